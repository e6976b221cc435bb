"""Attention pooling with both projections folded to the query side: plain PyTorch, any device.

Head h of query k attends with one latent query z = W_kᵀ q of width D directly to the patches, and the resulting mean of
patches is projected afterwards: keys, values and normalised patches never exist (DeepSeek's MLA calls such projections
absorbed),

    S = z x̂ᵀ,  A = softmax(S),  out_h = W_v A x̂ + b_v    with x̂ = x / |x| as a factor of S's and A's columns.

Images are processed a few at a time, so that all scratch stays in cache. The forward keeps nothing. The backward
computes S and dA = g x̂ᵀ in one product, where g = W_vᵀ dout is the gradient of the means, and with
δ = Σ_p A dA = <dout, out - b_v> per latent query

    dS = A (dA - δ),  [dz; means] = [dS; A] x̂,  dx̂ = [dS; A]ᵀ [z; g],  <x̂_p, dx̂_p> = Σ dS S + A dA,

so that the gradient through the norm is only a multiple of x itself. Latent queries and gradients lie interleaved,
zg (c, K, 2, H, D): each half is the output of one batched product, and the whole is the (c, 2 L, D) operand of others.

A key and a value of zeros beside the patches add exp(sink) to the softmax's denominator and nothing else, where the
sink is the logit of that key relative to keys without their bias. With l = logsumexp(S) and l' = logaddexp(l, sink),
the output of a latent query is multiplied by exp(l - l'), and the backward is the same with A = exp(S - l') and the δ
above.

The Triton backend differs only in the two steps between the projections (``Attention``).

Legend: B images, c of them at a time; P patches, K queries, D width, H heads, L = K H latent queries.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from betaclip.kernels.memory import scratch
from betaclip.kernels.precision import accumulation_dtype, add_product

# For a chunk of images: large enough for the products to run at full rate, small enough for the outer caches.
SCRATCH_BYTES = 32 * 2**20


class Patches(NamedTuple):
    """Patches of c images.

    rows: (c, P, D); masked rows are zero. mask: (c, P) bool, True = valid, or None.
    norm_eps: norms up to this count as zero; if None, rows are not normalised.
    """

    rows: Tensor
    mask: Tensor | None
    norm_eps: float | None

    def inverse_norm(self) -> Tensor | None:
        """1 / |x| (c, 1, P), 0 where x counts as zero; None if rows are not normalised."""
        if self.norm_eps is None:
            return None
        norm = torch.linalg.vector_norm(self.rows, dim=2, keepdim=True).mT
        return norm.masked_fill_(norm <= self.norm_eps, torch.inf).reciprocal_()


class Attention(Protocol):
    """The protocol of the folding backends: the two steps between the projections, for c images."""

    @property
    def scratch_bytes(self) -> int:
        """The largest scratch that a chunk of images may take, in bytes."""

    @property
    def scratch_tiles(self) -> int:
        """The number of (c, L, P) scratch tensors that ``forward`` and ``backward`` need."""

    @property
    def keeps_lse(self) -> bool:
        """Whether ``backward`` needs the log-sum-exps."""

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of everything between the projections."""

    def forward(self, x: Patches, z: Tensor, means: Tensor, tiles: Tensor) -> Tensor | None:
        """Attend to the patches with latent queries z (c, L, D): write their means of the patches into ``means``
        (c, L, D), and return (c, L) log-sum-exps if ``keeps_lse``. tiles: (scratch_tiles, c, L, P)."""

    def backward(
        self, x: Patches, zg: Tensor, lse: Tensor, delta: Tensor, weights: Tensor, tiles: Tensor
    ) -> Tensor | None:
        """Write [dS; A] / |x| into weights (c, K, 2, H, P), from zg (c, K, 2, H, D) and δ (c, K, H, 1). Return
        <x̂, dx̂> / |x|² (c, P), or None if patches are not normalised."""


