"""Similarity operations by blocks of rows: plain PyTorch, two reused tiles of scratch, any device.

A tile of S = scale * x y^T (+ bias) is one matrix product into scratch; it serves both directions, and the
backward recomputes it instead of keeping it. Nothing of size N * M ever exists.

One exponential per element serves both directions. With a single reference c for the whole launch,
e = exp(S - c) has plain sums over rows and over columns, so partial sums of tiles merge by addition:
lse = c + log(sum e). c follows from the largest possible |S|, so nothing overflows; a row or column whose
statistic lies so far below c that terms could be lost is found afterwards and done again with its true
maximum (``similarity_range`` has the limits). The backward uses the same e:
a_i exp(S - lse_x_i) + b_j exp(S - lse_y_j) = e * (A_i + B_j).

Padded rows (group < 0) are left out by gathering the others: they cost nothing and may hold anything.
bfloat16 and float16 inputs run as bfloat16 products with float32 accumulation and float32 results.
On devices other than the CPU this works too, but reads a few numbers back to the host.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from betaclip.kernels.memory import scratch
from betaclip.kernels.precision import half_products
from betaclip.kernels.similarity.exponent_range import FOOTROOM, HEADROOM
from betaclip.kernels.similarity.operand import Operand


def why_not(x: Tensor, y: Tensor) -> list[str]:
    """PyTorch itself is all that is needed."""
    return []


def block_shape(n: int, m: int) -> tuple[int, int]:
    """Rows and columns of a tile: enough for the matrix product's full rate, little enough for the cache."""
    return min(n, 768), min(m, 2304)


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for lo in range(0, count, max(step, 1)):
        yield lo, min(lo + step, count)


class _Side:
    """The valid rows of one operand, read in blocks, in accumulation dtype. All ranges count valid rows."""

    def __init__(self, operand: Operand, index: Tensor | None = None) -> None:
        self.operand, self.index = operand, index
        self.group = operand.group if operand.group is None or index is None else operand.group[index]
        self.dtype, self.rows = operand.accumulation, operand.rows
        self.count = self.rows.shape[0] if index is None else index.shape[0]

    @classmethod
    def without_padding(cls, operand: Operand) -> "_Side":
        if operand.group is None or not bool((operand.group < 0).any()):
            return cls(operand)
        return cls(operand, (operand.group >= 0).nonzero().squeeze(1))

    def pick(self, chosen: Tensor) -> "_Side":
        return _Side(self.operand, chosen if self.index is None else self.index[chosen])

    def block(self, lo: int, hi: int, factor: float, scratch: Tensor) -> Tensor:
        """(hi - lo, D) rows times ``factor``, in ``scratch`` unless they can be used as they are."""
        part = slice(lo, hi) if self.index is None else self.index[lo:hi]
        rows, inverse = self.rows[part], self.operand.inverse_norm
        out = scratch[: rows.numel()].view(rows.shape)
        if inverse is not None:
            return torch.mul(rows, (inverse[part] * factor)[:, None], out=out)
        return rows if factor == 1 and rows.dtype == self.dtype else torch.mul(rows, factor, out=out)

    def longest(self) -> float:
        """The largest norm of a row, or a bound on it."""
        if self.operand.inverse_norm is not None:
            return 1.0 + 1e-3  # rounded
        rows = self.rows if self.index is None else self.rows[self.index]
        return float(torch.linalg.vector_norm(rows, dim=1, dtype=self.dtype).max()) if self.count else 0.0

    def zeros(self) -> Tensor:
        """(count,)"""
        return self.rows.new_zeros(self.count, dtype=self.dtype)

    def compact(self, vector: Tensor) -> Tensor:
        """(count,) from a vector over all rows."""
        return (vector if self.index is None else vector[self.index]).to(self.dtype)

    def spread(self, vector: Tensor, fill: float) -> Tensor:
        """A vector over all rows from one over the valid rows."""
        if self.index is None:
            return vector
        return vector.new_full((self.rows.shape[0],), fill).index_copy_(0, self.index, vector)

    def new_gradient(self) -> Tensor:
        """(all rows, D); rows that receive a first product are not initialised."""
        if self.index is None:
            return self.rows.new_empty(self.rows.shape, dtype=self.dtype)
        return self.rows.new_zeros(self.rows.shape, dtype=self.dtype)

    def nothing(self) -> Tensor:
        """(0,): the gradient that nobody asked for."""
        return self.rows.new_empty(0, dtype=self.dtype)

    def add_product(self, gradient: Tensor, lo: int, hi: int, a: Tensor, b: Tensor, first: bool) -> None:
        """gradient[lo:hi] += a @ b, or = if this is the first product there."""
        if self.index is None:
            gradient[lo:hi].addmm_(a, b, beta=0 if first else 1)
        else:
            gradient.index_add_(0, self.index[lo:hi], a @ b)


