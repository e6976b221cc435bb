"""Attention pooling with both projections folded to the query side: plain PyTorch, any device.

Head h of query k attends with one latent query z = W_kᵀ q of width D straight on the patches, and the mean of the
patches that it takes is projected afterwards: keys, values and normalised patches never exist,

    S = z x̂ᵀ,  A = softmax(S),  out_h = W_v A x̂ + b_v    with x̂ = x / |x| as a factor of S's and A's columns.

Images are taken a few at a time, so that all scratch stays in cache. The forward keeps nothing; the backward forms S
and dA = g x̂ᵀ in one product, where g = W_vᵀ dout is the gradient of the means, and with
δ = <dout, out - b_v> = Σ_p A dA per latent query

    dS = A (dA - δ),  [dz; means] = [dS; A] x̂,  dx̂ = [dS; A]ᵀ [z; g],  <x̂_p, dx̂_p> = Σ dS S + A dA,

which leaves of the gradient through the norm one multiple of x itself. Latent queries and gradients lie interleaved,
zg (c, K, 2, H, D): each half is the output of one batched product, and the whole the (c, 2 L, D) operand of others.

Only the two steps between the projections (``Attention``) differ in the Triton backend.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from betaclip.kernels.memory import scratch
from betaclip.kernels.precision import accumulation_dtype, add_product, half_products

# Of a group of images: enough for the products' full rate, little enough for the outer caches.
SCRATCH_BYTES = 32 * 2**20


def why_not(x: Tensor, q: Tensor) -> list[str]:
    """PyTorch itself is all that is needed."""
    return []


class Patches(NamedTuple):
    """Patches of c images.

    rows: (c, P, D). mask: (c, P) bool, True = valid, or None; the others' rows are zero.
    least: norms below it count as zero; None: rows are used as they are.
    """

    rows: Tensor
    mask: Tensor | None
    least: float | None

    def inverse_norm(self) -> Tensor | None:
        """(c, 1, P)"""
        if self.least is None:
            return None
        norm = torch.linalg.vector_norm(self.rows, dim=2, keepdim=True).mT
        return norm.masked_fill_(norm < self.least, torch.inf).reciprocal_()


class Attention(Protocol):
    """The steps between the projections, for c images; L = K H latent queries."""

    spares: int  # how many (c, L, P) of scratch they want
    keeps_lse: bool  # whether the backward wants the log-sum-exps

    def dtype(self, x: Tensor) -> torch.dtype:
        """Of everything between the projections."""

    def forward(self, x: Patches, z: Tensor, means: Tensor, spare: Tensor) -> Tensor | None:
        """Write the means (c, L, D) that latent queries z (c, L, D) take of the patches; (c, L) log-sum-exps if
        ``backward`` wants them."""

    def backward(
        self, x: Patches, zg: Tensor, lse: Tensor, delta: Tensor, weights: Tensor, spare: Tensor
    ) -> Tensor | None:
        """Write [dS; A] / |x| into weights (c, K, 2, H, P), from zg (c, K, 2, H, D) and δ (c, K, H, 1). Returns
        <x̂, dx̂> / |x|² (c, P), or None if patches are not normalised."""


class Eager:
    """``Attention`` by PyTorch's own operators, in accumulation dtype."""

    spares, keeps_lse = 2, False

    def dtype(self, x: Tensor) -> torch.dtype:
        return accumulation_dtype(x.dtype)

    def forward(self, x: Patches, z: Tensor, means: Tensor, spare: Tensor) -> None:
        logits, weights = spare
        torch.bmm(z, x.rows.mT, out=logits)
        inverse = x.inverse_norm()
        if inverse is not None:
            logits.mul_(inverse)
        _softmax(logits, x.mask, weights)
        torch.bmm(weights if inverse is None else weights.mul_(inverse), x.rows, out=means)

    def backward(
        self, x: Patches, zg: Tensor, lse: Tensor, delta: Tensor, weights: Tensor, spare: Tensor
    ) -> Tensor | None:
        torch.bmm(zg.flatten(1, 3), x.rows.mT, out=weights.flatten(1, 3))
        inverse = x.inverse_norm()
        factor = weights.new_ones(()) if inverse is None else inverse[:, :, None]
        logits, a = spare.view(2, *weights[:, :, 0].shape)
        torch.mul(weights[:, :, 0], factor, out=logits)
        _softmax(logits.flatten(1, 2), x.mask, a.flatten(1, 2))
        da = weights[:, :, 1].mul_(factor)
        along = None
        if inverse is not None:
            along = torch.bmm(delta.flatten(1, 3).unsqueeze(1), a.flatten(1, 2)).squeeze(1)  # Σ A δ
        ds = da.sub_(delta).mul_(a)
        if inverse is not None and along is not None:  # Σ dS S + A dA = Σ dS (S + 1) + A δ
            along += logits.add_(1).mul_(ds).flatten(1, 2).sum(1)
            along *= inverse.squeeze(1).square()
            if x.mask is not None:
                along.masked_fill_(~x.mask, 0)  # 0 times a logit of -inf
        torch.mul(ds, factor, out=weights[:, :, 0])
        torch.mul(a, factor, out=weights[:, :, 1])
        return along


