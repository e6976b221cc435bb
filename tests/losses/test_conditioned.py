"""Conditioned negatives in β-CAL, against the docstrings' formulas. Several ranks are in test_across_ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip import BetaCALLoss, TextConditionedPool, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.losses.conditioned import conditioned_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, K, J, D = 5, 3, 4, 8
FORMS = ["ce", "bce"]
LOSSES = {"ce": beta_cal_ce_loss, "bce": beta_cal_bce_loss}


def leaves(others: int = J) -> list[Tensor]:
    """Image and text embeddings, scale, bias and cosines."""
    shapes = (B, K, D), (B, K, D), (), (), (B, K, others)
    image, text, scale, bias, cosines = (torch.randn(s, dtype=torch.float64, device=DEVICE) for s in shapes)
    return [t.requires_grad_() for t in (image, text, scale.abs() + 4, bias - 3, cosines.tanh())]


def masks() -> tuple[Tensor, Tensor]:
    """Texts: the second image has none. Others: the last image's texts have none, the rest some."""
    texts = torch.arange(K, device=DEVICE) < torch.tensor([3, 0, 1, 2, 3], device=DEVICE)[:, None]
    others = torch.rand(B, K, J, device=DEVICE) < 0.6
    others[0], others[4] = True, False
    return texts, others


def term(form: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, c: Tensor, valid: Tensor) -> Tensor:
    """The definition, text by text; valid: (B, K, J). The sigmoid form's is a sum."""
    own, losses = F.cosine_similarity(image, text, dim=-1), []
    for index in valid.any(2).nonzero().tolist():
        b, k = index
        others = c[b, k][valid[b, k]]
        if form == "bce":
            losses.append(F.softplus(scale * others + bias).sum())
        else:
            logits = scale * torch.cat((own[b, k, None], others))
            losses.append(F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.int64, device=DEVICE)))
    return torch.stack(losses).mean() if form == "ce" else torch.stack(losses).sum()


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True))]


