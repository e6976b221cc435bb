"""All implementations of one loss over the ranks of a group, measured in step; and what the model says of ours."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from batches import Batch
from comparison import PHASES, Comparison, mm_rate, phase_run
from global_batch_cost import Work, predict, sent_bytes
from global_batch_rates import Rates
from global_losses import GlobalLoss, beta_cal
from harness import (
    OK,
    Case,
    ForeignCores,
    Measurement,
    Run,
    attempt,
    busy_core_seconds,
    relative_error,
    time_ms,
    with_peak_bytes,
)
from implementations import loss_flop
from report import Figure, Progress, Row, in_bytes, in_ms, number
from torch import Tensor
from traffic import Traffic

from betaclip.kernels.memory import forget
from betaclip.losses.across_ranks import TRANSPORTS

BENCHMARK = "global_batch"
TRUTH_ROWS = 4608  # up to here the first rank computes the float64 truth


@dataclass(frozen=True)
class GlobalCase(Case):
    """n: texts of all ranks, k: texts per image."""

    n: int
    k: int
    dim: int
    ranks: int


@dataclass(frozen=True)
class GlobalMeasurement(Measurement):
    """sent_bytes: by a rank's sockets (of NCCL: nccl_bytes); formula_bytes: what the model says of them.

    nccl_bytes: what NCCL sends for the calls that were made. calls: of collectives, and single sends.
    predicted_ms: by the model, from the rates of the local kernel and of one message in the same rounds.
    Errors are of the averages over ranks.
    """

    case: GlobalCase
    sent_bytes: int | None = None
    formula_bytes: int | None = None
    nccl_bytes: int | None = None
    calls: int | None = None
    predicted_ms: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    scale_error: float | None = None


def predicted(row: Row) -> str:
    """127 (+4%): and how far it is from what was measured."""
    if not row["predicted_ms"]:
        return ""
    off = float(row["predicted_ms"]) / float(row["time_ms_p50"]) - 1
    return f"{in_ms(row['predicted_ms'])} ({off:+.0%})"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "predicted": predicted,
    "of mm": lambda row: number(row["share_of_mm"], ".2f"),
    "sent": lambda row: in_bytes(row["sent_bytes"]),
    "by formula": lambda row: in_bytes(row["formula_bytes"]),
    "calls": lambda row: row["calls"],
    "extra memory": lambda row: in_bytes(row["peak_bytes"]),
    "error: loss": lambda row: number(row["loss_error"], ".1e"),
    "gradients": lambda row: number(row["gradient_error"], ".1e"),
    "scale": lambda row: number(row["scale_error"], ".1e"),
}
FIGURE = Figure(
    panel=lambda row: f"{row['form']}, N = {int(row['n']):,}",
    x="ranks",
    x_label="ranks",
    quantities=(
        ("time_ms_p50", "forward + backward, ms", 1.0),
        ("sent_bytes", "sent by a rank, MiB", 2.0**20),
        ("peak_bytes", "peak extra memory of a rank, MiB", 2.0**20),
    ),
)


def over_ranks(value: float, how: Any = dist.ReduceOp.MAX) -> float:
    """Of all ranks' values."""
    t = torch.tensor(value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(t, how)
    return float(t)


def slowest_ms(run: Run, device: torch.device) -> float:
    """One call on every rank, from a common start. The same number everywhere, so that all go on to the same call."""
    dist.barrier()
    return over_ranks(time_ms(run, device))


class ForeignToRanks(ForeignCores):
    """What no rank keeps busy."""

    @staticmethod
    def _foreign_s() -> float | None:
        own_s, busy_s = over_ranks(time.process_time(), dist.ReduceOp.SUM), busy_core_seconds()
        return None if busy_s is None else busy_s - own_s


class GlobalComparison(Comparison[GlobalMeasurement]):
    """All implementations of one form on one batch, of which this rank has a part."""

    clock = staticmethod(slowest_ms)
    foreign = ForeignToRanks

    def __init__(self, form: str, whole: Batch, chosen: dict[str, GlobalLoss], device: str) -> None:
        self.form, self.whole, ranks, rank = form, whole, dist.get_world_size(), dist.get_rank()
        self.chosen = {name: value for name, value in chosen.items() if form in value.forms}
        images, self.k, dim = whole.image.shape
        self.own = slice(rank * images // ranks, (rank + 1) * images // ranks)
        self.batch = Batch(whole.image[self.own], whole.text[self.own], whole.scale).to_leaves()
        self.n, rows, dtype = images * self.k, images // ranks * self.k, whole.image.dtype
        super().__init__(f"{form}, N = {self.n}, W = {ranks}", self.chosen, rows, dim, dtype, whole.image.device)
        self.case = GlobalCase(BENCHMARK, form, str(dtype)[6:], device, "", "", self.n, self.k, dim, ranks)
        self.work = Work("bce" if form == "bce" else "ce", ranks, rows, dim, dtype.itemsize)
        self.rates = Rates(self.work, whole, self.own)
        self.truth = self._truth() if self.n <= TRUTH_ROWS else None

    def _truth(self) -> list[Tensor]:
        """The loss of the whole batch, and its gradients by this rank's rows and by the scale; the first rank's."""
        exact = self.whole.to_leaves(torch.float64)
        outputs = [torch.zeros((), dtype=torch.float64, device=self.device), *map(torch.zeros_like, exact.leaves)]
        if dist.get_rank() == 0:
            loss = beta_cal(self.form, False, "reference")
            outputs = list(phase_run(lambda: loss(exact), exact.leaves, outputs[0] + 1, PHASES[0])())
        for t in outputs:
            dist.broadcast(t.detach(), 0)
        loss, image, text, scale = outputs
        return [loss, image[self.own], text[self.own], scale]

    def flop(self, phase: str) -> float:
        """Of one rank."""
        return loss_flop(self.form, phase, self.n, self.dim) / self.work.ranks

    def heading(self, rows: list[Row]) -> str:
        foreign = max((float(row["foreign_cores"]) for row in rows if row["foreign_cores"]), default=0.0)
        return (
            f"\n{self.form}   N = {self.n:,} ({self.n // self.k:,} images × {self.k})   D = {self.dim}   "
            f"{self.case.dtype}   W = {self.work.ranks}, {self.work.rows:,} rows each   "
            f"{mm_rate(rows)}{self._shown_rates()}foreign cores {foreign:.2f}"
        )

    def _shown_rates(self) -> str:
        """What the model was told of this machine in the last phase."""
        machine = self.rates.machine(TRANSPORTS[0], self.phase, self.times)
        shown = f"kernel {machine.flop_per_s / 1e12:.3g} TFLOP/s   "
        if self.work.ranks > 1:
            link = machine.near
            shown += f"message {link.bytes_per_s / 1e9:.2g} GB/s, {link.latency_s * 1e6:.0f} µs   "
        return shown

    def measure(self, phase: str, seconds: float, progress: Progress, previous: list[Row]) -> list[GlobalMeasurement]:
        self.phase, self.alongside = phase, self.rates.runs(phase)
        rows = super().measure(phase, seconds, progress, previous)
        return [self._with_prediction(row) if row.status == OK else row for row in rows]

    def _with_prediction(self, row: GlobalMeasurement) -> GlobalMeasurement:
        transport = self.chosen[row.case.implementation].transport
        if transport is None:
            return row
        phase = row.case.phase
        machine = self.rates.machine(transport, phase, self.times)
        return replace(
            row,
            predicted_ms=predict(self.work, transport, phase, machine).time_s * 1e3,
            formula_bytes=sent_bytes(self.work, transport, phase, machine.reduction),
        )

    def first_call(self, name: str, phase: str, previous: list[Row]) -> tuple[GlobalMeasurement, Run | None, float]:
        row = GlobalMeasurement(replace(self.case, implementation=name, phase=phase))
        loss, status = attempt(lambda: self.chosen[name].build(self.form, self.batch))
        if status != OK:
            return replace(row, status=status), None, 0.0
        incoming = torch.ones((), device=self.device)
        run = phase_run(lambda: loss(self.batch), self.batch.leaves, incoming, phase)
        result, status = attempt(lambda: self._observe(run))
        if status != OK:
            return replace(row, status=status), None, 0.0
        observed, outputs = result
        return self._with_errors(replace(row, **observed), outputs), run, 0.0

    def _observe(self, run: Run) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """What one call sends and takes, on the rank with most of it; and its results."""
        run()  # what libraries set up once
        with Traffic() as traffic:
            outputs = run()
        # Each rank calls as often as the others.
        peaks = [with_peak_bytes(run, self.device, 0.0, forget)[1] for _ in range(3)]
        known = [peak for peak in peaks if peak is not None]
        sent = traffic.nccl_bytes if traffic.socket_bytes is None else traffic.socket_bytes
        observed = {
            "sent_bytes": int(over_ranks(sent)),
            "nccl_bytes": int(over_ranks(traffic.nccl_bytes)),
            "calls": int(over_ranks(sum(count for name, count in traffic.calls.items() if name != "recv_"))),
            "peak_bytes": int(over_ranks(statistics.median(known))) if known else None,
            "note": "" if known else "peak memory cannot be measured here",
        }
        return observed, outputs

    def _with_errors(self, row: GlobalMeasurement, outputs: tuple[Tensor, ...]) -> GlobalMeasurement:
        if self.truth is None:
            return replace(row, note="; ".join(filter(None, (row.note, f"no float64 truth above N = {TRUTH_ROWS}"))))
        loss, *gradients = (t.detach().double() / self.work.ranks for t in outputs)
        for shared in (loss, *gradients[2:]):
            dist.all_reduce(shared)
        errors = [over_ranks(relative_error(x, y)) for x, y in zip((loss, *gradients), self.truth, strict=False)]
        if not gradients:
            return replace(row, loss_error=errors[0])
        return replace(row, loss_error=errors[0], gradient_error=max(errors[1:3]), scale_error=errors[3])
