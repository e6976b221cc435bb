"""Similarity operations on the dense matrix: the definition of correct, for any float dtype and device.

Everything here holds (P, N, M) matrices of accumulation dtype and writes its gradients out by hand, so that it checks
the other backends and not autograd.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from betaclip.kernels.similarity.contract import Operand


@dataclass(frozen=True)
class Reference:
    """The ``SimilarityBackend`` on the dense matrix."""

    serves_prefixes = True

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = _Prefixes.of(x, y).cosines * scale
        excluded = _excluded_pairs(x, y)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        return logits.logsumexp(2), logits.logsumexp(1)

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
        prefixes = _Prefixes.of(x, y)
        logits = prefixes.cosines * scale
        # A row without any pair has the statistic -inf; its exponentials are excluded below.
        to_x = dlse_x.unsqueeze(2) * (logits - lse_x.unsqueeze(2)).exp()
        ds = to_x + dlse_y.unsqueeze(1) * (logits - lse_y.unsqueeze(1)).exp()
        excluded = _excluded_pairs(x, y)
        if excluded is not None:
            ds = ds.masked_fill(excluded, 0)
        return prefixes.gradients(ds, scale, need_dx, need_dy)

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        ones = scale.new_ones(len(x.slices), x.rows.shape[0])
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
        prefixes = _Prefixes.of(x, y)
        logits = prefixes.cosines * scale if bias is None else prefixes.cosines * scale + bias
        excluded = _excluded_pairs(x, y)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        rows = torch.logaddexp(logits, torch.zeros_like(logits)).sum(2)
        ds = drows.unsqueeze(2) * logits.sigmoid()
        return rows, *prefixes.gradients(ds, scale, need_dx, need_dy), ds.sum()


class _Prefixes(NamedTuple):
    """(P, N, M) cosines; (P, N, D) and (P, M, D) normalised rows of each prefix, zero beyond its length; and by which
    factors, (P, N, 1) and (P, M, 1), their numbers are larger than those of whole rows."""

    cosines: Tensor
    x: Tensor
    y: Tensor
    x_factor: Tensor
    y_factor: Tensor

    @classmethod
    def of(cls, x: Operand, y: Operand) -> "_Prefixes":
        rows, factors = [], []
        for side in (x, y):
            whole = side.matrix(side.accumulation)
            factor = torch.cat((side.prefix_factors(), whole.new_ones(1, len(whole)))).unsqueeze(2)
            prefixes = whole.new_zeros(len(factor), *whole.shape)
            for prefix, of_rows, part in zip(prefixes, factor, side.slices, strict=True):
                prefix[:, : part.stop] = whole[:, : part.stop] * of_rows
            rows.append(prefixes)
            factors.append(factor)
        return cls(rows[0] @ rows[1].mT, *rows, *factors)

    def gradients(self, ds: Tensor, scale: Tensor, need_dx: bool, need_dy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dy and dscale, from dS (P, N, M)."""
        dx, dy = (
            self._through_norms((weights @ other) * scale, own, factor) if need else ds.new_empty(0)
            for weights, other, own, factor, need in (
                (ds, self.y, self.x, self.x_factor, need_dx),
                (ds.mT, self.x, self.y, self.y_factor, need_dy),
            )
        )
        return dx, dy, (ds * self.cosines).sum()

    def _through_norms(self, g: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
        """(N, D) the gradient of whole rows, from those of prefixes; the norms of all but the longest depend on it."""
        g[:-1] -= (rows * g)[:-1].sum(2, keepdim=True) * rows[:-1]
        return (factor * g).sum(0)


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
