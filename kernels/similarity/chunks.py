"""What the backends with fused kernels share: the vectors they read, chunks of dS, and the products over them.

One square chunk of dS exists at a time. A backend's kernel writes it, and dS y and dS^T x are added to accumulators.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from betaclip.kernels.precision import accumulation_dtype, add_product
from betaclip.kernels.similarity.exponent_range import SPREAD


def aligned(t: Tensor, multiple: int) -> Tensor:
    """Rows that vector loads and the tensor memory accelerator can read: a copy with zero columns if need be.

    The depth and the stride are then multiples of ``multiple`` elements, and rows start at multiples of 16 bytes.
    """
    rows, depth = t.shape
    in_place = t.stride(1) == 1 and t.stride(0) >= depth and t.data_ptr() % 16 == 0
    if in_place and depth % multiple == 0 and t.stride(0) % multiple == 0:
        return t
    padded = t.new_zeros(rows, -(-depth // multiple) * multiple)
    padded[:, :depth] = t
    return padded


def amplification(dtype: torch.dtype) -> float:
    """The largest incoming gradient that a kernel is given. dS is at most twice that, and fits float16's range with
    as much room as there is for small ones; bfloat16 has float32's range."""
    return 2.0**14 if dtype == torch.float16 else 1.0


def logsumexp_vectors(
    lse_x: Tensor, lse_y: Tensor, dlse_x: Tensor, dlse_y: Tensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A common factor of the incoming gradients, and what a kernel forms dS from: statistics (N,) and (M,), incoming
    gradients without the factor, () int32 whether one exponential serves both directions, and for that case the
    factors of rows and columns: exp(S - lse_y) = exp(S - lse_x) exp(lse_x - least) exp(least - lse_y)."""
    factor = torch.maximum(dlse_x.abs().max(), dlse_y.abs().max()) / amplification(dtype)
    weight_x, weight_y = (torch.where(factor > 0, dlse / factor, 0) for dlse in (dlse_x, dlse_y))
    stat_x, stat_y = (torch.where(lse == -torch.inf, torch.inf, lse) for lse in (lse_x, lse_y))
    least = stat_y.min()
    narrow = torch.where(stat_x == torch.inf, -torch.inf, stat_x).max() - least < SPREAD[lse_x.dtype]
    factor_x = torch.where(stat_x == torch.inf, 0, torch.exp(stat_x - least))
    factor_y = torch.where(stat_y == torch.inf, 0, torch.exp(least - stat_y)) * weight_y
    return factor, (stat_x, stat_y, weight_x, weight_y, narrow.to(torch.int32), factor_x, factor_y)


class Accumulators:
    """dS y and dS^T x of chunks of dS, added up in accumulation dtype; dx and dy up to a common factor.

    x (N, D) and y (M, D) are :func:`aligned`, ``depth`` is D without the padding, ``side`` that of a chunk.
    """

    def __init__(self, x: Tensor, y: Tensor, depth: int, side: int, need_dx: bool, need_dy: bool) -> None:
        self.x, self.y, self.depth, self.side = x, y, depth, side
        # dscale = sum(x * (dS y)) = sum(y * (dS^T x)) takes one of the two.
        self.use_dx, self.need_dx, self.need_dy = need_dx or not need_dy, need_dx, need_dy
        dtype = accumulation_dtype(x.dtype)
        self.dx = x.new_empty(x.shape if self.use_dx else (0,), dtype=dtype)
        self.dy = y.new_empty(y.shape if need_dy else (0,), dtype=dtype)
        rows, cols = (min(side, t.shape[0]) for t in (x, y))
        self.workspace = x.new_empty(rows, -(-cols // 16) * 16)

    def chunks(self) -> Iterator[tuple[int, int, int, int, Tensor]]:
        """Bounds of each chunk and room for its dS; what was written there is added before the next."""
        for row in range(0, self.x.shape[0], self.side):
            row_end = min(row + self.side, self.x.shape[0])
            for col in range(0, self.y.shape[0], self.side):
                col_end = min(col + self.side, self.y.shape[0])
                ds = self.workspace[: row_end - row, : col_end - col]
                yield row, col, row_end, col_end, ds
                if self.use_dx:
                    add_product(self.dx[row:row_end], ds, self.y[col:col_end], first=col == 0)
                if self.need_dy:
                    add_product(self.dy[col:col_end], ds.T, self.x[row:row_end], first=row == 0)

    def finish(self, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dy and dscale, for dS times ``factor``; a gradient not needed is empty."""
        operand, gradient = (self.x, self.dx) if self.use_dx else (self.y, self.dy)
        dscale = gradient.new_zeros(())
        for row in range(0, operand.shape[0], self.side):
            dscale += (operand[row : row + self.side] * gradient[row : row + self.side]).sum()
        for gradient in (self.dx, self.dy):
            gradient.mul_(scale * factor)
        dx, dy = (t[..., : self.depth].contiguous() for t in (self.dx, self.dy))
        return dx if self.need_dx else dx.new_empty(0), dy if self.need_dy else dy.new_empty(0), dscale * factor
