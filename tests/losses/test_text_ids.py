"""Equal texts of different images are no negatives: against the docstrings' formulas.

test_operators.py has the operations, test_across_ranks several ranks.
"""

import pytest
import torch
from support.beta_cal import DEVICE, FORMS, B, D, K, assert_equal, batch, dense_rows, gradients, ragged
from support.precision import widest
from torch import Tensor

from betaclip import BetaCALLoss, ClipLoss, SigLipLoss, beta_cal_ce_loss

BACKENDS = ["triton", "blockwise", "reference"]


def ids_of(*shape: int) -> Tensor:
    """Few different ids, beyond int32 and alike in their last 32 bits, and some texts without one."""
    return torch.randint(-1, 4, shape, device=DEVICE) * (2**33) - (torch.rand(shape, device=DEVICE) < 0.2).long()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_dense_formula(backend, form, masked):
    b, ids, extra_ids = batch(widest(backend)), ids_of(B, K), ids_of(7)
    extra = torch.randn(7, D, dtype=widest(backend), device=DEVICE)
    leaves, mask = [*b.leaves, extra.requires_grad_()], b.mask if masked else None
    for extras in ({}, {"extra_texts": extra}, {"extra_texts": extra, "extra_text_ids": extra_ids}):
        loss = BetaCALLoss(form, beta=0.4, backend=backend, reduction="none")
        ours = loss(b.image, b.text, b.scale, logit_bias=b.bias, mask=mask, text_ids=ids, **extras)
        wanted = {"extra": extras.get("extra_texts"), "extra_ids": extras.get("extra_text_ids")}
        truth = dense_rows(form, *b.leaves, mask=mask, ids=ids, **wanted)
        incoming = torch.rand_like(truth)
        assert_equal(gradients(ours, leaves, incoming), gradients(truth, leaves, incoming))


@pytest.mark.parametrize("form", FORMS)
def test_all_texts_are_equal(form):
    """No negative is left, whatever the other images are."""
    b = batch()
    one = torch.zeros(B, K, dtype=torch.int32, device=DEVICE)
    whole = BetaCALLoss(form, reduction="none", divisor="rows" if form == "bce" else "pairs")
    rows = whole(b.image, b.text, b.scale, text_ids=one)
    for i in range(B):
        alone = whole(b.image[i : i + 1], b.text[i : i + 1], b.scale)
        torch.testing.assert_close(rows[i : i + 1], alone)
    assert all(g.isfinite().all() for g in torch.autograd.grad(rows.sum(), b.leaves[:3]))


@pytest.mark.parametrize("form", FORMS)
def test_different_texts_change_nothing(form):
    b = batch()
    truth = BetaCALLoss(form)(b.image, b.text, b.scale, mask=b.mask)
    different = torch.arange(B * K, device=DEVICE).view(B, K)
    within = different // K  # equal within an image, which has no negatives of its own
    for ids in (different, within, torch.full_like(different, -7)):
        torch.testing.assert_close(BetaCALLoss(form)(b.image, b.text, b.scale, mask=b.mask, text_ids=ids), truth)


@pytest.mark.parametrize("form", FORMS)
def test_ragged_equals_masked(form):
    b, ids, loss = batch(), ids_of(B, K), BetaCALLoss(form)
    masked = loss(b.image, b.text, b.scale, mask=b.mask, text_ids=ids)
    assert_equal(gradients(loss(**ragged(b, text_ids=ids), logit_scale=b.scale), b.leaves), gradients(masked, b.leaves))


@pytest.mark.parametrize("form", FORMS)
def test_one_text_per_image(form):
    b, ids = batch(), torch.tensor([5, 3, 5, -1, -1], dtype=torch.int16, device=DEVICE)
    image, text = b.image[:, 0], b.text[:, 0]
    one = b.image[:, :1], b.text[:, :1]
    truth = dense_rows(form, *one, b.scale, b.bias, divisor="rows", ids=ids[:, None]).mean()
    ours = ClipLoss()(image, text, b.scale, text_ids=ids) if form == "ce" else None
    assert_equal([SigLipLoss()(image, text, b.scale, b.bias, text_ids=ids) if ours is None else ours], [truth])


def test_compile():
    b, ids, loss = batch(), ids_of(B, K), BetaCALLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    values = [f(b.image, b.text, b.scale, mask=b.mask, text_ids=ids) for f in (compiled, loss)]
    assert_equal(*(gradients(value, b.leaves) for value in values))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    b, ids = batch(), torch.tensor([[1, 2], [2, 3], [1, -1]], device=DEVICE)
    image, text = (t.detach()[:3, :2, :4].clone().requires_grad_() for t in (b.image, b.text))
    loss = BetaCALLoss(form)
    scale = b.scale.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: loss(*leaves, text_ids=ids), (image, text, scale), fast_mode=True)


def test_rejects():
    b, ids, extra = batch(), ids_of(B, K), torch.ones(7, D, dtype=torch.float64, device=DEVICE)
    for options, message in (
        ({"text_ids": ids[:2]}, r"text_ids: expected shape \(5, 3\) as image_embeds, got \(2, 3\)"),
        ({"text_ids": ids.double()}, r"text_ids: expected an integer dtype, got torch.float64"),
        ({"text_ids": "a"}, "text_ids: expected a tensor, got str"),
        ({"extra_text_ids": ids}, "extra_text_ids: expected text_ids with them, got None"),
        ({"text_ids": ids, "extra_text_ids": ids}, "extra_text_ids: expected extra_texts with them, got None"),
        (
            {"text_ids": ids, "extra_texts": extra, "extra_text_ids": ids[0]},
            r"extra_text_ids: expected shape \(7,\) as extra_texts, got \(3,\)",
        ),
        ({"text_ids": ids, "label_smoothing": 0.1}, "label_smoothing: expected 0 with text_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            beta_cal_ce_loss(b.image, b.text, b.scale, **options)
    with pytest.raises(ValueError, match=r"text_ids: expected shape \(5,\) as image_embeds, got \(5, 3\)"):
        ClipLoss()(b.image[:, 0], b.text[:, 0], b.scale, text_ids=ids)
