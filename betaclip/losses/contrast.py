"""What a contrastive loss over images with many texts needs to know of its similarities.

The pairs of *different* images are all N * N of the work, and need only statistics: ``betaclip.kernels`` forms
those without the matrix. The pairs *within* an image, a (B, K, K) block, are returned as cosines in
accumulation dtype, so that targets, weights and masks are ordinary PyTorch around them.

Both come from one autograd node that starts at the raw embeddings. L2 normalisation belongs to it because
autograd would keep the normalised copies and add up three full-size gradients; here backends normalise on the
way, again in the backward, and the gradient is finished a few images at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import nvtx
import torch
from torch import Tensor

from betaclip.kernels.backends import resolve, without_autocast
from betaclip.kernels.precision import float32_products
from betaclip.kernels.similarity.operand import Operand, zero_rows
from betaclip.kernels.similarity.operators import BACKENDS, implementation
from betaclip.losses.across_ranks import AcrossRanks
from betaclip.losses.ranks import Ranks

# Embeddings shorter than this have no direction: they count as zero vectors and receive no gradient.
_SHORTEST = 1e-12
# Elements of one operand that the within-image part holds at a time: few on the CPU, for its cache and for memory in
# proportion to the inputs; many elsewhere, where each chunk is a few dozen launches.
_CHUNK = {"cpu": 2**17}
_CHUNK_ELSEWHERE = 2**23


@dataclass(frozen=True)
class Texts:
    """How N rows belong to B images.

    group: (N,) int32 image of each row, -1 for a row that takes no part.
    slots: (B, K) int64 row in each slot, -1 for none; None if row b * K + k is in slot (b, k).
    """

    images: int
    texts: int
    group: Tensor
    slots: Tensor | None

    def to_slots(self, rows: Tensor, fill: float) -> Tensor:
        """(B, K) from a vector over rows."""
        if self.slots is None:
            return rows.view(self.images, self.texts)
        return torch.where(self.slots >= 0, rows[self.slots.clamp_min(0)], fill)


def contrast_logsumexp(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    texts: Texts,
    dtype: torch.dtype,
    backend: str,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row's logits with the *other* images, both ways, and the cosines within images.

    Args:
        image, text: (N, D) embeddings, any norm, any floating dtype; N = B * K, or ragged.
        scale: () in accumulation dtype.
        texts: which image each row belongs to.
        dtype: of the normalised copies that are multiplied.
        backend: of :func:`betaclip.kernels.similarity.operators.similarity_logsumexp`.
        ranks: contrast with the images and texts of all of these; gradients are sums over the ranks' incoming ones.

    Returns:
        (N,) image to text, (N,) text to image, and (B, K, K) cosines, in accumulation dtype.
    """
    backend = resolve("similarity_logsumexp", backend, BACKENDS, image[:0].to(dtype), text[:0].to(dtype))
    return _LogSumExp.apply(
        image, text, scale, texts.group, texts.slots, texts.images, texts.texts, dtype, backend, ranks
    )


