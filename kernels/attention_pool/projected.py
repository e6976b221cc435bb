"""Attention pooling by projected keys and values, under PyTorch's own autograd.

This is less work than folding where the queries are so many that projecting every patch pays.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.attention_pool.folded import Pooling
from betaclip.kernels.precision import accumulation_dtype, inverse_norms, unit_rows


class _UnitPatches(torch.autograd.Function):
    """x / |x| of (B, P, D), and 1 / |x| (B, P, 1), in a third of the passes over memory that the formula takes.

    The gradient is written in terms of the results, so that it is differentiable as well. Compilers take the formula,
    which they fuse: torch 2.11's lose the gradient of a result that a forward has written in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))
        inverse_norms(x, eps, inverse)
        inverse = inverse.unsqueeze(2)
        unit = torch.mul(x, inverse, out=torch.empty_like(x))
        ctx.save_for_backward(unit, inverse)
        ctx.set_materialize_grads(False)
        return unit, inverse

    @staticmethod
    def backward(ctx: Any, dunit: Tensor | None, dinverse: Tensor | None) -> tuple[Tensor | None, None]:
        unit, inverse = ctx.saved_tensors
        if dunit is None:
            dunit = torch.zeros_like(unit)
        along = (unit * dunit).sum(2, keepdim=True, dtype=inverse.dtype)
        if dinverse is not None:  # only in a second derivative
            along = along + inverse * dinverse
        return torch.addcmul(dunit, unit, along.to(unit.dtype), value=-1).mul_(inverse), None


def _unit_patches(pooling: Pooling, *, fused: bool = False) -> Pooling:
    """The arguments with patches of length 1, written out for the compiler to fuse, or ``fused`` already."""
    if pooling.norm_eps is None:
        return pooling
    fused = fused and not torch.compiler.is_compiling()
    x = _UnitPatches.apply(pooling.x, pooling.norm_eps)[0] if fused else unit_rows(pooling.x)
    return pooling._replace(x=x, norm_eps=None)


def _heads(t: Tensor, pooling: Pooling) -> Tensor:
    """(B, H, rows, D / H) from (B, rows, D)"""
    return t.unflatten(2, (pooling.num_heads, -1)).transpose(1, 2)


def _softmax_mask(mask: Tensor) -> Tensor:
    """(B, 1, 1, P): the valid patches, or all patches of an image without any, so that its softmax is not NaN."""
    return (mask | ~mask.any(1, keepdim=True))[:, None, None]


def _finish(out: Tensor, pooling: Pooling) -> Tensor:
    """(B, K, D) from the heads' (B, H, K, D / H)"""
    out = out.transpose(1, 2).flatten(2)
    empty = pooling.empty()
    return out if empty is None else out.masked_fill(empty, 0)


def _attention(pooling: Pooling) -> Tensor:
    """The attention weights (B, H, K, P), for normalised patches; the sink has what is left of 1."""
    logits = _heads(pooling.q, pooling) @ _heads(F.linear(pooling.x, pooling.k_weight), pooling).mT * pooling.scale
    if pooling.mask is not None:
        logits = logits.masked_fill(~_softmax_mask(pooling.mask), -torch.inf)
    if pooling.sink is None:
        return logits.softmax(-1)
    return torch.cat((logits, pooling.sink.transpose(1, 2).unsqueeze(3)), 3).softmax(-1)[..., :-1]


def _wide(pooling: Pooling) -> Pooling:
    """The arguments in accumulation dtype."""
    dtype = accumulation_dtype(pooling.x.dtype)
    x, q, k_weight, v_weight = (t.to(dtype) for t in pooling[:4])
    v_bias = None if pooling.v_bias is None else pooling.v_bias.to(dtype)
    return pooling._replace(x=x, q=q, k_weight=k_weight, v_weight=v_weight, v_bias=v_bias)


def reference(pooling: Pooling) -> Tensor:
    """The definition of the correct result: every step in accumulation dtype, written out."""
    wide = _unit_patches(_wide(pooling))
    out = _attention(wide) @ _heads(F.linear(wide.x, wide.v_weight, wide.v_bias), wide)
    return _finish(out, wide).to(pooling.x.dtype)


def sdpa(pooling: Pooling, k_bias: Tensor | None) -> Tensor:
    """PyTorch's fused attention after the projections. k_bias: (D,) or None; it counts if there is a sink."""
    unit = _unit_patches(pooling, fused=True)
    k_bias = None if unit.sink is None else k_bias
    k, v = F.linear(unit.x, unit.k_weight, k_bias), F.linear(unit.x, unit.v_weight, unit.v_bias)
    mask = None if unit.mask is None else _softmax_mask(unit.mask)
    if unit.sink is not None:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1), value=True)
    q, k, v = (_heads(t, unit) for t in (unit.q, k, v))
    return _finish(F.scaled_dot_product_attention(q, k, v, mask, scale=unit.scale), unit)


def mean_attention(pooling: Pooling) -> Tensor:
    """(B, K, P) averaged over heads; 0 in an image without valid patches."""
    mean = _attention(_unit_patches(_wide(pooling))).mean(1).to(pooling.x.dtype)
    empty = pooling.empty()
    return mean if empty is None else mean.masked_fill(empty, 0)
