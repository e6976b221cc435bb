"""The dtypes of operands, of accumulation and of matrix products, and the norm below which a row counts as zero."""

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
    """float32 matrix products in ``"ieee"`` precision, or on the CPU with operands rounded to ``"bf16"``, meanwhile.

    The setting belongs to the process: another thread's float32 product that runs meanwhile is affected too.
    """
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def half_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The context for products of operands of ``dtype`` that were widened to float32.

    16-bit operands are multiplied as bfloat16 on the CPU, at four times float32's rate where it has AMX, and in TF32
    on a GPU; wider ones as the user's settings say.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    if device.type == "cuda":
        return float32_products("tf32", "cuda")
    bfloat16 = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return float32_products("bf16", "cpu") if bfloat16 else nullcontext()


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or = if ``first``, of matrices or batches of them; 16-bit operands with accumulation and result
    in float32."""
    add = torch.ops.aten.addmm if total.dim() == 2 else torch.ops.aten.baddbmm
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        add.out(total, a, b, beta=beta, out=total)
    elif total.is_cuda and not torch.version.hip:
        add.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:  # no such product on the CPU, where the interpreter runs, nor in every ROCm build
        add.out(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def least_norm(dtype: torch.dtype) -> float:
    """Rows with a smaller norm count as zero: 1e-12, as in torch.nn.functional.normalize; for float16, which must hold
    the inverse, its smallest normal number."""
    return 2.0**-14 if dtype == torch.float16 else 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| along the last dimension, in the dtype of x; 0, as is the gradient, where x counts as zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    return (x * norm.masked_fill(norm < least_norm(x.dtype), torch.inf).reciprocal()).to(x.dtype)
