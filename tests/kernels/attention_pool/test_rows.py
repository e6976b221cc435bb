"""Unit rows and inverse norms: by PyTorch's operators, and by the kernels of a GPU, which the interpreter runs here."""

import pytest
import torch
import torch.nn.functional as F
from support.attention_pool import DEVICE, arguments
from support.precision import HALF
from torch import Tensor

from betaclip.kernels.attention_pool import rows
from betaclip.kernels.attention_pool.rows import UnitRows, inverse_norms_into
from betaclip.kernels.precision import accumulation_dtype, inverse_norms, norm_eps


@pytest.fixture(params=["torch", "kernels"])
def implementation(request, monkeypatch):
    if request.param == "kernels":
        pytest.importorskip("triton")
    monkeypatch.setattr(rows, "kernels_serve", lambda x: request.param == "kernels")
    return request.param


def unit(x: Tensor) -> Tensor:
    return UnitRows.apply(x, norm_eps(x.dtype))[0]


def test_unit_rows_are_twice_differentiable():
    """Rows of norm 0 too, whose gradient is 0."""
    x = arguments(2, 1, 3, 4)[0]
    x[0, 1] = 0
    x.requires_grad_()
    torch.testing.assert_close(unit(x), F.normalize(x, dim=-1))
    keep = x.detach().norm(dim=2, keepdim=True) > 0
    assert torch.autograd.gradcheck(lambda x: unit(torch.where(keep, x, 0)), x)
    assert torch.autograd.gradgradcheck(lambda x: unit(torch.where(keep, x, 0)), x)


@pytest.mark.parametrize("p, d", [(7, 40), (3, 512), (1, 1), (2, 2500)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_unit_rows_and_their_gradient(implementation, dtype, p, d):
    """Against float64: an error of a few ulps; rows that leave out a class token, whose last block is not full."""
    x = torch.randn(3, p + 1, d, dtype=torch.float64, device=DEVICE).to(dtype)[:, 1:]
    weight = torch.randn(3, d, p, device=DEVICE).to(dtype).mT
    x[1, 0] = 0
    found, truth = [], []
    for results, leaf, function in (
        (found, x.detach().requires_grad_(), unit),
        (truth, x.detach().double().requires_grad_(), lambda x: F.normalize(x, dim=-1)),
    ):
        results.append(function(leaf))
        results += torch.autograd.grad(results[0], leaf, weight.to(leaf.dtype))
    found[1], truth[1] = (t.masked_fill(x == 0, 0) for t in (found[1], truth[1]))
    for a, t in zip(found, truth, strict=True):
        assert a.dtype == dtype and not a[1, 0].any()
        error = (a.double() - t).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * t.abs().max().clamp_min(1), error
    inverse = torch.empty(3, p, dtype=accumulation_dtype(dtype), device=DEVICE)
    inverse_norms_into(x, norm_eps(dtype), inverse)
    assert inverse[1, 0] == 0
    torch.testing.assert_close(inverse, x.double().norm(dim=2).reciprocal().masked_fill(inverse == 0, 0).to(inverse))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # of NumPy, in the interpreter
def test_norms_of_any_size(implementation, dtype):
    """As ``inverse_norms`` gives them: squares that overflow, rows that count as zero, an infinity, a NaN."""
    # On a GPU float64 rows have squares in float64.
    largest = torch.finfo(dtype).max / 8 if DEVICE == "cpu" or dtype != torch.float64 else 1e150
    x = [[largest, 0, -largest], [norm_eps(dtype) / 2] * 3, [0] * 3, [torch.inf, 1, 1], [torch.nan, 1, 1]]
    x = torch.tensor([x], dtype=torch.float64, device=DEVICE).to(dtype)
    found, expected = (torch.empty(1, 5, dtype=accumulation_dtype(dtype), device=DEVICE) for _ in range(2))
    inverse_norms_into(x, norm_eps(dtype), found)
    inverse_norms(x, norm_eps(dtype), expected)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0, 0] > 0 and found[0, 4].isnan()


def test_nothing_to_normalise(implementation):
    x = torch.ones(0, 3, 4, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(unit(x).sum(), x)
    assert dx.shape == (0, 3, 4)


def test_a_second_derivative_and_a_graph_are_not_for_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(rows, "kernels_serve", lambda x: True)
    x = arguments(2, 1, 3, 4)[0].requires_grad_()
    (dx,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
    assert dx.requires_grad
