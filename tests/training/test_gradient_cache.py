from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip import BetaCALLoss
from betaclip.training.gradient_cache import cached_backward

IMAGES, K, D = 7, 3, 8


class Model(nn.Module):
    """Towers with dropout, a scale that no micro-batch changes, and a mask without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.GELU(), nn.Linear(16, D))
        self.text = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, D))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(2, 2)
        self.unused.requires_grad_(False)

    def forward(self, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        image, text = micro_batch
        return {
            "image": self.image(image),
            "text": self.text(text),
            "mask": image[..., 0] > -1,
            "scale": self.log_scale.exp(),
            "unused": self.unused(image[..., :2]),
        }


def objective(out: dict[str, Tensor]) -> Tensor:
    torch.rand(3)  # a loss may draw too
    return BetaCALLoss()(out["image"], out["text"], out["scale"], mask=out["mask"])


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(IMAGES, K, 5, dtype=dtype), torch.randn(IMAGES, K, 6, dtype=dtype)


def split(whole: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(whole[0].split(sizes), whole[1].split(sizes), strict=True))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


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
