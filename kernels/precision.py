"""Dtypes of operands, accumulation and matrix products, and the norm up to which a vector counts as zero."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Whether GPUs have products of 16-bit matrices in float32. In ROCm builds before torch 2.10 they are wrong (PyTorch's
# pull request 162600). The CPU, where the interpreter runs, has none.
WIDENING_PRODUCTS = not torch.version.hip or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and gradients inside every backend."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast where it is enabled, else None. The meta device has no autocast to ask."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[None]:
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool, factor: float = 1) -> None:
    """Add a @ b times the factor to ``total`` in place, or overwrite it if ``first``; for matrices and for batches of
    matrices.

    16-bit operands are accumulated in float32, the dtype of ``total``."""
    add = torch.ops.aten.addmm if total.dim() == 2 else torch.ops.aten.baddbmm
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        add.out(total, a, b, beta=beta, alpha=factor, out=total)
    elif total.is_cuda and WIDENING_PRODUCTS:
        add.dtype_out(total, a, b, total.dtype, beta=beta, alpha=factor, out=total)
    else:
        add.out(total, a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=factor, out=total)


def dot_precision(architecture: str, dtype: torch.dtype) -> str:
    """The ``input_precision`` of tl.dot with which float32 products keep float32's accuracy (AMD has no TF32x3)."""
    return "tf32x3" if dtype == torch.float32 and architecture.startswith("sm_") else "ieee"


def norm_eps(dtype: torch.dtype) -> float:
    """The norm up to which a vector counts as zero: it then has no direction and receives no gradient.

    This is 1e-12, as in torch.nn.functional.normalize. The inverse norm is held in ``dtype``, and float16 cannot
    hold 1e12, so for float16 it is the smallest normal number.
    """
    return 2.0**-14 if dtype == torch.float16 else 1e-12


def row_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """|x| along the last dimension, in ``dtype``; also where squares overflow, as those of 1e20 do in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    if _squares_fit(x, norm):
        return norm
    largest, scaled = _largest_and_scaled_norm(x, dtype)
    return torch.where(norm.isfinite() | largest.isinf(), norm, largest * scaled)


def inverse_row_norms(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """1 / |x| along the last dimension, in ``dtype``: also where |x| overflows; NaN for rows that are not finite. And
    whether all rows are seen to be finite and to have a direction: on the CPU, where looking costs little."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    if norm.device.type == "cpu" and norm.numel():
        lowest, highest = map(float, norm.aminmax())
        if 2 * norm_eps(dtype) < lowest and highest < torch.inf:
            return norm.reciprocal_(), True
    if _squares_fit(x, norm):
        otherwise: Tensor | float = torch.nan
    else:
        largest, scaled = _largest_and_scaled_norm(x, dtype)
        otherwise = largest.reciprocal() / scaled
    return torch.where(norm.isfinite(), norm.reciprocal(), otherwise), False


def inverse_norms(x: Tensor, eps: float, out: Tensor) -> None:
    """Write 1 / |x| along the last dimension into ``out``: 0 where |x| <= eps, right where squares overflow in float32.

    In few launches: a GPU forms sums in float64, which costs it nothing while it waits for memory."""
    dtype = accumulation_dtype(x.dtype)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        norm = row_norms(x, dtype)
    else:
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype if x.dtype == torch.float16 else torch.float64)
    torch.reciprocal(torch.threshold(norm, eps, torch.inf), out=out)


def _squares_fit(x: Tensor, norm: Tensor) -> bool:
    """Whether sums of squares cannot overflow, or are seen not to: on the CPU, where looking costs little."""
    return x.dtype == torch.float16 or (x.device.type == "cpu" and bool(norm.isfinite().all()))


def _largest_and_scaled_norm(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """max |x_i| and |x| / max |x_i| along the last dimension; NaN for the latter where an element is not finite."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, dtype=dtype)
    return largest, torch.linalg.vector_norm(x / largest.unsqueeze(-1), dim=-1, dtype=dtype)


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| along the last dimension, in the dtype of x; 0, as is the gradient, where x counts as zero."""
    dtype, eps = accumulation_dtype(x.dtype), norm_eps(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    if torch.compiler.is_compiling() or not _squares_fit(x, norm.detach()):
        # The same direction, from rows whose squares fit: a factor that is constant leaves the gradient as it is. Other
        # rows are divided by 1, since rows of zeros divided by 0 would have a gradient of NaN even where not selected.
        largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True, dtype=dtype)
        x = (x / torch.where(largest > torch.finfo(dtype).max ** 0.25, largest, 1)).to(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return (x * norm.masked_fill(norm <= eps, torch.inf).reciprocal()).to(x.dtype)