@pytest.mark.parametrize("divisor", ["pairs", "rows"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_matches_dense_formula(form, masked, divisor):
    image, text, scale, bias, c = inputs = leaves()
    mask, others = masks() if masked else (None, None)
    valid = torch.ones_like(c) > 0 if others is None else others & mask[..., None]
    options = {"divisor": divisor if form == "bce" else "pairs"}
    loss = BetaCALLoss(form, beta=0.3, conditioned_weight=0.7, **options)
    given = {"mask": mask, "logit_bias": bias}
    ours = loss(image, text, scale, conditioned_negatives=c, conditioned_mask=others, **given)
    count = B * K if mask is None else int(mask.sum())
    number = 1 if form == "ce" else count if divisor == "rows" else count**2
    truth = loss(image, text, scale, **given) + 0.7 * term(form, image, text, scale, bias, c, valid) / number
    alone = conditioned_loss(image, text, scale, c, others, form=form, **given, **options)
    for a, t in zip(gradients(ours, inputs), gradients(truth, inputs), strict=True):
        torch.testing.assert_close(a, t, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(alone, term(form, image, text, scale, bias, c, valid) / number, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    image, text, scale, bias, c = leaves(2)
    small = [t.detach()[:3, :2].clone().requires_grad_() for t in (image[..., :3], text[..., :3], c)]
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]], device=DEVICE) > 0
    others = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 1]]], device=DEVICE) > 0

    def loss(image: Tensor, text: Tensor, c: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        options = {"logit_bias": bias} if form == "bce" else {}
        return LOSSES[form](image, text, scale, mask=mask, conditioned_negatives=c, conditioned_mask=others, **options)

    assert torch.autograd.gradcheck(loss, (*small, scale, bias))


@pytest.mark.parametrize("form", FORMS)
def test_ragged_equals_masked(form):
    image, text, scale, bias, c = inputs = leaves()
    mask, others = masks()
    index = torch.arange(B, device=DEVICE)[:, None].expand(B, K)[mask]
    loss = BetaCALLoss(form)
    masked = loss(image, text, scale, mask=mask, logit_bias=bias, conditioned_negatives=c, conditioned_mask=others)
    ragged = loss(
        image[mask], text[mask], scale, image_index=index, logit_bias=bias,
        conditioned_negatives=c[mask], conditioned_mask=others[mask],
    )  # fmt: skip
    for a, t in zip(gradients(ragged, inputs), gradients(masked, inputs), strict=True):
        torch.testing.assert_close(a, t, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_no_other_picture_no_term(form):
    """One image has none: J = 0, or all masked."""
    image, text, scale, bias, c = leaves()
    loss = BetaCALLoss(form)
    plain = gradients(loss(image, text, scale, logit_bias=bias), [image, c])
    none = torch.zeros_like(c) > 0
    for negatives, mask in ((c[..., :0], None), (c, none), (torch.full_like(c, torch.nan), none)):
        given = {"conditioned_negatives": negatives, "conditioned_mask": mask}
        ours = loss(image, text, scale, logit_bias=bias, **given)
        for a, t in zip(gradients(ours, [image, c]), plain, strict=True):
            torch.testing.assert_close(a, t, rtol=0, atol=0)
        assert conditioned_loss(image, text, scale, negatives, mask, form=form, logit_bias=bias) == 0
    one = image[:1], text[:1], scale
    torch.testing.assert_close(loss(*one, conditioned_negatives=c[:1, :, :0]), loss(*one))


@pytest.mark.parametrize("form", FORMS)
def test_anything_may_stand_in_masked_places(form):
    image, text, scale, bias, c = leaves()
    mask, others = masks()
    options = {"mask": mask, "logit_bias": bias, "conditioned_mask": others}
    clean = BetaCALLoss(form)(image, text, scale, conditioned_negatives=c, **options)
    odd = [t.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_() for t in (image, text)]
    wild = c.detach().masked_fill(~(others & mask[..., None]), torch.inf).requires_grad_()
    loss = BetaCALLoss(form)(*odd, scale, conditioned_negatives=wild, **options)
    torch.testing.assert_close(loss, clean)
    for found in torch.autograd.grad(loss, [*odd, scale, wild]):
        assert found.isfinite().all()
    alone = conditioned_loss(*odd, scale, wild, others, form=form, mask=mask, logit_bias=bias)
    assert alone.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(alone, [scale, wild]))


def test_embeddings_that_ignore_the_picture_cost_log_of_all_pictures():
    """The pool attends to nothing: its result is the same for every picture, and the term cannot fall below."""
    torch.manual_seed(0)
    pool = TextConditionedPool(D, 2, device=DEVICE, dtype=torch.float64)
    with torch.no_grad():
        pool.attn.in_proj_weight[2 * D :] = 0  # values
        pool.attn.in_proj_bias[2 * D :] = torch.randn(D)
        pool.attn.out_proj.bias.copy_(torch.randn(D))
    patches, texts = (torch.randn(B, n, D, dtype=torch.float64, device=DEVICE) for n in (6, K))
    images = (torch.arange(B * K)[:, None] // K + torch.arange(1, J)) % B
    c = pool.score(patches, texts.flatten(0, 1), images=images).unflatten(0, (B, K))
    for scale in (1.0, 50.0):
        found = conditioned_loss(pool(patches, texts), texts, scale, c)
        assert found.item() == pytest.approx(math.log(J))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_extreme_logits(form, sign):
    image, _, _, _, c = (t.detach().float() for t in leaves())
    scale, c = torch.tensor(100.0, device=DEVICE, requires_grad=True), torch.full_like(c, sign).requires_grad_()
    same = (image, sign * image)  # own cosines are at the other end
    loss = conditioned_loss(*same, scale, -c, form=form)
    own, other = 100 * sign, -100 * sign
    truth = math.log1p(J * math.exp(min(other - own, 50))) if form == "ce" else J / (B * K) * max(other, 0)
    assert loss.item() == pytest.approx(truth if other < own or form == "bce" else 200 + math.log(J), abs=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (scale, c)))


def test_dtypes():
    """Half-precision cosines are widened; the sum is in float32."""
    image, text, scale, _, c = (t.detach().float() for t in leaves())
    exact = conditioned_loss(image, text, scale, c.bfloat16().float())
    with torch.autocast(DEVICE, torch.bfloat16):
        found = conditioned_loss(image, text, scale, c.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


def test_compile():
    image, text, scale, bias, c = inputs = leaves()
    mask, others = masks()
    options = {"mask": mask, "logit_bias": bias, "conditioned_negatives": c, "conditioned_mask": others}
    loss = BetaCALLoss("bce")
    graph = torch.compile(loss, fullgraph=True, backend="eager")(image, text, scale, **options)
    for a, t in zip(gradients(graph, inputs), gradients(loss(image, text, scale, **options), inputs), strict=True):
        torch.testing.assert_close(a, t)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conditioned_negatives": torch.ones(2, 3)}, r"conditioned_negatives: expected shape \(2, 3, J\) .*\(2, 3\)"),
        ({"conditioned_negatives": torch.ones(2, 4, 5)}, r"conditioned_negatives: expected shape \(2, 3, J\)"),
        ({"conditioned_negatives": torch.ones(2, 3, 4).long()}, "conditioned_negatives: expected floating-point"),
        ({"conditioned_negatives": 0.5}, "conditioned_negatives: expected a tensor, got float"),
        ({"conditioned_negatives": torch.ones(2, 3, 4, device="meta")}, "conditioned_negatives: expected device cpu"),
        ({"conditioned_mask": torch.ones(2, 3, 5) > 0}, r"conditioned_mask: expected bool of shape \(2, 3, 4\)"),
        ({"conditioned_mask": torch.ones(2, 3, 4)}, r"conditioned_mask: expected bool of .*, got torch.float32"),
        ({"conditioned_negatives": None}, "conditioned_mask: expected conditioned_negatives with it, got None"),
    ],
)
def test_rejects(change, message):
    given = {"conditioned_negatives": torch.ones(2, 3, 4), "conditioned_mask": torch.ones(2, 3, 4) > 0} | change
    for form in FORMS:
        with pytest.raises(ValueError, match=message):
            LOSSES[form](torch.ones(2, 3, 8), torch.ones(2, 3, 8), 1.0, **given)


def test_rejects_weights():
    for weight in (-1.0, math.nan):
        with pytest.raises(ValueError, match="conditioned_weight: expected a finite weight >= 0"):
            BetaCALLoss(conditioned_weight=weight)
