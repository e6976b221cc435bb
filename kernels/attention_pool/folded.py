"""Attention pooling with both projections folded to the query side: plain PyTorch, any device.

Head h of query k attends with one latent query z = W_kᵀ q of width D directly to the patches, and the resulting mean of
patches is projected afterwards: keys, values and normalised patches never exist (DeepSeek's MLA calls such projections
absorbed),

    S = z x̂ᵀ,  A = softmax(S),  out_h = W_v A x̂ + b_v    with x̂ = x / |x| as a factor of S's and A's columns.

On the CPU images are processed a few at a time, so that all scratch stays in cache; on GPUs as many at a time as a
gibibyte of scratch serves. The forward keeps the norms of the patches and, on the CPU, as many of the weights A / |x|
as fit ``KEPT_BYTES``, and the means A x̂ if they fit as well; the backward computes the others again. With the gradient
of the means g = W_vᵀ dout, dA = g x̂ᵀ and δ = Σ_p A dA = <dout, out - b_v> per latent query,

    dS = A (dA - δ),  [dz; means] = [dS; A] x̂,  dx̂ = [dS; A]ᵀ [z; g],  dx = (dx̂ - <x̂, dx̂> x̂) / |x|.

A key and a value of zeros beside the patches add exp(sink) to the softmax's denominator and nothing else, where the
sink is the logit of that key relative to keys without their bias. With l = logsumexp(S) and l' = logaddexp(l, sink),
the output of a latent query is multiplied by exp(l - l'), and the backward is the same with A = exp(S - l') and the δ
above.

The Triton backend differs only in what lies between the projections (``Attention``).

Legend: B images, c of them at a time; P patches, K queries, D width, H heads, L = K H latent queries. A pair is [z; g],
[dz; means] or [dS; A].
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from betaclip.kernels.attention_pool.rows import inverse_norms_into
from betaclip.kernels.memory import scratch
from betaclip.kernels.precision import accumulation_dtype, add_product

# For a chunk of images. CPU: large enough for the products to run at full rate, small enough for the outer caches.
# GPU: any batch that fits is one chunk, because each chunk costs some 20 launches.
SCRATCH_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}
# For the weights that the forward keeps, and the means: 64 images with 36 texts keep 14 and 36 MiB, and on two cores
# forward and backward take 0.88 of the time, and 0.94 of that. On a GPU the kernels form logits anyway, and memory is
# dearer.
KEPT_BYTES = {"cpu": 256 * 2**20, "cuda": 0}
_COPIED_ELEMENTS = 2**19
# Rows of P elements: on GPUs they start at multiples of 16 bytes, which library products need to read them in bulk, and
# are multiples of 16 elements, from which Triton knows that a thread may load and store 16 bytes.
_ROW_MULTIPLE = {"cpu": 1, "cuda": 16}


class Patches(NamedTuple):
    """Patches of c images.

    rows: (c, P, D); masked rows are zero. mask: (c, P) bool, True = valid, or None.
    inverse_norm: 1 / |x| (c, P), 0 where x counts as zero; None if rows are not normalised.
    single: (c, 1, 1) bool, True for images with one valid patch, whose weight is 1 whatever the query; None if no image
    can be one.
    """

    rows: Tensor
    mask: Tensor | None
    inverse_norm: Tensor | None
    single: Tensor | None


class Kept(NamedTuple):
    """What a forward keeps: the weights A / |x| (n, L, P) of the first n images, and the means (B, L, D) of all images
    or (0, L, D)."""

    weights: Tensor
    means: Tensor

    def of(self, part: slice) -> tuple[Tensor | None, Tensor | None]:
        """Weights and means of these images, where those of all of them are kept."""
        weights, means = (of_images(t, part) if part.stop <= len(t) else None for t in self)
        return weights, means


class Result(NamedTuple):
    """out: (c, K, D), and dout, its gradient. v_bias: (D,), added to it, or None. means_kept: whether the means that it
    was projected from were kept."""

    out: Tensor
    dout: Tensor
    v_bias: Tensor | None
    means_kept: bool = False

    def delta(self, heads: int) -> Tensor:
        """δ (c, K, H, 1), in accumulation dtype"""
        means = self.out.to(accumulation_dtype(self.out.dtype))
        if self.v_bias is not None:
            means = means - self.v_bias
        return (means * self.dout).unflatten(2, (heads, -1)).sum(3, keepdim=True)


class Attention(Protocol):
    """The protocol of the folding backends: what lies between the projections, for c images.

    Scratch for a pair is (2, c, K, H, D) or (2, c, K, H, P)."""

    @property
    def scratch_bytes(self) -> int | None:
        """The largest scratch that a chunk of images may take, in bytes; None for the device's ``SCRATCH_BYTES``."""

    @property
    def kept_bytes(self) -> int | None:
        """The most that a forward keeps of weights and means, in bytes; None for the device's ``KEPT_BYTES``."""

    @property
    def keeps_lse(self) -> bool:
        """Whether ``backward`` needs the log-sum-exps."""

    @property
    def interleaves(self) -> bool:
        """Whether the halves of a pair lie query by query, (c, K, 2, H, ...) in memory, as products of both take them;
        else one after the other."""

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of everything between the projections."""

    def scratch(self, latents: int, patches: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many tiles of scratch ``forward`` and ``backward`` need, and the elements of each for an image."""

    def forward(
        self, x: Patches, z: Tensor, means: Tensor, lse: Tensor | None, kept: Tensor | None, scratch: Tensor
    ) -> None:
        """Attend to the patches with latent queries z (c, L, D): write their means of the patches into ``means``
        (c, L, D), log-sum-exps into ``lse`` (c, L), which is None unless ``keeps_lse``, and the weights A / |x| into
        ``kept`` (c, L, P), if it is not None. scratch: tiles (c, elements)."""

    def backward(
        self,
        x: Patches,
        zg: Tensor,
        lse: Tensor | None,
        kept: Tensor | None,
        result: Result,
        weights: Tensor,
        dz_and_means: Tensor,
        dx: Tensor | None,
        scratch: Tensor,
    ) -> None:
        """Write the pair [dz; means] and, if it is not None, the gradient of the patches into dx (c, P, D), from the
        pair [z; g] and what the forward wrote. weights: scratch for the pair [dS; A], whose rows may lie apart. Means
        need not be written if the forward's were kept."""


