"""Rows divided by their norms, in as few passes over memory and as few launches as there can be.

A GPU's kernels are those of ``triton_rows``; elsewhere, and where something else than a launch is wanted (a graph, a
second derivative), PyTorch's operators do the same.
"""

from typing import Any

import torch
from torch import Tensor

from betaclip.kernels import precision
from betaclip.kernels.architecture import triton_not_supported_reasons
from betaclip.kernels.backends import runs_at_once
from betaclip.kernels.precision import accumulation_dtype, inverse_norms, norm_eps


def kernels_serve(x: Tensor) -> bool:
    """Whether the rows of x are a kernel's."""
    return x.is_cuda and runs_at_once(x) and not triton_not_supported_reasons(x)


def inverse_norms_into(x: Tensor, eps: float, out: Tensor) -> None:
    """Write 1 / |x| of (B, P, D) into ``out`` (B, P), contiguous: 0 where |x| <= eps."""
    if not kernels_serve(x):
        return inverse_norms(x, eps, out)
    from betaclip.kernels.attention_pool.triton_rows import unit_rows_fwd  # Triton may not be installed

    unit_rows_fwd(x, eps, out, None)


class UnitRows(torch.autograd.Function):
    """x / |x| of (B, P, D), and 1 / |x| (B, P, 1), in a third of the passes over memory that the formula takes.

    Arguments: x; eps, the norm up to which a row counts as zero. The gradient is written in terms of the results, so
    that it is differentiable as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))
        if kernels_serve(x):
            from betaclip.kernels.attention_pool.triton_rows import unit_rows_fwd

            unit = x.new_empty(x.shape)
            unit_rows_fwd(x, eps, inverse, unit)
            inverse = inverse.unsqueeze(2)
        else:
            inverse_norms(x, eps, inverse)
            inverse = inverse.unsqueeze(2)
            unit = torch.mul(x, inverse, out=torch.empty_like(x))
        ctx.save_for_backward(unit, inverse)
        ctx.set_materialize_grads(False)
        return unit, inverse

    @staticmethod
    def backward(ctx: Any, dunit: Tensor | None, dinverse: Tensor | None) -> tuple[Tensor | None, None]:
        unit, inverse = ctx.saved_tensors
        if dunit is not None and dinverse is None and not torch.is_grad_enabled() and kernels_serve(unit):
            from betaclip.kernels.attention_pool.triton_rows import unit_rows_bwd

            return unit_rows_bwd(unit, inverse, dunit), None
        if dunit is None:
            dunit = torch.zeros_like(unit)
        along = (unit * dunit).sum(2, keepdim=True, dtype=inverse.dtype)
        if dinverse is not None:  # only in a second derivative
            along = along + inverse * dinverse
        return torch.addcmul(dunit, unit, along.to(unit.dtype), value=-1).mul_(inverse), None


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| along the last dimension of (B, P, D); 0, as is the gradient, where x counts as zero.

    Compilers take the formula, which they fuse: torch 2.11's lose the gradient of a result that a ``Function`` has
    written in place."""
    if torch.compiler.is_compiling():
        return precision.unit_rows(x)
    unit: Tensor = UnitRows.apply(x, norm_eps(x.dtype))[0]
    return unit
