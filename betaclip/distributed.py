"""Statistics of all pairs of different images when each rank of a process group holds some of the images.

Rows are image embeddings, columns are texts. A rank contrasts its rows with the columns of all ranks, and one tile
still serves both directions: the statistics of its rows are then complete, and what it knows of each column is merged
over ranks, which costs a vector. The gradient of a remote text is formed where the row is, and summed at its owner.
Each pair is computed once in the whole group.

Texts move in one of two ways, with the same numbers:

* ``"all_gather"``: every rank holds all of them at once, O(N D) memory; their gradients return by a reduce-scatter.
* ``"ring"``: shards go round, the next one on its way while this one is computed; statistics and gradients of a shard's
  columns follow it and are home after the last rank. O(N D / W) memory on each of W ranks.

Ranks may hold different numbers of rows, or none: shards are filled up to the largest with rows that take no part.
All ranks must call the same losses in the same order, with gradients of the same inputs wanted.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from betaclip.kernels.operand import Operand
from betaclip.kernels.similarity import implementation

TRANSPORTS = ("all_gather", "ring")


# Tensors on their way, and what to wait for.
Travelling = tuple[list[Tensor], list[dist.Work]]


def _arrive(travelling: Travelling) -> list[Tensor]:
    tensors, works = travelling
    for work in works:
        work.wait()
    return tensors


class Ranks:
    """A process group, and how texts move in it; of one loss, forward and backward."""

    def __init__(self, transport: str, group: dist.ProcessGroup | None) -> None:
        self.transport, self.group = transport, group
        self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._most: int | None = None

    def sum(self, t: Tensor) -> Tensor:
        """Over all ranks; without a gradient."""
        total = t.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def most(self, rows: int, device: torch.device) -> int:
        """The largest number of rows of any rank: the one value that the host waits for, once a loss."""
        if self._most is None:
            most = torch.full((), rows, device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
            self._most = int(most)
        return self._most

    def visit(self, shard: list[Tensor], compute: Callable[[list[Tensor]], Tensor | None], merge: str) -> Tensor | None:
        """Let this rank compute with the columns of all, and merge what all ranks computed of its own.

        shard: tensors (n, ...) of this rank's columns, n the same everywhere. compute: of the columns of one shard or
        of several, a tensor of their number of rows, or None on every rank. merge: by "sum" or "logsumexp".
        """
        if self.transport == "all_gather":
            part = compute([self.gather(t) for t in shard])
            return None if part is None else self.scatter(part, merge)
        total = None
        for step in range(self.count):
            travelling = self.pass_on(shard) if step + 1 < self.count else None
            part = compute(shard)
            if part is not None:
                total = part if total is None else total + part if merge == "sum" else torch.logaddexp(total, part)
                if self.count > 1:
                    (total,) = _arrive(self.pass_on([total]))
            if travelling is not None:
                shard = _arrive(travelling)
        return total

    def gather(self, t: Tensor) -> Tensor:
        """(W n, ...) from (n, ...) of the same shape everywhere."""
        everything = t.new_empty(self.count * t.shape[0], *t.shape[1:])
        dist.all_gather_into_tensor(everything, t.contiguous(), group=self.group)
        return everything

    def scatter(self, t: Tensor, merge: str) -> Tensor:
        """(n, ...) own part of (W n, ...) merged over ranks."""
        own = t.new_empty(t.shape[0] // self.count, *t.shape[1:])
        if merge == "sum":
            dist.reduce_scatter_tensor(own, t.contiguous(), group=self.group)
            return own
        top = t.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        top = torch.where(top == -torch.inf, 0, top)
        dist.reduce_scatter_tensor(own, torch.exp(t - top), group=self.group)
        return own.log_() + top.view(self.count, -1)[self.rank]

    def pass_on(self, tensors: list[Tensor]) -> Travelling:
        """Send to the rank before, receive from the one after."""
        before, after = (self._global(self.rank + step) for step in (-1, 1))
        arriving = [torch.empty_like(t) for t in tensors]
        operations = [dist.P2POp(dist.isend, t.contiguous(), before, self.group) for t in tensors]
        operations += [dist.P2POp(dist.irecv, t, after, self.group) for t in arriving]
        return arriving, dist.batch_isend_irecv(operations)

    def _global(self, rank: int) -> int:
        rank %= self.count
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class AcrossRanks:
    """The functions of a backend's module, between the rows of this rank and the columns of all.

    Groups are this rank's own; those of other ranks differ from them. Statistics and gradients are of this rank's rows
    and columns; dscale and dbias are of this rank's rows, so that their sum over ranks is that of all pairs.
    """

    def __init__(self, backend: str, ranks: Ranks) -> None:
        self.backend, self.ranks = backend, ranks

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        x, shard = self._local(x), self._shard(y)
        rows = [scale.new_full((x.rows.shape[0],), -torch.inf)]

        def contrast(columns: list[Tensor]) -> Tensor:
            operand = _operand(columns, y.dtype)
            lse_x, lse_y = self._module(x, operand).similarity_logsumexp_fwd(x, operand, scale)
            rows[0] = torch.logaddexp(rows[0], lse_x)
            return lse_y

        columns = _own(self.ranks.visit(shard, contrast, "logsumexp"), y, scale)
        return rows[0], columns

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
        x, shard = self._local(x), self._shard(y)
        sums = _Sums()

        def contrast(columns: list[Tensor]) -> Tensor | None:
            operand, (lse, dlse) = _operand(columns, y.dtype), columns[2:]
            dx, dy, dscale = self._module(x, operand).similarity_logsumexp_bwd(
                x, operand, scale, lse_x, lse, dlse_x, dlse, need_dx, need_dy
            )
            sums.add(dx, dscale)
            return dy if need_dy else None

        most = shard[0].shape[0]
        dy = self.ranks.visit([*shard, _fill(lse_y, most, -torch.inf), _fill(dlse_y, most, 0)], contrast, "sum")
        dx, dscale = sums.totals
        return dx, _own(dy, y, scale), dscale

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        x = self._local(x)
        sums = _Sums()

        def contrast(columns: list[Tensor]) -> None:
            operand = _operand(columns, y.dtype)
            sums.add(self._module(x, operand).similarity_softplus_fwd(x, operand, scale, bias))

        self.ranks.visit(self._shard(y), contrast, "sum")
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
        x = self._local(x)
        sums = _Sums()

        def contrast(columns: list[Tensor]) -> Tensor | None:
            operand = _operand(columns, y.dtype)
            rows, dx, dy, dscale, dbias = self._module(x, operand).similarity_softplus_fwd_bwd(
                x, operand, scale, bias, drows, need_dx, need_dy
            )
            sums.add(rows, dx, dscale, dbias)
            return dy if need_dy else None

        dy = self.ranks.visit(self._shard(y), contrast, "sum")
        rows, dx, dscale, dbias = sums.totals
        return rows, dx, _own(dy, y, scale), dscale, dbias

    def _module(self, x: Operand, y: Operand) -> ModuleType:
        return implementation(self.backend, x, y)

    def _groups(self, operand: Operand) -> Tensor:
        """(N,) int32 that no other rank has; -1 stays negative."""
        assert operand.group is not None
        return operand.group * self.ranks.count + self.ranks.rank

    def _local(self, x: Operand) -> Operand:
        return Operand(x.rows, self._groups(x), x.inverse_norm, x.dtype)

    def _shard(self, y: Operand) -> list[Tensor]:
        """Normalised rows and groups, filled up to the largest shard of any rank."""
        most = self.ranks.most(y.rows.shape[0], y.rows.device)
        return [_fill(y.matrix(y.dtype), most, 0), _fill(self._groups(y), most, -1)]


class _Sums:
    """Of what each call adds, one by one."""

    totals: tuple[Tensor, ...] = ()

    def add(self, *terms: Tensor) -> None:
        self.totals = tuple(a.add_(b) for a, b in zip(self.totals, terms, strict=True)) if self.totals else terms


def _operand(columns: list[Tensor], dtype: torch.dtype) -> Operand:
    return Operand(columns[0], columns[1], None, dtype)


def _own(columns: Tensor | None, y: Operand, scale: Tensor) -> Tensor:
    """Without the rows that fill the shard; empty for a gradient that nobody wants."""
    return scale.new_empty(0) if columns is None else columns[: y.rows.shape[0]]


def _fill(t: Tensor, most: int, value: float) -> Tensor:
    """(most, ...) with ``value`` in the rows beyond those of ``t``."""
    if t.shape[0] == most:
        return t.contiguous()
    return torch.cat((t, t.new_full((most - t.shape[0], *t.shape[1:]), value)))
