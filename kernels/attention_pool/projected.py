"""Attention pooling by projected keys and values, under PyTorch's own autograd.

This is less work than folding where the queries are so many that projecting every patch pays.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.attention_pool import rows
from betaclip.kernels.attention_pool.folded import Pooling
from betaclip.kernels.fused_attention import fused_attention
from betaclip.kernels.precision import accumulation_dtype, unit_rows


def _unit_patches(pooling: Pooling, *, fused: bool = False) -> Pooling:
    """The arguments with patches of length 1; ``fused``, in as few passes as there can be."""
    if pooling.norm_eps is None:
        return pooling
    x = rows.unit_rows(pooling.x) if fused else unit_rows(pooling.x)
    return pooling._replace(x=x, norm_eps=None)


def _heads(t: Tensor, pooling: Pooling) -> Tensor:
    """(B, H, rows, D / H) from (B, rows, D)"""
    return t.unflatten(2, (pooling.num_heads, -1)).transpose(1, 2)


def _softmax_mask(mask: Tensor) -> Tensor:
    """(B, 1, 1, P): the valid patches, or all patches of an image without any, so that its softmax is not NaN."""
    return (mask | ~mask.any(1, keepdim=True))[:, None, None]


def _finish(out: Tensor, pooling: Pooling, bias: Tensor | None = None) -> Tensor:
    """(B, K, D) from the heads' (B, H, K, D / H), plus the bias (D,)"""
    out = out.transpose(1, 2).flatten(2)
    if bias is not None:
        out = out + bias
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
    """PyTorch's fused attention after the projections. k_bias: (D,) or None; it counts if there is a sink.

    Without a sink the weights sum to 1 and pass a bias of the values on as it is: it is added to the few results."""
    unit = _unit_patches(pooling, fused=True)
    k_bias, v_bias, added = (None, None, unit.v_bias) if unit.sink is None else (k_bias, unit.v_bias, None)
    k, v = F.linear(unit.x, unit.k_weight, k_bias), F.linear(unit.x, unit.v_weight, v_bias)
    mask = None if unit.mask is None else _softmax_mask(unit.mask)
    if unit.sink is not None:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1), value=True)
    q, k, v = (_heads(t, unit) for t in (unit.q, k, v))
    return _finish(fused_attention(q, k, v, mask, scale=unit.scale), unit, added)


def mean_attention(pooling: Pooling) -> Tensor:
    """(B, K, P) averaged over heads; 0 in an image without valid patches."""
    mean = _attention(_unit_patches(_wide(pooling))).mean(1).to(pooling.x.dtype)
    empty = pooling.empty()
    return mean if empty is None else mean.masked_fill(empty, 0)
