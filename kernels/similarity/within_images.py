"""The part of a contrastive loss within images: cosines of the rows of one image, and gradients of raw embeddings.

Backends see only pairs of different images. Pairs of one image, a (B, K, K) block, are formed here in float64, a few
images at a time: their differences matter, and no setting of the process rounds products of float64. The gradient of
the embeddings is finished here as well, the contribution from between images included, because autograd would keep
normalised copies and add up three full-size gradients.
"""

from collections.abc import Iterator
from typing import NamedTuple

import nvtx
import torch
from torch import Tensor

from betaclip.kernels.precision import inverse_row_norms, norm_eps
from betaclip.kernels.similarity.contract import zero_rows

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
        elements = self.chunk_elements or _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        step = max(1, elements // max(self.texts_per_image * x.shape[1], 1))
        for lo in range(0, self.num_images, step):
            yield lo, min(lo + step, self.num_images)

    def buffers(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """``count`` buffers of float64 for a chunk's rows, allocated once: fresh memory costs more than that work."""
        _, images = next(self.chunks(x), (0, 0))
        return x.new_empty(count, images * self.texts_per_image * x.shape[1], dtype=torch.float64).unbind()

    def rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """(hi - lo, K, ...) rows of images lo to hi; an empty slot repeats row 0."""
        first, last = lo * self.texts_per_image, hi * self.texts_per_image
        part = x[first:last] if self.slots is None else x[self.slots[lo:hi].clamp_min(0).flatten()]
        return part.unflatten(0, (hi - lo, self.texts_per_image))

    def unit_rows(self, x: Tensor, inverse_norm: Tensor, lo: int, hi: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """(hi - lo, K, D) normalised rows and (hi - lo, K, 1) inverse norms of images lo to hi, zero in empty slots."""
        inverse = self.rows(inverse_norm, lo, hi)
        if self.slots is not None:
            inverse = inverse.masked_fill(self.slots[lo:hi] < 0, 0)
        rows = self.rows(x, lo, hi)
        unit = torch.mul(rows, inverse.unsqueeze(2), out=_shaped(buffer, rows))
        return zero_rows(unit, inverse), inverse.unsqueeze(2)

    def write_rows(self, out: Tensor, lo: int, hi: int, rows: Tensor) -> None:
        """Put the (hi - lo, K, D) rows of images lo to hi in their places."""
        if self.slots is None:
            out[lo * rows.shape[1] : hi * rows.shape[1]] = rows.flatten(0, 1)
        else:  # each row is in one slot; what the empty slots add to row 0 is zero
            out.index_add_(0, self.slots[lo:hi].clamp_min(0).flatten(), rows.flatten(0, 1).to(out.dtype))


def inverse_norms(x: Tensor, image_id: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) 1 / |x|; 0 for rows that take no part or have no direction, NaN for rows that are not finite."""
    inverse = inverse_row_norms(x, dtype)
    return torch.where((image_id < 0) | (inverse >= 1 / norm_eps(dtype)), 0, inverse)


def cosines(x: Tensor, y: Tensor, inverse: tuple[Tensor, Tensor], images: Images) -> Tensor:
    """(B, K, K) of x and y (N, D), whose inverse norms are given."""
    out = inverse[0].new_empty(images.num_images, images.texts_per_image, images.texts_per_image)
    with nvtx.annotate("within images", domain="betaclip"):
        x_buffer, y_buffer = images.buffers(x, 2)
        for lo, hi in images.chunks(x):
            u, _ = images.unit_rows(x, inverse[0], lo, hi, x_buffer)
            v, _ = images.unit_rows(y, inverse[1], lo, hi, y_buffer)
            out[lo:hi] = torch.bmm(u, v.mT)
    return out


def raw_gradients(
    x: Tensor,
    y: Tensor,
    inverse: tuple[Tensor, Tensor],
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
        if gain is None and images.slots is None and between.dtype == rows.dtype
        else torch.empty(rows.shape if between.dim() == 2 else (0,), dtype=rows.dtype, device=rows.device)
        for rows, between in ((x, dx), (y, dy))
    ]
    if images.slots is not None:
        for out in outs:
            out.zero_()
    with nvtx.annotate("within images, backward", domain="betaclip"):
        x_buffer, y_buffer, sum_buffer, product_buffer = images.buffers(x, 4)
        for lo, hi in images.chunks(x):
            u, u_inverse = images.unit_rows(x, inverse[0], lo, hi, x_buffer)
            v, v_inverse = images.unit_rows(y, inverse[1], lo, hi, y_buffer)
            block = dcosines[lo:hi].double()
            for out, between, own, own_inverse, other, weights in (
                (outs[0], dx, u, u_inverse, v, block),
                (outs[1], dy, v, v_inverse, u, block.mT),
            ):
                if between.dim() == 2:
                    g = images.rows(between, lo, hi)
                    g = torch.mul(g, 1.0 if gain is None else gain, out=_shaped(sum_buffer, g)).baddbmm_(weights, other)
                    images.write_rows(out, lo, hi, _through_norm(g, own, own_inverse, product_buffer))
    return outs[0], outs[1]


def _through_norm(g: Tensor, u: Tensor, inverse: Tensor, buffer: Tensor) -> Tensor:
    """(g - u <u, g>) / |x| in place: the gradient of rows x from that of the normalised rows u."""
    radial = torch.mul(u, g, out=_shaped(buffer, g)).sum(2, keepdim=True)
    return g.addcmul_(u, radial, value=-1).mul_(inverse)


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view(like.shape)