@dataclass(frozen=True)
class Eager:
    """``Attention`` by PyTorch's own operators, in accumulation dtype."""

    scratch_bytes: int | None = None
    kept_bytes: int | None = None
    keeps_lse: bool = False  # a sink needs them
    interleaves: bool = False

    def dtype(self, x: Tensor) -> torch.dtype:
        return accumulation_dtype(x.dtype)

    def scratch(self, latents: int, patches: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (2, latents * patches), (2, max(latents, width) * patches)

    def forward(
        self, x: Patches, z: Tensor, means: Tensor, lse: Tensor | None, kept: Tensor | None, scratch: Tensor
    ) -> None:
        shape = *z.shape[:2], x.rows.shape[1]
        logits = _part(scratch[0], shape)
        weights = _part(scratch[1], shape) if kept is None else kept
        _logits(x, z, logits)
        _softmax(logits, x.mask, weights)
        if x.inverse_norm is not None:
            weights.mul_(x.inverse_norm[:, None])
        torch.bmm(weights, x.rows, out=means)
        if lse is not None:
            torch.logsumexp(logits, 2, out=lse)

    def backward(
        self,
        x: Patches,
        zg: Tensor,
        lse: Tensor | None,
        kept: Tensor | None,
        result: Result,
        weights: Tensor,
        dz_and_means: Tensor,
        dx: Tensor | None,
        scratch: Tensor,
    ) -> None:
        z, g = zg.flatten(2, 3)
        dz, means = dz_and_means.flatten(2, 3)
        ds, a = weights.flatten(2, 3)
        if kept is not None:
            a = kept
        else:
            _logits(x, z, ds)
            if lse is None:
                _softmax(ds, x.mask, a)
            else:
                torch.sub(ds, lse.unsqueeze(2), out=a).exp_()
            if x.inverse_norm is not None:
                a.mul_(x.inverse_norm[:, None])
        da = torch.bmm(g, x.rows.mT, out=ds)  # times |x|, as a is times 1 / |x|
        if lse is None:
            # From these very numbers, so that dS is 0 where A is 1: ``out`` was rounded to the dtype of the patches.
            delta = torch.mul(a, da, out=_part(scratch[0], a.shape)).sum(2, keepdim=True)
        else:
            delta = result.delta(zg.shape[3]).flatten(1, 2)
        if x.inverse_norm is not None:
            da.mul_(x.inverse_norm[:, None])
        da.sub_(delta).mul_(a)
        torch.bmm(ds, x.rows, out=dz)
        if not result.means_kept:
            torch.bmm(a, x.rows, out=means)
        if dx is not None:
            gradient = torch.bmm(ds.mT, z, out=_part(scratch[0], x.rows.shape))
            torch.baddbmm(gradient, a.mT, g, out=gradient)
            if x.inverse_norm is None:
                dx.copy_(gradient)
                return
            radial = torch.mul(gradient, x.rows, out=_part(scratch[1], x.rows.shape)).sum(2, keepdim=True)
            torch.addcmul(gradient, x.rows, radial * x.inverse_norm.square().unsqueeze(2), value=-1, out=dx)


def _part(tile: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape in the memory of a tile."""
    return tile.flatten()[: math.prod(shape)].view(shape)


def _logits(x: Patches, z: Tensor, out: Tensor) -> None:
    """Write (c, L, P) logits, -inf for masked patches."""
    torch.bmm(z, x.rows.mT, out=out)
    if x.inverse_norm is not None:
        out.mul_(x.inverse_norm[:, None])
    if x.mask is not None:
        out.masked_fill_(~x.mask[:, None], -torch.inf)


def _softmax(logits: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Softmax over the last dimension of (c, L, P), 0 for an image without valid patches."""
    torch.softmax(logits, -1, out=out)
    if mask is not None:
        out.masked_fill_(~mask.any(1)[:, None, None], 0)


class Pooling(NamedTuple):
    """The operation's arguments.

    x: (B, P, D) patches. q: (B, K, D), not scaled. k_weight, v_weight: (D, D).
    v_bias: (D,) or None. mask: (B, P) bool or None.
    sink: (B, K, H) in accumulation dtype, the logit of a key of zeros, whose value is 0 too, less what a bias adds to
    those of all patches; None without such a key. norm_eps: norms up to this count as zero; if None, patches are not
    normalised.
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

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return (self.x.shape[2] // self.num_heads) ** -0.5

    def empty(self) -> Tensor | None:
        """(B, 1, 1) bool, True for images without valid patches; None without a mask."""
        return None if self.mask is None else ~self.mask.any(1)[:, None, None]

    def single(self) -> Tensor | None:
        """(B, 1, 1) bool, True for images with one valid patch: its weight is 1 whatever the query. None if no image
        can be one, or if there is a sink."""
        if self.sink is not None:
            return None
        if self.mask is not None:
            return (self.mask.sum(1) == 1)[:, None, None]
        return self.x.new_ones(self.x.shape[0], 1, 1, dtype=torch.bool) if self.x.shape[1] == 1 else None


class ImageChunks:
    """Iterates over the images, a few at a time; has the weights of the projections in the dtype of the attention, and
    the scratch of a chunk."""

    def __init__(self, pooling: Pooling, inverse_norm: Tensor, attention: Attention, backward: bool) -> None:
        """inverse_norm: (B, P), or (0,). backward: whether pairs are needed, or means alone."""
        self.pooling, self.heads, self.inverse_norm = pooling, pooling.num_heads, inverse_norm
        x, self.dtype = pooling.x, attention.dtype(pooling.x)
        self.k_weight, self.v_weight = (
            weight.to(self.dtype).unflatten(0, (self.heads, -1)) for weight in (pooling.k_weight, pooling.v_weight)
        )  # (H, D / H, D)
        images, patches, width = x.shape
        queries, heads, kind = pooling.q.shape[1], self.heads, _kind(x)
        count, size = attention.scratch(queries * heads, patches, width)[backward]
        pitch = -(-patches // _ROW_MULTIPLE[kind]) * _ROW_MULTIPLE[kind]  # of rows of P elements
        pairs = (width, width, pitch) if backward else (width,)
        elements = 2 * queries * heads * sum(pairs) + count * size + (x.dtype != self.dtype) * patches * width
        chunks = -(-images * elements * self.dtype.itemsize // (attention.scratch_bytes or SCRATCH_BYTES[kind]))
        self.step = step = max(1, -(-images // max(chunks, 1)))  # makes the chunks of equal size, but for the last
        self.interleaves = attention.interleaves and backward
        shape = (step, queries, 2, heads) if self.interleaves else (2, step, queries, heads)
        self.shapes = *((*shape, columns) for columns in pairs), (count, step, size)

    def scratch(self) -> AbstractContextManager[list[Tensor]]:
        """Pairs (2, c, K, H, D): [z; means], or [z; g], [dz; means] and the weights' (2, c, K, H, pitch); and tiles."""
        return scratch(self.shapes, self.dtype, self.pooling.x.device)

    def part(self, buffers: list[Tensor], part: slice) -> list[Tensor]:
        """The scratch for these images: pairs (2, c, K, H, ...), and tiles (count, c, elements)."""
        *pairs, tiles = buffers
        count = part.stop - part.start
        pairs = [pair.permute(2, 0, 1, 3, 4) if self.interleaves else pair for pair in pairs]
        return [buffer if count == self.step else buffer[:, :count] for buffer in (*pairs, tiles)]

    def __iter__(self) -> Iterator[tuple[slice, Patches, Tensor]]:
        """The slice of images, their patches, and their queries (c, K, D)."""
        x, q, mask, single = self.pooling.x, self.pooling.q, self.pooling.mask, self.pooling.single()
        norms = None if self.pooling.norm_eps is None else self.inverse_norm
        for lo in range(0, x.shape[0], self.step):
            part = slice(lo, min(lo + self.step, x.shape[0]))
            others = (None if t is None else of_images(t, part) for t in (mask, norms, single))
            rows = of_images(x, part).to(self.dtype)
            if max(rows.stride()[1:]) >= 2**31:  # the pitch is an int32 in libraries for matrix products
                rows = rows.contiguous()
            yield part, Patches(rows, *others), of_images(q, part).to(self.dtype)

    def by_head(self, t: Tensor) -> Tensor:
        """(H, c K, D / H) view of (c, K, D)"""
        return t.reshape(-1, self.heads, t.shape[2] // self.heads).transpose(0, 1)


def of_images(t: Tensor, part: slice) -> Tensor:
    """``t[part]``; ``t`` itself if that is all of it, since a view costs the host microseconds."""
    return t if part.stop - part.start == t.shape[0] else t[part]


def _kind(x: Tensor) -> str:
    return "cpu" if x.device.type == "cpu" else "cuda"


def _latents_by_head(t: Tensor) -> Tensor:
    """(H, c K, D) view of (c, K, H, D)"""
    return t.flatten(0, 1).transpose(0, 1)


def attention_pool_fwd(pooling: Pooling, attention: Attention, keep: bool) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """The result (B, K, D) in the dtype of x, and for the backward (B, L) log-sum-exps with the sink and the patches'
    (B, P) inverse norms, (0,) in place of each that it does not need, and what is kept of the first images.

    keep: whether a backward may follow."""
    x, heads = pooling.x, pooling.num_heads
    images, patches, width = x.shape
    queries = pooling.q.shape[1]
    new = partial(x.new_empty, dtype=accumulation_dtype(x.dtype))
    lse = new((images, queries * heads) if attention.keeps_lse else (0,))
    inverse_norm = new((0,) if pooling.norm_eps is None else (images, patches))
    chunks = ImageChunks(pooling, inverse_norm, attention, backward=False)
    kept_weights, kept_means = kept_images(pooling, attention) if keep else (0, 0)
    kept = Kept(new((kept_weights, queries * heads, patches)), new((kept_means, queries * heads, width)))
    out = x.new_empty(images, queries, width)
    with chunks.scratch() as buffers:
        for part, rows, q in chunks:
            (z, means), tiles = chunks.part(buffers, part)
            if rows.inverse_norm is not None and pooling.norm_eps is not None:
                inverse_norms_into(of_images(x, part), pooling.norm_eps, rows.inverse_norm)
            _product_into(_latents_by_head(z), chunks.by_head(q), chunks.k_weight, pooling.scale)
            of_weights, of_means = kept.of(part)
            if of_means is not None:
                means = of_means.view(means.shape)
            attention.forward(
                rows, z.flatten(1, 2), means.flatten(1, 2), of_images(lse, part) if attention.keeps_lse else None,
                of_weights, tiles,
            )  # fmt: skip
            _product_into(chunks.by_head(of_images(out, part)), _latents_by_head(means), chunks.v_weight.mT)
    if pooling.v_bias is not None:
        out += pooling.v_bias
    if pooling.sink is not None:
        with_sink = torch.logaddexp(lse.view(pooling.sink.shape), pooling.sink)
        share = attended(with_sink, pooling.sink)
        out.unflatten(2, (heads, -1)).mul_(share.unsqueeze(3))
        for t in kept:
            t.mul_(share.flatten(1)[: len(t), :, None])
        lse = with_sink.flatten(1)
    empty = pooling.empty()
    if empty is not None:
        out.masked_fill_(empty, 0)
    return out, lse, inverse_norm, kept


def kept_images(pooling: Pooling, attention: Attention) -> tuple[int, int]:
    """The numbers of images of which a forward keeps the weights, and the means."""
    images, patches, width = pooling.x.shape
    budget = KEPT_BYTES[_kind(pooling.x)] if attention.kept_bytes is None else attention.kept_bytes
    column = pooling.q.shape[1] * pooling.num_heads * accumulation_dtype(pooling.x.dtype).itemsize
    both_fit = images * column * (patches + width) <= budget
    return min(images, budget // max(column * patches, 1)), images if both_fit else 0


def attended(lse: Tensor, sink: Tensor) -> Tensor:
    """What the patches have together of the attention, from log-sum-exps with the sink."""
    return -torch.expm1(sink - lse)


def attention_pool_bwd(
    pooling: Pooling,
    out: Tensor,
    lse: Tensor,
    inverse_norm: Tensor,
    kept: Kept,
    dout: Tensor,
    need_dx: bool,
    attention: Attention,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x (empty if not needed), dq (B, K, D), and the gradients of k_weight and v_weight (2, D, D)."""
    x, patches = pooling.x, pooling.x.shape[1]
    chunks = ImageChunks(pooling, inverse_norm, attention, backward=True)
    dx = x.new_empty(x.shape if need_dx else (0,))
    dq = x.new_empty(pooling.q.shape)
    new = x.new_empty if len(x) else x.new_zeros  # the first chunk overwrites them
    dweights = new((2, *chunks.k_weight.shape), dtype=accumulation_dtype(x.dtype))
    with chunks.scratch() as buffers:
        for part, rows, q in chunks:
            zg, dz_and_means, weights, tiles = chunks.part(buffers, part)
            do = of_images(dout, part).to(chunks.dtype)
            _product_into(_latents_by_head(zg[0]), chunks.by_head(q), chunks.k_weight, pooling.scale)
            _product_into(_latents_by_head(zg[1]), chunks.by_head(do), chunks.v_weight)
            of_weights, of_means = kept.of(part)
            attention.backward(
                rows, zg, of_images(lse, part) if attention.keeps_lse else None, of_weights,
                Result(of_images(out, part), do, pooling.v_bias, of_means is not None), weights[..., :patches],
                dz_and_means, of_images(dx, part) if need_dx else None, tiles,
            )  # fmt: skip
            dz, means = dz_and_means
            if of_means is not None:
                means = of_means.view(means.shape)
            dz, means = _latents_by_head(dz), _latents_by_head(means)
            first = part.start == 0
            _product_into(chunks.by_head(of_images(dq, part)), dz, chunks.k_weight.mT, pooling.scale)
            add_product(dweights[0], chunks.by_head(q).mT, dz, first=first, factor=pooling.scale)
            add_product(dweights[1], chunks.by_head(do).mT, means, first=first)
    return dx, dq, dweights.flatten(1, 2).to(x.dtype)


def _product_into(out: Tensor, a: Tensor, b: Tensor, factor: float = 1) -> None:
    """Write a @ b times the factor into ``out``, of matrices in batches."""
    # The CPU's library computes a batch at a time only into contiguous memory. Large results are not worth the copy.
    apart = out.device.type == "cpu" and out.numel() <= _COPIED_ELEMENTS and not out.is_contiguous()
    if apart or out.dtype != a.dtype:
        torch.mul(torch.bmm(a, b), factor, out=out)
    else:
        torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)