class _Tiles:
    """Tiles of the logits of two operands, all in the same scratch; pairs of the same group hold -inf.

    Columns are the outer loop: their wide block of y is formed once, and x's narrow ones again for each.
    """

    def __init__(self, x: _Side, y: _Side, scale: Tensor, bias: Tensor | None = None) -> None:
        self.x, self.y = x, y
        self.scale, self.bias = float(scale), 0.0 if bias is None else float(bias)
        self.block = block_shape(x.count, y.count)
        rows, cols, depth = *self.block, x.rows.shape[1]
        shapes = [(rows * cols,), (rows * cols,), (rows * depth,), (cols * depth,)]
        self._tile, self._spare, self.left, self.right = scratch(shapes, x.dtype, x.rows.device)
        self._same_group = _same_group_ranges(x.group, y.group)

    def columns(self) -> Iterator[tuple[int, int, Tensor]]:
        """Column ranges with their rows of y, (c, D)."""
        for begin, end in _ranges(self.y.count, self.block[1]):
            yield begin, end, self.y.block(begin, end, 1.0, self.right)

    def down(
        self, begin: int, end: int, right: Tensor, shift: float = 0.0
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Row ranges of these columns with their rows of x times the scale, (r, D), and the tile S - shift, (r, c)."""
        shift -= self.bias
        for lo, hi in _ranges(self.x.count, self.block[0]):
            left = self.x.block(lo, hi, self.scale, self.left)
            tile = self._tile[: (hi - lo) * (end - begin)].view(hi - lo, end - begin)
            torch.mm(left, right.T, out=tile)
            if shift:
                tile.sub_(shift)
            self._exclude_same_group(tile, lo, hi, begin, end)
            yield lo, hi, left, tile

    def bound(self) -> float:
        """The largest possible |S|."""
        return abs(self.scale) * self.x.longest() * self.y.longest() + abs(self.bias)

    def spare(self, tile: Tensor) -> Tensor:
        """Scratch of the tile's shape."""
        return self._spare[: tile.numel()].view(tile.shape)

    def _exclude_same_group(self, tile: Tensor, lo: int, hi: int, begin: int, end: int) -> None:
        x_group, y_group = self.x.group, self.y.group
        if x_group is None or y_group is None:
            return
        for i in range(lo // _GROUP_ROWS, -(-hi // _GROUP_ROWS)):
            first, last = max(self._same_group[i][0], begin), min(self._same_group[i][1], end)
            top, bottom = max(lo, i * _GROUP_ROWS), min(hi, (i + 1) * _GROUP_ROWS)
            if first < last:
                equal = x_group[top:bottom, None] == y_group[first:last]
                tile[top - lo : bottom - lo, first - begin : last - begin].masked_fill_(equal, -torch.inf)


_GROUP_ROWS = 192


def _same_group_ranges(x_group: Tensor | None, y_group: Tensor | None) -> list[list[int]]:
    """For each ``_GROUP_ROWS`` rows of x, a range of columns that holds every pair of equal groups.

    Narrow when y's groups are sorted, as the texts of one image are neighbours; else all columns.
    """
    if x_group is None or y_group is None or x_group.numel() == 0:
        return []
    chunks = x_group.split(_GROUP_ROWS)
    if bool((y_group[1:] < y_group[:-1]).any()):
        return [[0, y_group.numel()]] * len(chunks)
    least, most = (torch.stack(ends) for ends in zip(*(chunk.aminmax() for chunk in chunks), strict=True))
    first, last = torch.searchsorted(y_group, least), torch.searchsorted(y_group, most, right=True)
    return torch.stack((first, last), 1).tolist()


def _exact_logsumexp(side: _Side, other: _Side, scale: Tensor) -> Tensor:
    """The statistics of ``side``'s rows, with their true maxima."""
    tiles, lse = _Tiles(side, other, scale), side.zeros().fill_(-torch.inf)
    for begin, end, right in tiles.columns():
        for lo, hi, _, tile in tiles.down(begin, end, right):
            lse[lo:hi] = torch.logaddexp(lse[lo:hi], tile.logsumexp(1))
    return lse


def _gradients(
    tiles: _Tiles, shift: float, tile_gradient: Callable[..., Tensor], need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy and dscale; ``tile_gradient(lo, hi, begin, end, tile of S - shift)`` returns the tile of dS."""
    x, y = tiles.x, tiles.y
    # dscale = sum(x * (dS @ y)) = sum(y * (dS.T @ x)) takes one of the two; the second one comes times the scale.
    use_dx = need_dx or not need_dy or tiles.scale == 0
    dx, dy = (side.new_gradient() if use else side.nothing() for side, use in ((x, use_dx), (y, need_dy)))
    dscale = x.rows.new_zeros((), dtype=x.dtype)
    if 0 in (x.count, y.count):  # all of one side is padding
        return dx.zero_() if need_dx else x.nothing(), dy.zero_(), dscale
    for begin, end, right in tiles.columns():
        for lo, hi, left, tile in tiles.down(begin, end, right, shift):
            ds = tile_gradient(lo, hi, begin, end, tile)
            if use_dx:
                x.add_product(dx, lo, hi, ds, right, first=begin == 0)
            if need_dy:
                y.add_product(dy, begin, end, ds.T, left, first=lo == 0)
    side, gradient, factor = (x, dx, 1.0) if use_dx else (y, dy, 1 / tiles.scale)
    for lo, hi in _ranges(side.count, tiles.block[0]):
        part = gradient[lo:hi] if side.index is None else gradient[side.index[lo:hi]]
        dscale += torch.dot(side.block(lo, hi, factor, tiles.left).reshape(-1), part.reshape(-1))
    return dx.mul_(tiles.scale) if need_dx else x.nothing(), dy, dscale


def similarity_logsumexp_fwd(x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = _Side.without_padding(x), _Side.without_padding(y)
    tiles, row_sum, col_sum = _Tiles(rows, cols, scale), rows.zeros(), cols.zeros()
    reference = max(0.0, tiles.bound() - HEADROOM[rows.dtype])
    with half_products(x.rows.device, x.dtype):
        for begin, end, right in tiles.columns():
            for lo, hi, _, tile in tiles.down(begin, end, right, reference):
                tile.exp_()
                row_sum[lo:hi] += tile.sum(1)
                col_sum[begin:end] += tile.sum(0)
        lse_x, lse_y = row_sum.log_().add_(reference), col_sum.log_().add_(reference)
        for lse, side, other in ((lse_x, rows, cols), (lse_y, cols, rows)):
            lost = (lse < reference - FOOTROOM[side.dtype]).nonzero().squeeze(1)
            if len(lost):
                lse[lost] = _exact_logsumexp(side.pick(lost), other, scale)
    return rows.spread(lse_x, -torch.inf), cols.spread(lse_y, -torch.inf)


def similarity_logsumexp_bwd(
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
    rows, cols = _Side.without_padding(x), _Side.without_padding(y)
    lse_x, lse_y = rows.compact(lse_x), cols.compact(lse_y)
    dlse_x, dlse_y = rows.compact(dlse_x), cols.compact(dlse_y)
    highest = float(lse_x.max()) if rows.count else 0.0  # no logit exceeds its row's statistic
    reference = max(0.0, highest - HEADROOM[rows.dtype])
    # A row without any pair has the statistic -inf; +inf gives it the weight exp(-inf) = 0.
    lse_x, lse_y = (lse.masked_fill(lse == -torch.inf, torch.inf) for lse in (lse_x, lse_y))
    lowest = min((float(lse.min()) for lse in (lse_x, lse_y) if lse.numel()), default=0.0)
    tiles = _Tiles(rows, cols, scale)

    def one_exponential(lo: int, hi: int, begin: int, end: int, tile: Tensor) -> Tensor:
        """e * (A_i + B_j), from S - reference."""
        weight_x = dlse_x[lo:hi, None] * (reference - lse_x[lo:hi, None]).exp()
        weight_y = dlse_y[begin:end] * (reference - lse_y[begin:end]).exp()
        return tile.exp_().mul_(torch.add(weight_x, weight_y, out=tiles.spare(tile)))

    def two_exponentials(lo: int, hi: int, begin: int, end: int, tile: Tensor) -> Tensor:
        """dlse_x exp(S - lse_x) + dlse_y exp(S - lse_y), from S."""
        to_y = torch.sub(tile, lse_x[lo:hi, None], out=tiles.spare(tile)).exp_().mul_(dlse_x[lo:hi, None])
        return tile.sub_(lse_y[begin:end]).exp_().mul_(dlse_y[begin:end]).add_(to_y)

    with half_products(x.rows.device, x.dtype):
        if lowest >= reference - FOOTROOM[rows.dtype]:
            return _gradients(tiles, reference, one_exponential, need_dx, need_dy)
        return _gradients(tiles, 0.0, two_exponentials, need_dx, need_dy)


def _softplus_sums(tile: Tensor, spare: Tensor, bound: float) -> Tensor:
    """(r,): row sums of softplus, exact relative to their value in both tails, for |S| <= bound."""
    if bound <= HEADROOM[tile.dtype]:
        return torch.exp(tile, out=spare).log1p_().sum(1)
    # softplus(S) = max(S, 0) + log1p(exp(-|S|)), which nothing overflows
    rows = torch.clamp_min(tile, 0, out=spare).sum(1)
    return rows.add_(torch.abs(tile, out=spare).neg_().exp_().log1p_().sum(1))


def similarity_softplus_fwd(x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, cols = _Side.without_padding(x), _Side.without_padding(y)
    tiles, total = _Tiles(rows, cols, scale, bias), rows.zeros()
    bound = tiles.bound()
    with half_products(x.rows.device, x.dtype):
        for begin, end, right in tiles.columns():
            for lo, hi, _, tile in tiles.down(begin, end, right):
                total[lo:hi] += _softplus_sums(tile, tiles.spare(tile), bound)
    return rows.spread(total, 0.0)


def similarity_softplus_fwd_bwd(
    x: Operand,
    y: Operand,
    scale: Tensor,
    bias: Tensor | None,
    drows: Tensor,
    need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, cols = _Side.without_padding(x), _Side.without_padding(y)
    tiles, total, dtotal = _Tiles(rows, cols, scale, bias), rows.zeros(), rows.zeros()
    bound = tiles.bound()
    drows = rows.compact(drows)

    def sigmoid_gradient(lo: int, hi: int, begin: int, end: int, tile: Tensor) -> Tensor:
        total[lo:hi] += _softplus_sums(tile, tiles.spare(tile), bound)
        tile.sigmoid_().mul_(drows[lo:hi, None])
        if bias is not None:
            dtotal[lo:hi] += tile.sum(1)
        return tile

    with half_products(x.rows.device, x.dtype):
        dx, dy, dscale = _gradients(tiles, 0.0, sigmoid_gradient, need_dx, need_dy)
    return rows.spread(total, 0.0), dx, dy, dscale, dtotal.sum()
