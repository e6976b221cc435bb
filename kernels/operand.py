"""One side of a similarity operation, as every backend receives it."""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and gradients inside every backend."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Operand:
    """Rows to be compared: ``rows * length[:, None]``. Gradients are with respect to this product.

    Backends that read blocks apply ``length`` on the way, so that normalised embeddings need not exist as a whole.

    rows: (N, D) floating point.
    group: (N,) int32, < 0 for rows that take no part; None for both sides of an operation, or for neither.
    length: (N,) in accumulation dtype, 0 for rows that count as zero whatever they hold; or None for 1.
    dtype: of the matrix products; statistics and accumulation are in ``accumulation_dtype(dtype)``.
    """

    rows: Tensor
    group: Tensor | None
    length: Tensor | None
    dtype: torch.dtype

    @property
    def accumulation(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(N, D) all rows in ``dtype``; no copy if they can be used as they are."""
        return scale_rows(self.rows, self.length, dtype)


def scale_rows(rows: Tensor, length: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``rows * length[:, None]`` in ``dtype``, zero where ``length`` is; no copy if nothing changes."""
    if length is None:
        return rows.to(dtype)
    scaled = torch.mul(rows, length[:, None], out=torch.empty(rows.shape, dtype=dtype, device=rows.device))
    return scaled.masked_fill_(length[:, None] == 0, 0)
