"""Multi-head attention pooling of many patches by few queries.

``attention_pool`` chooses between two orders of the same products: projecting every patch to keys and values, or
folding these projections into the queries' side (``folded``). The folded form is one ``torch.library`` operator; if
the backend is an ``Attention`` object instead of a name, the operator's function is called directly. The projected form
is left to PyTorch's autograd.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from betaclip.kernels.architecture import triton_not_supported_reasons
from betaclip.kernels.attention_pool import projected
from betaclip.kernels.attention_pool.cost import folding_pays
from betaclip.kernels.attention_pool.folded import (
    Attention,
    Eager,
    Kept,
    Pooling,
    attended,
    attention_pool_bwd,
    attention_pool_fwd,
    kept_images,
)
from betaclip.kernels.backends import (
    always_supported,
    count_run,
    define_operator,
    expect,
    needed_gradients,
    refuse_second_derivative,
    resolve,
    run_operator,
    without_autocast,
)
from betaclip.kernels.precision import DTYPES, accumulation_dtype, autocast_off, norm_eps

FOLDED: dict[str, Callable[..., list[str]]] = {"triton": triton_not_supported_reasons, "folded": always_supported}
PROJECTED: dict[str, Callable[..., list[str]]] = {"sdpa": always_supported, "reference": always_supported}
BACKENDS = FOLDED | PROJECTED
Backend = str | Attention


def local_backend(backend: Backend, has_sink: bool = False) -> Attention:
    """The object behind a folding backend's name. A backend for one architecture would be chosen here."""
    if backend == "triton":
        from betaclip.kernels.attention_pool.triton_kernels import Fused  # Triton may not be installed

        return Fused()
    attention = Eager() if isinstance(backend, str) else backend
    return replace(attention, keeps_lse=True) if has_sink and isinstance(attention, Eager) else attention


