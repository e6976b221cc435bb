"""Launchers of the Triton similarity kernels: workspaces, grids and the library products around them.

The forward is one kernel and two small merges. The backward holds one square chunk of dS at a time, made by
one fused kernel, and adds dS y and dS^T x to accumulators by two library products. Scale, bias and incoming
gradients are read on the device; nothing here waits for it.
"""

import copy
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from betaclip.kernels import architecture as triton_support
from betaclip.kernels.similarity.chunks import Accumulators, aligned, amplification, logsumexp_vectors
from betaclip.kernels.similarity.exponent_range import FOOTROOM, HEADROOM
from betaclip.kernels.similarity.operand import Operand
from betaclip.kernels.similarity.tiles import Tile, choose, chunk, rectangles


def why_not(x: Tensor, y: Tensor) -> list[str]:
    """Reasons from metadata alone."""
    return triton_support.why_not(x)


class _Launch:
    """What every launch on a pair of operands shares."""

    def __init__(self, x: Operand, y: Operand, scale: Tensor) -> None:
        import triton.language as tl

        from betaclip.kernels.similarity import triton_kernels as similarity_triton_kernels

        self.kernels = similarity_triton_kernels
        self.depth = x.rows.shape[1]
        self.x, self.y = (aligned(side.matrix(side.dtype), 16) for side in (x, y))
        self.scale, self.x_group, self.y_group, self.dtype = scale, x.group, y.group, x.accumulation
        self.arch = triton_support.architecture(self.x.device)
        self.tile = choose(self.arch, min(self.x.element_size(), 4))
        self.programs = self.tile.programs * triton_support.processors(self.x.device)
        self.constants = {
            "D": self.x.shape[1],
            "HAS_GROUP": x.group is not None,
            "PRECISION": triton_support.precision(self.arch, self.x.dtype),
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
        }

    def swapped(self) -> "_Launch":
        swapped = copy.copy(self)
        swapped.x, swapped.y, swapped.x_group, swapped.y_group = self.y, self.x, self.y_group, self.x_group
        return swapped

    def tiles(self, rows: int, cols: int) -> tuple[int, int]:
        """How many tiles cover (rows, cols)."""
        return -(-rows // self.tile.block_m), -(-cols // self.tile.block_n)

    def __call__(self, kernel: str, grid: int, *args: Any, **constants: Any) -> None:
        """Run a kernel with the operands, then ``args``."""
        tile, x, y = self.tile, self.x, self.y
        if tile.tma:
            x, y = _descriptor(x, tile.block_m, tile), _descriptor(y, tile.block_n, tile)
        guard = torch.cuda.device(self.x.device) if self.x.is_cuda else nullcontext()
        with guard:  # a kernel starts on the current device, wherever its tensors are
            getattr(self.kernels, kernel)[(grid,)](
                x, y, self.scale, *args, **self.constants, **constants, TMA=tile.tma,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)

    def chunk(self) -> int:
        return chunk(self.arch, min(self.x.element_size(), 4))

    def accumulators(self, need_dx: bool, need_dy: bool) -> Accumulators:
        return Accumulators(self.x, self.y, self.depth, self.chunk(), need_dx, need_dy)


def _descriptor(t: Tensor, rows: int, tile: Tile) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, tile.block_d])


def _largest_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype).max()


