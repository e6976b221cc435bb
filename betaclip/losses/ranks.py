"""The ranks that contrast their texts with each other's images, and how texts move between them.

* ``"all_gather"``: every rank holds all texts at once, O(N D) memory, from forward to backward; their gradients return
  by a reduce-scatter. On GPUs in pieces, one on its way while another is computed.
* ``"ring"``: shards go round, the next one on its way while this one is computed; statistics and gradients of a shard's
  columns follow it, one step behind, and are home after the last rank. O(N D / W) memory on each of W ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from betaclip.kernels.precision import DTYPES

TRANSPORTS = ("all_gather", "ring")
# Of what is gathered at a time: so many bytes of a shard take longer than the way to the next GPU, as its
# bandwidth is some 400 GB/s and its latency 1 µs.
_MOST_PIECES, _LEAST_COLUMNS, _LEAST_BYTES = 8, 4096, 2**19

Group = dist.ProcessGroup | DeviceMesh
# Tensors on their way, and what to wait for.
Travelling = tuple[list[Tensor], list[Any]]
# Normalised rows of this rank's columns and their groups.
Texts = Callable[[], list[Tensor]]
# Of the columns of one shard or of several: normalised rows, groups, and what comes beside; gives what is merged.
Compute = Callable[..., Tensor | None]


def pieces(count: int, most: int, nbytes: int, device_type: str) -> int:
    """Into how many each shard is cut when ``count`` of up to ``most`` rows, ``nbytes`` each, are gathered.

    A piece hides the messages of others, but costs launches and each link's latency again, so it is to have enough
    columns and bytes. On the CPU one: there cores that compute carry the messages.
    """
    if device_type == "cpu":
        return 1
    return max(1, min(_MOST_PIECES, count * most // _LEAST_COLUMNS, nbytes // _LEAST_BYTES))


class Ranks:
    """A process group, and how texts move in it; of one loss, forward and backward.

    Raises:
        ValueError: ``group`` is a mesh of several dimensions, or this rank is not in it.
    """

    def __init__(self, transport: str, group: Group | None) -> None:
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"process_group: expected a DeviceMesh of one dimension, got {group.ndim} (slice it)")
            group = group.get_group()
        self.transport, self.group = transport, group
        self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("process_group: expected one that this rank is in")
        self._kept: list[Travelling] = []

    def meet(self, rows: int, dim: int, dtype: torch.dtype, wanted: tuple[bool, bool], counts: Tensor) -> Tensor:
        """The sums of ``counts`` (integers) over ranks, by the one message that the host waits for.

        It also tells everyone the largest number of rows, and what gradients there will be. wanted: does this rank
        want any, and does it want that of its texts? What one rank wants, others have to help with.

        Raises:
            RuntimeError: ranks disagree on what can be contrasted; on all of them, instead of waiting for ever.
        """
        own = rows, dim, DTYPES.index(dtype), *wanted
        table = counts.new_zeros(self.count, len(own))
        table[self.rank] = torch.tensor(own, device=counts.device)
        everything = self.sum(torch.cat((table.flatten(), counts)))
        per_rank = list(zip(*everything[: table.numel()].view(table.shape).tolist(), strict=True))
        for name, values in zip(("D", "dtype", "a gradient is wanted"), per_rank[1:4], strict=True):
            if len(set(values)) > 1:
                shown = [str(DTYPES[x]) for x in values] if name == "dtype" else list(values)
                raise RuntimeError(f"gather={self.transport!r}: ranks call different losses: {name}: {shown} by rank")
        self.most, self.backward_wanted, self.text_wanted = max(per_rank[0]), bool(per_rank[3][0]), any(per_rank[4])
        return everything[table.numel() :]

    def sum(self, t: Tensor) -> Tensor:
        """Over all ranks; without a gradient."""
        total = t.detach().clone()
        with self._others():
            dist.all_reduce(total, group=self.group)
        return total

    def visit(
        self, texts: Texts, beside: list[Tensor], compute: Compute, merge: str, keep: bool = False
    ) -> Tensor | None:
        """Let this rank compute with the columns of all, and merge what all ranks computed of its own.

        texts, beside: (most, ...) of this rank's columns; the texts are not asked for if all have them from the last
        visit. compute: gives a tensor of as many rows as its columns, or None on every rank. merge: by "sum" or
        "logsumexp". keep: the texts for the next visit; then nothing comes beside.
        """
        visit = self._gather_all if self.transport == "all_gather" else self._go_round
        return visit(texts, beside, compute, merge, keep)

    def _gather_all(
        self, texts: Texts, beside: list[Tensor], compute: Compute, merge: str, keep: bool
    ) -> Tensor | None:
        """Rows in pieces of all shards: one is computed while the next arrive, and while sums of the last return."""
        kept, self._kept = self._kept, []
        statistics = self.gather(beside)
        if not kept:
            rows, group = texts()
            step = -(-self.most // pieces(self.count, self.most, rows.nbytes, rows.device.type))
            kept = [self.gather([t]) for t in (group, *rows.split(max(step, 1)))]
        groups, *wide = kept
        narrow = [t.unflatten(0, (self.count, self.most)) for t in self.arrive(groups) + self.arrive(statistics)]
        returning: list[Travelling] = []
        lo = 0
        for travelling in wide:
            (rows,) = self.arrive(travelling)
            hi = lo + rows.shape[0] // self.count
            given = compute(rows, *(t[:, lo:hi].flatten(0, 1) for t in narrow))
            if given is not None:
                returning.append(self.scatter(given) if merge == "sum" else ([given.view(self.count, hi - lo)], []))
            lo = hi
        if keep:
            self._kept = [(tensors, []) for tensors, _ in kept]
        parts = [t for travelling in returning for t in self.arrive(travelling)]
        if merge == "sum" or not parts:
            return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None
        return self.exchange(torch.cat(parts, 1)).logsumexp(0)

    def _go_round(self, texts: Texts, beside: list[Tensor], compute: Compute, merge: str, keep: bool) -> Tensor | None:
        """What is computed for a shard follows it one step behind, and is sent while the next shard is computed."""
        shard = texts() + beside
        behind: Travelling | None = None
        for step in range(self.count):
            following = self.pass_on(shard) if step + 1 < self.count else None
            part = compute(*shard)
            if part is not None:
                if behind is not None:
                    (others,) = self.arrive(behind)
                    part = part.add_(others) if merge == "sum" else torch.logaddexp(part, others)
                behind = self.pass_on([part])
            if following is not None:
                shard = self.arrive(following)
        return None if behind is None else self.arrive(behind)[0]

    def gather(self, tensors: list[Tensor]) -> Travelling:
        """(W n, ...) from (n, ...) of the same shape everywhere."""
        everything = [t.new_empty(self.count * t.shape[0], *t.shape[1:]) for t in tensors]
        # Its new name, since torch 2.14.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._others():
            works = [gather(a, t.contiguous(), self.group, True) for a, t in zip(everything, tensors, strict=True)]
        return everything, works

    def scatter(self, t: Tensor) -> Travelling:
        """(n, ...) own part of (W n, ...) summed over ranks."""
        own = t.new_empty(t.shape[0] // self.count, *t.shape[1:])
        reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self._others():
            return [own], [reduce(own, t.contiguous(), group=self.group, async_op=True)]

    def exchange(self, t: Tensor) -> Tensor:
        """(W, n) what each rank has for this one, from (W, n) what this one has for each."""
        others = torch.empty_like(t)
        with self._others():
            dist.all_to_all_single(others, t, group=self.group)
        return others

    def pass_on(self, tensors: list[Tensor]) -> Travelling:
        """Send to the rank before, receive from the one after."""
        if self.count == 1:
            return tensors, []
        before, after = (self._global(self.rank + step) for step in (-1, 1))
        arriving = [torch.empty_like(t) for t in tensors]
        operations = [dist.P2POp(dist.isend, t.contiguous(), before, self.group) for t in tensors]
        operations += [dist.P2POp(dist.irecv, t, after, self.group) for t in arriving]
        with self._others():
            return arriving, dist.batch_isend_irecv(operations)

    def arrive(self, travelling: Travelling) -> list[Tensor]:
        tensors, works = travelling
        with self._others():
            for work in works:
                work.wait()
        return tensors

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = "another rank failed, or did not call the same loss within the process group's timeout"
            raise RuntimeError(
                f"gather={self.transport!r}, rank {self.rank} of {self.count}: {reason}: {error}"
            ) from error

    def _global(self, rank: int) -> int:
        rank %= self.count
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
