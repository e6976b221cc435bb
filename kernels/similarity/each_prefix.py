"""Prefixes with a backend that knows none: a pass for each of them, which costs as much as separate losses."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from betaclip.kernels.similarity.contract import Operand, SimilarityBackend


@dataclass(frozen=True)
class EachPrefix:
    """The ``SimilarityBackend`` around one whose statistics have no axis of prefixes."""

    backend: SimilarityBackend

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        pairs = _Sides(x, y).pairs
        lse_x, lse_y = zip(*(self.backend.similarity_logsumexp_fwd(*pair, scale) for pair in pairs), strict=True)
        return torch.stack(lse_x), torch.stack(lse_y)

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
        sides, of_prefixes = _Sides(x, y), []
        statistics = zip(lse_x, lse_y, dlse_x, dlse_y, strict=True)
        for pair, (of_x, of_y, dof_x, dof_y) in zip(sides.pairs, statistics, strict=True):
            gradients = self.backend.similarity_logsumexp_bwd(*pair, scale, of_x, of_y, dof_x, dof_y, need_dx, need_dy)
            of_prefixes.append(gradients)
        return sides.gradients(*zip(*of_prefixes, strict=True))

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        pairs = _Sides(x, y).pairs
        return torch.stack([self.backend.similarity_softplus_fwd(*pair, scale, bias) for pair in pairs])

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
        sides = _Sides(x, y)
        rows, dx, dy, dscale, dbias = zip(
            *(
                self.backend.similarity_softplus_fwd_bwd(*pair, scale, bias, incoming, need_dx, need_dy)
                for pair, incoming in zip(sides.pairs, drows, strict=True)
            ),
            strict=True,
        )
        return torch.stack(rows), *sides.gradients(dx, dy, dscale), torch.stack(dbias).sum(0)


class _Sides:
    """Two operands; each prefix of both as a pair of operands of their own, the shortest first, last the whole rows."""

    def __init__(self, x: Operand, y: Operand) -> None:
        self._factors = [side.prefix_factors() for side in (x, y)]
        prefixes = (_prefixes(side, factors) for side, factors in zip((x, y), self._factors, strict=True))
        self.pairs: list[tuple[Operand, Operand]] = list(zip(*prefixes, strict=True))

    def gradients(
        self, dxs: tuple[Tensor, ...], dys: tuple[Tensor, ...], dscales: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dy and dscale, from those of each prefix. The norms of all but the longest depend on whole rows."""
        totals = []
        for index, gradients in enumerate((dxs, dys)):
            *shorter, total = gradients
            if total.dim() == 2:
                for pair, factor, gradient in zip(self.pairs, self._factors[index], shorter, strict=False):
                    rows = pair[index].matrix(gradient.dtype)
                    radial = (rows * gradient).sum(1, keepdim=True)
                    total[:, : rows.shape[1]] += gradient.addcmul_(rows, radial, value=-1).mul_(factor[:, None])
            totals.append(total)
        return totals[0], totals[1], torch.stack(dscales).sum(0)


def _prefixes(side: Operand, factors: Tensor) -> list[Operand]:
    inverses = factors if side.inverse_norm is None else factors * side.inverse_norm
    shorter = [
        replace(side, rows=side.rows[:, :dim], inverse_norm=inverse, complete=False, dims=())
        for dim, inverse in zip(side.dims, inverses, strict=False)
    ]
    return [*shorter, replace(side, dims=())]