def similarity_logsumexp_fwd(x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
    launch = _Launch(x, y, scale)
    n, m = launch.x.shape[0], launch.y.shape[0]
    row_tiles, col_tiles = launch.tiles(n, m)
    strips, ranges = rectangles(row_tiles, col_tiles, launch.programs)
    row_sum, col_sum = launch.new(ranges, n).zero_(), launch.new(strips, m).zero_()
    bound = scale.abs() * _largest_norm(launch.x, launch.dtype) * _largest_norm(launch.y, launch.dtype)
    # 0 where it can be: an exponent's rounding error grows with its size.
    reference = (bound - HEADROOM[launch.dtype]).clamp_min(0)
    launch(
        "_similarity_logsumexp_fwd_kernel", strips * ranges,
        reference, x.group, y.group, row_sum, col_sum, n, m, launch.x.stride(0), launch.y.stride(0),
        -(-row_tiles // strips), -(-col_tiles // ranges), ranges,
    )  # fmt: skip
    statistics = []
    for side, sums in ((launch, row_sum), (launch.swapped(), col_sum)):
        rows, others = side.x.shape[0], side.y.shape[0]
        lse = side.new(rows)
        side(
            "_similarity_logsumexp_merge_kernel", side.tiles(rows, others)[0],
            reference, side.x_group, side.y_group, sums, lse, rows, others, side.x.stride(0), side.y.stride(0),
            sums.shape[0], LEAST=math.exp(-FOOTROOM[launch.dtype]),
        )  # fmt: skip
        statistics.append(lse)
    return statistics[0], statistics[1]


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
    launch = _Launch(x, y, scale)
    sums = launch.accumulators(need_dx, need_dy)
    factor, vectors = logsumexp_vectors(lse_x, lse_y, dlse_x, dlse_y, x.dtype)
    for row, col, row_end, col_end, ds in sums.chunks():
        tiles = math.prod(launch.tiles(row_end - row, col_end - col))
        launch(
            "_similarity_logsumexp_bwd_kernel", min(tiles, launch.programs),
            x.group, y.group, *vectors, ds, launch.x.shape[0], launch.y.shape[0],
            launch.x.stride(0), launch.y.stride(0), ds.stride(0), row, col, row_end, col_end,
        )  # fmt: skip
    return sums.finish(scale, factor)


def similarity_softplus_fwd(x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
    launch = _Launch(x, y, scale)
    n, m, side = launch.x.shape[0], launch.y.shape[0], launch.chunk()
    rows = launch.new(n).zero_()
    for row in range(0, n, side):
        for col in range(0, m, side):
            bounds = row, col, min(row + side, n), min(col + side, m)
            rows[bounds[0] : bounds[2]] += _softplus_chunk(launch, bias, None, None, bounds)[0]
    return rows


def similarity_softplus_fwd_bwd(
    x: Operand,
    y: Operand,
    scale: Tensor,
    bias: Tensor | None,
    drows: Tensor,
    need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = _Launch(x, y, scale)
    sums = launch.accumulators(need_dx, need_dy)
    rows, dbias = launch.new(launch.x.shape[0]).zero_(), launch.new().zero_()
    factor = drows.abs().max() / amplification(x.dtype)
    weight = torch.where(factor > 0, drows / factor, 0)
    for row, col, row_end, col_end, ds in sums.chunks():
        softplus, sigmoid = _softplus_chunk(launch, bias, weight, ds, (row, col, row_end, col_end))
        rows[row:row_end] += softplus
        if sigmoid is not None:
            dbias += (sigmoid * drows[row:row_end]).sum()
    return rows, *sums.finish(scale, factor), dbias


def _softplus_chunk(
    launch: _Launch, bias: Tensor | None, weight: Tensor | None, ds: Tensor | None, bounds: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Row sums of softplus over a chunk, and of sigmoid if there is a bias to differentiate; writes dS into ``ds``."""
    row, col, row_end, col_end = bounds
    row_tiles, col_tiles = launch.tiles(row_end - row, col_end - col)
    softplus = launch.new(col_tiles, row_end - row)
    sigmoid = None if bias is None or ds is None else torch.empty_like(softplus)
    launch(
        "_similarity_softplus_kernel", min(row_tiles * col_tiles, launch.programs),
        bias, launch.x_group, launch.y_group, weight, softplus, sigmoid, ds, launch.x.shape[0], launch.y.shape[0],
        launch.x.stride(0), launch.y.stride(0), 0 if ds is None else ds.stride(0), row, col, row_end, col_end,
        HAS_BIAS=bias is not None, HAS_GRADIENT=ds is not None,
    )  # fmt: skip
    return softplus.sum(0), None if sigmoid is None else sigmoid.sum(0)