@dataclass(frozen=True)
class Eager:
    """``Attention`` by PyTorch's own operators, in accumulation dtype."""

    scratch_bytes: int = SCRATCH_BYTES
    scratch_tiles: int = 2
    keeps_lse: bool = False  # a sink needs them

    def dtype(self, x: Tensor) -> torch.dtype:
        return accumulation_dtype(x.dtype)

    def forward(self, x: Patches, z: Tensor, means: Tensor, tiles: Tensor) -> Tensor | None:
        logits, weights = tiles
        torch.bmm(z, x.rows.mT, out=logits)
        inverse = x.inverse_norm()
        if inverse is not None:
            logits.mul_(inverse)
        _softmax(logits, x.mask, weights)
        torch.bmm(weights if inverse is None else weights.mul_(inverse), x.rows, out=means)
        return logits.logsumexp(2) if self.keeps_lse else None

    def backward(
        self, x: Patches, zg: Tensor, lse: Tensor, delta: Tensor, weights: Tensor, tiles: Tensor
    ) -> Tensor | None:
        torch.bmm(zg.flatten(1, 3), x.rows.mT, out=weights.flatten(1, 3))
        inverse = x.inverse_norm()
        factor = weights.new_ones(()) if inverse is None else inverse[:, :, None]
        logits, a = tiles.view(2, *weights[:, :, 0].shape)
        torch.mul(weights[:, :, 0], factor, out=logits)
        da = weights[:, :, 1].mul_(factor)
        if self.keeps_lse:
            _mask(logits.flatten(1, 2), x.mask)
            torch.sub(logits, lse.view(delta.shape), out=a).exp_()
        else:
            _softmax(logits.flatten(1, 2), x.mask, a.flatten(1, 2))
            # From these very numbers, so that dS is 0 where A is 1: ``out`` was rounded to the dtype of the patches.
            delta = (a * da).sum(3, keepdim=True)
        radial = None
        if inverse is not None:
            radial = torch.bmm(delta.flatten(1, 3).unsqueeze(1), a.flatten(1, 2)).squeeze(1)  # Σ A δ
        ds = da.sub_(delta).mul_(a)
        if inverse is not None and radial is not None:  # Σ dS S + A dA = Σ dS (S + 1) + A δ
            radial += logits.add_(1).mul_(ds).flatten(1, 2).sum(1)
            radial *= inverse.squeeze(1).square()
            if x.mask is not None:
                radial.masked_fill_(~x.mask, 0)  # 0 times a logit of -inf
        torch.mul(ds, factor, out=weights[:, :, 0])
        torch.mul(a, factor, out=weights[:, :, 1])
        return radial


