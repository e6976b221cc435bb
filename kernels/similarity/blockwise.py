"""Similarity operations by blocks of rows: plain PyTorch, two reused tiles of scratch, any device.

A tile of S = scale * x y^T (+ bias) is one matrix product into scratch, and it serves both directions. Nothing of size
N * M ever exists: the backward forms tiles again, except those whose exponentials the forward was given room to keep.

One exponential per element serves both directions. With a single shift c for the whole launch, e = exp(S - c) has
plain sums over rows and over columns, so partial sums of tiles merge by addition: lse = c + log(sum e). c follows from
the largest possible |S|, so nothing overflows. Rows and columns whose statistics lie so far below c that terms could
be lost are found afterwards (``exponent_range`` has the limits). The tiles that hold any of them are formed once more,
with true maxima for both directions: at most a second forward, whatever the norms. These tiles have the same shape
again, and so the same roundings, as in the backward: statistics and gradients agree even where logits are so large that
their rounding errors matter. The backward uses the same e: a_i exp(S - lse_x_i) + b_j exp(S - lse_y_j) = e (A_i + B_j).
A kept e and one formed again have the same bits. Where statistics lie outside the range of c, kept ones are not used.

With several prefixes, the product of a longer one is that of the shorter one plus one over the columns by which it is
longer, its slice. The backward holds the dS of all prefixes of a tile: each slice takes part in one product, with the
sum of the dS of all prefixes that contain it. The gradient through the norm of a shorter prefix needs sums of dS * S.

Padded rows are left out by gathering the others: they cost nothing and may hold anything. bfloat16 and float16 inputs
are widened to float32 a block at a time; products of float32 follow the settings of the process. Devices other than the
CPU work too, but a few numbers are read back to the host.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from betaclip.kernels.memory import on_huge_pages, scratch
from betaclip.kernels.precision import row_norms
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.exponent_range import MAX_ABOVE_SHIFT, MAX_BELOW_SHIFT
from betaclip.kernels.similarity.prefixes import columns, sums_from_last

# Up to here all pairs are compared for equal images, as a look for ranges that hold them all would cost more.
_FEW_PAIRS = 2**17


@dataclass(frozen=True)
class Blockwise:
    """The ``SimilarityBackend`` by tiles of ``rows`` by ``cols``.

    The default tile is large enough for the matrix product's full rate, and small enough for the cache. Pairs of the
    same image are looked for among ``search_rows`` rows at a time.

    kept: flat room in accumulation dtype for exponentials, which the forward of the log-sum-exp fills and its backward
    reads: those of as many tiles as fit, in order, of the longest prefix. None: nothing is kept.
    """

    serves_prefixes = True
    rows: int = 1152
    cols: int = 1152
    search_rows: int = 192
    kept: Tensor | None = None

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = _ValidRows.of(x), _ValidRows.of(y)
        row_sum, col_sum = (side.zeros(len(x.slices)) for side in (rows, cols))
        row_sums, col_sums = row_sum.unbind(), col_sum.unbind()
        with self._tiles(rows, cols, scale) as tiles:
            lse_shift = tiles.lse_shift()
            for block in tiles.blocks():
                logits = tiles.logits(block, lse_shift, block.place_in(self.kept))
                for of_rows, of_cols, tile in zip(row_sums, col_sums, logits, strict=True):
                    tile.exp_()
                    of_rows[block.rows].add_(tile.sum(1))
                    of_cols[block.cols].add_(tile.sum(0))
            lse_x, lse_y = row_sum.log_().add_(lse_shift), col_sum.log_().add_(lse_shift)
            least = lse_shift - MAX_BELOW_SHIFT[rows.dtype]
            lowest, highest = zip(_extremes(lse_x), _extremes(lse_y), strict=True)
            if not (least <= min(lowest) and max(highest) < torch.inf):
                lost_x, lost_y = ((lse < least) | (lse == torch.inf) for lse in (lse_x, lse_y))
                exact_x, exact_y = _exact_logsumexp(tiles, lost_x, lost_y)
                lse_x, lse_y = torch.where(lost_x, exact_x, lse_x), torch.where(lost_y, exact_y, lse_y)
        return rows.scatter(lse_x, -torch.inf), cols.scatter(lse_y, -torch.inf)

    def similarity_logsumexp_bwd(
        self,
        x: Operand,
        y: Operand,
        scale: Tensor,
        lse_x: Tensor,
        lse_y: Tensor,
        dlse_x: Tensor,
        dlse_y: Tensor,
        need_dx: bool,
        need_dy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = _ValidRows.of(x), _ValidRows.of(y)
        lse_x, lse_y = rows.gather(lse_x), cols.gather(lse_y)
        dlse_x, dlse_y = rows.gather(dlse_x), cols.gather(dlse_y)
        (lowest, highest), (lowest_y, _) = _extremes(lse_x), _extremes(lse_y)
        lowest = min(lowest, lowest_y)
        if lowest == -torch.inf:  # a row without any pair; +inf gives it the weight exp(-inf) = 0
            lse_x, lse_y = (lse.masked_fill(lse == -torch.inf, torch.inf) for lse in (lse_x, lse_y))
            lowest = min(_extremes(lse_x)[0], _extremes(lse_y)[0])
        above, below = MAX_ABOVE_SHIFT[rows.dtype], MAX_BELOW_SHIFT[rows.dtype]
        with self._tiles(rows, cols, scale) as tiles:
            lse_shift, kept = tiles.lse_shift(), self.kept
            # No logit exceeds its row's statistic.
            if not (lse_shift - below <= lowest and highest <= lse_shift + above):  # the forward's shift will not do
                lse_shift, kept = max(0.0, highest - above), None

            def single_exp(block: _Block) -> Iterator[Tensor]:
                """e * (A_i + B_j) with e = exp(S - lse_shift)."""
                e, scratch_tile = block.place_in(kept), tiles.scratch_tile(block)
                formed = tiles.logits(block, lse_shift, longest=e is None)
                for to_x, to_y, tile in zip(
                    weights_x, weights_y, chain(formed, () if e is None else (e,)), strict=True
                ):
                    weight = torch.add(to_x[block.rows, None], to_y[block.cols], out=scratch_tile)
                    yield weight.mul_(e) if tile is e else tile.exp_().mul_(weight)

            def two_exps(block: _Block) -> Iterator[Tensor]:
                """dlse_x exp(S - lse_x) + dlse_y exp(S - lse_y)."""
                for prefix, tile in enumerate(tiles.logits(block, 0.0)):
                    of_rows, of_cols = (prefix, block.rows), (prefix, block.cols)
                    to_y = torch.sub(tile, lse_x[of_rows][:, None], out=tiles.scratch_tile(block))
                    to_y.exp_().mul_(dlse_x[of_rows][:, None])
                    yield tile.sub_(lse_y[of_cols]).exp_().mul_(dlse_y[of_cols]).add_(to_y)

            if lowest >= lse_shift - below:
                weights_x = (dlse_x * (lse_shift - lse_x).exp()).unbind()
                weights_y = (dlse_y * (lse_shift - lse_y).exp()).unbind()
                return _gradients(tiles, single_exp, need_dx, need_dy)
            return _gradients(tiles, two_exps, need_dx, need_dy)

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        rows, cols = _ValidRows.of(x), _ValidRows.of(y)
        total = rows.zeros(len(x.slices))
        totals = total.unbind()
        with self._tiles(rows, cols, scale, bias) as tiles:
            bound = tiles.bound()
            for block in tiles.blocks():
                for sums, tile in zip(totals, tiles.logits(block, 0.0), strict=True):
                    exponentials = _exponentials(tile, tiles.scratch_tile(block), bound)
                    sums[block.rows].add_(exponentials.softplus_sums())
        return rows.scatter(total, 0.0)

    def similarity_softplus_fwd_bwd(
        self,
        x: Operand,
        y: Operand,
        scale: Tensor,
        bias: Tensor | None,
        drows: Tensor,
        need_dx: bool,
        need_dy: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        rows, cols = _ValidRows.of(x), _ValidRows.of(y)
        total, dbias_of_row = rows.zeros(len(x.slices)), rows.zeros()
        drows = rows.gather(drows)
        totals, weights = total.unbind(), drows.unbind()
        uniform = _extremes(drows) == (1.0, 1.0)

        with self._tiles(rows, cols, scale, bias) as tiles:
            bound = tiles.bound()

            def sigmoid_gradient(block: _Block) -> Iterator[Tensor]:
                for sums, incoming, tile in zip(totals, weights, tiles.logits(block, 0.0), strict=True):
                    exponentials = _exponentials(tile, tiles.scratch_tile(block), bound)
                    sums[block.rows].add_(exponentials.softplus_sums())
                    ds = exponentials.sigmoid_()
                    if not uniform:
                        ds.mul_(incoming[block.rows, None])
                    if bias is not None:
                        dbias_of_row[block.rows].add_(ds.sum(1))
                    yield ds

            dx, dy, dscale = _gradients(tiles, sigmoid_gradient, need_dx, need_dy)
        return rows.scatter(total, 0.0), dx, dy, dscale, dbias_of_row.sum()

    @contextmanager
    def _tiles(self, x: "_ValidRows", y: "_ValidRows", scale: Tensor, bias: Tensor | None = None) -> Iterator["_Tiles"]:
        block = min(x.count, self.rows), min(y.count, self.cols)
        elements, depth = block[0] * block[1], x.rows.shape[1]
        shapes = [(block[0] * depth,), (block[1] * depth,), *[(elements,)] * (1 + len(x.slices))]
        with scratch(shapes, x.dtype, x.rows.device) as buffers:
            yield _Tiles(x, y, scale, bias, block, self.search_rows, buffers)


class _ValidRows:
    """The valid rows of one operand, read in blocks, in accumulation dtype. All ranges count valid rows.

    index: where they are among all rows; None if all rows are valid.
    """

    def __init__(self, operand: Operand, index: Tensor | None = None) -> None:
        self.operand, self.index = operand, index
        self.image_id = operand.image_id if operand.image_id is None or index is None else operand.image_id[index]
        self.text_id = operand.text_id if operand.text_id is None or index is None else operand.text_id[index]
        self.dtype, self.rows = operand.accumulation, operand.rows
        self.count = self.rows.shape[0] if index is None else index.shape[0]
        self.slices = operand.slices

    @classmethod
    def of(cls, operand: Operand) -> "_ValidRows":
        image_id = operand.image_id
        if image_id is None or operand.complete or _extremes(image_id)[0] >= 0:
            return cls(operand)
        return cls(operand, (image_id >= 0).nonzero().squeeze(1))

    @cached_property
    def prefix_factors(self) -> Tensor:
        """(P - 1, count) of each prefix but the longest."""
        return self.gather(self.operand.prefix_factors())

    def block(self, lo: int, hi: int, factor: float, buffer: Tensor) -> Tensor:
        """(hi - lo, D) rows times ``factor``, in ``buffer`` unless they can be used as they are."""
        part = slice(lo, hi) if self.index is None else self.index[lo:hi]
        rows, inverse = self.rows[part], self.operand.inverse_norm
        out = buffer[: rows.numel()].view(rows.shape)
        if inverse is not None:
            scaled = inverse[part] if factor == 1 else inverse[part] * factor
            return torch.mul(rows, scaled[:, None], out=out)
        if factor == 1 and rows.dtype == self.dtype:
            return rows
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
        for lo, hi in _ranges(self.count, step):
            rows = self.block(lo, hi, 1.0, buffer)
            for part, weight in zip(self.slices, weights, strict=False):
                change = rows[:, part] * weight[lo:hi, None]
                if self.index is None:
                    gradient[lo:hi, part] -= change
                else:
                    gradient[:, part].index_add_(0, self.index[lo:hi], change, alpha=-1)


class _Block(NamedTuple):
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


class _Tiles:
    """Tiles of the logits of two operands, all in the same scratch; pairs of the same image or text hold -inf.

    Columns are the outer loop: their wide block of y is formed once, and the narrow blocks of x again for each.
    """

    def __init__(
        self,
        x: _ValidRows,
        y: _ValidRows,
        scale: Tensor,
        bias: Tensor | None,
        block: tuple[int, int],
        search_rows: int,
        buffers: list[Tensor],
    ) -> None:
        self.x, self.y, self.block = x, y, block
        self.scale, self.bias = float(scale), 0.0 if bias is None else float(bias)
        self.left, self.right, self._scratch_tile, *self._tiles = buffers
        few = x.count * y.count <= _FEW_PAIRS
        self._search_rows = max(x.count, 1) if few else search_rows
        self._same_image = [(0, y.count)] if few else _same_image_ranges(x.image_id, y.image_id, search_rows)

    def blocks(self, wanted_x: Tensor | None = None, wanted_y: Tensor | None = None) -> Iterator[_Block]:
        """All blocks; or those with a wanted row or column, of which there is a bool for each."""
        for begin, end in _ranges(self.y.count, self.block[1]):
            right = self.y.block(begin, end, 1.0, self.right)
            wanted = wanted_x if wanted_y is None or not bool(wanted_y[begin:end].any()) else None
            for lo, hi in _ranges(self.x.count, self.block[0]):
                if wanted is None or bool(wanted[lo:hi].any()):
                    left = self.x.block(lo, hi, self.scale, self.left)
                    before = begin * self.x.count + lo * (end - begin)
                    yield _Block(slice(lo, hi), slice(begin, end), left, right, before)

    def logits(self, block: _Block, shift: float, out: Tensor | None = None, longest: bool = True) -> Iterator[Tensor]:
        """The tile S - shift, (r, c), of each prefix, the shortest first; that of the ``longest`` in ``out`` if it is
        given, or not at all. Tiles may be written over, and stay until those of the next block are formed."""
        *shorter, product = (self._view(tile, block) for tile in self._tiles)
        product = product if out is None else out
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

    def through_factors(self, block: _Block, prefix: int, ds: Tensor) -> tuple[Tensor, Tensor]:
        """Turn dS of a shorter prefix, in place, into the gradient of its product before the factors. Return sums of
        dS * S over rows (r,) and columns (c,). To be called before the next prefix is formed."""
        x_factor, y_factor = self._factors(block, prefix)
        ds.mul_(x_factor).mul_(y_factor)
        radial = torch.mul(ds, self._view(self._tiles[-1], block), out=self.scratch_tile(block))
        return radial.sum(1), radial.sum(0)

    def _factors(self, block: _Block, prefix: int) -> tuple[Tensor, Tensor]:
        """(r, 1) and (c,)"""
        return self.x.prefix_factors[prefix, block.rows, None], self.y.prefix_factors[prefix, block.cols]

    def lse_shift(self) -> float:
        """The shift with which no exponential overflows."""
        return max(0.0, self.bound() - MAX_ABOVE_SHIFT[self.x.dtype])

    def bound(self) -> float:
        """The largest possible |S|, or the largest finite number."""
        bound = abs(self.scale) * self.x.max_norm() * self.y.max_norm() + abs(self.bias)
        return min(bound, torch.finfo(self.x.dtype).max)

    def scratch_tile(self, block: _Block) -> Tensor:
        """(r, c) further scratch."""
        return self._view(self._scratch_tile, block)

    @staticmethod
    def _view(buffer: Tensor, block: _Block) -> Tensor:
        return buffer[: math.prod(block.shape)].view(block.shape)

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


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for lo in range(0, count, max(step, 1)):
        yield lo, min(lo + step, count)


def _exact_logsumexp(tiles: _Tiles, wanted_x: Tensor, wanted_y: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics (P, ...) of the wanted rows and columns, from their true maxima; those of the others are partial."""
    rows, cols = (_RunningLogSumExp(side.zeros(len(wanted_x))) for side in (tiles.x, tiles.y))
    for block in tiles.blocks(wanted_x.any(0), wanted_y.any(0)):
        for prefix, tile in enumerate(tiles.logits(block, 0.0)):
            rows.add((prefix, block.rows), tile, 1, tiles.scratch_tile(block))
            cols.add((prefix, block.cols), tile, 0, tiles.scratch_tile(block))
    return rows.value(), cols.value()


