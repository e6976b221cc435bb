"""The part of a contrastive loss within images: cosines of the rows of one image, and gradients of raw embeddings.

Backends see only pairs of different images. Pairs of one image, a (B, K, K) block, are formed here, a few images at a
time. Their differences matter, so that no setting of the process may round these products: they are float64 wherever
one could. The gradient of the embeddings is finished here as well, the contribution from between images included,
because autograd would keep normalised copies and add up three full-size gradients.
"""

from collections.abc import Iterator
from typing import NamedTuple

import nvtx
import torch
from torch import Tensor

from betaclip.kernels.memory import on_huge_pages, scratch
from betaclip.kernels.precision import accumulation_dtype, inverse_row_norms, norm_eps
from betaclip.kernels.similarity.contract import Operand, zero_rows

# Elements of one operand that are held at a time: few on the CPU, for its cache and for memory in proportion to the
# inputs; many elsewhere, where each chunk is a few dozen launches.
_CHUNK_ELEMENTS = {"cpu": 2**17}
_CHUNK_ELEMENTS_ELSEWHERE = 2**22


class Images(NamedTuple):
    """The B images that N rows belong to, with up to K rows each.

    slots: (B, K) int64 row in each slot, -1 for none; None if row b * K + k is in slot (b, k).
    chunk_elements: how many elements of one operand are held at a time; None for the device's default.
    """

    num_images: int
    texts_per_image: int
    slots: Tensor | None
    chunk_elements: int | None = None

    def chunks(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """Ranges of images."""
        step = self.chunk_images(x)
        for lo in range(0, self.num_images, step):
            yield lo, min(lo + step, self.num_images)

    def chunk_images(self, x: Tensor) -> int:
        """How many images are taken at a time."""
        elements = self.chunk_elements or _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        return max(1, elements // max(self.texts_per_image * x.shape[1], 1))

    def buffer_shape(self, x: Tensor) -> tuple[int, int, int]:
        """Of a chunk's rows."""
        return min(self.chunk_images(x), self.num_images), self.texts_per_image, x.shape[1]

    def rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """(hi - lo, K, ...) rows of images lo to hi; an empty slot repeats row 0."""
        first, last = lo * self.texts_per_image, hi * self.texts_per_image
        part = x[first:last] if self.slots is None else x[self.slots[lo:hi].clamp_min(0).flatten()]
        return part.unflatten(0, (hi - lo, self.texts_per_image))

    def unit_rows(self, x: Operand, lo: int, hi: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """(hi - lo, K, D) normalised rows and (hi - lo, K, 1) inverse norms of images lo to hi, zero in empty slots."""
        assert x.inverse_norm is not None
        inverse = self.rows(x.inverse_norm, lo, hi)
        if self.slots is not None:
            inverse = inverse.masked_fill(self.slots[lo:hi] < 0, 0)
        unit = torch.mul(self.rows(x.rows, lo, hi), inverse.unsqueeze(2), out=buffer[: hi - lo])
        complete = x.complete and self.slots is None
        return unit if complete else zero_rows(unit, inverse), inverse.unsqueeze(2)

    def write_rows(self, out: Tensor, lo: int, hi: int, rows: Tensor) -> None:
        """Put the (hi - lo, K, D) rows of images lo to hi in their places."""
        if self.slots is None:
            out[lo * rows.shape[1] : hi * rows.shape[1]] = rows.flatten(0, 1)
        else:  # each row is in one slot; what the empty slots add to row 0 is zero
            out.index_add_(0, self.slots[lo:hi].clamp_min(0).flatten(), rows.flatten(0, 1).to(out.dtype))


def exact_dtype(x: Tensor) -> torch.dtype:
    """The narrowest dtype that holds ``x`` whose products no setting of the process rounds: float32 on the CPU unless
    PyTorch is told to round products there, else float64."""
    if x.device.type == "cpu" and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee"):  # type: ignore[attr-defined]
        return accumulation_dtype(x.dtype)
    return torch.float64


def may_be_padded(image_id: Tensor) -> bool:
    """False if no row is seen to take no part: on the CPU, where looking costs little."""
    return image_id.device.type != "cpu" or image_id.numel() == 0 or int(image_id.min()) < 0


def inverse_norms(x: Tensor, image_id: Tensor, dtype: torch.dtype, padded: bool = True) -> tuple[Tensor, bool]:
    """(N,) 1 / |x|: 0 for rows that take no part or have no direction, NaN for rows that are not finite; and whether
    every row is known to take part and to have a direction.

    padded: False if it is known that no image id is negative.
    """
    inverse, ordinary = inverse_row_norms(x, dtype)
    if ordinary and not padded:
        return inverse, True
    return torch.where((image_id < 0) | (inverse >= 1 / norm_eps(dtype)), 0, inverse), False


def cosines(x: Operand, y: Operand, images: Images) -> Tensor:
    """(B, K, K) of x and y (N, D), whose inverse norms are given."""
    assert x.inverse_norm is not None
    out = x.inverse_norm.new_empty(images.num_images, images.texts_per_image, images.texts_per_image)
    shape, dtype = images.buffer_shape(x.rows), exact_dtype(x.rows.new_empty(0, dtype=out.dtype))
    with nvtx.annotate("within images", domain="betaclip"), scratch([shape] * 2, dtype, out.device) as buffers:
        for lo, hi in images.chunks(x.rows):
            u, v = (images.unit_rows(side, lo, hi, buffer)[0] for side, buffer in zip((x, y), buffers, strict=True))
            if dtype == out.dtype:
                torch.bmm(u, v.mT, out=out[lo:hi])
            else:
                out[lo:hi] = torch.bmm(u, v.mT)
    return out


def raw_gradients(
    x: Operand,
    y: Operand,
    images: Images,
    dx: Tensor,
    dy: Tensor,
    dcosines: Tensor,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the raw embeddings x and y in their dtypes; empty for a side whose ``dx`` or ``dy`` is.

    A normalised row receives ``gain * dx`` from between the images (dx itself if gain is None, which may then be
    written over), and ``dcosines @ unit(other side)`` from within.
    """
    outs = [
        between
        if gain is None and images.slots is None and between.dtype == side.rows.dtype
        else on_huge_pages(between.new_empty(between.shape, dtype=side.rows.dtype))
        for side, between in ((x, dx), (y, dy))
    ]
    if images.slots is not None:
        for out in outs:
            out.zero_()
    shape, dtype = images.buffer_shape(x.rows), exact_dtype(dcosines)
    with nvtx.annotate("within images, backward", domain="betaclip"), scratch([shape] * 4, dtype, dx.device) as buffers:
        x_buffer, y_buffer, sum_buffer, product_buffer = buffers
        for lo, hi in images.chunks(x.rows):
            u, u_inverse = images.unit_rows(x, lo, hi, x_buffer)
            v, v_inverse = images.unit_rows(y, lo, hi, y_buffer)
            block, buffer = dcosines[lo:hi].to(dtype), product_buffer[: hi - lo]
            for out, between, own, own_inverse, other, weights in (
                (outs[0], dx, u, u_inverse, v, block),
                (outs[1], dy, v, v_inverse, u, block.mT),
            ):
                if between.dim() < 2:  # not needed
                    continue
                direct = images.slots is None and out.dtype == dtype
                g = images.rows(out, lo, hi) if direct else sum_buffer[: hi - lo]
                if not direct or out is not between:
                    torch.mul(images.rows(between, lo, hi), 1.0 if gain is None else gain, out=g)
                _through_norm(g.baddbmm_(weights, other), own, own_inverse, buffer)
                if not direct:
                    images.write_rows(out, lo, hi, g)
    return outs[0], outs[1]


def _through_norm(g: Tensor, u: Tensor, inverse: Tensor, buffer: Tensor) -> None:
    """(g - u <u, g>) / |x| in place: the gradient of rows x from that of the normalised rows u."""
    radial = torch.mul(u, g, out=buffer).sum(2, keepdim=True)
    g.addcmul_(u, radial, value=-1).mul_(inverse)
