"""Blocks of rows in plain PyTorch: accuracy at any norm and in any dtype."""

import pytest
import torch
import torch.nn.functional as F
from support.precision import HALF
from support.similarity import dense_logsumexp, dense_softplus, product_flop, value_and_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("norm, scale", [(1e-3, 100), (1, 14), (1, 100), (8, 14), (8, 100), (100, 1), (1e4, 1e-6)])
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


@pytest.mark.parametrize("norm, scale", [(10, 10), (30, 1), (100, 1), (10, 1000), (1e3, 1)])
@pytest.mark.parametrize("form", ["logsumexp", "softplus"])
def test_float32_at_large_logits(form, norm, scale):
    """Logits of 10^3 to 10^6 have rounding errors that gradients show, unless statistics share them."""
    check(form, norm, scale, torch.float32)


@pytest.mark.parametrize(
    "norm, scale, spread, passes",
    [
        (1, 100, 0, 1),  # normalised
        (1, 14, 0.1, 1),
        (10, 1, 0.1, 2),  # every row is far below what the largest norms allow
        (100, 1, 0.1, 2),
        (1e20, 1e-38, 0.1, 2),
        (1e3, 100, 0, 2),
    ],
)
def test_work_at_any_norm(norm, scale, spread, passes):
    """A forward is one pass over the matrix where norms are alike, and never more than two."""
    n, m, d = 200, 150, 512
    x, y = (F.normalize(torch.randn(rows, d), dim=1) * norm * (1 + spread * torch.randn(rows, 1)) for rows in (n, m))
    with FlopCounterMode(display=False) as flop:
        lse_x, lse_y = similarity_logsumexp(x, y, torch.tensor(float(scale)), backend=BACKEND)
    assert flop.get_total_flops() <= passes * 2 * n * m * d
    truth = dense_logsumexp(x.double(), y.double(), scale, None, None)
    torch.testing.assert_close(torch.cat((lse_x, lse_y)), truth.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("largest", [1.0, 80.0, 300.0])
def test_one_exponential_for_softplus_and_sigmoid(largest):
    """Where no logit of a tile is large, whatever bound their norms allow, and where one is: exact in both tails."""
    x, y = torch.zeros(3, 2), torch.zeros(50, 2)
    x[:, 0], y[:, 0], y[:, 1], y[7, 0] = 1, -torch.arange(50), 400, largest
    x.requires_grad_()
    rows = similarity_softplus(x, y, torch.tensor(1.0), backend=BACKEND)
    logits = y[:, 0].double()
    truth = torch.logaddexp(logits, torch.zeros_like(logits))
    torch.testing.assert_close(rows.double(), truth.sum().expand(3), rtol=1e-6, atol=0)
    (dx,) = torch.autograd.grad(rows.sum(), x)
    truth, terms = (logits.sigmoid() @ t.double() for t in (y, y.abs()))
    assert ((dx.double() - truth).abs() <= 1e-6 * terms).all()


def _plain(n: int, m: int) -> dict[str, Tensor | None]:
    return {}


def _padded_groups_and_texts(n: int, m: int) -> dict[str, Tensor | None]:
    ids = {f"{side}_group": torch.arange(rows) // 7 - 1 for side, rows in (("x", n), ("y", m))}
    return ids | {f"{side}_text": torch.randint(-1, 20, (rows,)) for side, rows in (("x", n), ("y", m))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ids", [_plain, _padded_groups_and_texts])
@pytest.mark.parametrize(
    "norm, scale, used",
    [
        (1, 14, True),
        (1, 100, True),  # with a shift
        (30, 1, False),  # every statistic lies below what the shift allows
    ],
)
def test_kept_exponentials_have_the_same_bits(norm, scale, used, ids, dtype):
    """Gradients are those of exponentials formed again, at the FLOP that the tiles kept leave."""
    n, m, d = 99, 150, 256
    x, y = (F.normalize(torch.randn(rows, d), dim=1).mul(norm).to(dtype).requires_grad_() for rows in (n, m))
    weight_x, weight_y, of_rows = torch.rand(n), torch.rand(m), ids(n, m)
    itemsize = accumulation_dtype(dtype).itemsize
    flops, gradients = [], []
    cols, pairs = (m - 7, (n - 7) * (m - 7)) if of_rows else (m, n * m)  # without padding
    for keep in (0, (40 * cols - 1) * itemsize, n * m * itemsize):  # two of three tiles along the first rows
        lse_x, lse_y = similarity_logsumexp(x, y, torch.tensor(float(scale)), **of_rows, backend=BACKEND, keep=keep)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flop}) as flop:
            gradients.append(torch.autograd.grad(_total(lse_x, weight_x) + _total(lse_y, weight_y), (x, y)))
        flops.append(flop.get_total_flops())
    for some in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(some, gradients[0], strict=True))
    if dtype == torch.float64 or used:
        assert flops == [6 * pairs * d, 6 * pairs * d - 2 * 2 * 40 * 56 * d, 4 * pairs * d]
    else:
        assert flops[0] == flops[1] == flops[2]


def _total(lse: Tensor, weight: Tensor) -> Tensor:
    return torch.where(lse.isfinite(), lse, 0) @ weight.to(lse.dtype)


@pytest.mark.parametrize("norm", [-0.875, 1e3])
def test_kept_exponentials_beside_a_row_done_again(norm):
    """A row whose terms the forward's shift has lost, or whose logits exceed those of all others."""
    x, y = (torch.randn(90, 16, dtype=torch.float64) for _ in range(2))
    x, y = (F.normalize(t.index_fill(1, torch.tensor([0]), 4), dim=1) for t in (x, y))
    x[7] = norm * y[3]
    inputs = [t.float().requires_grad_() for t in (x, y)], [t.requires_grad_() for t in (x, y)]
    ours = similarity_logsumexp(*inputs[0], torch.tensor(100.0), backend=BACKEND, keep=10**6)
    truth = dense_logsumexp(*inputs[1], 100.0, None, None)
    torch.testing.assert_close(torch.cat(ours).double(), truth, rtol=1e-5, atol=1e-3)
    for a, b in zip(
        torch.autograd.grad(torch.cat(ours).sum(), inputs[0]), torch.autograd.grad(truth.sum(), inputs[1]), strict=True
    ):
        assert (a.double() - b).norm() <= 1e-3 * b.norm()


def test_one_row_is_done_again_alone():
    """Its block of rows is, and no other."""
    x, y = (torch.zeros(400, 4) for _ in range(2))
    x[:, 0], y[:, 0], x[7, 0] = 1, 1, -0.875
    with FlopCounterMode(display=False) as flop:
        similarity_logsumexp(x, y, torch.tensor(100.0), backend=BACKEND)
    assert flop.get_total_flops() == 2 * (400 + BACKEND.rows) * 400 * 4