class _RunningLogSumExp:
    """Log-sum-exps of a number of rows, relative to the largest logits so far, and rounded once at the end."""

    def __init__(self, zeros: Tensor) -> None:
        self.top, self.total = zeros - torch.inf, zeros

    def add(self, rows: tuple[int, slice], tile: Tensor, dim: int, scratch_tile: Tensor) -> None:
        """The logits of a prefix's ``rows``, which the tile has along ``dim``."""
        top = torch.maximum(self.top[rows], tile.amax(dim))
        base = top.masked_fill(top.isinf(), 0)  # inf - inf would make NaN of -inf, no pair, and of inf
        shares = torch.sub(tile, base.unsqueeze(dim), out=scratch_tile).exp_().sum(dim)
        self.total[rows] = self.total[rows] * (self.top[rows] - base).exp() + shares
        self.top[rows] = top

    def value(self) -> Tensor:
        return self.total.log_().add_(self.top.masked_fill_(self.top.isinf(), 0))


def _extremes(vector: Tensor) -> tuple[float, float]:
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
    chunks = x_image_id.split(search_rows)
    if bool((y_image_id[1:] < y_image_id[:-1]).any()):
        return [(0, y_image_id.numel())] * len(chunks)
    lowest, highest = (torch.stack(ends) for ends in zip(*(chunk.aminmax() for chunk in chunks), strict=True))
    first, last = torch.searchsorted(y_image_id, lowest), torch.searchsorted(y_image_id, highest, right=True)
    return list(zip(first.tolist(), last.tolist(), strict=True))


