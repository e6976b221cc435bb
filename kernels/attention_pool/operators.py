"""Multi-head attention pooling of patches by queries, of which there are few.

``attention_pool`` chooses between two orders of the same products: projecting every patch to keys and values, or
folding these projections to the side of the queries (``attention_pool_folded``). The folded form is one
``torch.library`` operator whose backend is a string argument; the projected form is left to PyTorch's autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from betaclip.kernels.attention_pool import (
    folded as attention_pool_folded,
)
from betaclip.kernels.attention_pool import (
    projected as attention_pool_projected,
)
from betaclip.kernels.attention_pool import (
    triton_backend as attention_pool_triton,
)
from betaclip.kernels.attention_pool.cost import folding_pays
from betaclip.kernels.attention_pool.folded import Attention, Eager, Pooling
from betaclip.kernels.backends import resolve, without_autocast
from betaclip.kernels.precision import DTYPES, accumulation_dtype, least_norm

FOLDED: dict[str, Callable[[Tensor, Tensor], list[str]]] = {
    "triton": attention_pool_triton.why_not,
    "folded": attention_pool_folded.why_not,
}
PROJECTED: dict[str, Callable[[Tensor, Tensor], list[str]]] = {
    "sdpa": attention_pool_projected.why_not,
    "reference": attention_pool_projected.why_not,
}
BACKENDS = FOLDED | PROJECTED
_PROJECTING = {"sdpa": attention_pool_projected.sdpa, "reference": attention_pool_projected.reference}
_ATTENTION: dict[str, Attention] = {"triton": attention_pool_triton.Fused(), "folded": Eager()}


def attention_pool(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    mask: Tensor | None = None,
    *,
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Pool each image's patches by queries: multi-head attention whose keys and values need not exist.

    Equivalent to:

        x = F.normalize(x, dim=-1)  # if normalize
        q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2)
                   for t in (q, F.linear(x, k_weight), F.linear(x, v_weight, v_bias)))
        out = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        return out.transpose(1, 2).flatten(2)

    A bias of the keys cancels in the softmax, so there is none. ``"auto"`` folds the projections of keys and values
    to the side of the queries where that is less work (``attention_pool_cost``): then the backward keeps the
    arguments and the result, nothing else. Softmax and sums in float32 (float64 for float64), the result in the dtype
    of ``x``, under autocast as well; deterministic.
    Differentiable once in ``x``, ``q``, ``k_weight``, ``v_weight`` and ``v_bias``; the projected backends as often as
    PyTorch's own operators.

    Args:
        x: (B, P, D) patches, P >= 1; with ``normalize``, of any norm: they are divided by it, those of norm 0 (below
            1e-12; float16: 2^-14) stay 0.
        q: (B, K, D) projected queries of the same dtype, not scaled; (1, K, D): the same for every image.
        k_weight, v_weight: (D, D) projections of keys and values.
        v_bias: (D,) bias of the values, or None.
        num_heads: H, a divisor of D.
        mask: (B, P) bool, True = valid patch; others take part in nothing and may hold anything.
        backend: ``"auto"``; ``"triton"`` or ``"folded"`` (plain PyTorch), which fold;
            ``"sdpa"`` or ``"reference"``, which project.

    Returns:
        (B, K, D), the heads side by side; 0 for an image without a valid patch.

    Raises:
        ValueError: shapes, dtypes or devices disagree; D is not divisible by ``num_heads``.
        NotImplementedError: the backend cannot serve these tensors; the message says why.
    """
    pooling = _pooling(x, q, k_weight, v_weight, v_bias, num_heads, mask, normalize)
    backend = resolve("attention_pool", backend, _preferred(pooling), x, q)
    if backend in FOLDED:
        return folded(*pooling, backend)[0]
    with torch.autocast(x.device.type, enabled=False):  # or dtype and precision would follow the choice of backend
        return _PROJECTING[backend](pooling)


def attention_weights(
    x: Tensor, q: Tensor, k_weight: Tensor, num_heads: int, mask: Tensor | None = None, *, normalize: bool = True
) -> Tensor:
    """(B, K, P) the attention by which :func:`attention_pool` pools, averaged over heads: for pictures.

    Plain PyTorch, in O(B·H·K·P) memory. The arguments are ``attention_pool``'s; 0 for an image without a valid patch.
    """
    pooling = _pooling(x, q, k_weight, k_weight, None, num_heads, mask, normalize)
    with torch.autocast(x.device.type, enabled=False):
        return attention_pool_projected.mean_attention(pooling)


