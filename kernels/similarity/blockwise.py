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

With several prefixes, the backward holds the dS of all prefixes of a tile: each slice of the embeddings takes part in
one product, with the sum of the dS of all prefixes that contain it. The gradient through the norm of a shorter prefix
needs sums of dS * S.

Devices other than the CPU work too, but a few numbers are read back to the host. ``logit_tiles`` forms the tiles.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from betaclip.kernels.memory import scratch
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.exponent_range import MAX_ABOVE_SHIFT, MAX_BELOW_SHIFT
from betaclip.kernels.similarity.logit_tiles import Block, LogitTiles, ValidRows, extremes, ranges


@dataclass(frozen=True)
class Blockwise:
    """The ``SimilarityBackend`` by tiles of ``rows`` by ``cols``.

    The default tile is large enough for the matrix product's full rate, and small enough for the cache. Pairs of the
    same image are looked for among ``search_rows`` rows at a time.

    max_matrix: up to so many pairs of embeddings of one batch are left to ``all_cosines``.
    kept: flat room in accumulation dtype for exponentials, which the forward of the log-sum-exp fills and its backward
    reads: those of as many tiles as fit, in order, of the longest prefix. None: nothing is kept.
    """

    serves_prefixes = True
    rows: int = 1152
    cols: int = 1152
    search_rows: int = 192
    max_matrix: int = 2**19
    kept: Tensor | None = None

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = ValidRows.of(x), ValidRows.of(y)
        row_sum, col_sum = (side.zeros(len(x.slices)) for side in (rows, cols))
        row_sums, col_sums = row_sum.unbind(), col_sum.unbind()
        with self._tiles(rows, cols, scale) as tiles:
            lse_shift = tiles.lse_shift()
            for block in tiles.blocks():
                # The product is formed in scratch, which is in cache, whether or not exponentials are kept elsewhere.
                places = [None] * (len(row_sums) - 1) + [block.place_in(self.kept)]
                logits = tiles.logits(block, lse_shift)
                for of_rows, of_cols, tile, place in zip(row_sums, col_sums, logits, places, strict=True):
                    e = torch.exp(tile, out=tile if place is None else place)
                    of_rows[block.rows].add_(e.sum(1))
                    of_cols[block.cols].add_(e.sum(0))
            lse_x, lse_y = row_sum.log_().add_(lse_shift), col_sum.log_().add_(lse_shift)
            least = lse_shift - MAX_BELOW_SHIFT[rows.dtype]
            lowest, highest = zip(extremes(lse_x), extremes(lse_y), strict=True)
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
        rows, cols = ValidRows.of(x), ValidRows.of(y)
        lse_x, lse_y = rows.gather(lse_x), cols.gather(lse_y)
        dlse_x, dlse_y = rows.gather(dlse_x), cols.gather(dlse_y)
        (lowest, highest), (lowest_y, _) = extremes(lse_x), extremes(lse_y)
        lowest = min(lowest, lowest_y)
        if lowest == -torch.inf:  # a row without any pair; +inf gives it the weight exp(-inf) = 0
            lse_x, lse_y = (lse.masked_fill(lse == -torch.inf, torch.inf) for lse in (lse_x, lse_y))
            lowest = min(extremes(lse_x)[0], extremes(lse_y)[0])
        above, below = MAX_ABOVE_SHIFT[rows.dtype], MAX_BELOW_SHIFT[rows.dtype]
        with self._tiles(rows, cols, scale) as tiles:
            lse_shift, kept = tiles.lse_shift(), self.kept
            # No logit exceeds its row's statistic.
            if not (lse_shift - below <= lowest and highest <= lse_shift + above):  # the forward's shift will not do
                lse_shift, kept = max(0.0, highest - above), None

            def single_exp(block: Block) -> Iterator[Tensor]:
                """e * (A_i + B_j) with e = exp(S - lse_shift)."""
                e, scratch_tile = block.place_in(kept), tiles.scratch_tile(block)
                formed = tiles.logits(block, lse_shift, longest=e is None)
                for to_x, to_y, tile in zip(
                    weights_x, weights_y, chain(formed, () if e is None else (e,)), strict=True
                ):
                    weight = torch.add(to_x[block.rows, None], to_y[block.cols], out=scratch_tile)
                    yield weight.mul_(e) if tile is e else tile.exp_().mul_(weight)

            def two_exps(block: Block) -> Iterator[Tensor]:
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
        rows, cols = ValidRows.of(x), ValidRows.of(y)
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
        rows, cols = ValidRows.of(x), ValidRows.of(y)
        total, dbias_of_row = rows.zeros(len(x.slices)), rows.zeros()
        drows = rows.gather(drows)
        totals, weights = total.unbind(), drows.unbind()
        uniform = extremes(drows) == (1.0, 1.0)

        with self._tiles(rows, cols, scale, bias) as tiles:
            bound = tiles.bound()

            def sigmoid_gradient(block: Block) -> Iterator[Tensor]:
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
    def _tiles(self, x: ValidRows, y: ValidRows, scale: Tensor, bias: Tensor | None = None) -> Iterator[LogitTiles]:
        block = min(x.count, self.rows), min(y.count, self.cols)
        elements, depth = block[0] * block[1], x.rows.shape[1]
        shapes = [(block[0] * depth,), (block[1] * depth,), *[(elements,)] * (1 + len(x.slices))]
        with scratch(shapes, x.dtype, x.rows.device) as buffers:
            yield LogitTiles(x, y, scale, bias, block, self.search_rows, buffers)


def _exact_logsumexp(tiles: LogitTiles, wanted_x: Tensor, wanted_y: Tensor) -> tuple[Tensor, Tensor]:
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


def _gradients(
    tiles: LogitTiles, tile_gradients: Callable[[Block], Iterator[Tensor]], need_dx: bool, need_dy: bool
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
    for lo, hi in ranges(side.count, tiles.block[0]):
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
    """Form them from a tile of logits, |S| <= bound. Only a tile that holds a large one takes more than one pass."""
    limit = MAX_ABOVE_SHIFT[tile.dtype]
    if bound <= limit or float(tile.max()) <= limit:
        return _Exponentials(tile.exp_(), room, None, None)
    positive, above = tile > 0, torch.clamp_min(tile, 0, out=room).sum(1)
    return _Exponentials(tile.abs_().neg_().exp_(), room, positive, above)
