"""The part of a contrastive loss within images: cosines of the rows of one image, and gradients of raw embeddings.

Backends see only pairs of different images. Pairs of one image, a (B, K, K) block, are formed here, a few images at a
time. Their differences matter, so no setting of the process may round these products: PyTorch computes them in float64
wherever a setting could, and on a GPU ``triton_rows`` in its most exact float32. The gradient of the embeddings is
finished here as well, including the contribution from between images, because autograd would keep normalised copies and
add up three full-size gradients.

Where rows have several prefixes (``Operand.dims``), products of a prefix are partial sums of those of the next one, and
each slice of the rows receives one product, with the sum of the weights of all prefixes that contain it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import nvtx
import torch
from torch import Tensor

from betaclip.kernels.memory import on_huge_pages, scratch
from betaclip.kernels.precision import accumulation_dtype, inverse_row_norms, norm_eps
from betaclip.kernels.similarity.contract import Operand, row_kernels_serve, zero_rows
from betaclip.kernels.similarity.prefixes import columns, prefix_factors, sums_from_last

# Elements of one operand that are held at a time: few on the CPU, for its cache and for memory in proportion to the
# inputs; many elsewhere, where each chunk is a few dozen launches.
_CHUNK_ELEMENTS = {"cpu": 2**19}
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
        """The shape of a buffer for a chunk's rows."""
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
        elif x.unit is not None and x.unit.dtype == buffer.dtype:
            return self.rows(x.unit, lo, hi), inverse.unsqueeze(2)
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
    if row_kernels_serve(x):
        from betaclip.kernels.similarity import triton_rows  # Triton may not be installed

        return triton_rows.inverse_norms(x, image_id, norm_eps(dtype)), False
    inverse, ordinary = inverse_row_norms(x, dtype)
    if ordinary and not padded:
        return inverse, True
    return torch.where((image_id < 0) | (inverse >= 1 / norm_eps(dtype)), 0, inverse), False


def cosines(x: Operand, y: Operand, images: Images) -> Tensor:
    """(P, B, K, K) of x and y (N, D), whose inverse norms are given."""
    assert x.inverse_norm is not None
    texts_per_image = images.texts_per_image
    out = x.inverse_norm.new_empty(len(x.slices), images.num_images, texts_per_image, texts_per_image)
    if row_kernels_serve(x.rows) and not x.dims:
        from betaclip.kernels.similarity import triton_rows  # Triton may not be installed

        assert y.inverse_norm is not None
        with nvtx.annotate("within images", domain="betaclip"):
            triton_rows.cosines(x.rows, y.rows, x.inverse_norm, y.inverse_norm, images.slots, out[0])
        return out
    shape, dtype = images.buffer_shape(x.rows), exact_dtype(x.rows.new_empty(0, dtype=out.dtype))
    with nvtx.annotate("within images", domain="betaclip"), scratch([shape] * 2, dtype, out.device) as buffers:
        for lo, hi in images.chunks(x.rows):
            u, v = (images.unit_rows(side, lo, hi, buffer)[0] for side, buffer in zip((x, y), buffers, strict=True))
            prefixes = [out[prefix, lo:hi] for prefix in range(len(x.slices))]
            products = prefixes if dtype == out.dtype else [torch.empty_like(p, dtype=dtype) for p in prefixes]
            _partial_products(u, v, x.slices, products)
            for product, u_factor, v_factor in zip(
                products, _factors(u, x.slices), _factors(v, x.slices), strict=False
            ):
                product.mul_(u_factor).mul_(v_factor.mT)
            if dtype != out.dtype:
                for prefix, product in zip(prefixes, products, strict=True):
                    prefix.copy_(product)
    return out


