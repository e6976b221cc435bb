"""Blocks of rows in plain PyTorch: accuracy at any norm and in any dtype."""

import pytest
import torch
import torch.nn.functional as F
from support.precision import HALF
from support.similarity import dense_logsumexp, dense_softplus, value_and_gradients
from torch import Tensor

from betaclip.kernels.precision import accumulation_dtype
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.functional import similarity_logsumexp, similarity_softplus

BACKEND = Blockwise(40, 56)


def check(form: str, norm: float, scale: float, dtype: torch.dtype) -> None:
    """Against the dense form that widens the same rows, and rounds its gradients to their dtype."""
    n, m, d = 99, 123, 64
    x, y = (F.normalize(torch.randn(rows, d), dim=1) * norm * (1 + 0.1 * torch.randn(rows, 1)) for rows in (n, m))
    x, y, s, b = x.to(dtype), y.to(dtype), torch.tensor(float(scale)), torch.tensor(-scale / 10)

    def ours(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        if form == "softplus":
            return similarity_softplus(x, y, s, b, backend=BACKEND)
        return torch.cat(similarity_logsumexp(x, y, s, backend=BACKEND)) + 0 * b

    def dense(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        wide = [t.to(accumulation_dtype(t.dtype)) for t in (x, y)]
        if form == "softplus":
            return dense_softplus(*wide, s, b, None, None)
        return dense_logsumexp(*wide, s, None, None) + 0 * b

    weight = torch.randn(n if form == "softplus" else n + m, dtype=torch.float64)
    truth = value_and_gradients(dense, weight, x.double(), y.double(), s.double(), b.double())
    same_dtype = value_and_gradients(dense, weight, x, y, s, b)
    for i, (a, e, t) in enumerate(zip(value_and_gradients(ours, weight, x, y, s, b), same_dtype, truth, strict=True)):
        error, allowed = (float((v.double() - t).abs().max()) for v in (a, e))
        limit = 3 * allowed + 64 * torch.finfo(torch.float32).eps * float(t.abs().max())
        assert error <= limit, f"output {i}: error {error:.2e}, dense {allowed:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("norm, scale", [(1e-3, 100), (1, 14), (1, 100), (8, 14), (8, 100), (1e4, 1e-6)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", ["logsumexp", "softplus"])
def test_half_precision_at_any_norm(form, dtype, norm, scale):
    """The scale multiplies rows that are widened, so it rounds and overflows nothing."""
    check(form, norm, scale, dtype)


@pytest.mark.parametrize("form", ["logsumexp", "softplus"])
def test_float16_whose_scaled_rows_overflow(form):
    """|x| scale is above 65504, far fewer logits."""
    x, y = (torch.zeros(5, 8, dtype=torch.float16) for _ in range(2))
    x[:, 0], y[:, 1], y[0, 0] = 700, 3, 2.0**-14
    x.requires_grad_()
    if form == "softplus":
        out = similarity_softplus(x, y, torch.tensor(100.0), backend=BACKEND)
        expected = F.softplus(torch.tensor(70000 * 2.0**-14)) + 4 * F.softplus(torch.tensor(0.0))
    else:
        out = similarity_logsumexp(x, y, torch.tensor(100.0), backend=BACKEND)[0]
        expected = torch.tensor([70000 * 2.0**-14, 0, 0, 0, 0]).logsumexp(0)
    torch.testing.assert_close(out, expected.expand(5))
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
