"""Similarity operations on the dense matrix: the definition of correct, for any float dtype and device.

Everything here holds an (N, M) matrix of accumulation dtype (float32, or float64 for float64 inputs) and
writes its gradients out by hand, so that it checks the other backends and not autograd.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and gradients inside every backend."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def why_not(x: Tensor, y: Tensor) -> list[str]:
    """The dense form serves whatever fits into memory."""
    return []


def excluded_pairs(x_group: Tensor | None, y_group: Tensor | None) -> Tensor | None:
    """(N, M) bool, True where a pair takes no part: same group, or either side padded (group < 0)."""
    if x_group is None or y_group is None:  # the operators give both or none
        return None
    x_group, y_group = x_group[:, None], y_group[None, :]
    return (x_group == y_group) | (x_group < 0) | (y_group < 0)


def _cosines(x: Tensor, y: Tensor, x_group: Tensor | None, y_group: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(N, M) products, and both operands in accumulation dtype with padded rows zeroed (they may hold NaN)."""
    dtype = accumulation_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if x_group is not None:
        x = x.masked_fill(x_group[:, None] < 0, 0)
    if y_group is not None:
        y = y.masked_fill(y_group[:, None] < 0, 0)
    return x @ y.T, x, y


def similarity_logsumexp_fwd(
    x: Tensor, y: Tensor, scale: Tensor, x_group: Tensor | None, y_group: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = _cosines(x, y, x_group, y_group)[0] * scale
    excluded = excluded_pairs(x_group, y_group)
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits.logsumexp(1), logits.logsumexp(0)


def similarity_logsumexp_bwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_group: Tensor | None,
    y_group: Tensor | None,
    lse_x: Tensor,
    lse_y: Tensor,
    dlse_x: Tensor,
    dlse_y: Tensor,
    need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cosines, x, y = _cosines(x, y, x_group, y_group)
    logits = cosines * scale
    # A row without any pair has the statistic -inf; its exponentials are excluded below.
    ds = dlse_x[:, None] * (logits - lse_x[:, None]).exp() + dlse_y * (logits - lse_y).exp()
    excluded = excluded_pairs(x_group, y_group)
    if excluded is not None:
        ds = ds.masked_fill(excluded, 0)
    return (
        (ds @ y) * scale if need_dx else ds.new_empty(0),
        (ds.T @ x) * scale if need_dy else ds.new_empty(0),
        (ds * cosines).sum(),
    )


def similarity_softplus_fwd(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, x_group: Tensor | None, y_group: Tensor | None
) -> Tensor:
    ones = torch.ones(x.shape[0], dtype=accumulation_dtype(x.dtype), device=x.device)
    return similarity_softplus_fwd_bwd(x, y, scale, bias, x_group, y_group, ones, False, False)[0]


def similarity_softplus_fwd_bwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_group: Tensor | None,
    y_group: Tensor | None,
    drows: Tensor,
    need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cosines, x, y = _cosines(x, y, x_group, y_group)
    logits = cosines * scale if bias is None else cosines * scale + bias
    excluded = excluded_pairs(x_group, y_group)
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    rows = torch.logaddexp(logits, torch.zeros_like(logits)).sum(1)
    ds = drows[:, None] * logits.sigmoid()
    return (
        rows,
        (ds @ y) * scale if need_dx else ds.new_empty(0),
        (ds.T @ x) * scale if need_dy else ds.new_empty(0),
        (ds * cosines).sum(),
        ds.sum(),
    )