def contrast_softplus(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    texts: Texts,
    dtype: torch.dtype,
    backend: str,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """() sum of softplus of all logits between different images, and the (B, K, K) cosines within images.

    The arguments are those of :func:`contrast_logsumexp`. The gradient is formed together with the value when
    one is wanted, which saves forming the logits again. With ``ranks`` the sum is over this rank's image embeddings,
    and every rank must backpropagate the same incoming gradient.
    """
    backend = resolve("similarity_softplus", backend, BACKENDS, image[:0].to(dtype), text[:0].to(dtype))
    differentiable = torch.is_grad_enabled()
    return _Softplus.apply(
        image, text, scale, bias, texts.group, texts.slots, texts.images, texts.texts, dtype, backend, ranks,
        differentiable,
    )  # fmt: skip


def _inverse_norm(x: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) 1 / |x|; 0 for rows that take no part or have no direction, NaN for rows that are not finite."""
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    inverse = torch.where(norm.isfinite(), norm.reciprocal(), torch.nan)
    return torch.where((group < 0) | (norm <= _SHORTEST), 0, inverse)


def _operands(
    image: Tensor, text: Tensor, inverse: tuple[Tensor, Tensor], group: Tensor, dtype: torch.dtype
) -> tuple[Operand, Operand]:
    return Operand(image, group, inverse[0], dtype), Operand(text, group, inverse[1], dtype)


def _chunks(x: Tensor, images: int, texts: int) -> Iterator[tuple[int, int]]:
    """Ranges of images."""
    step = max(1, _CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // max(texts * x.shape[1], 1))
    for lo in range(0, images, step):
        yield lo, min(lo + step, images)


def _rows(x: Tensor, slots: Tensor | None, texts: int, lo: int, hi: int) -> Tensor:
    """(hi - lo, K, ...) rows of images lo to hi; an empty slot repeats row 0."""
    part = x[lo * texts : hi * texts] if slots is None else x[slots[lo:hi].clamp_min(0).flatten()]
    return part.unflatten(0, (hi - lo, texts))


def _unit_rows(
    x: Tensor, inverse: Tensor, slots: Tensor | None, texts: int, lo: int, hi: int, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """(hi - lo, K, D) normalised rows and (hi - lo, K, 1) inverse norms of images lo to hi, zero in empty slots."""
    length = _rows(inverse, slots, texts, lo, hi)
    if slots is not None:
        length = length.masked_fill(slots[lo:hi] < 0, 0)
    rows = _rows(x, slots, texts, lo, hi)
    unit = torch.mul(rows, length.unsqueeze(2), out=_shaped(scratch, rows))
    return zero_rows(unit, length), length.unsqueeze(2)


def _shaped(scratch: Tensor, like: Tensor) -> Tensor:
    return scratch[: like.numel()].view(like.shape)


def _chunk_scratch(x: Tensor, inverse: Tensor, images: int, texts: int, count: int) -> tuple[Tensor, ...]:
    """``count`` buffers of a chunk's rows: allocated once, for fresh memory costs the CPU more than the work in it."""
    _, rows = next(_chunks(x, images, texts), (0, 0))
    return inverse.new_empty(count, rows * texts * x.shape[1]).unbind()


@contextmanager
def _within_images(name: str, image: Tensor) -> Iterator[None]:
    """Products in float32 proper, whatever the process allows others to be rounded to: their differences matter."""
    with nvtx.annotate(name, domain="betaclip"), float32_products("ieee", image.device.type):
        yield


def _cosines(
    image: Tensor, text: Tensor, inverse: tuple[Tensor, Tensor], slots: Tensor | None, images: int, texts: int
) -> Tensor:
    """(B, K, K)"""
    cosines = inverse[0].new_empty(images, texts, texts)
    scratch = _chunk_scratch(image, inverse[0], images, texts, 2)
    for lo, hi in _chunks(image, images, texts):
        x, _ = _unit_rows(image, inverse[0], slots, texts, lo, hi, scratch[0])
        y, _ = _unit_rows(text, inverse[1], slots, texts, lo, hi, scratch[1])
        torch.bmm(x, y.mT, out=cosines[lo:hi])
    return cosines


def _through_norm(g: Tensor, u: Tensor, length: Tensor, scratch: Tensor) -> Tensor:
    """(g - u <u, g>) / |x| in place: the gradient of rows x from that of the normalised rows u."""
    along = torch.mul(u, g, out=_shaped(scratch, g)).sum(2, keepdim=True)
    return g.addcmul_(u, along, value=-1).mul_(length)


def _between(backend: str, ranks: Ranks | None, operands: tuple[Operand, Operand]) -> Any:
    """What has a backend's functions."""
    return implementation(backend, *operands) if ranks is None else AcrossRanks(backend, ranks)


@torch.library.custom_op("betaclip::contrast_logsumexp", mutates_args=())
@without_autocast
def _logsumexp_op(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    group: Tensor,
    slots: Tensor | None,
    images: int,
    texts: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _logsumexp_fwd(image, text, scale, group, slots, images, texts, dtype, backend)


def _logsumexp_fwd(  # type: ignore[no-untyped-def]
    image, text, scale, group, slots, images, texts, dtype, backend, ranks=None
) -> tuple[Tensor, Tensor, Tensor]:
    inverse = _inverse_norm(image, group, scale.dtype), _inverse_norm(text, group, scale.dtype)
    with nvtx.annotate("between images", domain="betaclip"):
        operands = _operands(image, text, inverse, group, dtype)
        lse_x, lse_y = _between(backend, ranks, operands).similarity_logsumexp_fwd(*operands, scale)
    with _within_images("within images", image):
        return lse_x, lse_y, _cosines(image, text, inverse, slots, images, texts)


@_logsumexp_op.register_fake
def _(image, text, scale, group, slots, images, texts, dtype, backend):  # type: ignore[no-untyped-def]
    return scale.new_empty(image.shape[0]), scale.new_empty(text.shape[0]), scale.new_empty(images, texts, texts)


@torch.library.custom_op("betaclip::contrast_logsumexp_backward", mutates_args=())
@without_autocast
def _logsumexp_backward_op(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    group: Tensor,
    slots: Tensor | None,
    lse_x: Tensor,
    lse_y: Tensor,
    dlse_x: Tensor,
    dlse_y: Tensor,
    dcosines: Tensor,
    need_dx: bool,
    need_dy: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = lse_x, lse_y, dlse_x, dlse_y, dcosines
    return _logsumexp_bwd(image, text, scale, group, slots, *statistics, need_dx, need_dy, dtype, backend)


def _logsumexp_bwd(  # type: ignore[no-untyped-def]
    image,
    text,
    scale,
    group,
    slots,
    lse_x,
    lse_y,
    dlse_x,
    dlse_y,
    dcosines,
    need_dx,
    need_dy,
    dtype,
    backend,
    ranks=None,
) -> tuple[Tensor, Tensor, Tensor]:
    inverse = _inverse_norm(image, group, scale.dtype), _inverse_norm(text, group, scale.dtype)
    with nvtx.annotate("between images, backward", domain="betaclip"):
        operands = _operands(image, text, inverse, group, dtype)
        dx, dy, dscale = _between(backend, ranks, operands).similarity_logsumexp_bwd(
            *operands, scale, lse_x, lse_y, dlse_x, dlse_y, need_dx, need_dy
        )
    return *_raw_gradients(image, text, inverse, dx, dy, None, dcosines, slots), dscale


@_logsumexp_backward_op.register_fake
def _(image, text, scale, group, slots, lse_x, lse_y, dlse_x, dlse_y, dcosines, need_dx, need_dy, dtype, backend):  # type: ignore[no-untyped-def]
    return _like(image, need_dx), _like(text, need_dy), torch.empty_like(scale)


def _raw_gradients(
    image: Tensor,
    text: Tensor,
    inverse: tuple[Tensor, Tensor],
    dx: Tensor,
    dy: Tensor,
    gain: Tensor | None,
    dcosines: Tensor,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the raw embeddings; empty for a side whose ``dx`` or ``dy`` is.

    A normalised row receives ``gain * dx`` (dx itself if gain is None, which may then be written over) from between
    the images, and ``dcosines @ unit(other side)`` from within.
    """
    images, texts, _ = dcosines.shape
    outs = [
        between if gain is None and slots is None and between.dtype == x.dtype else _like(x, between.dim() == 2)
        for x, between in ((image, dx), (text, dy))
    ]
    if slots is not None:
        for out in outs:
            out.zero_()
    *scratch, sums, products = _chunk_scratch(image, inverse[0], images, texts, 4)
    with _within_images("within images, backward", image):
        for lo, hi in _chunks(image, images, texts):
            u, u_length = _unit_rows(image, inverse[0], slots, texts, lo, hi, scratch[0])
            v, v_length = _unit_rows(text, inverse[1], slots, texts, lo, hi, scratch[1])
            block = dcosines[lo:hi]
            for out, between, own, length, other, weights in (
                (outs[0], dx, u, u_length, v, block),
                (outs[1], dy, v, v_length, u, block.mT),
            ):
                if between.dim() == 2:
                    g = _rows(between, slots, texts, lo, hi)
                    g = torch.mul(g, 1.0 if gain is None else gain, out=_shaped(sums, g)).baddbmm_(weights, other)
                    _write_rows(out, slots, lo, hi, _through_norm(g, own, length, products))
    return outs[0], outs[1]


def _write_rows(out: Tensor, slots: Tensor | None, lo: int, hi: int, rows: Tensor) -> None:
    """Put the (hi - lo, K, D) rows of images lo to hi in their places."""
    if slots is None:
        out[lo * rows.shape[1] : hi * rows.shape[1]] = rows.flatten(0, 1)
    else:  # each row is in one slot; what the empty slots add to row 0 is zero
        out.index_add_(0, slots[lo:hi].clamp_min(0).flatten(), rows.flatten(0, 1).to(out.dtype))


def _like(x: Tensor, needed: bool) -> Tensor:
    return torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device)


def _across(run: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """An operator's function between the images of all ranks. No operator: it talks to other processes."""
    if torch.is_grad_enabled():  # in a backward that is to be differentiated; a forward runs without
        _refuse(None)
    return without_autocast(partial(run, ranks=ranks))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image, text, scale, group, slots, images, texts, dtype, backend, ranks):  # type: ignore[no-untyped-def]
        arguments = image, text, scale, group, slots, images, texts, dtype, backend
        run = _logsumexp_op if ranks is None else _across(_logsumexp_fwd, ranks)
        lse_x, lse_y, cosines = run(*arguments)
        ctx.save_for_backward(image, text, scale, group, slots, lse_x, lse_y)
        ctx.dtype, ctx.backend, ctx.ranks = dtype, backend, ranks
        return lse_x, lse_y, cosines

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, need_dy, need_dscale, *_ = ctx.needs_input_grad
        run = _logsumexp_backward_op if ctx.ranks is None else _across(_logsumexp_bwd, ctx.ranks)
        dimage, dtext, dscale = run(*ctx.saved_tensors, *gradients, need_dx, need_dy, ctx.dtype, ctx.backend)
        return dimage if need_dx else None, dtext if need_dy else None, dscale if need_dscale else None, *[None] * 7


@torch.library.custom_op("betaclip::contrast_softplus", mutates_args=())
@without_autocast
def _softplus_op(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    slots: Tensor | None,
    images: int,
    texts: int,
    dtype: torch.dtype,
    backend: str,
    differentiable: bool,
    need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum and the cosines, and the sum's gradients for normalised rows, scale and bias."""
    needs = differentiable, need_dx, need_dy
    return _softplus_fwd(image, text, scale, bias, group, slots, images, texts, dtype, backend, *needs)


def _softplus_fwd(  # type: ignore[no-untyped-def]
    image, text, scale, bias, group, slots, images, texts, dtype, backend, differentiable, need_dx, need_dy, ranks=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inverse = _inverse_norm(image, group, scale.dtype), _inverse_norm(text, group, scale.dtype)
    with nvtx.annotate("between images", domain="betaclip"):
        operands = _operands(image, text, inverse, group, dtype)
        module = _between(backend, ranks, operands)
        if differentiable:
            ones = scale.new_ones(image.shape[0])
            rows, *gradients = module.similarity_softplus_fwd_bwd(*operands, scale, bias, ones, need_dx, need_dy)
        else:
            rows = module.similarity_softplus_fwd(*operands, scale, bias)
            gradients = [scale.new_empty(0), scale.new_empty(0), torch.zeros_like(scale), torch.zeros_like(scale)]
    with _within_images("within images", image):
        return rows.sum(), _cosines(image, text, inverse, slots, images, texts), *gradients


@_softplus_op.register_fake
def _(image, text, scale, bias, group, slots, images, texts, dtype, backend, differentiable, need_dx, need_dy):  # type: ignore[no-untyped-def]
    dx, dy = (
        scale.new_empty(x.shape if differentiable and need else (0,)) for x, need in ((image, need_dx), (text, need_dy))
    )
    return (
        torch.empty_like(scale),
        scale.new_empty(images, texts, texts),
        dx,
        dy,
        *map(torch.empty_like, (scale, scale)),
    )


@torch.library.custom_op("betaclip::contrast_softplus_backward", mutates_args=())
@without_autocast
def _softplus_backward_op(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    slots: Tensor | None,
    dx: Tensor,
    dy: Tensor,
    dscale: Tensor,
    dbias: Tensor,
    dtotal: Tensor,
    dcosines: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale and bias are arguments only so that a second differentiation by them meets this operator."""
    inverse = _inverse_norm(image, group, dtotal.dtype), _inverse_norm(text, group, dtotal.dtype)
    dimage, dtext = _raw_gradients(image, text, inverse, dx, dy, dtotal, dcosines, slots)
    return dimage, dtext, dtotal * dscale, dtotal * dbias


@_softplus_backward_op.register_fake
def _(image, text, scale, bias, group, slots, dx, dy, dscale, dbias, dtotal, dcosines):  # type: ignore[no-untyped-def]
    return _like(image, dx.dim() == 2), _like(text, dy.dim() == 2), torch.empty_like(dscale), torch.empty_like(dbias)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("betaclip's losses can be differentiated once, not twice (create_graph=True)")


_logsumexp_backward_op.register_autograd(_refuse)
_softplus_backward_op.register_autograd(_refuse)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, image, text, scale, bias, group, slots, images, texts, dtype, backend, ranks, differentiable
    ):
        need_dx, need_dy, need_dscale, need_dbias, *_ = ctx.needs_input_grad
        differentiable = differentiable and (need_dx or need_dy or need_dscale or need_dbias)
        arguments = image, text, scale, bias, group, slots, images, texts, dtype, backend
        run = _softplus_op if ranks is None else _across(_softplus_fwd, ranks)
        total, cosines, *gradients = run(*arguments, differentiable, need_dx, need_dy)
        ctx.save_for_backward(image, text, scale, bias, group, slots, *gradients)
        return total, cosines

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dcosines: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, need_dy, need_dscale, need_dbias, *_ = ctx.needs_input_grad
        dimage, dtext, dscale, dbias = _softplus_backward_op(*ctx.saved_tensors, dtotal, dcosines)
        return (
            dimage if need_dx else None,
            dtext if need_dy else None,
            dscale if need_dscale else None,
            dbias if need_dbias else None,
            *[None] * 8,
        )