def _softmax(logits: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Over the last dimension of (c, L, P), 0 for an image without valid patches; writes over the logits."""
    if mask is None:
        torch.softmax(logits, -1, out=out)
        return
    torch.softmax(logits.masked_fill_(~mask[:, None], -torch.inf), -1, out=out)
    out.masked_fill_(~mask.any(1)[:, None, None], 0)


class Pooling(NamedTuple):
    """The operation's arguments.

    x: (B, P, D) patches. q: (B, K, D) times (D / H)^-½. k_weight, v_weight: (D, D).
    v_bias: (D,) or None. mask: (B, P) bool or None. least: as for ``Patches``.
    """

    x: Tensor
    q: Tensor
    k_weight: Tensor
    v_weight: Tensor
    v_bias: Tensor | None
    mask: Tensor | None
    num_heads: int
    least: float | None

    def empty(self) -> Tensor | None:
        """(B, 1, 1) images without valid patches."""
        return None if self.mask is None else ~self.mask.any(1)[:, None, None]


class _Groups:
    """Images a few at a time, and what the products between them share, in the dtype of the attention."""

    def __init__(self, pooling: Pooling, attention: Attention, latents: int, weights: int) -> None:
        """latents, weights: how many (L, D) and (L, P) of scratch an image takes."""
        self.pooling, self.heads = pooling, pooling.num_heads
        x, self.dtype = pooling.x, attention.dtype(pooling.x)
        self.k_weight, self.v_weight = (
            weight.to(self.dtype).unflatten(0, (self.heads, -1)) for weight in (pooling.k_weight, pooling.v_weight)
        )  # (H, D / H, D)
        self.wide = x.dtype != self.dtype
        images, patches, width = x.shape
        length = pooling.q.shape[1] * self.heads
        each = length * (latents * width + weights * patches) + self.wide * 2 * patches * width
        groups = -(-images * each * self.dtype.itemsize // SCRATCH_BYTES)
        self.step = max(1, -(-images // max(groups, 1)))  # groups of one size

    def scratch(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        return scratch(shapes, self.dtype, self.pooling.x.device)

    def __iter__(self) -> Iterator[tuple[slice, Patches, Tensor]]:
        """Which images, their patches and their queries (c, K, D)."""
        x, q, _, _, _, mask, _, least = self.pooling
        for lo in range(0, x.shape[0], self.step):
            part = slice(lo, min(lo + self.step, x.shape[0]))
            rows = x[part].to(self.dtype)
            yield part, Patches(rows, None if mask is None else mask[part], least), q[part].to(self.dtype)

    def by_head(self, t: Tensor) -> Tensor:
        """(H, c K, D / H) view of (c, K, D)"""
        return t.reshape(-1, self.heads, t.shape[2] // self.heads).transpose(0, 1)


def _latents_by_head(t: Tensor) -> Tensor:
    """(H, c K, D) view of (c, K, H, D)"""
    return t.flatten(0, 1).transpose(0, 1)


def attention_pool_fwd(pooling: Pooling, attention: Attention) -> tuple[Tensor, Tensor]:
    """(B, K, D) in the dtype of x, and (B, L) log-sum-exps, or (0,) if the backward does without."""
    x, heads = pooling.x, pooling.num_heads
    images, patches, width = x.shape
    texts = pooling.q.shape[1]
    length = texts * heads
    groups = _Groups(pooling, attention, 2, attention.spares)
    step = groups.step
    latents, means, spare = groups.scratch(
        (step, texts, heads, width), (step, texts, heads, width), (attention.spares, step, length, patches)
    )
    out = x.new_empty(images, texts, width)
    statistics = []
    with half_products(x.device, x.dtype):
        for part, rows, q in groups:
            count = part.stop - part.start
            z, mean = latents[:count], means[:count]
            torch.bmm(groups.by_head(q), groups.k_weight, out=_latents_by_head(z))
            lse = attention.forward(rows, z.flatten(1, 2), mean.flatten(1, 2), spare[:, :count])
            statistics += [] if lse is None else [lse]
            _product_into(groups.by_head(out[part]), _latents_by_head(mean), groups.v_weight.mT)
    if pooling.v_bias is not None:
        out += pooling.v_bias
    empty = pooling.empty()
    if empty is not None:
        out.masked_fill_(empty, 0)
    return out, torch.cat(statistics) if statistics else x.new_empty(0, dtype=accumulation_dtype(x.dtype))


def attention_pool_bwd(
    pooling: Pooling, out: Tensor, lse: Tensor, dout: Tensor, need_dx: bool, attention: Attention
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x (empty if not needed), dq (B, K, D), dk_weight and dv_weight (D, D) in accumulation dtype."""
    x, heads = pooling.x, pooling.num_heads
    images, patches, width = x.shape
    texts = pooling.q.shape[1]
    length = texts * heads
    accumulation = accumulation_dtype(x.dtype)
    groups = _Groups(pooling, attention, 4, 2 + attention.spares)
    step = groups.step
    zgs, sums, weights, spare = groups.scratch(
        (step, texts, 2, heads, width),
        (step, texts, 2, heads, width),
        (step, texts, 2, heads, patches),
        (attention.spares, step, length, patches),
    )
    dx = x.new_empty(x.shape if need_dx else (0,))
    dq = x.new_empty(images, texts, width)
    dk_weight, dv_weight = (w.new_zeros(w.shape, dtype=accumulation) for w in (groups.k_weight, groups.v_weight))
    with half_products(x.device, x.dtype):
        for part, rows, q in groups:
            count = part.stop - part.start
            zg, both, w = zgs[:count], sums[:count], weights[:count]
            do = dout[part].to(groups.dtype)
            torch.bmm(groups.by_head(q), groups.k_weight, out=_latents_by_head(zg[:, :, 0]))
            torch.bmm(groups.by_head(do), groups.v_weight, out=_latents_by_head(zg[:, :, 1]))
            pooled = out[part].to(accumulation)
            if pooling.v_bias is not None:
                pooled = pooled - pooling.v_bias
            delta = (pooled * do).unflatten(2, (heads, -1)).sum(3, keepdim=True)
            along = attention.backward(rows, zg, lse[part], delta, w, spare[:, :count])
            w = w.flatten(1, 3)
            torch.bmm(w, rows.rows, out=both.flatten(1, 3))
            dz, mean = (_latents_by_head(both[:, :, i]) for i in range(2))
            _product_into(groups.by_head(dq[part]), dz, groups.k_weight.mT)
            add_product(dk_weight, groups.by_head(q).mT, dz, first=False)
            add_product(dv_weight, groups.by_head(do).mT, mean, first=False)
            if need_dx:
                target = dx[part] if dx.dtype == groups.dtype else rows.rows  # a copy of x that is done with
                if along is None:
                    torch.bmm(w.mT, zg.flatten(1, 3), out=target)
                else:
                    torch.mul(rows.rows, -along[:, :, None], out=target).baddbmm_(w.mT, zg.flatten(1, 3))
                if dx.dtype != groups.dtype:
                    dx[part] = target
    return dx, dq, dk_weight.flatten(0, 1), dv_weight.flatten(0, 1)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
