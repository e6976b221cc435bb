"""Losses over several ranks equal those of one process."""

import logging
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.batches_of_ranks import SCALE, D, K, own_part, whole_batch
from support.largest import LargestTensor
from support.ranks import processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from betaclip import BetaCALLoss, ClipLoss, SigLipLoss, backend_runs, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.kernels.similarity.operators import RowLayout, contrast_logsumexp, contrast_softplus
from betaclip.losses.across_ranks import TRANSPORTS, AcrossRanks, Call, Wanted, pieces, sum_over_ranks
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

SIZES = (3, 2, 0, 4)  # images per rank: unequal, and none
CALL = Call("BetaCALLoss", "ce", "ignore", False)
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def value_and_gradients(
    form: str, image: Tensor, text: Tensor, mask: Tensor | None = None, ragged: bool = False, **options: Any
) -> list[Tensor]:
    """The loss, and gradients of image and text embeddings, scale, β and bias (0 in the softmax form).

    ragged: of the valid rows alone, with the image of each.
    """
    leaves = [t.clone().requires_grad_() for t in (image, text)]
    scale, beta, bias = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (7.0, 0.5, -1.0))
    given: dict[str, Any] = {"mask": mask, "logit_bias": bias if form == "bce" else None}
    rows = leaves
    if ragged:
        assert mask is not None
        rows = [t[mask] for t in leaves]
        given |= {"mask": None, "image_index": torch.arange(len(mask))[:, None].expand_as(mask)[mask]}
    loss = BetaCALLoss(form, beta=beta, **{"gather": False, **options})(*rows, scale, **given)
    (3 * loss).backward()  # as a gradient scaler would
    return [loss.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (*leaves, scale, beta, bias))]


def compare(ours: list[Tensor], truth: list[Tensor], part: slice, case: str) -> None:
    """Own rows times 1 / W, and the mean over ranks of what all have: what DistributedDataParallel makes of them."""
    count = dist.get_world_size()
    shared = torch.stack(ours[3:])
    dist.all_reduce(shared)
    torch.testing.assert_close(ours[0], truth[0], atol=1e-12, rtol=0, msg=lambda m: f"{case}: loss: {m}")
    for name, a, t in (
        ("image", ours[1] / count, truth[1][part]),
        ("text", ours[2] / count, truth[2][part]),
        ("scale, beta, bias", shared / count, torch.stack(truth[3:])),
    ):
        torch.testing.assert_close(a, t, atol=1e-12, rtol=0, msg=lambda m, name=name: f"{case}: {name}: {m}")


def equals_one_process() -> None:
    sizes = SIZES[: dist.get_world_size()]
    image, text, mask = whole_batch(sizes)
    part = own_part(sizes)
    without_second = mask.clone()
    without_second[sizes[0] : sum(sizes[:2])] = False
    variants = [
        (padding, name, given, name == "ragged")
        for padding in ("ignore", "published")
        for name, given in (
            ("all", None), ("masked", mask), ("second rank without texts", without_second), ("ragged", mask)
        )
        if padding == "ignore" or name != "ragged"
    ]  # fmt: skip
    for form in ("ce", "bce"):
        for padding, name, given, ragged in variants:
            truth = value_and_gradients(form, image, text, given, ragged, padding=padding)
            for transport in TRANSPORTS:
                own = None if given is None else given[part]
                options = {"padding": padding, "gather": transport}
                ours = value_and_gradients(form, image[part], text[part], own, ragged, **options)
                compare(ours, truth, part, f"{form}, {padding}, {name}, {transport}")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equals_one_process(count, tmp_path):
    """Both forms, both ways to move, masked and ragged, unequal counts, a rank without images or without texts."""
    processes(count, equals_one_process, tmp_path)


