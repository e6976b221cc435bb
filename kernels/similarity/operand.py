"""One side of a similarity operation, as every backend receives it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from betaclip.kernels.precision import accumulation_dtype


@dataclass(frozen=True)
class Operand:
    """Rows to be compared, normalised on the way if ``inverse_norm`` is given. Gradients are with respect to the
    normalised rows. Backends that read blocks never hold the normalised rows of both sides.

    rows: (N, D) floating point.
    group: (N,) contiguous int32, < 0 for rows that take no part; None for both sides of an operation, or for neither.
    inverse_norm: (N,) in accumulation dtype, 0 for rows that count as zero; or None: the rows are used as they are.
    dtype: of the matrix products; statistics and accumulation are in ``accumulation_dtype(dtype)``.
    """

    rows: Tensor
    group: Tensor | None
    inverse_norm: Tensor | None
    dtype: torch.dtype

    @property
    def accumulation(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(N, D) all rows in ``dtype``, zero where ``inverse_norm`` is; no copy if they can be used as they are."""
        if self.inverse_norm is None:
            return self.rows.to(dtype)
        unit = torch.mul(self.rows, self.inverse_norm[:, None], out=self.rows.new_empty(self.rows.shape, dtype=dtype))
        return zero_rows(unit, self.inverse_norm)


def zero_rows(rows: Tensor, inverse_norm: Tensor) -> Tensor:
    """``rows`` (..., D) with zeros where ``inverse_norm`` (...) is 0, whatever they hold; in place."""
    zero = inverse_norm == 0
    if rows.device.type == "cpu" and not bool(zero.any()):  # elsewhere looking would cost more than doing it
        return rows
    return rows.masked_fill_(zero.unsqueeze(-1), 0)