def _softmax(logits: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Softmax over the last dimension of (c, L, P), 0 for an image without valid patches; overwrites the logits."""
    torch.softmax(_mask(logits, mask), -1, out=out)
    if mask is not None:
        out.masked_fill_(~mask.any(1)[:, None, None], 0)


def _mask(logits: Tensor, mask: Tensor | None) -> Tensor:
    """(c, L, P) logits, overwritten: -inf for masked patches."""
    return logits if mask is None else logits.masked_fill_(~mask[:, None], -torch.inf)


class Pooling(NamedTuple):
    """The operation's arguments.

    x: (B, P, D) patches. q: (B, K, D) times (D / H)^-½. k_weight, v_weight: (D, D).
    v_bias: (D,) or None. mask: (B, P) bool or None. norm_eps: as for ``Patches``.
    sink: (B, K, H) in accumulation dtype, the logit of a key of zeros, whose value is 0 too, less what a bias adds to
    those of all patches; None without such a key.
    """

    x: Tensor
    q: Tensor
    k_weight: Tensor
    v_weight: Tensor
    v_bias: Tensor | None
    mask: Tensor | None
    sink: Tensor | None
    num_heads: int
    norm_eps: float | None

    def empty(self) -> Tensor | None:
        """(B, 1, 1) bool, True for images without valid patches; None without a mask."""
        return None if self.mask is None else ~self.mask.any(1)[:, None, None]

    def single(self) -> Tensor | None:
        """(B, 1, 1, 1) bool, True for images with one valid patch: its weight is 1 whatever the query. None if no image
        can be one, or if there is a sink."""
        if self.sink is not None:
            return None
        if self.mask is not None:
            return (self.mask.sum(1) == 1)[:, None, None, None]
        return self.x.new_ones(self.x.shape[0], 1, 1, 1, dtype=torch.bool) if self.x.shape[1] == 1 else None


class ImageChunks:
    """Iterates over the images, a few at a time; has the weights of the projections in the dtype of the attention."""

    def __init__(self, pooling: Pooling, attention: Attention, latents: int, weights: int) -> None:
        """latents, weights: how many (L, D) and (L, P) scratch tensors an image takes."""
        self.pooling, self.heads = pooling, pooling.num_heads
        x, self.dtype = pooling.x, attention.dtype(pooling.x)
        self.k_weight, self.v_weight = (
            weight.to(self.dtype).unflatten(0, (self.heads, -1)) for weight in (pooling.k_weight, pooling.v_weight)
        )  # (H, D / H, D)
        images, patches, width = x.shape
        length = pooling.q.shape[1] * self.heads
        copies = 2 if x.dtype != self.dtype else 0  # the patches and their gradient, in this dtype
        elements = length * (latents * width + weights * patches) + copies * patches * width
        chunks = -(-images * elements * self.dtype.itemsize // attention.scratch_bytes)
        self.step = max(1, -(-images // max(chunks, 1)))  # makes the chunks of equal size, but for the last

    def scratch(self, *shapes: tuple[int, ...]) -> AbstractContextManager[list[Tensor]]:
        return scratch(shapes, self.dtype, self.pooling.x.device)

    def __iter__(self) -> Iterator[tuple[slice, Patches, Tensor]]:
        """The slice of images, their patches, and their queries (c, K, D)."""
        x, q, mask, norm_eps = self.pooling.x, self.pooling.q, self.pooling.mask, self.pooling.norm_eps
        for lo in range(0, x.shape[0], self.step):
            part = slice(lo, min(lo + self.step, x.shape[0]))
            rows = x[part].to(self.dtype)
            yield part, Patches(rows, None if mask is None else mask[part], norm_eps), q[part].to(self.dtype)

    def by_head(self, t: Tensor) -> Tensor:
        """(H, c K, D / H) view of (c, K, D)"""
        return t.reshape(-1, self.heads, t.shape[2] // self.heads).transpose(0, 1)


def _latents_by_head(t: Tensor) -> Tensor:
    """(H, c K, D) view of (c, K, H, D)"""
    return t.flatten(0, 1).transpose(0, 1)


def attention_pool_fwd(pooling: Pooling, attention: Attention) -> tuple[Tensor, Tensor]:
    """The result (B, K, D) in the dtype of x, and (B, L) log-sum-exps with the sink, or (0,) if the backward does not
    need them."""
    x, heads = pooling.x, pooling.num_heads
    images, patches, width = x.shape
    queries = pooling.q.shape[1]
    chunks = ImageChunks(pooling, attention, 2, attention.scratch_tiles)
    step = chunks.step
    out = x.new_empty(images, queries, width)
    statistics = []
    with chunks.scratch(
        (step, queries, heads, width),
        (step, queries, heads, width),
        (attention.scratch_tiles, step, queries * heads, patches),
    ) as (z_scratch, mean_scratch, tiles):
        for part, rows, q in chunks:
            count = part.stop - part.start
            z, mean = z_scratch[:count], mean_scratch[:count]
            torch.bmm(chunks.by_head(q), chunks.k_weight, out=_latents_by_head(z))
            lse = attention.forward(rows, z.flatten(1, 2), mean.flatten(1, 2), tiles[:, :count])
            statistics += [] if lse is None else [lse]
            _product_into(chunks.by_head(out[part]), _latents_by_head(mean), chunks.v_weight.mT)
    if pooling.v_bias is not None:
        out += pooling.v_bias
    lse = torch.cat(statistics) if statistics else x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    if pooling.sink is not None:
        with_sink = torch.logaddexp(lse.view(pooling.sink.shape), pooling.sink)
        out.unflatten(2, (heads, -1)).mul_(attended(with_sink, pooling.sink).unsqueeze(3))
        lse = with_sink.flatten(1)
    empty = pooling.empty()
    if empty is not None:
        out.masked_fill_(empty, 0)
    return out, lse


def attended(lse: Tensor, sink: Tensor) -> Tensor:
    """What the patches have together of the attention, from log-sum-exps with the sink."""
    return -torch.expm1(sink - lse)


def attention_pool_bwd(
    pooling: Pooling, out: Tensor, lse: Tensor, dout: Tensor, need_dx: bool, attention: Attention
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x (empty if not needed), dq (B, K, D), dk_weight and dv_weight (D, D) in accumulation dtype."""
    x, heads = pooling.x, pooling.num_heads
    images, patches, width = x.shape
    queries = pooling.q.shape[1]
    accumulation = accumulation_dtype(x.dtype)
    chunks = ImageChunks(pooling, attention, 4, 2 + attention.scratch_tiles)
    step = chunks.step
    dx = x.new_empty(x.shape if need_dx else (0,))
    dq = x.new_empty(images, queries, width)
    dk_weight, dv_weight = (w.new_zeros(w.shape, dtype=accumulation) for w in (chunks.k_weight, chunks.v_weight))
    single = pooling.single()
    with chunks.scratch(
        (step, queries, 2, heads, width),
        (step, queries, 2, heads, width),
        (step, queries, 2, heads, patches),
        (attention.scratch_tiles, step, queries * heads, patches),
    ) as (zg_scratch, dz_and_mean_scratch, weight_scratch, tiles):
        for part, rows, q in chunks:
            count = part.stop - part.start
            zg, dz_and_mean, weights = zg_scratch[:count], dz_and_mean_scratch[:count], weight_scratch[:count]
            do = dout[part].to(chunks.dtype)
            torch.bmm(chunks.by_head(q), chunks.k_weight, out=_latents_by_head(zg[:, :, 0]))
            torch.bmm(chunks.by_head(do), chunks.v_weight, out=_latents_by_head(zg[:, :, 1]))
            pooled = out[part].to(accumulation)
            if pooling.v_bias is not None:
                pooled = pooled - pooling.v_bias
            delta = (pooled * do).unflatten(2, (heads, -1)).sum(3, keepdim=True)
            radial = attention.backward(rows, zg, lse[part], delta, weights, tiles[:, :count])
            if single is not None:
                weights[:, :, 0].masked_fill_(single[part], 0)
            weights = weights.flatten(1, 3)
            torch.bmm(weights, rows.rows, out=dz_and_mean.flatten(1, 3))
            dz, mean = (_latents_by_head(dz_and_mean[:, :, i]) for i in range(2))
            _product_into(chunks.by_head(dq[part]), dz, chunks.k_weight.mT)
            add_product(dk_weight, chunks.by_head(q).mT, dz, first=False)
            add_product(dv_weight, chunks.by_head(do).mT, mean, first=False)
            if need_dx:
                target = dx[part] if dx.dtype == chunks.dtype else rows.rows  # a copy of x, no longer needed
                if radial is None:
                    torch.bmm(weights.mT, zg.flatten(1, 3), out=target)
                else:
                    torch.mul(rows.rows, -radial[:, :, None], out=target).baddbmm_(weights.mT, zg.flatten(1, 3))
                if dx.dtype != chunks.dtype:
                    dx[part] = target
    return dx, dq, dk_weight.flatten(0, 1), dv_weight.flatten(0, 1)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
