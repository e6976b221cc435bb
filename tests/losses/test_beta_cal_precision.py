"""β-CAL in all dtypes: half precision, autocast, norms and logits at the limits, NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.beta_cal_batches import DEVICE, FORMS, LOSSES, Recorder, batch, dense, gradients, require
from support.precision import HALF, usual

from betaclip import BetaCALLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.kernels.similarity.operators import BACKENDS


@pytest.mark.parametrize("divisor", ["pairs", "rows"])
@pytest.mark.parametrize("backend", ["triton", "blockwise", "reference"])
def test_small_gradients_are_lost_by_nothing_but_their_dtype(backend, divisor):
    """A gradient scaler brings float16's back, whatever divides the loss: nothing underflows on the way."""
    b = batch(dtype=torch.float16)
    leaves = [t.clone().requires_grad_() for t in (b.image, b.text)]
    options = {"logit_bias": -8.0, "divisor": divisor}
    loss = beta_cal_bce_loss(*leaves, b.scale, backend=backend, **options) * 2.0**-20
    ours = torch.autograd.grad(loss * 2.0**24, leaves)
    plain = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(beta_cal_bce_loss(*plain, b.scale.double(), **options) * 16, plain)
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=2e-3, atol=2e-3 * float(t.abs().max()))
    assert not torch.autograd.grad(beta_cal_bce_loss(*leaves, b.scale, **options) * 2.0**-30, leaves)[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_zero_vector_has_no_direction(form):
    b = batch(dtype=torch.float16)
    b.image[2, 1] = 0
    b.image.requires_grad_()
    loss = LOSSES[form](b.image, b.text, b.scale)
    (gradient,) = torch.autograd.grad(loss, b.image)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[2, 1] == 0).all() and (gradient[2, 0] != 0).any()


