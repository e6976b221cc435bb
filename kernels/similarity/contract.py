"""The contract of the similarity backends: the operands that they receive, and the functions that they have."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from betaclip.kernels.architecture import triton_not_supported_reasons
from betaclip.kernels.precision import accumulation_dtype, row_norms
from betaclip.kernels.similarity.prefixes import prefix_factors, prefix_slices


@dataclass(frozen=True)
class Operand:
    """The rows on one side, to be normalised on the way if ``inverse_norm`` is given.

    rows: (N, D) floating point.
    image_id: (N,) contiguous int32, < 0 for rows that take no part; None on both sides of an operation, or neither.
    inverse_norm: (N,) in accumulation dtype, 0 for rows that count as zero; or None to use the rows as they are.
    dtype: of the matrix products; statistics and accumulation are in ``accumulation_dtype(dtype)``.
    text_id: (N,) contiguous int32, < 0 for rows whose text equals no other; None on both sides, or neither.
    complete: whether every row is known to take part and to have a direction. Only on the CPU does anybody look.
    dims: lengths of P prefixes of the rows, ascending up to D, the same on both sides; normalised rows then have norm 1
    or 0. Empty for whole rows alone, P = 1.
    unit: (N, D) the normalised rows in accumulation dtype, zero where ``inverse_norm`` is, if they have been formed;
    valid during a call.
    """

    rows: Tensor
    image_id: Tensor | None
    inverse_norm: Tensor | None
    dtype: torch.dtype
    text_id: Tensor | None = None
    complete: bool = False
    dims: tuple[int, ...] = ()
    unit: Tensor | None = None

    @property
    def accumulation(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    @property
    def slices(self) -> list[slice]:
        """The columns by which each prefix is longer than the one before it."""
        return prefix_slices(self.dims, self.rows.shape[1])

    def prefix_factors(self) -> Tensor:
        """(P - 1, N) 1 / the norm of each prefix but the longest of the normalised rows; 0 where it counts as zero."""
        norms = self.rows.new_empty((len(self.slices) - 1, self.rows.shape[0]), dtype=self.accumulation)
        for norm, dim in zip(norms, self.dims, strict=False):
            norm.copy_(row_norms(self.rows[:, :dim], self.accumulation))
        return prefix_factors(norms if self.inverse_norm is None else norms.mul_(self.inverse_norm))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(N, D) all rows in ``dtype``, zero where ``inverse_norm`` is; no copy if they can be used as they are."""
        if self.inverse_norm is None:
            return self.rows.to(dtype)
        if row_kernels_serve(self.rows):
            from betaclip.kernels.similarity import triton_rows  # Triton may not be installed

            return triton_rows.unit_rows(self.rows, self.inverse_norm, dtype)
        unit = torch.mul(self.rows, self.inverse_norm[:, None], out=self.rows.new_empty(self.rows.shape, dtype=dtype))
        return unit if self.complete else zero_rows(unit, self.inverse_norm)


def row_kernels_serve(rows: Tensor) -> bool:
    """Whether ``triton_rows`` takes the place of PyTorch's operators: on a GPU, but for float64."""
    return rows.is_cuda and not triton_not_supported_reasons(rows)


def zero_rows(rows: Tensor, inverse_norm: Tensor) -> Tensor:
    """Set ``rows`` (..., D) to zero in place where ``inverse_norm`` (...) is 0, whatever they hold."""
    return rows.masked_fill_((inverse_norm == 0).unsqueeze(-1), 0)


class SimilarityBackend(Protocol):
    """Statistics of S = scale <x_i, y_j> (+ bias) over pairs of different image ids, N rows of x by M rows of y.

    With ``dims`` there is an S for each of P prefixes: for the longest that of whole rows, for the others scale times
    the cosines of the rows' first ``dims[p]`` columns. Scale and bias are the same for all.
    Pairs of the same text id take no part either, unless it is negative.
    Rows whose image id is negative take part in nothing and may hold anything. Scalars are () tensors; scalars,
    statistics, incoming gradients and results are in accumulation dtype. Gradients are with respect to the normalised
    rows; dx and dy are new tensors that the caller may write over, and a gradient that is not needed is empty, (0,).
    Results are deterministic. Nothing here is differentiable.

    A backend that serves ``dims`` has an attribute ``serves_prefixes`` of True. Others are called for each prefix by
    itself (``EachPrefix``): their operands have no ``dims``, their statistics and incoming gradients no such axis.
    """

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over the pairs of each row, (P, N), and of each column, (P, M); -inf where there is no pair."""

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
        """dx (N, D), dy (M, D) and dscale (), from the forward's statistics and their incoming gradients."""

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Sum of softplus over the pairs of each row, (P, N); 0 where there is no pair."""

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
        """The sums (P, N), and dx (N, D), dy (M, D), dscale () and dbias () for their incoming gradient drows (P, N).

        The gradient needs no statistic of the whole matrix, so one pass forms both: 6 N M D FLOP instead of 8.
        """
