"""Similarity operations on the dense matrix: the definition of correct, for any float dtype and device.

Everything here holds an (N, M) matrix of accumulation dtype and writes its gradients out by hand, so that it checks
the other backends and not autograd.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from betaclip.kernels.similarity.contract import Operand


@dataclass(frozen=True)
class Reference:
    """The ``SimilarityBackend`` on the dense matrix."""

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = _cosines(x, y)[0] * scale
        excluded = _excluded_pairs(x, y)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        return logits.logsumexp(1), logits.logsumexp(0)

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
        cosines, x_rows, y_rows = _cosines(x, y)
        logits = cosines * scale
        # A row without any pair has the statistic -inf; its exponentials are excluded below.
        ds = dlse_x[:, None] * (logits - lse_x[:, None]).exp() + dlse_y * (logits - lse_y).exp()
        excluded = _excluded_pairs(x, y)
        if excluded is not None:
            ds = ds.masked_fill(excluded, 0)
        return (
            (ds @ y_rows) * scale if need_dx else ds.new_empty(0),
            (ds.T @ x_rows) * scale if need_dy else ds.new_empty(0),
            (ds * cosines).sum(),
        )

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        ones = scale.new_ones(x.rows.shape[0])
        return self.similarity_softplus_fwd_bwd(x, y, scale, bias, ones, False, False)[0]

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
        cosines, x_rows, y_rows = _cosines(x, y)
        logits = cosines * scale if bias is None else cosines * scale + bias
        excluded = _excluded_pairs(x, y)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        rows = torch.logaddexp(logits, torch.zeros_like(logits)).sum(1)
        ds = drows[:, None] * logits.sigmoid()
        return (
            rows,
            (ds @ y_rows) * scale if need_dx else ds.new_empty(0),
            (ds.T @ x_rows) * scale if need_dy else ds.new_empty(0),
            (ds * cosines).sum(),
            ds.sum(),
        )


def _cosines(x: Operand, y: Operand) -> tuple[Tensor, Tensor, Tensor]:
    """(N, M) products, and both operands in accumulation dtype."""
    x_rows, y_rows = x.matrix(x.accumulation), y.matrix(y.accumulation)
    return x_rows @ y_rows.T, x_rows, y_rows


def _excluded_pairs(x: Operand, y: Operand) -> Tensor | None:
    """(N, M) bool, True where a pair takes no part: the image or the text is the same, or a row is padding (image
    id < 0)."""
    excluded = None
    if x.image_id is not None and y.image_id is not None:
        x_image_id, y_image_id = x.image_id[:, None], y.image_id[None, :]
        excluded = (x_image_id == y_image_id) | (x_image_id < 0) | (y_image_id < 0)
    if x.text_id is not None and y.text_id is not None:
        same_text = (x.text_id[:, None] == y.text_id) & (y.text_id >= 0)
        excluded = same_text if excluded is None else excluded | same_text
    return excluded