def pieces_equal_one_piece() -> None:
    sizes = SIZES[:2]
    image, text, mask = whole_batch(sizes)
    part = own_part(sizes)
    rows = [t[part].flatten(0, 1).requires_grad_() for t in (image, text)]
    ids = torch.arange(sizes[dist.get_rank()], dtype=torch.int32).repeat_interleave(K)
    layout = RowLayout(sizes[dist.get_rank()], K, torch.where(mask[part].flatten(), ids, -1), None)

    def run(count: int) -> list[Tensor]:
        def backend() -> AcrossRanks:
            options = ProcessGroup.of(), Wanted(True, True), CALL, lambda *_: count
            return AcrossRanks("blockwise", "all_gather", *options)

        dims = (3, D)
        lse_x, lse_y, _ = contrast_logsumexp(*rows, SCALE, layout, SCALE.dtype, backend(), dims=dims)
        total, _ = contrast_softplus(*rows, SCALE, None, layout, SCALE.dtype, backend(), dims=dims)
        valid = layout.image_id >= 0
        loss = lse_x[:, valid].sin().sum() + lse_y[:, valid].cos().sum() + total
        return [lse_x, lse_y, total, *torch.autograd.grad(loss, rows)]

    whole = run(1)
    for count in (3, 5, 100):  # 12 rows: even pieces, uneven ones, rows
        for ours, truth in zip(run(count), whole, strict=True):
            torch.testing.assert_close(ours, truth, atol=1e-12, rtol=0)


def test_pieces_equal_one_piece(tmp_path):
    """Shards that the all-gather brings in pieces, as on GPUs. ``test_equals_one_process`` has the one piece."""
    processes(2, pieces_equal_one_piece, tmp_path)


def test_pieces():
    assert [pieces(8, rows, 1024 * rows, "cuda") for rows in (0, 100, 1024, 2304, 10**6)] == [1, 1, 2, 4, 8]
    assert [pieces(1024, rows, 1024 * rows, "cuda") for rows in (100, 1024, 2304)] == [1, 2, 4]
    assert pieces(1024, 2304, 2**30, "cpu") == 1


def other_inputs_equal_one_process() -> None:
    sizes = SIZES[:2]
    image, text, mask = whole_batch(sizes)
    part = own_part(sizes)
    scale = torch.tensor(5.0, dtype=torch.float64)
    for transport in TRANSPORTS:
        loss, of_all = BetaCALLoss(gather=transport), BetaCALLoss(gather=False)
        # Pair weights, of every rank its own.
        weights = torch.rand(sum(sizes), K, K, dtype=torch.float64)
        ours = loss(image[part], text[part], scale, pair_weights=weights[part])
        torch.testing.assert_close(ours, of_all(image, text, scale, pair_weights=weights))
        # Other pictures under the same text, of every rank its own; the second rank has none.
        negatives = torch.rand(sum(sizes), K, 3, dtype=torch.float64).requires_grad_()
        exists = (torch.rand(sum(sizes), K, 3) < 0.7) & (torch.arange(sum(sizes)) < sizes[0])[:, None, None]
        for form in ("ce", "bce"):
            options = {"form": form, "conditioned_weight": 0.5}
            given = {"conditioned_negatives": negatives, "conditioned_mask": exists}
            truth = BetaCALLoss(**options, gather=False)(image, text, scale, mask=mask, **given)
            (wanted,) = torch.autograd.grad(truth, negatives)
            given = {name: t[part] for name, t in given.items()}
            ours = BetaCALLoss(**options, gather=transport)(image[part], text[part], scale, mask=mask[part], **given)
            torch.testing.assert_close(ours, truth)
            (found,) = torch.autograd.grad(ours, negatives)
            torch.testing.assert_close(found[part] / 2, wanted[part])
            rows_equal_one_process(form, transport, image, text, mask, part)
            extra_texts_equal_one_process(form, transport, image, text, mask, part)
        # One text per image.
        first = ClipLoss(gather=transport)(image[part, 0], text[part, 0], scale)
        torch.testing.assert_close(first, ClipLoss(gather=False)(image[:, 0], text[:, 0], scale))
        first = SigLipLoss(gather=transport)(image[part, 0], text[part, 0], scale, -2.0)
        torch.testing.assert_close(first, SigLipLoss(gather=False)(image[:, 0], text[:, 0], scale, -2.0))
        # Float32, and products in bfloat16 under autocast.
        single = of_all(image.float(), text.float(), scale)
        torch.testing.assert_close(loss(image[part].float(), text[part].float(), scale), single)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = loss(image[part].float(), text[part].float(), scale)
        torch.testing.assert_close(rounded, single, atol=3e-2, rtol=0)
        # Nothing valid anywhere.
        nothing = torch.zeros_like(mask[part])
        leaf = image[part].clone().requires_grad_()
        value = loss(leaf, text[part], scale, mask=nothing)
        assert value.item() == 0 and not torch.autograd.grad(value, leaf)[0].any()
        with torch.no_grad():
            torch.testing.assert_close(loss(image[part], text[part], scale), of_all(image, text, scale))
        # No image anywhere.
        leaf = image[:0].clone().requires_grad_()
        value = loss(leaf, text[:0], scale)
        assert value.item() == 0 and torch.autograd.grad(value, leaf)[0].shape == leaf.shape
    # True is the default way.
    torch.testing.assert_close(BetaCALLoss(gather=True)(image[part], text[part], scale), of_all(image, text, scale))


