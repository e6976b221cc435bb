"""Rows of the losses, their weights and smoothed targets: against the docstrings' formulas.

test_beta_cal has the losses without options, test_across_ranks several ranks.
"""

import pytest
import torch
import torch.nn.functional as F
from support.beta_cal import DEVICE, FORMS, K, assert_equal, batch, dense_rows, gradients, ragged
from support.precision import widest

from betaclip import BetaCALLoss, ClipLoss, SigLipLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.kernels.similarity.blockwise import Blockwise

LOSSES = {"ce": beta_cal_ce_loss, "bce": beta_cal_bce_loss}
BACKENDS = ["triton", "blockwise", "reference"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_any_incoming_gradient(backend, form, masked):
    b = batch(widest(backend))
    mask = b.mask if masked else None
    incoming = torch.randn_like(b.weights)
    loss = BetaCALLoss(form, beta=0.4, backend=backend, reduction="none")
    ours = loss(b.image, b.text, b.scale, logit_bias=b.bias, mask=mask)
    truth = dense_rows(form, *b.leaves, mask=mask)
    assert_equal(gradients(ours, b.leaves, incoming), gradients(truth, b.leaves, incoming))


@pytest.mark.parametrize("divisor", ["pairs", "rows"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_mean_is_that_of_the_rows(form, weighted, divisor):
    b = batch()
    if form == "ce" and divisor == "rows":
        pytest.skip("the softmax form is a mean over rows")
    weights = b.weights if weighted else torch.ones_like(b.weights)
    options = {"mask": b.mask, "logit_bias": b.bias, "weights": b.weights if weighted else None}
    loss = BetaCALLoss(form, beta=0.4, divisor=divisor)(b.image, b.text, b.scale, **options)
    rows = dense_rows(form, *b.leaves, mask=b.mask, divisor=divisor)
    truth = (weights * rows).sum() / (weights * b.mask).sum()
    assert_equal(gradients(loss, b.leaves), gradients(truth, b.leaves))
    ours = BetaCALLoss(form, beta=0.4, divisor=divisor, reduction="none")(b.image, b.text, b.scale, **options)
    torch.testing.assert_close(ours, weights * rows)


@pytest.mark.parametrize("form", FORMS)
def test_ragged_equals_masked(form):
    b = batch()
    masked = {"mask": b.mask, "weights": b.weights}
    for reduction in ("none", "mean"):
        loss = BetaCALLoss(form, reduction=reduction, label_smoothing=0.2 * (form == "ce"))
        truth = loss(b.image, b.text, b.scale, **masked)
        truth = truth[b.mask] if reduction == "none" else truth
        incoming = torch.randn_like(truth)
        ours = gradients(loss(**ragged(b, weights=b.weights), logit_scale=b.scale), b.leaves, incoming)
        assert_equal(ours, gradients(truth, b.leaves, incoming))


@pytest.mark.parametrize("form", FORMS)
def test_published_padding_counts_padded_rows(form):
    b = batch()
    given = {"mask": b.mask, "weights": torch.ones_like(b.weights)}
    mean, rows = (
        BetaCALLoss(form, padding="published", reduction=reduction)(b.image, b.text, b.scale, **given)
        for reduction in ("mean", "none")
    )
    unweighted = BetaCALLoss(form, padding="published")(b.image, b.text, b.scale, mask=b.mask)
    torch.testing.assert_close(mean, unweighted)
    torch.testing.assert_close(rows.sum() / (b.mask.sum() if form == "ce" else b.mask.numel()), unweighted)
    assert not rows[~b.mask].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(smoothing, masked):
    b = batch()
    mask = b.mask if masked else None
    count = b.mask.sum() if masked else b.mask.numel()
    loss = BetaCALLoss(beta=0.4, label_smoothing=smoothing)(b.image, b.text, b.scale, mask=mask)
    truth = dense_rows("ce", *b.leaves, mask=mask, smoothing=smoothing).sum() / count
    assert_equal(gradients(loss, b.leaves), gradients(truth, b.leaves))


def test_label_smoothing_of_the_published_padding():
    """Padded texts stay in the denominators, and are among the texts that share the smoothed part of a target."""
    b = batch()
    v, t = (F.normalize(embeds, dim=-1).flatten(0, 1) for embeds in (b.image, b.text))
    w = (
        torch.block_diag(*[0.5 + 0.5 * torch.eye(K, dtype=torch.float64, device=DEVICE)] * len(b.mask))
        * b.mask.flatten()
    )
    kept, s = b.mask.flatten(), b.scale * v @ t.T
    target = w[kept] / w[kept].sum(1, keepdim=True)
    truth = sum(F.cross_entropy(logits[kept], target, label_smoothing=0.3) for logits in (s, s.T)) / 2
    loss = BetaCALLoss(padding="published", label_smoothing=0.3)(b.image, b.text, b.scale, mask=b.mask)
    assert_equal(gradients(loss, b.leaves), gradients(truth, b.leaves))


@pytest.mark.parametrize("form", FORMS)
def test_one_text_per_image(form):
    b = batch()
    image, text, weights = b.image[:, 0], b.text[:, 0], b.weights[:, 0]
    rows = dense_rows(form, b.image[:, :1], b.text[:, :1], b.scale, b.bias, divisor="rows", smoothing=0.1)[:, 0]
    if form == "ce":
        given, options = (image, text, b.scale), {"label_smoothing": 0.1}
    else:
        given, options = (image, text, b.scale, b.bias), {}
    kind = ClipLoss if form == "ce" else SigLipLoss
    assert_equal(
        [kind(reduction="none", **options)(*given), kind(**options)(*given, weights=weights)],
        [rows, (weights * rows).sum() / weights.sum()],
    )


@pytest.mark.parametrize("form", FORMS)
def test_rows_hold_their_conditioned_negatives(form):
    b = batch()
    cosines = torch.rand(*b.mask.shape, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    options = {"form": form, "conditioned_weight": 0.7}
    given = {"conditioned_negatives": cosines, "weights": b.weights}
    mean, rows = (
        BetaCALLoss(**options, reduction=reduction)(b.image, b.text, b.scale, **given) for reduction in ("mean", "none")
    )
    plain = BetaCALLoss(form, reduction="none")(b.image, b.text, b.scale, weights=b.weights)
    assert (rows > plain).all()
    assert_equal(gradients(rows.sum() / b.weights.sum(), [cosines]), gradients(mean, [cosines]))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    b = batch()
    image, text = (t.detach()[:3, :2, :4].clone().requires_grad_() for t in (b.image, b.text))
    loss = BetaCALLoss(form, reduction="none", label_smoothing=0.2 * (form == "ce"))
    mask, weights = torch.tensor([[1, 1], [1, 0], [1, 1]], device=DEVICE).bool(), b.weights[:3, :2]
    assert torch.autograd.gradcheck(
        lambda image, text, scale, bias: loss(image, text, scale, logit_bias=bias, mask=mask, weights=weights),
        (image, text, b.scale.detach().requires_grad_(), b.bias.detach().requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("form, reduction", [("ce", "none"), ("bce", "mean")])
def test_compile(form, reduction):
    b = batch()
    given = {"mask": b.mask, "weights": b.weights}
    loss = BetaCALLoss(form, reduction=reduction, label_smoothing=0.2 * (form == "ce"))
    values = [
        f(b.image, b.text, b.scale, **given) for f in (torch.compile(loss, fullgraph=True, backend="eager"), loss)
    ]
    assert_equal(*(gradients(value, b.leaves, torch.ones_like(value)) for value in values))


class Recorder:
    """The blockwise backend; keeps which functions were called."""

    serves_prefixes = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        self.calls.append(name)
        return getattr(Blockwise(), name)


def test_weighted_sigmoid_mean_forms_its_gradient_early():
    b = batch()
    called = {}
    for reduction in ("mean", "none"):
        loss = beta_cal_bce_loss(
            b.image, b.text, b.scale, weights=b.weights, reduction=reduction, backend=(recorder := Recorder())
        )
        loss.sum().backward()
        called[reduction] = recorder.calls
    early = ["similarity_softplus_fwd_bwd"]
    assert called == {"mean": early, "none": ["similarity_softplus_fwd", *early]}


@pytest.mark.parametrize("form", FORMS)
def test_padded_slots_may_hold_anything(form):
    b = batch()
    weights = b.weights.masked_fill(~b.mask, torch.nan)
    image, text = (t.detach().masked_fill(~b.mask[..., None], torch.inf).requires_grad_() for t in (b.image, b.text))
    for reduction in ("mean", "none"):
        loss = BetaCALLoss(form, reduction=reduction, label_smoothing=0.2 * (form == "ce"))
        given = {"mask": b.mask, "weights": weights}
        clean = loss(b.image, b.text, b.scale, mask=b.mask, weights=b.weights)
        value = loss(image, text, b.scale, **given)
        assert_equal([value], [clean])
        assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), [image, text]))


@pytest.mark.parametrize("form", FORMS)
def test_no_valid_text(form):
    b = batch()
    loss = BetaCALLoss(form, reduction="none", label_smoothing=0.2 * (form == "ce"))
    rows = loss(b.image, b.text, b.scale, mask=torch.zeros_like(b.mask), weights=b.weights)
    assert rows.shape == b.mask.shape
    assert all((g == 0).all() for g in gradients(rows, b.leaves[:3], torch.ones_like(rows)))
    nothing = BetaCALLoss(form)(b.image, b.text, b.scale, weights=torch.zeros_like(b.weights))
    assert nothing == 0


def test_rejects():
    b = batch()
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'none', got 'sum'"):
        BetaCALLoss(reduction="sum")
    with pytest.raises(ValueError, match=r"label_smoothing: expected a number from 0 to 1, got 1\.5"):
        ClipLoss(label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 in the sigmoid form, .*got 0\.1"):
        BetaCALLoss("bce", label_smoothing=0.1)
    for weights, message in (
        (b.weights[:2], r"weights: expected shape \(5, 3\) as image_embeds, got \(2, 3\)"),
        (b.weights.requires_grad_(), r"weights: expected constants, .*requires a gradient \(multiply the rows"),
        ([1.0], "weights: expected a tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            beta_cal_ce_loss(b.image, b.text, b.scale, weights=weights)
    with pytest.raises(ValueError, match=r"weights: expected shape \(5,\) as image_embeds, got \(5, 3\)"):
        SigLipLoss()(b.image[:, 0], b.text[:, 0], b.scale, weights=b.weights.detach())