def attention_pool(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    mask: Tensor | None = None,
    *,
    add_zero_attn: bool = False,
    k_bias: Tensor | None = None,
    normalize: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Pool each image's patches by queries: multi-head attention whose keys and values need not exist.

    Equivalent to:

        x = F.normalize(x, dim=-1)  # if normalize
        q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2)
                   for t in (q, F.linear(x, k_weight), F.linear(x, v_weight, v_bias)))
        out = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        return out.transpose(1, 2).flatten(2)

    With ``add_zero_attn`` a query also attends to a key and a value of zeros, as in nn.MultiheadAttention:

        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)))

    Otherwise a bias of the keys cancels in the softmax. ``"auto"`` folds the projections of keys and values into the
    queries' side where that takes less time (``cost``). What is then kept for the backward is the arguments, the
    result, the norms of the patches and at most two numbers for each query and head; on the CPU also the attention
    weights of as many images as fit into 256 MiB, and the weighted means of patches if they fit as well, so that the
    backward need not compute them again. Softmax and sums are in float32 (float64 for float64), and the result is in
    the dtype of ``x``, under autocast as well. The result is deterministic, and so are its gradients, except
    that on GPUs those of ``"sdpa"`` vary by rounding. It can be differentiated once in ``x``,
    ``q``, ``k_weight``, ``v_weight``, ``v_bias`` and ``k_bias``; the projected backends can be differentiated as often
    as PyTorch's own operators.

    Args:
        x: (B, P, D) patches, P >= 1. With ``normalize`` they are divided by their norms; patches of norm 0 (up to
            1e-12; float16: 2^-14) stay 0.
        q: (B, K, D) projected queries of the same dtype, not scaled; (1, K, D): the same for every image.
        k_weight, v_weight: (D, D) projections of keys and values.
        v_bias: (D,) bias of the values, or None.
        num_heads: H, a divisor of D.
        mask: (B, P) bool, True = valid patch; other patches are ignored and may hold anything, NaN included.
        add_zero_attn: add a key and a value of zeros to the patches of each image.
        k_bias: (D,) bias of the keys, or None. Without ``add_zero_attn`` it has no effect.
        backend: ``"auto"``; ``"triton"`` or ``"folded"`` (plain PyTorch), which fold;
            ``"sdpa"`` or ``"reference"``, which project; or an ``Attention`` object, which folds.

    Returns:
        (B, K, D), the heads side by side; 0 for an image without a valid patch.

    Raises:
        ValueError: shapes, dtypes or devices disagree; D is not divisible by ``num_heads``.
        NotImplementedError: the backend cannot serve these tensors; the message says why.

    Example:
        >>> import torch
        >>> from betaclip.kernels.attention_pool import attention_pool
        >>> x = torch.eye(4).view(1, 4, 4)  # one image of 4 patches
        >>> q = torch.tensor([[[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])  # like the first patch; like none
        >>> out = attention_pool(x, q, torch.eye(4), torch.eye(4), None, num_heads=1)
        >>> for row in out[0].tolist():
        ...     print([round(value, 2) for value in row])
        [0.97, 0.01, 0.01, 0.01]
        [0.25, 0.25, 0.25, 0.25]
    """
    pooling = _pooling(x, q, k_weight, v_weight, v_bias, num_heads, mask, normalize, add_zero_attn, k_bias)
    if isinstance(backend, str):
        # Only the choice weighs the costs, so that a named backend is exported for any number of images and queries.
        backend = resolve("attention_pool", backend, _preferred(pooling) if backend == "auto" else BACKENDS, x, q)
    if not isinstance(backend, str) or backend in FOLDED:
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in pooling[:5])
        return _Folded.apply(*pooling[:7], keep, *pooling[7:], backend)
    if not torch.compiler.is_compiling():
        count_run("attention_pool", backend)
    with autocast_off(x.device.type):  # or dtype and precision would follow the choice of backend
        return projected.sdpa(pooling, k_bias) if backend == "sdpa" else projected.reference(pooling)


def attention_weights(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    *,
    add_zero_attn: bool = False,
    k_bias: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The attention weights (B, K, P) of :func:`attention_pool`, averaged over heads, for example to draw them.

    Plain PyTorch, in O(B·H·K·P) memory. The arguments are ``attention_pool``'s; 0 for an image without a valid patch.
    With ``add_zero_attn`` they sum to less than 1: the key of zeros has the rest.
    """
    pooling = _pooling(x, q, k_weight, k_weight, None, num_heads, mask, normalize, add_zero_attn, k_bias)
    with autocast_off(x.device.type):
        return projected.mean_attention(pooling)


def _pooling(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    mask: Tensor | None,
    normalize: bool,
    add_zero_attn: bool,
    k_bias: Tensor | None,
) -> Pooling:
    """The arguments, checked; queries are one per image, masked patches are 0."""
    _check(x, q, k_weight, v_weight, v_bias, num_heads, mask, k_bias)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    sink = _sink(q, k_bias, num_heads).expand(x.shape[0], -1, -1) if add_zero_attn else None
    if q.shape[0] != x.shape[0]:
        q = q.expand(x.shape[0], -1, -1)
    return Pooling(x, q, k_weight, v_weight, v_bias, mask, sink, num_heads, norm_eps(x.dtype) if normalize else None)


def _sink(q: Tensor, k_bias: Tensor | None, num_heads: int) -> Tensor:
    """(B or 1, K, H) in accumulation dtype: the logit 0 of a key of zeros, less what the bias adds to all others."""
    dtype = accumulation_dtype(q.dtype)
    if k_bias is None:
        return q.new_zeros(*q.shape[:2], num_heads, dtype=dtype)
    of_bias = (q.to(dtype) * k_bias.to(dtype)).unflatten(2, (num_heads, -1))
    return of_bias.sum(3) * -(of_bias.shape[3] ** -0.5)


def _preferred(pooling: Pooling) -> dict[str, Callable[[Tensor, Tensor], list[str]]]:
    """All backends, those of the cheaper form first."""
    x, queries = pooling.x, pooling.q.shape[1]
    pays = folding_pays(x.shape[0], queries, x.shape[1], x.shape[2], pooling.num_heads, x.dtype, x.device.type)
    return FOLDED | PROJECTED if pays else PROJECTED | FOLDED


def _check(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    mask: Tensor | None,
    k_bias: Tensor | None,
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
    others = {"q": q, "k_weight": k_weight, "v_weight": v_weight, "v_bias": v_bias, "k_bias": k_bias}
    for name in ("k_weight", "v_weight"):
        expect(name, others[name], shape=(width, width))
    for name in ("v_bias", "k_bias"):
        expect(name, others[name], shape=(width,))
    for name, tensor in others.items():
        expect(name, tensor, "as x", dtype=x.dtype)
    if mask is not None and (mask.shape != (images, patches) or mask.dtype != torch.bool):
        expected = f"bool of shape ({images}, {patches}), True = valid"
        raise ValueError(f"mask: expected {expected}, got {mask.dtype} {tuple(mask.shape)}")
    for name, tensor in (others | {"mask": mask}).items():
        expect(name, tensor, "as for x", device=x.device)


@without_autocast
def _folded(  # type: ignore[no-untyped-def]
    x, q, k_weight, v_weight, v_bias, mask, sink, keep, num_heads, eps, backend: Backend
) -> tuple[Tensor, ...]:
    """The result, and for the backward log-sum-exps, inverse norms, weights and means, empty if it does not need
    them."""
    pooling = Pooling(x, q, k_weight, v_weight, v_bias, mask, sink, num_heads, eps)
    *results, kept = attention_pool_fwd(pooling, _running(backend, sink is not None), keep)
    return *results, *kept


@without_autocast
def _folded_backward(  # type: ignore[no-untyped-def]
    x,
    q,
    k_weight,
    v_weight,
    v_bias,
    mask,
    sink,
    out,
    lse,
    inverse_norm,
    kept_weights,
    kept_means,
    dout,
    need_dx,
    num_heads,
    eps,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, P, D) (empty if not needed), dq (B, K, D), and the gradients of k_weight and v_weight (2, D, D)."""
    pooling = Pooling(x, q, k_weight, v_weight, v_bias, mask, sink, num_heads, eps)
    kept, running = Kept(kept_weights, kept_means), _running(backend, sink is not None)
    return attention_pool_bwd(pooling, out, lse, inverse_norm, kept, dout, need_dx, running)


def _running(backend: Backend, has_sink: bool) -> Attention:
    """The object behind a backend's name, which is about to run."""
    if isinstance(backend, str):
        count_run("attention_pool", backend)
    return local_backend(backend, has_sink)


_TENSORS = "Tensor x, Tensor q, Tensor k_weight, Tensor v_weight, Tensor? v_bias, Tensor? mask, Tensor? sink"
_OPTIONS = "int num_heads, float? eps, str backend"
folded = define_operator("attention_pool", _folded, f"{_TENSORS}, bool keep, {_OPTIONS}", 5)
folded_backward = define_operator(
    "attention_pool_backward",
    _folded_backward,
    f"{_TENSORS}, Tensor out, Tensor lse, Tensor inverse_norm, Tensor kept_weights, Tensor kept_means, Tensor dout, "
    f"bool need_dx, {_OPTIONS}",
    3,
)
folded_backward.register_autograd(refuse_second_derivative)


@folded.register_fake
def _(x, q, k_weight, v_weight, v_bias, mask, sink, keep, num_heads, eps, backend):  # type: ignore[no-untyped-def]
    attention, latents = local_backend(backend, sink is not None), q.shape[1] * num_heads
    pooling = Pooling(x, q, k_weight, v_weight, v_bias, mask, sink, num_heads, eps)
    lse = (x.shape[0], latents) if attention.keeps_lse else (0,)
    norms = (0,) if eps is None else x.shape[:2]
    counts = kept_images(pooling, attention) if keep else (0, 0)
    kept = ((count, latents, columns) for count, columns in zip(counts, x.shape[1:], strict=True))
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(q.shape), *(x.new_empty(shape, dtype=dtype) for shape in (lse, norms, *kept))


@folded_backward.register_fake
def _(x, q, k_weight, v_weight, *others):  # type: ignore[no-untyped-def]
    need_dx = others[-4]
    return x.new_empty(x.shape if need_dx else (0,)), x.new_empty(q.shape), x.new_empty(2, *k_weight.shape)


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, q, k_weight, v_weight, v_bias, mask, sink, *options):  # type: ignore[no-untyped-def]
        tensors = x, q, k_weight, v_weight, v_bias, mask, sink
        out, *statistics = run_operator(folded, _folded, *tensors, *options)
        ctx.save_for_backward(*tensors, out, *statistics)
        ctx.options = options[1:]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them at each access
        x, *_, mask, sink, out, lse, _, _, _ = tensors
        need_dx = ctx.needs_input_grad[0]
        dx, dq, dweights = run_operator(folded_backward, _folded_backward, *tensors, dout, need_dx, *ctx.options)
        if mask is not None:
            dout = dout.masked_fill(~mask.any(1)[:, None, None], 0)
        dsink = None
        if sink is not None:
            dtype = accumulation_dtype(x.dtype)
            # Its value is 0, so that its weight's gradient is -<dout, out> and that of its logit the weight times this.
            share, by_head = attended(lse.view(sink.shape), sink), (ctx.options[0], -1)
            products = (dout.to(dtype) * out.to(dtype)).unflatten(2, by_head).sum(3)
            dsink = (share - 1) * products
            dout = (dout.unflatten(2, by_head) * share.unsqueeze(3)).flatten(2)
        dv_bias = dout.sum((0, 1)).to(x.dtype) if ctx.needs_input_grad[4] else None  # 16 bits are summed in float32
        return needed_gradients(ctx, dx, dq, *dweights.unbind(), dv_bias, None, dsink)