@pytest.mark.parametrize(
    "dtype, norm", [(torch.float32, n) for n in (1e-10, 1e18, 1e20, 1e37)] + [(torch.float64, 1e200)]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_norm(backend, form, dtype, norm):
    """Also norms whose squares overflow or vanish, on either side."""
    require(backend, dtype)
    b = batch(dtype=dtype)
    unit = [F.normalize(t.double(), dim=-1) for t in (b.image, b.text)]
    leaves = [(t * factor).to(dtype).requires_grad_() for t, factor in zip(unit, (norm, 1.0), strict=True)]
    ours = gradients(LOSSES[form](*leaves, b.scale, mask=b.mask, backend=backend), *leaves)
    plain = [t.detach().double().div(factor).requires_grad_() for t, factor in zip(leaves, (norm, 1.0), strict=True)]
    truth = gradients(dense(form, *plain, b.scale.double(), mask=b.mask), *plain)
    for name, a, t, factor in zip(("loss", "image", "text"), ours, truth, (1.0, norm, 1.0), strict=True):
        error = (a.double() * factor - t).abs().max() / t.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_similarities_at_the_limit(backend, form, sign):
    """Every logit +100 or -100: the loss is log N (or known in closed form), the gradients finite."""
    # Rows have length 2: normalising is exact in every precision.
    image = torch.ones(5, 3, 4, dtype=usual(backend), device=DEVICE, requires_grad=True)
    text = (sign * image.detach()).requires_grad_()
    scale = torch.tensor(100.0, device=DEVICE, requires_grad=True)
    loss = LOSSES[form](image, text, scale, backend=backend)
    if form == "ce":
        expected = torch.tensor(15.0).log()
    else:  # per row: 12 negatives, one positive, two of weight 1/2
        negative, positive = F.softplus(torch.tensor([sign, -sign], dtype=torch.float64) * 100)
        expected = (12 * negative + 2 * positive) / 15
    torch.testing.assert_close(loss.double().cpu(), expected.double(), rtol=1e-5, atol=1e-12)
    for gradient in torch.autograd.grad(loss, (image, text, scale)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("logit", [-19.0, -21.0, -30.0])
def test_positives_of_low_logits_in_float64(logit):
    """A lone positive costs log(1 + e^-S) to the last digits, on either side of the threshold of F.softplus."""
    image = torch.full((1, 1, 4), 0.5, dtype=torch.float64, device=DEVICE)
    scale = torch.tensor(-logit, dtype=torch.float64, device=DEVICE, requires_grad=True)
    loss = beta_cal_bce_loss(image, -image, scale)
    assert loss.item() == pytest.approx(-logit + math.log1p(math.exp(logit)), rel=1e-15, abs=0)
    (dscale,) = torch.autograd.grad(loss, scale)
    assert dscale.item() == pytest.approx(1 / (1 + math.exp(logit)), rel=1e-15, abs=0)


@pytest.mark.parametrize("form", FORMS)
def test_near_the_optimum_in_bfloat16(form):
    """Within-image gradients are a small difference of numbers near 1: they are formed in float32.

    The bfloat16 embeddings are exact inputs, so the truth is the dense form in float64 on the same numbers.
    """
    image = F.normalize(torch.randn(8, 1, 64, dtype=torch.float64), dim=-1).repeat(1, 4, 1)
    text = (image + 0.02 * torch.randn(8, 4, 64, dtype=torch.float64)).to(DEVICE, torch.bfloat16).requires_grad_()
    image = image.to(DEVICE, torch.bfloat16).requires_grad_()
    ours = gradients(LOSSES[form](image, text, torch.tensor(50.0, device=DEVICE)), image, text)
    exact = [t.detach().double().requires_grad_() for t in (image, text)]
    truth = gradients(dense(form, *exact, 50.0), *exact)
    for a, t in zip(ours, truth, strict=True):
        assert (a.double() - t).norm() <= 0.02 * t.norm()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_cuda_matches_dense_formula(form, masked, dtype, cuda):
    """On the embeddings as they were rounded; what is normalised is rounded once more."""
    b = batch(images=12, dim=72, dtype=dtype)
    leaves = [t.requires_grad_() for t in (b.image, b.text, b.scale)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    mask = b.mask if masked else None
    ours = gradients(LOSSES[form](*leaves, mask=mask, backend="cuda"), *leaves)
    for a, t in zip(ours, gradients(dense(form, *exact, mask=mask), *exact), strict=True):
        assert (a.double() - t).norm() <= 0.02 * t.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_casts_once(form, dtype):
    """Under autocast the products run in its dtype, statistics and loss in float32, gradients as the inputs."""
    backend = Recorder()
    b = batch(dtype=torch.float32)
    b.image.requires_grad_(), b.text.requires_grad_()
    options = {"weights": 1e5 * torch.rand(b.text.shape[:2], device=DEVICE)}  # half precision holds no sum of these
    options |= {"label_smoothing": 0.1} if form == "ce" else {}
    exact = LOSSES[form](b.image, b.text, b.scale, backend=backend, **options)
    assert {seen for _, seen in backend.calls} == {torch.float32}
    backend.calls.clear()
    with torch.autocast(DEVICE, dtype):
        loss = LOSSES[form](b.image, b.text, b.scale, backend=backend, **options)
        loss.backward()  # within autocast, as some loops do
    assert {seen for _, seen in backend.calls} == {dtype}
    assert loss.dtype == b.image.grad.dtype == torch.float32
    assert abs(loss - exact) < 0.02 * exact
    truth = torch.autograd.grad(exact, b.image)[0]
    assert (b.image.grad - truth).norm() < 0.03 * truth.norm()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_keeps_float64(form):
    b = batch()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = LOSSES[form](b.image, b.text, b.scale)
    assert loss.dtype == torch.float64 and torch.equal(loss, LOSSES[form](b.image, b.text, b.scale))


def test_within_image_ignores_reduced_precision():
    """torch.set_float32_matmul_precision("medium") rounds float32 products; not those whose differences matter."""
    image = F.normalize(torch.randn(24, 1, 128, device=DEVICE), dim=-1).repeat(1, 4, 1)
    text = (image + 0.005 * torch.randn(24, 4, 128, device=DEVICE)).requires_grad_()
    exact = [t.detach().double() for t in (image, text)]
    exact[1].requires_grad_()
    truth = torch.autograd.grad(dense("ce", *exact, 100.0), exact[1])[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        gradient = torch.autograd.grad(beta_cal_ce_loss(image, text, 100.0), text)[0]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (gradient.double() - truth).norm() <= 1e-3 * truth.norm()


@pytest.mark.parametrize("form", FORMS)
def test_mixed_dtypes(form):
    b = batch(dtype=torch.float32)
    swapped = LOSSES[form](b.image, b.text.bfloat16(), b.scale)
    torch.testing.assert_close(swapped, LOSSES[form](b.image, b.text.bfloat16().float(), b.scale))
    image, text = b.image.bfloat16().requires_grad_(), b.text.requires_grad_()
    ours = gradients(LOSSES[form](image, text, b.scale), image, text)
    leaves = [image.detach().float().requires_grad_(), text]
    theirs = gradients(LOSSES[form](*leaves, b.scale), *leaves)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1].float(), theirs[1], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_diverged_embeddings_show(backend, form, poison):
    """NaN or infinity in a valid row must reach the loss, where a gradient scaler or a guard looks for it."""
    b = batch(dtype=usual(backend))
    b.text[2, 1, 3] = poison
    assert LOSSES[form](b.image, b.text, b.scale, backend=backend).isnan()


@pytest.mark.parametrize("form", FORMS)
def test_nan_weights_show(form):
    b = batch()
    weights = torch.full((5, 5), torch.nan, dtype=torch.float64, device=DEVICE)
    assert BetaCALLoss(form)(b.image, b.text, b.scale, pair_weights=weights).isnan()