def _gradients(
    tiles: _Tiles, tile_gradients: Callable[[_Block], Iterator[Tensor]], need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy and dscale, from the function that forms a tile of dS for each prefix."""
    x, y = tiles.x, tiles.y
    # dscale = sum(x * (dS @ y)) = sum(y * (dS.T @ x)) takes one of the two; the second one comes times the scale.
    use_dx = need_dx or not need_dy or tiles.scale == 0
    dx, dy = (side.new_gradient() if use else side.no_gradient() for side, use in ((x, use_dx), (y, need_dy)))
    dscale = x.rows.new_zeros((), dtype=x.dtype)
    if 0 in (x.count, y.count):  # all of one side is padding
        return dx.zero_() if need_dx else x.no_gradient(), dy.zero_(), dscale
    shorter = len(x.slices) - 1
    radial = [side.zeros(shorter) for side in (x, y)] if shorter else []
    for block in tiles.blocks():
        of_prefixes = []
        for prefix, ds in enumerate(tile_gradients(block)):
            if prefix < shorter:
                of_rows, of_cols = tiles.through_factors(block, prefix, ds)
                radial[0][prefix, block.rows] += of_rows
                radial[1][prefix, block.cols] += of_cols
            of_prefixes.append(ds)
        for prefix in range(shorter, -1, -1):
            part, ds = x.slices[prefix], of_prefixes[prefix]
            if prefix < shorter:
                ds.add_(of_prefixes[prefix + 1])
            if use_dx:
                x.add_product(dx, block.rows, part, ds, block.right, first=block.cols.start == 0)
            if need_dy:
                y.add_product(dy, block.cols, part, ds.T, block.left, first=block.rows.start == 0)
    side, gradient, factor = (x, dx, 1.0) if use_dx else (y, dy, 1 / tiles.scale)
    for lo, hi in _ranges(side.count, tiles.block[0]):
        rows = gradient[lo:hi] if side.index is None else gradient[side.index[lo:hi]]
        dscale += torch.dot(side.block(lo, hi, factor, tiles.left).reshape(-1), rows.reshape(-1))
    dx = dx.mul_(tiles.scale) if need_dx else x.no_gradient()
    for side, gradient, sums in zip((x, y), (dx, dy), radial, strict=False):
        if gradient.dim() == 2:  # needed
            side.subtract_radial(gradient, sums, tiles.block[0], tiles.left)
    return dx, dy, dscale


class _Exponentials(NamedTuple):
    """e = exp(S), or exp(-|S|) where that might overflow: one exponential serves softplus and sigmoid, exactly in both
    tails.

    e: (r, c), in the tile's place. room: (r, c) scratch. positive: where S > 0, if e is exp(-|S|). above: (r,) the sums
    of max(S, 0), or None for 0.
    """

    e: Tensor
    room: Tensor
    positive: Tensor | None
    above: Tensor | None

    def softplus_sums(self) -> Tensor:
        """(r,) log1p(exp(S)) = max(S, 0) + log1p(exp(-|S|))."""
        sums = torch.log1p(self.e, out=self.room).sum(1)
        return sums if self.above is None else sums.add_(self.above)

    def sigmoid_(self) -> Tensor:
        """(r, c) in place of e: e / (1 + e), or 1 / (1 + e) where e is exp(-|S|) and S > 0."""
        one_more = torch.add(self.e, 1, out=self.room)
        if self.positive is not None:
            self.e.masked_fill_(self.positive, 1)
        return self.e.div_(one_more)


def _exponentials(tile: Tensor, room: Tensor, bound: float) -> _Exponentials:
    """Of the logits of a tile, |S| <= bound. Only a tile that does hold a large one takes more than one pass."""
    limit = MAX_ABOVE_SHIFT[tile.dtype]
    if bound <= limit or float(tile.max()) <= limit:
        return _Exponentials(tile.exp_(), room, None, None)
    positive, above = tile > 0, torch.clamp_min(tile, 0, out=room).sum(1)
    return _Exponentials(tile.abs_().neg_().exp_(), room, positive, above)