def rows_equal_one_process(form: str, transport: str, image: Tensor, text: Tensor, mask: Tensor, part: slice) -> None:
    """Weights of texts, smoothed targets, rows with any incoming gradients of each rank's own, and several prefixes."""
    weights, incoming = (torch.rand(*mask.shape, dtype=torch.float64) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (image, text, SCALE)]
    for reduction, factor, dims in (("none", 1, None), ("mean", 2, None), ("mean", 2, {D: 1.0, 3: 0.5})):
        options = {"form": form, "reduction": reduction, "label_smoothing": 0.2 * (form == "ce"), "dims": dims}
        truth = BetaCALLoss(**options, gather=False)(*leaves, mask=mask, weights=weights)
        own = (leaves[0][part], leaves[1][part], leaves[2])
        ours = BetaCALLoss(**options, gather=transport)(*own, mask=mask[part], weights=weights[part])
        each = reduction == "none"
        wanted = torch.autograd.grad(truth, leaves, incoming if each else None)
        found = torch.autograd.grad(ours, leaves, incoming[part] if each else None)
        scale = found[2].clone()
        dist.all_reduce(scale)
        torch.testing.assert_close(ours, truth[part] if each else truth)
        for a, t in zip(
            (*(g[part] for g in found[:2]), scale), (*(g[part] for g in wanted[:2]), wanted[2]), strict=True
        ):
            torch.testing.assert_close(a / factor, t, atol=1e-12, rtol=0)


def extra_texts_equal_one_process(
    form: str, transport: str, image: Tensor, text: Tensor, mask: Tensor, part: slice
) -> None:
    """More of them than texts, none, some that are invalid; a bank without a gradient on one rank alone; equal texts
    on different ranks."""
    for counts in ((20, 3), (0, 5)):
        extra, valid = torch.randn(sum(counts), D, dtype=torch.float64), torch.rand(sum(counts)) < 0.7
        own = own_part(counts)
        leaves = [t.clone().requires_grad_() for t in (image, text, extra)]
        ids, extra_ids = (torch.randint(-1, 4, shape) * 2**40 for shape in (mask.shape, valid.shape))
        for smoothing, texts in ((0.2 * (form == "ce"), {}), (0.0, {"text_ids": ids, "extra_text_ids": extra_ids})):
            options = {"form": form, "label_smoothing": smoothing}
            loss = BetaCALLoss(**options, gather=False)
            truth = loss(*leaves[:2], SCALE, mask=mask, extra_texts=leaves[2], extra_mask=valid, **texts)
            wanted = torch.autograd.grad(truth, leaves)
            given = {"mask": mask[part], "extra_mask": valid[own]}
            given |= {name: t[part if name == "text_ids" else own] for name, t in texts.items()}
            bank = dist.get_rank() == 1
            shard = leaves[2][own].detach() if bank else leaves[2][own]
            loss = BetaCALLoss(**options, gather=transport)
            ours = loss(leaves[0][part], leaves[1][part], SCALE, extra_texts=shard, **given)
            found = torch.autograd.grad(ours, leaves[:2] if bank else leaves)
            torch.testing.assert_close(ours, truth)
            parts = (part, part, own)[: len(found)]
            for a, t, rows in zip(found, wanted, parts, strict=False):
                torch.testing.assert_close(a[rows] / 2, t[rows], atol=1e-12, rtol=0)