def _pooling(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    mask: Tensor | None,
    normalize: bool,
) -> Pooling:
    """Checked, queries scaled and one per image, masked patches 0."""
    _check(x, q, k_weight, v_weight, v_bias, num_heads, mask)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    q = (q * (x.shape[2] // num_heads) ** -0.5).expand(x.shape[0], -1, -1)
    return Pooling(x, q, k_weight, v_weight, v_bias, mask, num_heads, least_norm(x.dtype) if normalize else None)


def _preferred(pooling: Pooling) -> dict[str, Callable[[Tensor, Tensor], list[str]]]:
    """All backends; first the form that is less work."""
    x, texts = pooling.x, pooling.q.shape[1]
    pays = folding_pays(x.shape[0], texts, x.shape[1], x.shape[2], pooling.num_heads, x.dtype, x.device.type)
    return FOLDED | PROJECTED if pays else PROJECTED | FOLDED


def _check(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    mask: Tensor | None,
) -> None:
    """Raise on malformed tensors."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x: expected (B, P, D) with P >= 1, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    images, patches, width = x.shape
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of D = {width}, got {num_heads}")
    if q.dim() != 3 or q.shape[0] not in (1, images) or q.shape[2] != width:
        raise ValueError(f"q: expected ({images} or 1, K, {width}) as x is {tuple(x.shape)}, got {tuple(q.shape)}")
    for name, weight in (("k_weight", k_weight), ("v_weight", v_weight)):
        if weight.shape != (width, width):
            raise ValueError(f"{name}: expected shape ({width}, {width}), got {tuple(weight.shape)}")
    if v_bias is not None and v_bias.shape != (width,):
        raise ValueError(f"v_bias: expected shape ({width},), got {tuple(v_bias.shape)}")
    others = {"q": q, "k_weight": k_weight, "v_weight": v_weight, "v_bias": v_bias}
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: expected dtype {x.dtype} as x, got {tensor.dtype}")
    if mask is not None and (mask.shape != (images, patches) or mask.dtype != torch.bool):
        expected = f"bool of shape ({images}, {patches}), True = valid"
        raise ValueError(f"mask: expected {expected}, got {mask.dtype} {tuple(mask.shape)}")
    for name, tensor in (others | {"mask": mask}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as for x, got {tensor.device}")


@torch.library.custom_op("betaclip::attention_pool", mutates_args=())
@without_autocast
def folded(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    mask: Tensor | None,
    num_heads: int,
    least: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exps that the backend's backward wants."""
    pooling = Pooling(x, q, k_weight, v_weight, v_bias, mask, num_heads, least)
    return attention_pool_folded.attention_pool_fwd(pooling, _ATTENTION[backend])


@folded.register_fake
def _(x, q, k_weight, v_weight, v_bias, mask, num_heads, least, backend):  # type: ignore[no-untyped-def]
    keeps = _ATTENTION[backend].keeps_lse
    lse = (x.shape[0], q.shape[1] * num_heads) if keeps else (0,)
    return x.new_empty(q.shape), x.new_empty(lse, dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("betaclip::attention_pool_backward", mutates_args=())
@without_autocast
def folded_backward(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    num_heads: int,
    least: float | None,
    need_dx: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (B, P, D) (empty if not needed) and dq (B, K, D) in the dtype of x; dk_weight and dv_weight (D, D) in
    accumulation dtype."""
    pooling = Pooling(x, q, k_weight, v_weight, v_bias, mask, num_heads, least)
    return attention_pool_folded.attention_pool_bwd(pooling, out, lse, dout, need_dx, _ATTENTION[backend])


@folded_backward.register_fake
def _(x, q, k_weight, v_weight, v_bias, mask, out, lse, dout, num_heads, least, need_dx, backend):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(x.dtype)
    dk_weight, dv_weight = (w.new_empty(w.shape, dtype=dtype) for w in (k_weight, v_weight))
    return x.new_empty(x.shape if need_dx else (0,)), x.new_empty(q.shape), dk_weight, dv_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_heads, ctx.least, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # once: checkpoints compute them at each access
    x, mask = tensors[0], tensors[5]
    gradients = folded_backward(*tensors, dout, ctx.num_heads, ctx.least, ctx.needs_input_grad[0], ctx.backend)
    if mask is not None:
        dout = dout.masked_fill(~mask.any(1)[:, None, None], 0)
    dv_bias = dout.sum((0, 1), dtype=gradients[2].dtype) if ctx.needs_input_grad[4] else None
    casts = [
        gradient.to(x.dtype) if needed and gradient is not None else None
        for gradient, needed in zip((*gradients, dv_bias), ctx.needs_input_grad, strict=False)
    ]
    return *casts, None, None, None, None


folded.register_autograd(_autograd, setup_context=_save)
