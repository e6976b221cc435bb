"""Dtypes of operands, accumulation and matrix products, and the norm up to which a vector counts as zero."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and gradients inside every backend."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def float32_products(precision: str, device_type: str) -> Iterator[None]:
    """Run float32 matrix products in ``precision``: ``"ieee"``, ``"tf32"`` on a GPU, or ``"bf16"`` on the CPU.

    The setting belongs to the process, so it also affects float32 products that other threads run in the meantime.
    """
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def half_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The context in which to multiply operands of ``dtype`` that were widened to float32.

    16-bit operands are multiplied as bfloat16 on a CPU that supports it, at four times float32's rate with AMX, and in
    TF32 on a GPU. Products of wider operands follow the user's settings.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    if device.type == "cuda":
        return float32_products("tf32", "cuda")
    bfloat16 = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return float32_products("bf16", "cpu") if bfloat16 else nullcontext()


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a @ b to ``total`` in place, or overwrite it if ``first``; for matrices and for batches of matrices.

    16-bit operands are accumulated in float32, the dtype of ``total``."""
    add = torch.ops.aten.addmm if total.dim() == 2 else torch.ops.aten.baddbmm
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        add.out(total, a, b, beta=beta, out=total)
    elif total.is_cuda and not torch.version.hip:
        add.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:  # neither the CPU, where the interpreter runs, nor every ROCm build has a product with another output dtype
        add.out(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def dot_precision(architecture: str, dtype: torch.dtype) -> str:
    """The ``input_precision`` of tl.dot with which float32 products keep float32's accuracy (AMD has no TF32x3)."""
    return "tf32x3" if dtype == torch.float32 and architecture.startswith("sm_") else "ieee"


def norm_eps(dtype: torch.dtype) -> float:
    """The norm up to which a vector counts as zero: it then has no direction and receives no gradient.

    This is 1e-12, as in torch.nn.functional.normalize. The inverse norm is held in ``dtype``, and float16 cannot
    hold 1e12, so for float16 it is the smallest normal number.
    """
    return 2.0**-14 if dtype == torch.float16 else 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| along the last dimension, in the dtype of x; 0, as is the gradient, where x counts as zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    return (x * norm.masked_fill(norm <= norm_eps(x.dtype), torch.inf).reciprocal()).to(x.dtype)