def test_other_inputs_equal_one_process(tmp_path):
    processes(2, other_inputs_equal_one_process, tmp_path)


def by_default_all_ranks() -> None:
    image, text, _ = whole_batch((2, 2))
    part, pair = own_part((2, 2)), (image[:, 0], text[:, 0], SCALE)
    own_pair = (image[part, 0], text[part, 0], SCALE)
    own, whole = (image[part], text[part], SCALE), (image, text, SCALE)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for loss in (beta_cal_ce_loss, beta_cal_bce_loss):
        torch.testing.assert_close(loss(*own), loss(*whole, gather=False))
        local = loss(*own, gather=False)
        assert (loss(*own) - local).abs() > 0.01
        torch.testing.assert_close(loss(*own, process_group=alone), local)
    for kind in (BetaCALLoss, ClipLoss, SigLipLoss):
        given, of_all = (own, whole) if kind is BetaCALLoss else (own_pair, pair)
        torch.testing.assert_close(kind()(*given), kind(gather=False)(*of_all))
        assert (kind()(*given) - kind(gather=False)(*given)).abs() > 0.01
    # "auto" chooses between the same backends as on one rank.
    os.environ["BETACLIP_BACKEND"] = "reference"
    before = backend_runs()
    beta_cal_ce_loss(*own)
    assert (backend_runs() - before).keys() == {("similarity_logsumexp", "reference")}


def test_by_default_all_ranks(tmp_path):
    processes(2, by_default_all_ranks, tmp_path)


def only_some_gradients() -> None:
    """One side wants gradients, on all ranks or on the first alone; the others have to help with those of texts."""
    sizes = SIZES[:2]
    image, text, _ = whole_batch(sizes)
    part, rank = own_part(sizes), dist.get_rank()
    for form in ("ce", "bce"):
        for transport in TRANSPORTS:
            for wanted in (0, 1):
                whole = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((image, text))]
                (truth,) = torch.autograd.grad(BetaCALLoss(form, gather=False)(*whole, SCALE), whole[wanted])
                for first_alone in (False, True):
                    wants = rank == 0 or not first_alone
                    own = [t[part].clone().requires_grad_(i == wanted and wants) for i, t in enumerate((image, text))]
                    scale = SCALE.clone().requires_grad_()
                    gradients = torch.autograd.grad(
                        BetaCALLoss(form, gather=transport)(*own, scale), [own[wanted], scale] if wants else scale
                    )
                    if wants:
                        torch.testing.assert_close(gradients[0] / 2, truth[part], atol=1e-12, rtol=0)


def test_only_some_gradients(tmp_path):
    processes(2, only_some_gradients, tmp_path)


def backward_again() -> None:
    """A second backward gathers the texts again, because the first has freed them."""
    sizes = SIZES[:2]
    image, text, _ = whole_batch(sizes)
    part = own_part(sizes)
    for transport in TRANSPORTS:
        leaves = [t[part].clone().requires_grad_() for t in (image, text)]
        loss = BetaCALLoss(gather=transport)(*leaves, SCALE)
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_again(tmp_path):
    processes(2, backward_again, tmp_path)


def test_compiled_sum_over_one_rank():
    terms, scale = (torch.randn(n, requires_grad=True) for n in (5, 1))

    def total(terms: Tensor, scale: Tensor) -> Tensor:
        return (scale * sum_over_ranks(terms, scale, SINGLE_PROCESS)).square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(terms, scale), (terms, scale)) for f in (compiled, total)))


