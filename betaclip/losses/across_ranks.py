"""Statistics of all pairs of different images when each rank of a process group holds some of the images.

Rows are image embeddings, columns are texts. A rank contrasts its rows with the columns of all ranks, and one tile
still serves both directions: the statistics of its rows are then complete, and what it knows of each column is merged
over ranks, which costs a vector. The gradient of a remote text is formed where the row is, and summed at its owner.
Each pair is computed once in the whole group. ``betaclip.losses.ranks`` has the two ways in which texts move.

Ranks may hold different numbers of rows, or none: shards are filled up to the largest with rows that take no part.
All ranks must call the same losses in the same order.
"""

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from betaclip.kernels.similarity.operand import Operand
from betaclip.kernels.similarity.operators import implementation
from betaclip.losses.ranks import Ranks


class AcrossRanks:
    """The functions of a backend's module, between the rows of this rank and the columns of all.

    Groups are this rank's own; those of other ranks differ from them. Statistics and gradients are of this rank's rows
    and columns; dscale and dbias are of this rank's rows, so that their sum over ranks is that of all pairs.
    """

    def __init__(self, backend: str, ranks: Ranks) -> None:
        self.backend, self.ranks = backend, ranks

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = self._local(x)
        rows = scale.new_full((x.rows.shape[0],), -torch.inf)

        def contrast(texts: Tensor, group: Tensor) -> Tensor:
            columns = Operand(texts, group, None, y.dtype)
            lse_x, lse_y = self._module(x, columns).similarity_logsumexp_fwd(x, columns, scale)
            torch.logaddexp(rows, lse_x, out=rows)
            return lse_y

        keep = self.ranks.backward_wanted
        return rows, _own(self.ranks.visit(partial(self._shard, y), [], contrast, "logsumexp", keep), y, scale)

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
        x, sums, dy_wanted = self._local(x), _Sums(), self.ranks.text_wanted
        statistics = torch.stack((_fill(lse_y, self.ranks.most, -torch.inf), _fill(dlse_y, self.ranks.most, 0)), 1)

        def contrast(texts: Tensor, group: Tensor, statistics: Tensor) -> Tensor | None:
            columns, (lse, dlse) = Operand(texts, group, None, y.dtype), statistics.T.contiguous()
            dx, dy, dscale = self._module(x, columns).similarity_logsumexp_bwd(
                x, columns, scale, lse_x, lse, dlse_x, dlse, need_dx, dy_wanted
            )
            sums.add(dx, dscale)
            return dy if dy_wanted else None

        dy = self.ranks.visit(partial(self._shard, y), [statistics], contrast, "sum")
        dx, dscale = sums.totals
        return dx, _own(dy if need_dy else None, y, scale), dscale

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        x, sums = self._local(x), _Sums()

        def contrast(texts: Tensor, group: Tensor) -> None:
            columns = Operand(texts, group, None, y.dtype)
            sums.add(self._module(x, columns).similarity_softplus_fwd(x, columns, scale, bias))

        self.ranks.visit(partial(self._shard, y), [], contrast, "sum")
        return sums.totals[0]

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
        x, sums, dy_wanted = self._local(x), _Sums(), self.ranks.text_wanted

        def contrast(texts: Tensor, group: Tensor) -> Tensor | None:
            columns = Operand(texts, group, None, y.dtype)
            rows, dx, dy, dscale, dbias = self._module(x, columns).similarity_softplus_fwd_bwd(
                x, columns, scale, bias, drows, need_dx, dy_wanted
            )
            sums.add(rows, dx, dscale, dbias)
            return dy if dy_wanted else None

        dy = self.ranks.visit(partial(self._shard, y), [], contrast, "sum")
        rows, dx, dscale, dbias = sums.totals
        return rows, dx, _own(dy if need_dy else None, y, scale), dscale, dbias

    def _module(self, x: Operand, y: Operand) -> ModuleType:
        return implementation(self.backend, x, y)

    def _groups(self, operand: Operand) -> Tensor:
        """(N,) int32 that no other rank has; -1 stays. They grow with the rank: sorted ones stay so once gathered, and
        backends need not look for equal ones everywhere."""
        assert operand.group is not None
        return torch.where(operand.group < 0, -1, operand.group + self.ranks.rank * self.ranks.most)

    def _local(self, x: Operand) -> Operand:
        return Operand(x.rows, self._groups(x), x.inverse_norm, x.dtype)

    def _shard(self, y: Operand) -> list[Tensor]:
        """Normalised rows and groups, filled up to the largest shard of any rank."""
        most = self.ranks.most
        return [_fill(y.matrix(y.dtype), most, 0), _fill(self._groups(y), most, -1)]


class _Sums:
    """Of what each call adds, one by one."""

    totals: tuple[Tensor, ...] = ()

    def add(self, *terms: Tensor) -> None:
        self.totals = tuple(a.add_(b) for a, b in zip(self.totals, terms, strict=True)) if self.totals else terms


def _own(columns: Tensor | None, y: Operand, scale: Tensor) -> Tensor:
    """Without the rows that fill the shard; empty for a gradient that nobody wants."""
    return scale.new_empty(0) if columns is None else columns[: y.rows.shape[0]]


def _fill(t: Tensor, most: int, value: float) -> Tensor:
    """(most, ...) with ``value`` in the rows beyond those of ``t``."""
    if t.shape[0] == most:
        return t.contiguous()
    return torch.cat((t, t.new_full((most - t.shape[0], *t.shape[1:]), value)))
