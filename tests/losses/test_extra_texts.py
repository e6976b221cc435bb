"""Extra texts as negatives: against the docstrings' formulas. Several ranks are in test_across_ranks."""

import pytest
import torch
from support.beta_cal import DEVICE, FORMS, B, D, K, assert_equal, batch, dense_rows, gradients, ragged
from support.largest import LargestTensor
from support.precision import widest
from support.similarity import product_flop
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from betaclip import BetaCALLoss, ClipLoss, SigLipLoss, beta_cal_ce_loss
from betaclip.kernels.similarity.blockwise import Blockwise

E = 7
BACKENDS = ["triton", "blockwise", "reference"]


def extra_texts(count: int = E, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, D, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_dense_formula(backend, form, masked):
    b, extra = batch(widest(backend)), extra_texts(dtype=widest(backend))
    mask = b.mask if masked else None
    loss = BetaCALLoss(form, beta=0.4, backend=backend)
    ours = loss(b.image, b.text, b.scale, logit_bias=b.bias, mask=mask, extra_texts=extra)
    rows = dense_rows(form, *b.leaves, mask=mask, extra=extra)
    truth = rows.sum() / (b.mask.sum() if masked else b.mask.numel())
    leaves = [*b.leaves, extra]
    assert_equal(gradients(ours, leaves), gradients(truth, leaves))


@pytest.mark.parametrize("form", FORMS)
def test_with_weights_rows_and_smoothed_targets(form):
    b, extra = batch(), extra_texts()
    leaves, smoothing = [*b.leaves, extra], 0.2 * (form == "ce")
    given = {"logit_bias": b.bias, "mask": b.mask, "weights": b.weights, "extra_texts": extra}
    for reduction in ("none", "mean"):
        loss = BetaCALLoss(form, beta=0.4, reduction=reduction, label_smoothing=smoothing)
        ours = loss(b.image, b.text, b.scale, **given)
        truth = b.weights * dense_rows(form, *b.leaves, mask=b.mask, extra=extra, smoothing=smoothing)
        if reduction == "mean":
            truth = truth.sum() / (b.weights * b.mask).sum()
        incoming = torch.rand_like(truth)
        assert_equal(gradients(ours, leaves, incoming), gradients(truth, leaves, incoming))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_ones_take_part_in_nothing(backend, form):
    b, extra = batch(widest(backend)), extra_texts(dtype=widest(backend))
    valid = torch.arange(E, device=DEVICE) % 3 > 0
    poisoned = extra.detach().masked_fill(~valid[:, None], torch.nan).requires_grad_()
    options = {"form": form, "label_smoothing": 0.2 * (form == "ce")}
    truth = BetaCALLoss(**options)(b.image, b.text, b.scale, extra_texts=extra[valid])
    ours = BetaCALLoss(**options, backend=backend)(b.image, b.text, b.scale, extra_texts=poisoned, extra_mask=valid)
    torch.testing.assert_close(ours, truth)
    (gradient,) = torch.autograd.grad(ours, poisoned)
    assert gradient.isfinite().all() and not gradient[~valid].any() and gradient[valid].any(1).all()


@pytest.mark.parametrize("form", FORMS)
def test_none_is_the_plain_loss(form):
    b, loss = batch(), BetaCALLoss(form)
    plain = gradients(loss(b.image, b.text, b.scale, mask=b.mask), b.leaves)
    for extra, mask in ((extra_texts(0), None), (extra_texts(), torch.zeros(E, dtype=torch.bool, device=DEVICE))):
        value = loss(b.image, b.text, b.scale, mask=b.mask, extra_texts=extra, extra_mask=mask)
        assert_equal(gradients(value, b.leaves, torch.ones_like(value)), plain)


@pytest.mark.parametrize("form", FORMS)
def test_one_image_has_only_extra_negatives(form):
    b, extra = batch(), extra_texts()
    one = b.image[:1], b.text[:1], b.scale
    truth = dense_rows(form, *one, b.bias, beta=0.5, extra=extra).mean()
    ours = BetaCALLoss(form)(*one, logit_bias=b.bias, extra_texts=extra)
    assert_equal(gradients(ours, [*b.leaves, extra]), gradients(truth, [*b.leaves, extra]))


@pytest.mark.parametrize("form", FORMS)
def test_ragged_equals_masked(form):
    b, extra = batch(), extra_texts()
    loss, leaves = BetaCALLoss(form), [*b.leaves, extra]
    masked = loss(b.image, b.text, b.scale, mask=b.mask, extra_texts=extra)
    rows = loss(**ragged(b), logit_scale=b.scale, extra_texts=extra)
    assert_equal(gradients(rows, leaves), gradients(masked, leaves))


def test_published_padding():
    """Padded texts of the batch are negatives as well; extra texts are beside them."""
    b, extra = batch(), extra_texts()
    with_extra, without = (
        BetaCALLoss(padding="published", reduction="none")(b.image, b.text, b.scale, mask=b.mask, extra_texts=given)
        for given in (extra, None)
    )
    assert (with_extra > without)[b.mask].all() and not with_extra[~b.mask].any()


@pytest.mark.parametrize("form", FORMS)
def test_one_text_per_image(form):
    b, extra = batch(), extra_texts()
    image, text = b.image[:, 0], b.text[:, 0]
    truth = dense_rows(form, b.image[:, :1], b.text[:, :1], b.scale, b.bias, divisor="rows", extra=extra).mean()
    if form == "ce":
        ours = ClipLoss()(image, text, b.scale, extra_texts=extra)
    else:
        ours = SigLipLoss()(image, text, b.scale, b.bias, extra_texts=extra)
    assert_equal([ours], [truth])


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    b, extra = batch(), extra_texts(2)
    image, text, extra = (
        t.detach()[..., :4].clone().requires_grad_() for t in (b.image[:3, :2], b.text[:3, :2], extra)
    )
    loss = BetaCALLoss(form, reduction="none")
    assert torch.autograd.gradcheck(
        lambda image, text, scale, bias, extra: loss(image, text, scale, logit_bias=bias, extra_texts=extra),
        (image, text, *(t.detach().requires_grad_() for t in (b.scale, b.bias)), extra),
        fast_mode=True,
    )


@pytest.mark.parametrize("form, keep, flop", [("ce", 0, 8), ("ce", 10**6, 6), ("bce", "auto", 6)])
def test_costs_as_many_products_as_columns(form, keep, flop):
    """8 N E D FLOP in the softmax form, 6 with kept exponentials and in the sigmoid form; 2 less if the extra texts
    want no gradient."""
    b, loss = batch(), BetaCALLoss(form, backend=Blockwise(), keep=keep)
    counted = {}
    for name, extra in (("none", None), ("learned", extra_texts()), ("bank", extra_texts().detach())):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flop}) as counter:
            loss(b.image, b.text, b.scale, extra_texts=extra).backward()
        counted[name] = counter.get_total_flops()
    pairs = B * K * E * D
    assert counted["learned"] - counted["none"] == flop * pairs
    assert counted["bank"] - counted["none"] == (flop - 2) * pairs