def raw_gradients(
    x: Operand,
    y: Operand,
    images: Images,
    dx: Tensor,
    dy: Tensor,
    dcosines: Tensor,
    gain: Tensor | None = None,
    write_over: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of the raw embeddings x and y in their dtypes; empty for a side whose ``dx`` or ``dy`` is.

    A normalised row receives ``gain * dx`` from between the images (dx itself if gain is None), and
    ``dcosines @ unit(other side)`` from within. ``write_over``: whether dx and dy may be written over.
    """
    if row_kernels_serve(x.rows) and not x.dims:
        return _raw_gradients_by_kernels(x, y, images, (dx, dy), dcosines[0], gain)
    shape, dtype = images.buffer_shape(x.rows), exact_dtype(dcosines)
    in_place = write_over and images.slots is None and dx.dtype == dtype
    outs = [
        between if in_place else on_huge_pages(between.new_empty(between.shape, dtype=side.rows.dtype))
        for side, between in ((x, dx), (y, dy))
    ]
    if images.slots is not None:
        for out in outs:
            out.zero_()
    with nvtx.annotate("within images, backward", domain="betaclip"), scratch([shape] * 4, dtype, dx.device) as buffers:
        x_buffer, y_buffer, sum_buffer, product_buffer = buffers
        for lo, hi in images.chunks(x.rows):
            u, u_inverse = images.unit_rows(x, lo, hi, x_buffer)
            v, v_inverse = images.unit_rows(y, lo, hi, y_buffer)
            blocks = [dcosines[prefix, lo:hi].to(dtype) for prefix in range(len(x.slices))]
            weights, own_weights = _weights(u, v, x.slices, blocks)
            buffer = product_buffer[: hi - lo]
            for out, between, own, own_inverse, other, of_other, of_own in (
                (outs[0], dx, u, u_inverse, v, weights, own_weights[0]),
                (outs[1], dy, v, v_inverse, u, [weight.mT for weight in weights], own_weights[1]),
            ):
                if between.dim() < 2:  # not needed
                    continue
                direct = images.slots is None and out.dtype == dtype
                g = images.rows(out, lo, hi) if direct else sum_buffer[: hi - lo]
                if not in_place or gain is not None:
                    torch.mul(images.rows(between, lo, hi), 1.0 if gain is None else gain, out=g)
                for part, weight in zip(x.slices, of_other, strict=True):
                    if x.dims:  # in place on a slice, PyTorch would take a product for each image
                        g[..., part] += torch.bmm(weight, other[..., part])
                    else:
                        g.baddbmm_(weight, other)
                for part, weight in zip(x.slices, of_own, strict=False):
                    g[..., part].addcmul_(own[..., part], weight, value=-1)
                _through_norm(g, own, own_inverse, buffer)
                if not direct:
                    images.write_rows(out, lo, hi, g)
    return outs[0].to(x.rows.dtype), outs[1].to(y.rows.dtype)


def _raw_gradients_by_kernels(
    x: Operand, y: Operand, images: Images, between: tuple[Tensor, Tensor], dcosines: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    from betaclip.kernels.similarity import triton_rows  # Triton may not be installed

    assert x.inverse_norm is not None and y.inverse_norm is not None
    dx, dy = between
    inverse = x.inverse_norm, y.inverse_norm
    with nvtx.annotate("within images, backward", domain="betaclip"):
        if dx.dim() == 2:  # else not needed
            dx = triton_rows.raw_gradient(x.rows, y.rows, *inverse, images.slots, dx, dcosines, gain)
        if dy.dim() == 2:
            dy = triton_rows.raw_gradient(y.rows, x.rows, *inverse[::-1], images.slots, dy, dcosines.mT, gain)
    return dx.to(x.rows.dtype), dy.to(y.rows.dtype)


def _partial_products(u: Tensor, v: Tensor, slices: list[slice], out: Sequence[Tensor]) -> None:
    """Write into ``out``, (b, K, K) each, the products of the prefixes that end with each slice of u, v (b, K, D)."""
    for index, part in enumerate(slices):
        torch.bmm(columns(u, part), columns(v, part).mT, out=out[index])
        if index:
            out[index].add_(out[index - 1])


def _factors(unit: Tensor, slices: list[slice]) -> list[Tensor]:
    """P - 1 times (b, K, 1): 1 / the norm of each prefix of the rows but the longest, whose norm is 1."""
    norms = (torch.linalg.vector_norm(unit[..., : part.stop], dim=2, keepdim=True) for part in slices[:-1])
    return [prefix_factors(norm) for norm in norms]


def _weights(
    u: Tensor, v: Tensor, slices: list[slice], dcosines: list[Tensor]
) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
    """P times (b, K, K) weights with which a slice of v is added to the gradient of that of u, and the other way round;
    and for u and v P - 1 times (b, K, 1) with which their own slices are subtracted, through the norms of prefixes."""
    factors = list(zip(_factors(u, slices), _factors(v, slices), strict=True))
    products = [torch.empty_like(weight) for weight, _ in zip(dcosines, factors, strict=False)]
    _partial_products(u, v, slices[:-1], products)
    weights, own_u, own_v = list(dcosines), [], []
    for index, (u_factor, v_factor) in enumerate(factors):
        weights[index] = dcosines[index] * u_factor * v_factor.mT
        radial = products[index].mul_(weights[index])
        own_u.append(radial.sum(2, keepdim=True) * u_factor**2)
        own_v.append(radial.sum(1).unsqueeze(2) * v_factor**2)
    return sums_from_last(weights), (sums_from_last(own_u), sums_from_last(own_v))


def _through_norm(g: Tensor, u: Tensor, inverse: Tensor, buffer: Tensor) -> None:
    """(g - u <u, g>) / |x| in place: the gradient of rows x from that of the normalised rows u."""
    radial = torch.mul(u, g, out=buffer).sum(2, keepdim=True)
    g.addcmul_(u, radial, value=-1).mul_(inverse)
