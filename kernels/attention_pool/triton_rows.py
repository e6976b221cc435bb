"""Rows over their norms in Triton: one pass over memory for the norms, or for the unit rows, and one for the gradient.

A program holds BLOCK_M whole rows, read at 16 bytes per load. Squares that overflow are summed once more from smaller
numbers.

``similarity.triton_rows`` has kernels of its own: rows there may take no part, rows that are not finite have a norm of
NaN, norms are summed in float64 and known before anybody asks for unit rows. One kernel for both would be two in one.

Legend: B images of P rows x of width D; unit: x / |x|; ``inverse``: 1 / |x|, 0 for rows that count as zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from betaclip.kernels.attention_pool.triton_kernels import launch
from betaclip.kernels.precision import accumulation_dtype

_ELEMENTS = 2048  # of a program's block: 16 for each thread
_SHRINK = {torch.float32: 2.0**-80, torch.float64: 2.0**-600}  # squares times its square neither overflow nor vanish


@triton.jit(do_not_specialize=["P", "rows"])
def _unit_rows_fwd_kernel(
    x_ptr, unit_ptr, inverse_ptr,  # (B, P, D), (B, P, D) if HAS_UNIT, (B, P)
    P, rows, stride_image, stride_row,
    D: tl.constexpr, EPS: tl.constexpr, SHRINK: tl.constexpr, HAS_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_m, offs_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (offs_m < rows)[:, None] & (offs_d < D)[None, :]
    x_offsets = (offs_m // P).to(tl.int64) * stride_image + (offs_m % P).to(tl.int64) * stride_row
    x = tl.load(x_ptr + x_offsets[:, None] + offs_d[None, :], mask=mask, other=0.0).to(ACC)
    shrunk = x * SHRINK
    squares, small = tl.sum(x * x, 1), tl.sum(shrunk * shrunk, 1)
    fits = squares < float("inf")
    zero = squares <= EPS * EPS
    root = tl.sqrt(tl.where(zero, 1.0, tl.where(fits, squares, small)))
    inverse = tl.where(zero, 0.0, tl.where(fits, 1.0, SHRINK) / root)
    tl.store(inverse_ptr + offs_m, inverse, mask=offs_m < rows)
    if HAS_UNIT:
        unit = (x * inverse[:, None]).to(unit_ptr.dtype.element_ty)
        tl.store(unit_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :], unit, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _unit_rows_bwd_kernel(
    unit_ptr, inverse_ptr, dunit_ptr, dx_ptr,  # (rows, D), (rows,), (rows, D) twice
    rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_m, offs_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (offs_m < rows)[:, None] & (offs_d < D)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    unit = tl.load(unit_ptr + offsets, mask=mask, other=0.0).to(ACC)
    dunit = tl.load(dunit_ptr + offsets, mask=mask, other=0.0).to(ACC)
    inverse = tl.load(inverse_ptr + offs_m, mask=offs_m < rows, other=0.0)
    dx = (dunit - unit * tl.sum(unit * dunit, 1)[:, None]) * inverse[:, None]
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def unit_rows_fwd(x: Tensor, eps: float, inverse: Tensor, unit: Tensor | None) -> None:
    """Write 1 / |x| of (B, P, D) into ``inverse`` (B, P): 0 where |x| <= eps; and x / |x| into ``unit``, if it is not
    None. Both are contiguous."""
    images, patches, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    acc = accumulation_dtype(x.dtype)
    _launch_rows(
        _unit_rows_fwd_kernel, images * patches, width, acc, x, unit, inverse, patches, images * patches, x.stride(0),
        x.stride(1), EPS=eps, SHRINK=_SHRINK[acc], HAS_UNIT=unit is not None,
    )  # fmt: skip


def unit_rows_bwd(unit: Tensor, inverse: Tensor, dunit: Tensor) -> Tensor:
    """The gradient of x, like unit, from unit and inverse as they were written, and the gradient of unit."""
    dx, rows = torch.empty_like(unit), inverse.numel()
    _launch_rows(
        _unit_rows_bwd_kernel, rows, unit.shape[-1], inverse.dtype, unit, inverse, dunit.contiguous(), dx, rows
    )
    return dx


def _launch_rows(kernel: Any, rows: int, width: int, acc: torch.dtype, *arguments: Any, **constants: Any) -> None:
    if rows == 0:
        return
    block_d = triton.next_power_of_2(width)
    block_m = max(1, _ELEMENTS // block_d)
    launch(
        kernel, -(-rows // block_m), arguments, D=width, BLOCK_M=block_m, BLOCK_D=block_d,
        ACC=tl.float64 if acc == torch.float64 else tl.float32, **constants,
    )  # fmt: skip
