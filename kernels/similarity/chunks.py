"""The backward around a fused kernel that forms dS: the vectors it reads, chunks of dS, and the products over them.

One square chunk of dS exists at a time. A backend's kernel writes it, and dS y and dS^T x are added to accumulators.
With several prefixes there is a dS for each slice of the rows, as ``prefix_rows`` defines it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.precision import accumulation_dtype, add_product
from betaclip.kernels.similarity.contract import row_kernels_serve
from betaclip.kernels.similarity.exponent_range import MAX_SINGLE_EXP_SPREAD
from betaclip.kernels.similarity.prefixes import columns

# Rows of a chunk below which running out of memory is an error: 2 MiB of dS in 16 bits.
LEAST_CHUNK_ROWS = 1024
# Elements of dscale's products that exist at a time: 128 MiB in float32.
PRODUCT_ELEMENTS = 2**25


def amplification(dtype: torch.dtype, prefixes: int = 1) -> float:
    """The largest incoming gradient that a kernel is given.

    dS is at most twice as large, and that of a slice the sum over the prefixes: in float16 that leaves as much range as
    there is for small values; bfloat16 has the range of float32.
    """
    return 2.0**14 / prefixes if dtype == torch.float16 else 1.0


class LogsumexpVectors(NamedTuple):
    """The vectors from which a kernel forms dS = weight_x exp(S - stat_x) + weight_y exp(S - stat_y).

    stat_x, stat_y: (P, N), (P, M) log-sum-exp, +inf for rows without any pair. weight_x, weight_y: incoming gradients
    without their common factor. single_exp_ok: (P, 1) int32, whether one exponential serves both directions:
    exp(S - stat_y) = exp(S - stat_x) factor_x factor_y / weight_y, with min_lse the smallest stat_y of the prefix,
    factor_x = exp(stat_x - min_lse) and factor_y = exp(min_lse - stat_y) weight_y.
    """

    stat_x: Tensor
    stat_y: Tensor
    weight_x: Tensor
    weight_y: Tensor
    single_exp_ok: Tensor
    factor_x: Tensor
    factor_y: Tensor


def logsumexp_vectors(
    lse_x: Tensor, lse_y: Tensor, dlse_x: Tensor, dlse_y: Tensor, dtype: torch.dtype, multiple: int = 1
) -> tuple[Tensor, LogsumexpVectors]:
    """The common factor of the incoming gradients, (), and the vectors without it, from (P, N) and (P, M).

    Vectors are filled up to a ``multiple`` with rows without any pair, of weight 0.
    """
    if row_kernels_serve(lse_x):
        from betaclip.kernels.similarity import triton_rows  # Triton may not be installed

        gain = amplification(dtype, len(lse_x))
        factor, *on_gpu = triton_rows.logsumexp_vectors(lse_x, lse_y, dlse_x, dlse_y, gain, multiple)
        return factor, LogsumexpVectors(*on_gpu)
    lse_x, lse_y = (filled(lse, multiple, -torch.inf) for lse in (lse_x, lse_y))
    dlse_x, dlse_y = (filled(dlse, multiple, 0.0) for dlse in (dlse_x, dlse_y))
    factor = torch.maximum(dlse_x.abs().max(), dlse_y.abs().max()) / amplification(dtype, len(lse_x))
    weight_x, weight_y = (torch.where(factor > 0, dlse / factor, 0) for dlse in (dlse_x, dlse_y))
    stat_x, stat_y = (torch.where(lse == -torch.inf, torch.inf, lse) for lse in (lse_x, lse_y))
    min_lse = stat_y.amin(1, keepdim=True)
    spread = torch.where(stat_x == torch.inf, -torch.inf, stat_x).amax(1, keepdim=True) - min_lse
    single_exp_ok = (spread < MAX_SINGLE_EXP_SPREAD[lse_x.dtype]).to(torch.int32)
    factor_x = torch.where(stat_x == torch.inf, 0, torch.exp(stat_x - min_lse))
    factor_y = torch.where(stat_y == torch.inf, 0, torch.exp(min_lse - stat_y)) * weight_y
    return factor, LogsumexpVectors(stat_x, stat_y, weight_x, weight_y, single_exp_ok, factor_x, factor_y)


def filled(vectors: Tensor, multiple: int, value: float) -> Tensor:
    """Vectors (P, N) with ``value`` up to a multiple of elements."""
    missing = -vectors.shape[1] % multiple
    return F.pad(vectors, (0, missing), value=value) if missing else vectors


class Accumulators:
    """dS y and dS^T x of chunks of dS, added up in accumulation dtype; dx and dy up to a common factor.

    x: (N, D) and y: (M, D), aligned. depth: D without the padding. chunk_rows: rows and columns of a chunk, a multiple
    of ``multiple``; fewer if memory does not suffice. places: the columns that have a dS of their own, all by default.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        depth: int,
        chunk_rows: int,
        need_dx: bool,
        need_dy: bool,
        multiple: int = 1,
        places: Sequence[slice] = (),
    ) -> None:
        self.x, self.y, self.depth, self.places = x, y, depth, places or (slice(0, x.shape[1]),)
        # dscale = sum(x * (dS y)) = sum(y * (dS^T x)) takes one of the two.
        self.use_dx, self.need_dx, self.need_dy = need_dx or not need_dy, need_dx, need_dy
        dtype = accumulation_dtype(x.dtype)
        self.dx = x.new_empty(x.shape if self.use_dx else (0,), dtype=dtype)
        self.dy = y.new_empty(y.shape if need_dy else (0,), dtype=dtype)
        self.workspace, self.chunk_rows = _workspace(x, y, len(self.places), chunk_rows, multiple)

    def chunks(self) -> Iterator[tuple[int, int, int, int, Tensor]]:
        """Bounds of each chunk and room for its dS, (places, rows, cols); the dS written there is added before the next
        chunk."""

        @functools.cache  # few shapes, each of which would otherwise cost three calls per chunk and place
        def room(rows: int, cols: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            ds = self.workspace[:, :rows, :cols]
            return ds, [(of_place, of_place.T) for of_place in ds]

        ends = [self._bounds(side) for side in (self.x, self.y)]
        xs, ys, dxs, dys = (self._split(t) for t in (self.x, self.y, self.dx, self.dy))
        for i, (row, row_end) in enumerate(ends[0]):
            for j, (col, col_end) in enumerate(ends[1]):
                ds, of_places = room(row_end - row, col_end - col)
                yield row, col, row_end, col_end, ds
                for place, (of_place, transposed) in enumerate(of_places):
                    if self.use_dx:
                        add_product(dxs[place][i], of_place, ys[place][j], first=j == 0)
                    if self.need_dy:
                        add_product(dys[place][j], transposed, xs[place][i], first=i == 0)

    def _bounds(self, side: Tensor) -> list[tuple[int, int]]:
        rows = side.shape[0]
        return [(row, min(row + self.chunk_rows, rows)) for row in range(0, rows, self.chunk_rows)]

    def _split(self, t: Tensor) -> list[tuple[Tensor, ...]]:
        """The parts of ``t`` by place and chunk."""
        return [columns(t, place).split(self.chunk_rows) for place in self.places]

    def finish(self, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dy and dscale, for dS times ``factor``; a gradient not needed is empty."""
        operand, gradient = (self.x, self.dx) if self.use_dx else (self.y, self.dy)
        rows = max(1, PRODUCT_ELEMENTS // operand.shape[1])
        parts = zip(operand.split(rows), gradient.split(rows), strict=True)
        dscale = functools.reduce(torch.add, [(values * gradients).sum() for values, gradients in parts])
        gain = scale * factor
        dx, dy = (
            self._scaled(t, gain) if needed else t.new_empty(0)
            for t, needed in ((self.dx, self.need_dx), (self.dy, self.need_dy))
        )
        return dx, dy, dscale * factor

    def _scaled(self, gradient: Tensor, gain: Tensor) -> Tensor:
        gradient.mul_(gain)
        return gradient if gradient.shape[1] == self.depth else gradient[:, : self.depth].contiguous()


def _workspace(x: Tensor, y: Tensor, places: int, chunk_rows: int, multiple: int) -> tuple[Tensor, int]:
    """Room for a chunk of each place's dS, rows filled up to a multiple of 16, and the rows and columns of a chunk."""
    while True:
        rows, cols = (min(chunk_rows, t.shape[0]) for t in (x, y))
        try:
            return x.new_empty(places, rows, -(-cols // 16) * 16), chunk_rows
        except torch.OutOfMemoryError:
            if chunk_rows <= max(LEAST_CHUNK_ROWS, multiple):
                raise
            chunk_rows = -(-chunk_rows // (2 * multiple)) * multiple