def test_memory_is_linear():
    image, text, extra = (torch.randn(n, 4) for n in (1100, 1100, 2000))
    with LargestTensor() as seen:
        ClipLoss(backend=Blockwise(64, 64), keep=0)(image.requires_grad_(), text, 10.0, extra_texts=extra).backward()
    assert seen.numel <= 5 * extra.numel() < image.shape[0] * extra.shape[0] / 50


def test_compile():
    b, extra, loss = batch(), extra_texts(), BetaCALLoss()
    values = [
        f(b.image, b.text, b.scale, extra_texts=extra)
        for f in (torch.compile(loss, fullgraph=True, backend="eager"), loss)
    ]
    assert_equal(*(gradients(value, [*b.leaves, extra]) for value in values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_cuda_matches_dense_formula(form, dtype, cuda):
    b, extra = batch(), extra_texts()
    leaves = [t.detach().to(dtype).requires_grad_() for t in (b.image, b.text, extra)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ours = BetaCALLoss(form, beta=0.4, backend="cuda")(
        *leaves[:2], b.scale.detach().float(), logit_bias=b.bias.detach().float(), extra_texts=leaves[2]
    )
    truth = dense_rows(form, *exact[:2], b.scale.detach(), b.bias.detach(), extra=exact[2]).mean()
    for a, t in zip(gradients(ours, leaves), gradients(truth, exact), strict=True):
        assert (a.double() - t).norm() <= 0.02 * t.norm()


def test_rejects():
    b = batch()
    one = torch.ones(E, D, device=DEVICE)
    for extra, mask, message in (
        (torch.ones(E, D + 1), None, r"extra_texts: expected \(E, 8\), D as in image_embeds, got shape \(7, 9\)"),
        (torch.ones(E, D).long(), None, "extra_texts: expected float16, bfloat16, float32 or float64, got torch.int64"),
        ([1.0], None, "extra_texts: expected a tensor, got list"),
        (
            one,
            torch.ones(E, device=DEVICE),
            r"extra_mask: expected dtype torch.bool \(True = valid\), got torch.float32",
        ),
        (one, one[:3, 0] > 0, r"extra_mask: expected shape \(7,\) as extra_texts, got \(3,\)"),
        (None, torch.ones(3) > 0, "extra_mask: expected extra_texts with it, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            beta_cal_ce_loss(b.image, b.text, b.scale, extra_texts=extra, extra_mask=mask)
