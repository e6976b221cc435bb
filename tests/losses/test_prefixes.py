"""Losses of several prefixes in one pass: against the sum of separate losses of embeddings that are cut."""

from typing import Any

import pytest
import torch
from support.beta_cal import DEVICE, FORMS, B, D, K, assert_equal, batch, gradients, ragged
from support.largest import LargestTensor
from support.precision import widest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from betaclip import BetaCALLoss, ClipLoss, SigLipLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.losses.prefixes import Prefixes

BACKENDS = ["triton", "blockwise", "reference"]
DIMS = {4: 0.5, 7: 0.75, 5: 0.25}  # in any order, none of them D


def separate(loss: Any, dims: dict[int, float], image: Tensor, text: Tensor, *args: Any, **given: Any) -> Tensor:
    """The sum of the losses of cut embeddings; conditioned negatives are in that of the longest."""
    total = 0
    for dim, weight in dims.items():
        cut = dict(given)
        if "extra_texts" in given:
            cut["extra_texts"] = given["extra_texts"][:, :dim]
        if dim < max(dims):
            cut.pop("conditioned_negatives", None)
        total = total + weight * loss(image[..., :dim], text[..., :dim], *args, **cut)
    return total


@pytest.mark.parametrize("others", ["none", "masked", "texts"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_sum_of_separate_losses(backend, form, others):
    b = batch(widest(backend))
    extra = torch.randn(7, D, dtype=widest(backend), device=DEVICE, requires_grad=True)
    given: dict[str, Any] = {"logit_bias": b.bias}
    if others != "none":
        given |= {"mask": b.mask, "weights": b.weights}
    if others == "texts":
        given |= {"text_ids": torch.randint(-1, 5, (B, K), device=DEVICE), "extra_texts": extra}
    leaves = [*b.leaves, extra]
    for reduction in ("mean", "none"):
        options = {"form": form, "beta": 0.4, "reduction": reduction}
        options |= {"label_smoothing": 0.2 * (form == "ce" and others != "texts")}
        ours = BetaCALLoss(**options, backend=backend, dims=DIMS)(b.image, b.text, b.scale, **given)
        truth = separate(BetaCALLoss(**options, backend="reference"), DIMS, b.image, b.text, b.scale, **given)
        incoming = torch.rand_like(truth)
        assert_equal(gradients(ours, leaves, incoming), gradients(truth, leaves, incoming))


@pytest.mark.parametrize("form", FORMS)
def test_small_blocks(form):
    """Several blocks of rows and columns, padded rows among them, and gradients of one side alone."""
    b, small = batch(), Blockwise(4, 6, 2)
    for needed in (b.leaves, b.leaves[:1], b.leaves[1:2], b.leaves[2:3]):
        given = [t if any(t is leaf for leaf in needed) else t.detach() for t in b.leaves]
        ours = BetaCALLoss(form, backend=small, dims=DIMS)(*given[:3], logit_bias=given[3], mask=b.mask)
        truth = separate(BetaCALLoss(form), DIMS, *given[:3], logit_bias=given[3], mask=b.mask)
        assert_equal(gradients(ours, needed), gradients(truth, needed))


@pytest.mark.parametrize("scale", [0.0, 30.0, 300.0, -300.0])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_logits(form, scale):
    """Statistics that no single shift serves, in float32, and logits that do not depend on the embeddings."""
    b = batch()
    image, text = (t.detach().float().requires_grad_() for t in (b.image, b.text))
    exact = [t.detach().double().requires_grad_() for t in (image, text)]
    ours = BetaCALLoss(form, backend=Blockwise(4, 6, 2), dims=DIMS)(image, text, scale, logit_bias=-1.0)
    truth = separate(BetaCALLoss(form, backend="reference"), DIMS, *exact, scale, logit_bias=-1.0)
    for a, t in zip(gradients(ours, [image, text]), gradients(truth, exact), strict=True):
        torch.testing.assert_close(a.double(), t, rtol=0, atol=3e-6 * max(t.abs().max().item(), 1e-3))


@pytest.mark.parametrize("backend", ["cuda", *BACKENDS])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form, backend, request):
    """Triton's one pass rounds dS of each prefix once more, to sum it."""
    if backend == "cuda":
        request.getfixturevalue("cuda")
    b = batch()
    image, text = (t.detach().bfloat16().requires_grad_() for t in (b.image, b.text))
    exact = [t.detach().double().requires_grad_() for t in (image, text)]
    ours = BetaCALLoss(form, backend=backend, dims=DIMS)(image, text, 10.0, logit_bias=-1.0)
    truth = separate(BetaCALLoss(form), DIMS, *exact, 10.0, logit_bias=-1.0)
    # The kernels multiply rows and gradients of logits that are rounded to bfloat16, with one prefix as with several.
    allowed = 8e-3 if backend in ("cuda", "triton") else 4e-3
    for a, t in zip(gradients(ours, [image, text]), gradients(truth, exact), strict=True):
        assert (a.double() - t).norm() <= allowed * t.norm()


@pytest.mark.parametrize("form", FORMS)
def test_conditioned_negatives_join_the_longest_prefix(form):
    b = batch()
    cosines = (2 * torch.rand(B, K, 2, dtype=torch.float64, device=DEVICE) - 1).requires_grad_()
    given = {"logit_bias": b.bias, "mask": b.mask, "conditioned_negatives": cosines}
    for reduction in ("mean", "none"):
        options = {"form": form, "reduction": reduction, "conditioned_weight": 0.3}
        ours = BetaCALLoss(**options, dims=DIMS)(b.image, b.text, b.scale, **given)
        truth = separate(BetaCALLoss(**options), DIMS, b.image, b.text, b.scale, **given)
        incoming = torch.rand_like(truth)
        leaves = [*b.leaves, cosines]
        assert_equal(gradients(ours, leaves, incoming), gradients(truth, leaves, incoming))


@pytest.mark.parametrize("form", FORMS)
def test_ragged_equals_masked(form):
    b, loss = batch(), BetaCALLoss(form, dims=DIMS)
    masked = loss(b.image, b.text, b.scale, mask=b.mask)
    assert_equal(gradients(loss(**ragged(b), logit_scale=b.scale), b.leaves), gradients(masked, b.leaves))


@pytest.mark.parametrize("form", FORMS)
def test_published_padding(form):
    b, options = batch(), {"form": form, "padding": "published"}
    ours = BetaCALLoss(**options, dims=DIMS)(b.image, b.text, b.scale, mask=b.mask)
    truth = separate(BetaCALLoss(**options), DIMS, b.image, b.text, b.scale, mask=b.mask)
    assert_equal(gradients(ours, b.leaves), gradients(truth, b.leaves))


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
def test_one_text_per_image(kind):
    b = batch()
    bias = (b.bias,) if kind is SigLipLoss else ()
    ours = kind(dims=(D, 3))(b.image[:, 0], b.text[:, 0], b.scale, *bias)
    truth = separate(kind(), {D: 1.0, 3: 1.0}, b.image[:, 0], b.text[:, 0], b.scale, *bias)
    assert_equal(gradients(ours, b.leaves), gradients(truth, b.leaves))


@pytest.mark.parametrize("function", [beta_cal_ce_loss, beta_cal_bce_loss])
def test_one_prefix(function):
    b = batch()
    plain = function(b.image, b.text, b.scale)
    assert torch.equal(function(b.image, b.text, b.scale, dims=[D]), plain)
    half = function(b.image, b.text, b.scale, dims={5: 0.5})
    torch.testing.assert_close(half, function(b.image[..., :5], b.text[..., :5], b.scale) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_prefix_without_direction(form, backend):
    """It counts as zero, as a zero row does; padded rows may hold anything."""
    b = batch(widest(backend))
    image = b.image.detach().clone()
    image[0, 1, :4] = 0
    image[2, 0] = 0
    image[~b.mask] = torch.nan
    image.requires_grad_()
    ours = BetaCALLoss(form, backend=backend, dims=DIMS)(image, b.text, b.scale, mask=b.mask)
    truth = separate(BetaCALLoss(form), DIMS, image, b.text, b.scale, mask=b.mask)
    leaves = [image, *b.leaves[1:3]]
    assert_equal(gradients(ours, leaves), gradients(truth, leaves))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    b = batch()
    image, text = (t.detach()[:3, :2, :4].clone().requires_grad_() for t in (b.image, b.text))
    loss = BetaCALLoss(form, reduction="none", dims=(4, 1, 2))
    assert torch.autograd.gradcheck(
        lambda image, text, scale, bias: loss(image, text, scale, logit_bias=bias),
        (image, text, *(t.detach().requires_grad_() for t in (b.scale, b.bias))),
        fast_mode=True,
    )


@pytest.mark.parametrize("form", FORMS)
def test_compile(form):
    b, loss = batch(), BetaCALLoss(form, dims=DIMS)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    values = [f(b.image, b.text, b.scale, mask=b.mask, weights=b.weights) for f in (compiled, loss)]
    assert_equal(*(gradients(value, b.leaves) for value in values))


def product_flop(total, a, b, **_) -> int:
    """FLOP of a product that is added in place, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("form, keep, flop", [("ce", 0, 8 * D), ("ce", 2**20, 6 * D + 2 * 5), ("bce", 0, 6 * D)])
def test_products_are_those_of_the_longest_prefix(form, keep, flop):
    """With kept exponentials, which are those of the longest prefix, only the shorter ones are formed again."""
    b = batch()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flop}) as counter:
        BetaCALLoss(form, backend=Blockwise(), keep=keep, dims=(D, 5, 2))(b.image, b.text, b.scale).backward()
    # Within images the cosines, those of the shorter prefixes again, and both gradients.
    within = 2 * B * K * K * (D + 5 + 2 * D)
    assert counter.get_total_flops() == flop * (B * K) ** 2 + within


def test_kept_exponentials_change_no_bit():
    b = batch()
    kept = [
        gradients(
            BetaCALLoss(backend=Blockwise(4, 6), keep=keep, dims=DIMS)(b.image, b.text, b.scale, mask=b.mask), b.leaves
        )
        for keep in (0, 300, 2**20)  # none, some of nine blocks, all
    ]
    for a, b, c in zip(*kept, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_memory_is_linear():
    image, text = (torch.randn(400, 8, requires_grad=True) for _ in range(2))
    with LargestTensor() as seen:
        ClipLoss(backend=Blockwise(32, 64), keep=0, dims=(8, 4, 2))(image, text, 10.0).backward()
    assert seen.numel <= 5 * image.numel() <= image.shape[0] ** 2 / 10


def test_rejects():
    b = batch()
    for dims, message in (
        ((), r"dims: expected different lengths of at least 1, or a mapping .*, got \(\)"),
        ((4, 4), r"got \(4, 4\)"),
        ((4, 0), r"got \(4, 0\)"),
        ((4.0, 2), r"got \(4\.0, 2\)"),
        (4, "got 4"),
        ({4: -1.0}, r"dims: expected finite weights of at least 0, got \{4: -1\.0\}"),
        ({4: "1"}, r"got \{4: '1'\}"),
    ):
        for make in (lambda dims=dims: BetaCALLoss(dims=dims), lambda dims=dims: SigLipLoss(dims=dims)):
            with pytest.raises(ValueError, match=message):
                make()
    with pytest.raises(ValueError, match=r"dims: expected lengths of at most D = 8, got 9"):
        beta_cal_ce_loss(b.image, b.text, b.scale, dims=(9, 2))


def test_prefixes():
    assert Prefixes.of(None) == Prefixes((), (1.0,))
    assert Prefixes.of([3, 8, 5]) == Prefixes((3, 5, 8), (1.0, 1.0, 1.0))
    assert Prefixes.of({8: 1, 3: 0.5}) == Prefixes((3, 8), (0.5, 1.0))
    assert Prefixes.of((3,)).contrasted == ()
