"""Operands, truth and tolerances for tests of the similarity operations."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.precision import HALF
from torch import Tensor

from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.cuda_backend import Cuda
from betaclip.kernels.similarity.functional import similarity_logsumexp, similarity_softplus
from betaclip.kernels.similarity.operators import BACKENDS, Backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["blockwise", "triton", "cuda"]
DTYPES = {name: HALF if name == "cuda" else [torch.float32, torch.float64] for name in BACKENDS}


def small(backend: str) -> Backend:
    """A backend in blocks so small that a dense form in float64 can check several of them. Triton's interpreter has
    small tiles of its own."""
    return {"blockwise": Blockwise(40, 56), "cuda": Cuda(48)}.get(backend, backend)


def require(backend: str, dtype: torch.dtype) -> None:
    probe = torch.zeros(1, 8, dtype=dtype, device=DEVICE)
    if reasons := BACKENDS[backend](probe, probe):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def product_flop(total, a, b, **_) -> int:
    """FLOP of a product that is added in place, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def operands(n: int, m: int, d: int, dtype: torch.dtype = torch.float64, *, groups: bool = True) -> list[Tensor | None]:
    """x, y of unequal row norms around 1, sorted image ids with padding (or None)."""
    x = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1) * (0.8 + 0.4 * torch.rand(n, 1))
    y = F.normalize(torch.randn(m, d, dtype=torch.float64), dim=1) * (0.8 + 0.4 * torch.rand(m, 1))
    x_group, y_group = (torch.randint(-1, 12, (rows,)).sort().values if groups else None for rows in (n, m))
    to = {"device": DEVICE}
    return [
        x.to(dtype=dtype, **to),
        y.to(dtype=dtype, **to),
        None if x_group is None else x_group.to(**to),
        None if y_group is None else y_group.to(**to),
    ]


def dense_logsumexp(x, y, scale, x_group, y_group):
    """The docstring's formula, by autograd."""
    s = scale * x @ y.T
    if x_group is not None:
        s = s.masked_fill((x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0), -torch.inf)
    return torch.cat((s.logsumexp(1), s.logsumexp(0)))


def dense_softplus(x, y, scale, bias, x_group, y_group):
    s = scale * x @ y.T + bias
    s = torch.logaddexp(s, torch.zeros_like(s))
    if x_group is not None:
        s = s.masked_fill((x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0), 0)
    return s.sum(1)


def value_and_gradients(function: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of a weighted sum of the finite ones: non-uniform incoming gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    loss = torch.where(out.isfinite(), out, 0) @ weight.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def assert_as_good_as_eager(ours: list[Tensor], eager: list[Tensor], truth: list[Tensor], scale: float) -> None:
    """Error at most twice that of the eager dense form in the same dtype, plus a few ulps of the largest value.

    An exponent as large as ``scale`` is known to scale * eps at best, and its exponential relatively so.
    """
    ulps = max(16, scale)
    for i, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
        assert torch.equal(a.isfinite(), t.isfinite()), i
        finite = t.isfinite()
        if not finite.any():
            continue
        size = t[finite].abs().max()
        error, allowed = (((v.double() - t)[finite]).abs().max() for v in (a, b))
        # A scalar is one sum with cancellation: eager's may be right by luck.
        floor = (ulps if t.dim() else 8 * ulps) * torch.finfo(eager[1].dtype).eps * size
        assert error <= 2 * allowed + floor, f"output {i}: error {error:.2e}, eager {allowed:.2e}, size {size:.2e}"


def _ready(backend: Backend, dtype: torch.dtype) -> Backend:
    """A named backend in small blocks, if it runs here; an object as it is."""
    if not isinstance(backend, str):
        return backend
    require(backend, dtype)
    return small(backend)


def check_logsumexp(backend: Backend, dtype: torch.dtype, scale: float, n: int, m: int, d: int, groups: bool) -> None:
    backend = _ready(backend, dtype)
    x, y, x_group, y_group = operands(n, m, d, dtype, groups=groups)
    weight = torch.randn(n + m, dtype=torch.float64, device=DEVICE)
    s = torch.tensor(scale, dtype=torch.float64, device=DEVICE)

    def ours(x, y, s):
        return torch.cat(similarity_logsumexp(x, y, s, x_group, y_group, backend=backend))

    def eager(x, y, s):
        return dense_logsumexp(x, y, s, x_group, y_group)

    truth = value_and_gradients(eager, weight, x.double(), y.double(), s)
    assert_as_good_as_eager(
        value_and_gradients(ours, weight, x, y, s), value_and_gradients(eager, weight, x, y, s.to(dtype)), truth, scale
    )


def check_softplus(backend: Backend, dtype: torch.dtype, scale: float, n: int, m: int, d: int, groups: bool) -> None:
    backend = _ready(backend, dtype)
    x, y, x_group, y_group = operands(n, m, d, dtype, groups=groups)
    weight = torch.randn(n, dtype=torch.float64, device=DEVICE)
    s, b = (torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in (scale, -scale / 10))

    def ours(x, y, s, b):
        return similarity_softplus(x, y, s, b, x_group, y_group, backend=backend)

    def eager(x, y, s, b):
        return dense_softplus(x, y, s, b, x_group, y_group)

    truth = value_and_gradients(eager, weight, x.double(), y.double(), s, b)
    eager_same = value_and_gradients(eager, weight, x, y, s.to(dtype), b.to(dtype))
    assert_as_good_as_eager(value_and_gradients(ours, weight, x, y, s, b), eager_same, truth, scale)


CHECKS = pytest.mark.parametrize("check", [check_logsumexp, check_softplus])
