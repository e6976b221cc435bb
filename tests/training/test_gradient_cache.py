from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.caching import IMAGES, Model, batch, gradients, objective, split
from support.ranks import needs_gloo, processes
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from betaclip import BetaCALLoss
from betaclip.process_group import ProcessGroup
from betaclip.training.gradient_cache import cached_backward


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 2, 0, 4], [1] * 7, [7, 0]])
def test_equals_uncached(sizes):
    """Dropout included: the whole batch in one graph, micro-batch after micro-batch, has the same random numbers."""
    model, micro_batches = Model().double(), split(batch(), sizes)
    torch.manual_seed(3)
    outs = [model(micro_batch) for micro_batch in micro_batches]
    whole = {name: torch.cat([o[name] for o in outs]) for name in ("image", "text", "mask")}
    value = objective(whole | {"scale": outs[0]["scale"]})
    value.backward()
    truth, state = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(3)
    ours = cached_backward(model, micro_batches, objective)
    torch.testing.assert_close(ours, value, atol=1e-14, rtol=0)
    assert not ours.requires_grad and len(truth) == 9
    for a, t in zip(gradients(model), truth, strict=True):
        torch.testing.assert_close(a, t, atol=1e-13, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_keeps_the_graph_of_one_micro_batch():
    """Activations that autograd keeps at a time are a micro-batch's, not the batch's."""
    model, whole = Model().double(), batch()
    saved = 0
    most = {}
    for count, sizes in (("one", [IMAGES]), ("many", [1] * IMAGES)):
        largest = 0

        def count_bytes(t: Tensor) -> Tensor:
            nonlocal saved, largest
            saved += t.numel()
            largest = max(largest, saved)
            return t

        def forward(micro_batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            nonlocal saved
            saved = 0
            with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda t: t):
                return model(micro_batch)

        cached_backward(forward, split(whole, sizes), objective)
        most[count] = largest
    assert most["many"] < most["one"] / 3


def test_autocast():
    """Weights that autocast casts in the first pass, which has no graph, still get gradients in the second."""
    model, micro_batches = Model(), split(batch(torch.float32), [3, 4])
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        cached_backward(model, micro_batches, objective)
    ours = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        objective(model(whole_batch(micro_batches))).backward()
    for a, t in zip(ours, gradients(model), strict=True):
        torch.testing.assert_close(a, t, atol=float(0.05 * t.abs().max()), rtol=0)


def whole_batch(micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([c[0] for c in micro_batches]), torch.cat([c[1] for c in micro_batches])


def test_other_outputs():
    """Outputs that the loss leaves out, and rows of any shape: not only a BetaCLIP's."""
    layer = nn.Linear(4, 2).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def forward(micro_batch: Tensor) -> dict[str, Tensor]:
        return {"rows": layer(micro_batch), "ignored": layer.weight.sum() * micro_batch}

    cached_backward(forward, x.split(2), lambda out: F.logsigmoid(out["rows"]).std())
    ours = gradients(layer)
    layer.zero_grad()
    F.logsigmoid(layer(x)).std().backward()
    for a, t in zip(ours, gradients(layer), strict=True):
        torch.testing.assert_close(a, t)


def test_rejects():
    with pytest.raises(ValueError, match="micro_batches: expected at least one"):
        cached_backward(partial(Model()), [], objective)


def ranks_equal_one_process() -> None:
    group = ProcessGroup.of()
    whole = batch()
    torch.manual_seed(1)
    model = Model().double().eval()
    other = Model().double().eval()
    other.load_state_dict(model.state_dict())
    objective(model(whole)).backward()
    wrapped = DistributedDataParallel(other)
    image, text = (t[:5] if group.is_first else t[5:] for t in whole)
    reduced = []

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    def loss(out: dict[str, Tensor]) -> Tensor:
        return BetaCALLoss(gather=True)(out["image"], out["text"], out["scale"], mask=out["mask"])

    wrapped.register_comm_hook(None, count)
    micro_batches = split((image, text), [[2, 1, 2], [1, 0, 1]][group.rank])
    cached_backward(wrapped, micro_batches, loss, no_sync=wrapped.no_sync)
    assert reduced == [0]
    for a, t in zip(gradients(other), gradients(model), strict=True):
        torch.testing.assert_close(a, t, atol=1e-13, rtol=0)


@needs_gloo
def test_ranks_equal_one_process(tmp_path):
    """DistributedDataParallel reduces once, after the last micro-batch, and the loss spans both ranks."""
    processes(2, ranks_equal_one_process, tmp_path)
