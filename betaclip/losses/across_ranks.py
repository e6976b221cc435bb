"""The similarity backend between the images of all ranks of a process group, each of which holds some of them.

Rows are image embeddings, columns are texts. A rank contrasts its rows with the columns of all ranks, and one tile
still serves both directions: the statistics of its rows are then complete, and its share of each column's statistic is
merged over ranks, which costs a vector. The gradient of a remote text is formed where the row is, and summed at its
owner. Each pair is computed once in the whole group. Columns move in one of two ways:

* ``"all_gather"``: every rank holds all columns at once, O(N D) memory, from forward to backward; their gradients
  return by a reduce-scatter. On GPUs they come in pieces, one on its way while another is computed.
* ``"ring"``: shards go round, the next one on its way while this one is computed; statistics and gradients of a shard's
  columns follow it, one step behind, and are back on their own rank at the end. O(N D / W) memory on each of W ranks.

Ranks may hold different numbers of rows, or none: shards are filled up to the largest with rows that take no part.
All ranks must call the same losses in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from betaclip.kernels.precision import DTYPES
from betaclip.kernels.similarity.contract import Operand, SimilarityBackend
from betaclip.kernels.similarity.operators import Backend, local_backend
from betaclip.process_group import ProcessGroup

TRANSPORTS = ("all_gather", "ring")
# Limits of the pieces that are gathered at a time. This many bytes of a shard take longer than the way to the next GPU,
# as its bandwidth is some 400 GB/s and its latency 1 µs.
_MAX_PIECES, _MIN_COLUMNS, _MIN_BYTES = 8, 4096, 2**19

# This rank's normalised columns, their image ids and, if there are any, text ids, filled up to the largest shard.
LoadShard = Callable[[], list[Tensor]]
# From the columns of one shard or of several (normalised rows, ids, extras), what is merged at their owner.
Compute = Callable[..., Tensor | None]


def pieces(ranks: int, max_rows: int, nbytes: int, device_type: str) -> int:
    """Into how many pieces each shard is cut when shards of up to ``max_rows`` rows, ``nbytes`` each, are gathered.

    A piece hides the messages of others, but costs launches and each link's latency again, so it is to have enough
    columns and bytes. On the CPU there is one piece, because the cores that compute also carry the messages.
    """
    if device_type == "cpu":
        return 1
    return max(1, min(_MAX_PIECES, ranks * max_rows // _MIN_COLUMNS, nbytes // _MIN_BYTES))


class Wanted(NamedTuple):
    """Whether a rank needs any gradient, and whether it needs that of its texts, which all ranks compute together."""

    any: bool
    text: bool


class Call(NamedTuple):
    """The loss that a rank calls and its options, which must be the same on all ranks."""

    loss: str
    form: str
    padding: str
    bias: bool
    divisor: str = "pairs"
    conditioned: bool = False
    reduction: str = "mean"
    smoothed: bool = False
    weighted: bool = False
    extra: bool = False
    text_ids: bool = False


# The possible values of each entry of a call. Ranks exchange the index of a value.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "loss": ("BetaCALLoss", "ClipLoss"),
    "form": ("ce", "bce"),
    "padding": ("ignore", "published"),
    "bias": (False, True),
    "divisor": ("pairs", "rows"),
    "conditioned": (False, True),
    "reduction": ("mean", "none"),
    "smoothed": (False, True),
    "weighted": (False, True),
    "extra": (False, True),
    "text_ids": (False, True),
    "gather": TRANSPORTS,
    "dtype": DTYPES,
}


class AcrossRanks:
    """The ``SimilarityBackend`` between the rows of this rank and the columns of all; made for one call of one loss.

    Image ids are this rank's own; those of other ranks differ from them. Statistics and gradients are those of this
    rank's rows and columns. dscale and dbias are those of this rank's rows, so that their sum over ranks is that of all
    pairs. The incoming gradients of all ranks add up.

    backend: between this rank's rows and the columns that have arrived, an object or a resolved name. call: which loss
    this is. num_pieces: as :func:`pieces`.
    """

    serves_prefixes = True

    def __init__(
        self,
        backend: Backend,
        transport: str,
        group: ProcessGroup,
        wanted: Wanted,
        call: Call,
        num_pieces: Callable[[int, int, int, str], int] = pieces,
    ) -> None:
        self.backend, self.group, self.wanted, self.call = backend, group, wanted, call
        self._text_ids: Tensor | None = None
        self.shards = _Shards(transport, group, num_pieces)

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = self._agree(x, y)
        rows = scale.new_full((len(x.slices), x.rows.shape[0]), -torch.inf)

        def contrast(texts: Tensor, *ids: Tensor) -> Tensor:
            columns = _columns(y, texts, *ids)
            lse_x, lse_y = self._local("similarity_logsumexp", x, columns).similarity_logsumexp_fwd(x, columns, scale)
            torch.logaddexp(rows, lse_x, out=rows)
            return lse_y.T.contiguous()

        lse_y = self.shards.for_each(partial(self._shard, y), [], contrast, "logsumexp", keep=self.wanted.any)
        return rows, _own(lse_y, y, scale).T.contiguous()

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
        x, sums, dy_wanted = self._across(x), _Sums(), self.wanted.text
        max_rows = self.shards.max_rows
        statistics = torch.stack((_fill(lse_y.T, max_rows, -torch.inf), _fill(dlse_y.T, max_rows, 0)), 1)

        def contrast(texts: Tensor, *ids_and_statistics: Tensor) -> Tensor | None:
            *ids, statistics = ids_and_statistics
            columns, (lse, dlse) = _columns(y, texts, *ids), statistics.permute(1, 2, 0).contiguous()
            dx, dy, dscale = self._local("similarity_logsumexp", x, columns).similarity_logsumexp_bwd(
                x, columns, scale, lse_x, lse, dlse_x, dlse, need_dx, dy_wanted
            )
            sums.add(dx, dscale)
            return dy if dy_wanted else None

        dy = self.shards.for_each(partial(self._shard, y), [statistics], contrast, "sum")
        dx, dscale = sums.totals
        return dx, _own(dy if need_dy else None, y, scale), dscale

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        x, sums = self._agree(x, y), _Sums()

        def contrast(texts: Tensor, *ids: Tensor) -> None:
            columns = _columns(y, texts, *ids)
            sums.add(self._local("similarity_softplus", x, columns).similarity_softplus_fwd(x, columns, scale, bias))

        self.shards.for_each(partial(self._shard, y), [], contrast, "sum")
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
        x, sums = self._agree(x, y), _Sums()
        dy_wanted = self.wanted.text

        def contrast(texts: Tensor, *ids: Tensor) -> Tensor | None:
            columns = _columns(y, texts, *ids)
            rows, dx, dy, dscale, dbias = self._local("similarity_softplus", x, columns).similarity_softplus_fwd_bwd(
                x, columns, scale, bias, drows, need_dx, dy_wanted
            )
            sums.add(rows, dx, dscale, dbias)
            return dy if dy_wanted else None

        dy = self.shards.for_each(partial(self._shard, y), [], contrast, "sum")
        rows, dx, dscale, dbias = sums.totals
        return rows, dx, _own(dy if need_dy else None, y, scale), dscale, dbias

    def _agree(self, x: Operand, y: Operand) -> Operand:
        """Find the largest shard, and whether any rank wants the gradient of its texts; ``x`` as :meth:`_across`.

        Raises:
            RuntimeError: ranks disagree on what they contrast. It is raised on all ranks, which would otherwise wait
                for each other forever.
        """
        self.wanted = self.shards.agree(x, y, self.wanted, self.call)
        if x.text_id is not None and y.text_id is not None:
            with _explained(self.group, "the ids of all texts"):
                ids = x.text_id if x.text_id is y.text_id else torch.cat((x.text_id, y.text_id))
                self._text_ids = self.group.gather_rows(ids).sort().values
        return self._across(x)

    def _across(self, x: Operand) -> Operand:
        """``x`` with image ids that no other rank has, and text ids that equal texts of all ranks share; -1 stays.
        Image ids grow with the rank: sorted ones stay so once gathered, and backends need not look for equal ones
        everywhere."""
        assert x.image_id is not None
        ids = torch.where(x.image_id < 0, -1, x.image_id + self.group.rank * self.shards.ids_per_rank)
        text_id = None if x.text_id is None else renumbered(x.text_id, self._text_ids)
        return replace(x, image_id=ids, text_id=text_id)

    def _local(self, operation: str, x: Operand, y: Operand) -> SimilarityBackend:
        return local_backend(operation, self.backend, x, y)

    def _shard(self, y: Operand) -> list[Tensor]:
        across = self._across(y)
        ids = [t for t in (across.image_id, across.text_id) if t is not None]
        return [_fill(y.matrix(y.dtype), self.shards.max_rows, 0), *(_fill(t, self.shards.max_rows, -1) for t in ids)]


def renumbered(text_id: Tensor, all_ids: Tensor | None = None) -> Tensor:
    """(N,) int32 ids, equal where those of ``text_id`` are, -1 where they are negative: each id's place among all ids,
    which are sorted, or by default among these."""
    all_ids = text_id.sort().values if all_ids is None else all_ids
    return torch.where(text_id < 0, -1, torch.searchsorted(all_ids, text_id)).to(torch.int32)


def over_ranks(terms: Tensor, counts: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The sums of ``terms`` and ``counts`` over ranks.

    The gradient of the terms is W times that of this rank's: an average over the W ranks undoes that.
    """
    if group is None:
        return terms, counts
    with _explained(group, "the sum over ranks"):
        sums = group.sum(torch.cat((terms.detach().flatten().double(), counts.flatten().double())))
    total = sums[: terms.numel()].view(terms.shape).to(terms.dtype)
    share = group.size * terms
    return total + (share - share.detach()), sums[terms.numel() :].view(counts.shape).to(counts.dtype)


