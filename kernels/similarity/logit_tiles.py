"""Tiles of the logits of two operands, for ``blockwise``: their valid rows in blocks, and the pairs that are left out.

With several prefixes, the product of a longer one is that of the shorter one plus one over the columns by which it is
longer, its slice.

Padded rows are left out by gathering the others: they cost nothing and may hold anything. bfloat16 and float16 inputs
are widened to float32 a block at a time; products of float32 follow the settings of the process.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from betaclip.kernels.memory import on_huge_pages
from betaclip.kernels.precision import row_norms
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.exponent_range import MAX_ABOVE_SHIFT
from betaclip.kernels.similarity.prefixes import columns, sums_from_last

# Up to here all pairs are compared for equal images, as a look for ranges that hold them all would cost more.
_FEW_PAIRS = 2**17


class ValidRows:
    """The valid rows of one operand, read in blocks, in accumulation dtype. All ranges count valid rows.

    index: where they are among all rows; None if all rows are valid.
    """

    def __init__(self, operand: Operand, index: Tensor | None = None) -> None:
        self.operand, self.index = operand, index
        self.image_id = operand.image_id if operand.image_id is None or index is None else operand.image_id[index]
        self.text_id = operand.text_id if operand.text_id is None or index is None else operand.text_id[index]
        self.dtype = operand.accumulation
        self.rows, self.inverse_norm = operand.rows, operand.inverse_norm
        if operand.unit is not None:
            self.rows, self.inverse_norm = operand.unit, None
        self.count = self.rows.shape[0] if index is None else index.shape[0]
        self.slices = operand.slices

    @classmethod
    def of(cls, operand: Operand) -> "ValidRows":
        image_id = operand.image_id
        if image_id is None or operand.complete or extremes(image_id)[0] >= 0:
            return cls(operand)
        return cls(operand, (image_id >= 0).nonzero().squeeze(1))

    @cached_property
    def prefix_factors(self) -> Tensor:
        """(P - 1, count) of each prefix but the longest."""
        return self.gather(self.operand.prefix_factors())

    def block(self, lo: int, hi: int, factor: float, buffer: Tensor) -> Tensor:
        """(hi - lo, D) rows times ``factor``, in ``buffer`` unless they can be used as they are."""
        part = slice(lo, hi) if self.index is None else self.index[lo:hi]
        rows, inverse = self.rows[part], self.inverse_norm
        out = buffer[: rows.numel()].view(rows.shape)
        if inverse is not None:
            scaled = inverse[part] if factor == 1 else inverse[part] * factor
            return torch.mul(rows, scaled[:, None], out=out)
        if rows.dtype == self.dtype:
            return rows if factor == 1 else torch.mul(rows, factor, out=out)
        return out.copy_(rows).mul_(factor)  # torch.mul(rows, factor) would round to the dtype of the rows

    def max_norm(self) -> float:
        """The largest norm of a row, or a bound on it."""
        if self.operand.inverse_norm is not None:
            return 1.0 + 1e-3  # rounded
        norms = row_norms(self.rows if self.index is None else self.rows[self.index], self.dtype)
        # Rows that are not finite make their own statistics so, and must not move others'.
        return float(norms.masked_fill_(~norms.isfinite(), 0).max()) if self.count else 0.0

    def zeros(self, *prefixes: int) -> Tensor:
        """(*prefixes, count)"""
        return self.rows.new_zeros((*prefixes, self.count), dtype=self.dtype)

    def gather(self, vectors: Tensor) -> Tensor:
        """(P, count) from vectors over all rows."""
        return (vectors if self.index is None else vectors[:, self.index]).to(self.dtype)

    def scatter(self, vectors: Tensor, fill: float) -> Tensor:
        """(P, all rows) from vectors over the valid rows."""
        if self.index is None:
            return vectors
        return vectors.new_full((len(vectors), self.rows.shape[0]), fill).index_copy_(1, self.index, vectors)

    def new_gradient(self) -> Tensor:
        """(all rows, D); rows that receive a first product are not initialised."""
        if self.index is None:
            return on_huge_pages(self.rows.new_empty(self.rows.shape, dtype=self.dtype))
        return self.rows.new_zeros(self.rows.shape, dtype=self.dtype)

    def no_gradient(self) -> Tensor:
        """(0,)"""
        return self.rows.new_empty(0, dtype=self.dtype)

    def add_product(self, gradient: Tensor, rows: slice, part: slice, a: Tensor, b: Tensor, first: bool) -> None:
        """gradient[rows, part] += a @ b[:, part], or = if this is the first product there."""
        if self.index is None:
            columns(gradient[rows], part).addmm_(a, columns(b, part), beta=0 if first else 1)
        else:
            columns(gradient, part).index_add_(0, self.index[rows], a @ columns(b, part))

    def subtract_radial(self, gradient: Tensor, radial: Tensor, step: int, buffer: Tensor) -> None:
        """Let the gradient of prefixes pass through their norms: those of the rows themselves, (P - 1, count) sums over
        dS * S of each shorter prefix."""
        weights = sums_from_last((radial * self.prefix_factors**2).unbind())
        for lo, hi in ranges(self.count, step):
            rows = self.block(lo, hi, 1.0, buffer)
            for part, weight in zip(self.slices, weights, strict=False):
                change = rows[:, part] * weight[lo:hi, None]
                if self.index is None:
                    gradient[lo:hi, part] -= change
                else:
                    gradient[:, part].index_add_(0, self.index[lo:hi], change, alpha=-1)


class Block(NamedTuple):
    """One tile's rows of x times the scale, (r, D), and rows of y, (c, D), in scratch.

    before: how many elements the tiles before it have.
    """

    rows: slice
    cols: slice
    left: Tensor
    right: Tensor
    before: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    def place_in(self, kept: Tensor | None) -> Tensor | None:
        """(r, c) of the flat ``kept``; None if the tile does not fit."""
        end = self.before + math.prod(self.shape)
        return None if kept is None or end > kept.numel() else kept[self.before : end].view(self.shape)


class LogitTiles:
    """Tiles of the logits of two operands, all in the same scratch; pairs of the same image or text hold -inf.

    Rows are the outer loop: their block of x is formed once, and the blocks of y again for each, unless these can be
    used as they are.
    """

    def __init__(
        self,
        x: ValidRows,
        y: ValidRows,
        scale: Tensor,
        bias: Tensor | None,
        block: tuple[int, int],
        search_rows: int,
        buffers: list[Tensor],
    ) -> None:
        self.x, self.y, self.block = x, y, block
        self.scale, self.bias = float(scale), 0.0 if bias is None else float(bias)
        self.left, self.right, self._scratch_tile, *self._tiles = buffers
        self._few = x.count * y.count <= _FEW_PAIRS
        self._search_rows = max(x.count, 1) if self._few else search_rows

    def blocks(self, wanted_x: Tensor | None = None, wanted_y: Tensor | None = None) -> Iterator[Block]:
        """All blocks; or those with a wanted row or column, of which there is a bool for each."""
        for lo, hi in ranges(self.x.count, self.block[0]):
            left = self.x.block(lo, hi, self.scale, self.left)
            wanted = wanted_y if wanted_x is None or not bool(wanted_x[lo:hi].any()) else None
            for begin, end in ranges(self.y.count, self.block[1]):
                if wanted is None or bool(wanted[begin:end].any()):
                    right = self.y.block(begin, end, 1.0, self.right)
                    before = lo * self.y.count + begin * (hi - lo)
                    yield Block(slice(lo, hi), slice(begin, end), left, right, before)

    def logits(self, block: Block, shift: float, longest: bool = True) -> Iterator[Tensor]:
        """The tile S - shift, (r, c), of each prefix, the shortest first, with or without that of the ``longest``.
        Tiles may be written over, and stay until those of the next block are formed."""
        *shorter, product = (self._view(tile, block) for tile in self._tiles)
        for prefix, part in enumerate(self.x.slices if longest else self.x.slices[:-1]):
            left, right = columns(block.left, part), columns(block.right, part).T
            tile = product.addmm_(left, right) if prefix else torch.mm(left, right, out=product)
            if prefix < len(shorter):
                x_factor, y_factor = self._factors(block, prefix)
                tile = torch.mul(product, x_factor, out=shorter[prefix]).mul_(y_factor)
            if shift != self.bias:
                tile.sub_(shift - self.bias)
            self._exclude_same_image(tile, block.rows, block.cols)
            self._exclude_same_text(tile, block.rows, block.cols)
            yield tile

    def through_factors(self, block: Block, prefix: int, ds: Tensor) -> tuple[Tensor, Tensor]:
        """Turn dS of a shorter prefix, in place, into the gradient of its product before the factors. Return sums of
        dS * S over rows (r,) and columns (c,). To be called before the next prefix is formed."""
        x_factor, y_factor = self._factors(block, prefix)
        ds.mul_(x_factor).mul_(y_factor)
        radial = torch.mul(ds, self._view(self._tiles[-1], block), out=self.scratch_tile(block))
        return radial.sum(1), radial.sum(0)

    def _factors(self, block: Block, prefix: int) -> tuple[Tensor, Tensor]:
        """(r, 1) and (c,)"""
        return self.x.prefix_factors[prefix, block.rows, None], self.y.prefix_factors[prefix, block.cols]

    def lse_shift(self) -> float:
        """The shift with which no exponential overflows."""
        return max(0.0, self.bound() - MAX_ABOVE_SHIFT[self.x.dtype])

    def bound(self) -> float:
        """The largest possible |S|, or the largest finite number."""
        bound = abs(self.scale) * self.x.max_norm() * self.y.max_norm() + abs(self.bias)
        return min(bound, torch.finfo(self.x.dtype).max)

    def scratch_tile(self, block: Block) -> Tensor:
        """(r, c) further scratch."""
        return self._view(self._scratch_tile, block)

    @staticmethod
    def _view(buffer: Tensor, block: Block) -> Tensor:
        return buffer[: math.prod(block.shape)].view(block.shape)

    @cached_property
    def _same_image(self) -> list[tuple[int, int]]:
        """For each ``_search_rows`` rows, a range of columns that holds all pairs of the same image; not needed where
        all exponentials are kept."""
        if self._few:
            return [(0, self.y.count)]
        return _same_image_ranges(self.x.image_id, self.y.image_id, self._search_rows)

    def _exclude_same_image(self, tile: Tensor, rows: slice, cols: slice) -> None:
        x_image_id, y_image_id, step = self.x.image_id, self.y.image_id, self._search_rows
        if x_image_id is None or y_image_id is None:
            return
        lo, hi, begin, end = rows.start, rows.stop, cols.start, cols.stop
        for i in range(lo // step, -(-hi // step)):
            first, last = max(self._same_image[i][0], begin), min(self._same_image[i][1], end)
            top, bottom = max(lo, i * step), min(hi, (i + 1) * step)
            if first < last:
                equal = x_image_id[top:bottom, None] == y_image_id[first:last]
                tile[top - lo : bottom - lo, first - begin : last - begin].masked_fill_(equal, -torch.inf)

    def _exclude_same_text(self, tile: Tensor, rows: slice, cols: slice) -> None:
        """Equal texts may be anywhere, so that all pairs of the tile are compared."""
        if self.x.text_id is not None and self.y.text_id is not None:
            y_text_id = self.y.text_id[cols]
            y_text_id = y_text_id.masked_fill(y_text_id < 0, -2)  # unlike those of x that equal no other
            tile.masked_fill_(self.x.text_id[rows, None].clamp_min(-1) == y_text_id, -torch.inf)


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for lo in range(0, count, max(step, 1)):
        yield lo, min(lo + step, count)


def extremes(vector: Tensor) -> tuple[float, float]:
    """The smallest and the largest element, NaN if there is a NaN; 0 and 0 of an empty vector."""
    if vector.numel() == 0:
        return 0.0, 0.0
    lowest, highest = vector.aminmax()
    return float(lowest), float(highest)


def _same_image_ranges(x_image_id: Tensor | None, y_image_id: Tensor | None, search_rows: int) -> list[tuple[int, int]]:
    """For each ``search_rows`` rows of x, a range of columns that holds every pair of the same image.

    The range is small where y's image ids are sorted, as the texts of one image are neighbours; else it is all columns.
    """
    if x_image_id is None or y_image_id is None or x_image_id.numel() == 0:
        return []
    count = x_image_id.numel()
    if bool((y_image_id[1:] < y_image_id[:-1]).any()):
        return [(0, y_image_id.numel())] * -(-count // search_rows)
    whole = count - count % search_rows
    chunks = [x_image_id[:whole].view(-1, search_rows), x_image_id[whole:].view(1, -1)]
    ends = [chunk.aminmax(dim=1) for chunk in chunks if chunk.numel()]
    lowest, highest = (torch.cat(parts) for parts in zip(*ends, strict=True))
    first, last = torch.searchsorted(y_image_id, lowest), torch.searchsorted(y_image_id, highest, right=True)
    return list(zip(first.tolist(), last.tolist(), strict=True))