def compiles_quietly() -> None:
    """The graph breaks where ranks communicate, without a warning."""
    image, text, mask = whole_batch((3,))
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    handler.addFilter(lambda record: record.name != "torch.utils.cpp_extension")  # a CUDA toolkit without a GPU
    logging.getLogger("torch").addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for loss, given, options in (
            (ClipLoss(gather=True), (image[:, 0], text[:, 0]), {}),
            (BetaCALLoss("bce", gather="ring"), (image, text), {"mask": mask}),
        ):
            leaves = [t.clone().requires_grad_() for t in given]
            compiled = torch.compile(loss, backend="eager")
            values = [call(*leaves, SCALE, **options) for call in (compiled, loss)]
            torch.testing.assert_close(*([v.detach(), *torch.autograd.grad(v, leaves)] for v in values))
    said = [*(record.getMessage() for record in records), *(str(warning.message) for warning in warned)]
    assert not said, said


def test_compiles_quietly(tmp_path):
    processes(1, compiles_quietly, tmp_path)


class Model(nn.Module):
    """Two towers and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, D), nn.Linear(5, D)
        self.logit_scale = nn.Parameter(torch.tensor([1.5]))  # fully_shard takes no scalars

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.logit_scale.exp()


def parallel_training_equals_one_process(wrapper: str) -> None:
    sizes = SIZES[:2]
    part = own_part(sizes)
    pictures, words = torch.randn(sum(sizes), K, 6).double(), torch.randn(sum(sizes), K, 5).double()
    model = Model().double()
    truth = torch.autograd.grad(BetaCALLoss(gather=False)(*model(pictures, words)), list(model.parameters()))
    for transport in TRANSPORTS:
        parallel = Model().double()
        parallel.load_state_dict(model.state_dict())
        if wrapper == "ddp":
            wrapped: nn.Module = DistributedDataParallel(parallel)
        else:
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(parallel, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        out = wrapped(pictures[part], words[part])
        scale = out[2].full_tensor() if hasattr(out[2], "full_tensor") else out[2]
        BetaCALLoss(gather=transport)(out[0], out[1], scale).backward()
        for (name, p), t in zip(wrapped.named_parameters(), truth, strict=True):
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            case = f"{wrapper}, {transport}: {name}"
            torch.testing.assert_close(gradient, t, atol=1e-12, rtol=0, msg=lambda m, case=case: f"{case}: {m}")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_parallel_training_equals_one_process(wrapper, tmp_path):
    """Parameters' gradients as DistributedDataParallel and fully_shard average them."""
    processes(2, parallel_training_equals_one_process, tmp_path, wrapper)


def cached_gradients_equal_one_process() -> None:
    """Encode without a graph, one loss over all embeddings, then backward chunk by chunk."""
    sizes = SIZES[:2]
    part = own_part(sizes)
    pictures, words = torch.randn(sum(sizes), K, 6).double(), torch.randn(sum(sizes), K, 5).double()
    model = Model().double()
    truth = torch.autograd.grad(BetaCALLoss(gather=False)(*model(pictures, words)), list(model.parameters()))
    with torch.no_grad():
        cache = [t.requires_grad_() for t in model(pictures[part], words[part])]
    BetaCALLoss(gather="ring")(*cache).backward()
    for i in range(sizes[dist.get_rank()]):
        chunk = slice(part.start + i, part.start + i + 1)
        image, text, scale = model(pictures[chunk], words[chunk])
        surrogate = (image * cache[0].grad[i : i + 1]).sum() + (text * cache[1].grad[i : i + 1]).sum()
        if i == 0:
            surrogate = surrogate + scale * cache[2].grad
        surrogate.backward()
    for p, t in zip(model.parameters(), truth, strict=True):
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad / 2, t, atol=1e-12, rtol=0)


def test_cached_gradients_equal_one_process(tmp_path):
    processes(2, cached_gradients_equal_one_process, tmp_path)


