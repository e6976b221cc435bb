"""Several prefixes of rows: the slices that they share, and the norms by which each is normalised."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from betaclip.kernels.precision import norm_eps


def prefix_slices(dims: tuple[int, ...], depth: int) -> list[slice]:
    """The columns by which each of P prefixes is longer than the one before it.

    dims: their lengths, ascending up to ``depth``; empty for whole rows alone, P = 1.
    """
    ends = dims or (depth,)
    return [slice(begin, end) for begin, end in zip((0, *ends), ends, strict=False)]


def columns(rows: Tensor, part: slice) -> Tensor:
    """``rows[..., part]``; the rows themselves where that is all of them: in small batches operators are the time."""
    return rows if part.stop - part.start == rows.shape[-1] else rows[..., part]


def prefix_factors(norms: Tensor) -> Tensor:
    """1 / the norms of prefixes of rows whose own norm is 1 or 0; 0 where a prefix counts as zero."""
    return torch.where(norms > norm_eps(norms.dtype), norms.reciprocal(), 0)


def sums_from_last(prefixes: Sequence[Tensor]) -> list[Tensor]:
    """Sums over each prefix and all longer ones: those that contain the slice with which the prefix ends."""
    return list(accumulate(reversed(prefixes), torch.add))[::-1]