def sum_over_ranks(terms: Tensor, scale: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of ``terms`` over ranks; its gradient is the sum of all ranks' gradients.

    The backward is a collective. All ranks that want any gradient take part in it if their ``scale`` wants one.
    """
    sums: Tensor = _SumOverRanks.apply(terms, scale, group)
    return sums


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor, scale: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        with _explained(group, "the sum over ranks"):
            return group.sum(terms)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        with _explained(ctx.group, "the sum over ranks, backward"):
            return ctx.group.sum(incoming[0].contiguous()), None, None


class InFlight(NamedTuple):
    """Tensors on their way, and the works to wait for."""

    tensors: list[Tensor]
    works: list[Any]


class _Shards:
    """How the columns of one loss move between ranks, forward and backward."""

    def __init__(self, transport: str, group: ProcessGroup, num_pieces: Callable[[int, int, int, str], int]) -> None:
        self.transport, self.group, self.num_pieces = transport, group, num_pieces
        self.max_rows = self.ids_per_rank = 0
        self._kept: list[InFlight] = []

    def agree(self, x: Operand, y: Operand, wanted: Wanted, call: Call) -> Wanted:
        """Set ``max_rows``, the largest number of a rank's columns, and ``ids_per_rank``, which is above each rank's
        image ids: they are at most the number of its rows. Return which gradients the ranks want together.

        The host waits for this message, and with text ids for their numbers. Its size is the same whatever is called,
        so ranks that differ learn of it before they exchange messages of different sizes.
        """
        rows, depth = x.rows.shape
        columns = y.rows.shape[0]
        chosen = {**call._asdict(), "gather": self.transport, "dtype": x.dtype}
        places = [choices.index(chosen[name]) for name, choices in _CHOICES.items()]
        numbers = [rows, columns, depth, crc32(repr(x.dims).encode()), *wanted, *places]
        table = torch.zeros(self.group.size, len(numbers), dtype=torch.int64)
        table[self.group.rank] = torch.tensor(numbers)
        with self._explained():
            per_rank = list(zip(*self.group.sum(table.to(x.rows.device)).tolist(), strict=True))
        row_counts, column_counts, depths, checksums, any_wanted, text_wanted, *codes = per_rank
        alike = {
            name: [choices[c] for c in code] for (name, choices), code in zip(_CHOICES.items(), codes, strict=True)
        }
        numbers_alike = {"D": depths, "dims (checksums)": checksums, "a gradient is wanted": any_wanted}
        for name, values in {**alike, **numbers_alike}.items():
            if len(set(values)) > 1:
                shown = ", ".join(str(value) for value in values)
                raise RuntimeError(
                    f"gather: ranks call different losses: {name}: [{shown}] by rank; call the same on all"
                )
        self.max_rows, self.ids_per_rank = max(column_counts), max(row_counts) + 1
        return Wanted(bool(any_wanted[0]), any(text_wanted))

    def for_each(
        self, load: LoadShard, extras: list[Tensor], compute: Compute, merge: str, keep: bool = False
    ) -> Tensor | None:
        """Let this rank compute with the columns of all, and merge at their owner what all ranks computed of its own.

        Args:
            load: this rank's columns; not called if all ranks have kept them since the last call.
            extras: (max_rows, ...) that travel with this rank's columns.
            compute: returns a tensor with a row per column, or None on every rank.
            merge: how to merge those tensors, ``"sum"`` or ``"logsumexp"``.
            keep: keep the columns for the next call, where the transport holds them all; then there are no extras.
        """
        if self.transport == "ring":
            return self._ring(load, extras, compute, merge)
        return self._all_gather(load, extras, compute, merge, keep)

    def _all_gather(
        self, load: LoadShard, extras: list[Tensor], compute: Compute, merge: str, keep: bool
    ) -> Tensor | None:
        """Rows come in pieces of all shards: one is computed while the next arrive and the last one's sums return."""
        size = self.group.size
        kept, self._kept = self._kept, []
        extras_in_flight = self._gather(extras)
        if not kept:
            rows, *ids = load()
            step = -(-self.max_rows // self.num_pieces(size, self.max_rows, rows.nbytes, rows.device.type))
            kept = [self._gather(ids), *(self._gather([t]) for t in rows.split(max(step, 1)))]
        ids_in_flight, *pieces_in_flight = kept
        vectors = self._wait(ids_in_flight) + self._wait(extras_in_flight)
        vectors = [t.unflatten(0, (size, self.max_rows)) for t in vectors]
        returning: list[InFlight] = []
        lo = 0
        for piece in pieces_in_flight:
            (rows,) = self._wait(piece)
            hi = lo + rows.shape[0] // size
            computed = compute(rows, *(t[:, lo:hi].flatten(0, 1) for t in vectors))
            if computed is not None and merge == "sum":
                returning.append(self._reduce_scatter(computed))
            elif computed is not None:
                returning.append(InFlight([computed.unflatten(0, (size, hi - lo))], []))
            lo = hi
        if keep:
            self._kept = [InFlight(tensors, []) for tensors, _ in kept]
        parts = [t for in_flight in returning for t in self._wait(in_flight)]
        if merge == "sum" or not parts:
            return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None
        return self._exchange(torch.cat(parts, 1)).logsumexp(0)

    def _ring(self, load: LoadShard, extras: list[Tensor], compute: Compute, merge: str) -> Tensor | None:
        """A shard's result follows it one step behind, and is sent while the next shard is computed."""
        shard = load() + extras
        behind: InFlight | None = None
        for step in range(self.group.size):
            following = self._send_recv(shard) if step + 1 < self.group.size else None
            part = compute(*shard)
            if part is not None:
                if behind is not None:
                    (others,) = self._wait(behind)
                    part = part.add_(others) if merge == "sum" else torch.logaddexp(part, others)
                behind = self._send_recv([part])
            if following is not None:
                shard = self._wait(following)
        return None if behind is None else self._wait(behind)[0]

    def _gather(self, tensors: list[Tensor]) -> InFlight:
        """(W n, ...) from (n, ...) of the same shape everywhere."""
        gathered = [t.new_empty(self.group.size * t.shape[0], *t.shape[1:]) for t in tensors]
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.14
        with self._explained():
            works = [gather(a, t.contiguous(), self.group.group, True) for a, t in zip(gathered, tensors, strict=True)]
        return InFlight(gathered, works)

    def _reduce_scatter(self, t: Tensor) -> InFlight:
        """(n, ...) this rank's part of (W n, ...) summed over ranks."""
        own = t.new_empty(t.shape[0] // self.group.size, *t.shape[1:])
        reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.14
        with self._explained():
            return InFlight([own], [reduce(own, t.contiguous(), group=self.group.group, async_op=True)])

    def _exchange(self, t: Tensor) -> Tensor:
        """(W, n, P), statistics from each rank for this one, out of (W, n, P), those from this one for each rank."""
        others = torch.empty_like(t)
        with self._explained():
            dist.all_to_all_single(others, t, group=self.group.group)
        return others

    def _send_recv(self, tensors: list[Tensor]) -> InFlight:
        """Send to the rank before, receive from the one after."""
        if self.group.size == 1:
            return InFlight(tensors, [])
        before, after = (self._global_rank(self.group.rank + step) for step in (-1, 1))
        received = [torch.empty_like(t) for t in tensors]
        operations = [dist.P2POp(dist.isend, t.contiguous(), before, self.group.group) for t in tensors]
        operations += [dist.P2POp(dist.irecv, t, after, self.group.group) for t in received]
        with self._explained():
            return InFlight(received, dist.batch_isend_irecv(operations))

    def _wait(self, in_flight: InFlight) -> list[Tensor]:
        with self._explained():
            for work in in_flight.works:
                work.wait()
        return in_flight.tensors

    def _explained(self) -> Any:
        return _explained(self.group, f"gather={self.transport!r}")

    def _global_rank(self, rank: int) -> int:
        rank %= self.group.size
        return rank if self.group.group is None else dist.get_global_rank(self.group.group, rank)


@contextmanager
def _explained(group: ProcessGroup, what: str) -> Iterator[None]:
    """Say in an error of torch.distributed what this rank was doing, and why that may have failed."""
    try:
        yield
    except RuntimeError as error:
        reason = "another rank failed, or did not call the same loss within the process group's timeout"
        raise RuntimeError(f"{what}, rank {group.rank} of {group.size}: {reason}: {error}") from error


def _columns(y: Operand, texts: Tensor, image_id: Tensor, text_id: Tensor | None = None) -> Operand:
    """Columns that have arrived, normalised where they come from."""
    return Operand(texts, image_id, None, y.dtype, text_id, dims=y.dims)


class _Sums:
    """Element-wise running sums of a tuple of tensors."""

    totals: tuple[Tensor, ...] = ()

    def add(self, *terms: Tensor) -> None:
        self.totals = tuple(a.add_(b) for a, b in zip(self.totals, terms, strict=True)) if self.totals else terms


def _own(columns: Tensor | None, y: Operand, scale: Tensor) -> Tensor:
    """``columns`` without the rows that fill the shard; empty for a gradient that nobody wants."""
    return scale.new_empty(0) if columns is None else columns[: y.rows.shape[0]]


def _fill(t: Tensor, max_rows: int, value: float) -> Tensor:
    """(max_rows, ...) with ``value`` in the rows beyond those of ``t``."""
    if t.shape[0] == max_rows:
        return t.contiguous()
    return torch.cat((t, t.new_full((max_rows - t.shape[0], *t.shape[1:]), value)))