def groups_are_apart() -> None:
    """Ranks 1 and 3 are one batch, 0 and 2 another; the ring goes by the group's own order of ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    batches = [whole_batch((2, 2))[:2] for _ in groups]
    image, text = batches[rank % 2]
    part = slice(0, 2) if rank < 2 else slice(2, 4)
    scale = torch.tensor(4.0, dtype=torch.float64)
    for transport in TRANSPORTS:
        loss = BetaCALLoss(gather=transport, process_group=groups[rank % 2])
        torch.testing.assert_close(loss(image[part], text[part], scale), BetaCALLoss(gather=False)(image, text, scale))


def test_groups_are_apart(tmp_path):
    processes(4, groups_are_apart, tmp_path)


def mesh_is_a_group() -> None:
    image, text, _ = whole_batch((2, 2))
    part = own_part((2, 2))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))
    ours = BetaCALLoss(gather=True, process_group=mesh["data"])(image[part], text[part], SCALE)
    torch.testing.assert_close(ours, BetaCALLoss(gather=False)(image, text, SCALE))
    with pytest.raises(ValueError, match="process_group: expected a DeviceMesh of one dimension, got 2"):
        BetaCALLoss(gather=True, process_group=mesh)(image[part], text[part], SCALE)
    alone = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="process_group: expected one that this rank is in"):
            BetaCALLoss(gather=True, process_group=alone)(image[part], text[part], SCALE)


def test_mesh_is_a_group(tmp_path):
    processes(2, mesh_is_a_group, tmp_path)


def extreme_logits() -> None:
    """Columns whose logits with the two ranks' rows are +100 and -100: no one number is near both ranks' sums."""
    toward = torch.zeros(D)
    toward[0] = 1
    image = torch.stack((toward, -toward)).repeat_interleave(2, 0)[:, None].expand(4, K, D) + 0.01 * torch.randn(
        4, K, D
    )
    text = toward + 0.01 * torch.randn(4, K, D)
    part = own_part((2, 2))
    for form in ("ce", "bce"):
        truth = value_and_gradients_in_float32(form, image, text)
        for transport in TRANSPORTS:
            ours = value_and_gradients_in_float32(form, image[part], text[part], gather=transport)
            torch.testing.assert_close(ours[0], truth[0])
            for a, t in zip(ours[1:], truth[1:], strict=True):
                torch.testing.assert_close(a / 2, t[part], atol=float(1e-4 * t.abs().max()), rtol=0)


def value_and_gradients_in_float32(form: str, image: Tensor, text: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (image, text)]
    loss = BetaCALLoss(form, **{"gather": False, **options})(*leaves, torch.tensor(100.0))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_extreme_logits(tmp_path):
    processes(2, extreme_logits, tmp_path)


def order_of_ranks_does_not_matter() -> None:
    image, text, _ = whole_batch((2, 2, 2))
    scale = torch.tensor(20.0)
    values = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        place = order[dist.get_rank()]
        part = slice(2 * place, 2 * place + 2)
        for transport in TRANSPORTS:
            values.append(BetaCALLoss(gather=transport)(image[part].float(), text[part].float(), scale))
    torch.testing.assert_close(torch.stack(values), values[0].expand(len(values)), atol=1e-6, rtol=0)


def test_order_of_ranks_does_not_matter(tmp_path):
    processes(3, order_of_ranks_does_not_matter, tmp_path)


def ring_holds_shards() -> None:
    """No tensor has the size of all ranks' embeddings, or of a multiple of this rank's that grows with the ranks."""
    rows, wide = 600, 2048  # a chunk of the scratch for images is smaller
    image, text = (torch.randn(rows, 1, wide, requires_grad=True) for _ in range(2))
    largest = {}
    for transport in TRANSPORTS:
        with LargestTensor() as seen:
            BetaCALLoss(gather=transport, backend="reference")(image, text, torch.tensor(5.0)).backward()
        largest[transport] = seen.numel
    assert largest["ring"] <= 2 * rows * wide < 4 * rows * wide <= largest["all_gather"], largest


def test_ring_holds_shards(tmp_path):
    processes(4, ring_holds_shards, tmp_path)
