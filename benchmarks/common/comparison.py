"""The comparison of implementations at one size: each is called once, then all are timed in interleaved rounds."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.budget import Budget
from common.harness import (
    ForeignCores,
    Run,
    attempt,
    free_bytes,
    interleave,
    matrix_products,
    matrix_tflops,
    nothing,
    time_ms,
    with_peak_bytes,
)
from common.report import Progress, in_bytes
from common.rows import FORWARD, OK, OUT_OF_MEMORY, SKIPPED, Case, Measurement, Row


@dataclass(frozen=True)
class Call:
    """``function()`` is what is measured; gradients are taken with respect to ``leaves``.

    warm_up: a smaller call of the same code, by which libraries initialise themselves; by default the call itself.
    forget: lets go of scratch that the code keeps between calls, for it to be counted.
    estimated_bytes: peak memory by phase, where a call that exceeds the free memory must not be tried.
    """

    function: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    warm_up: "Call | None" = None
    forget: Callable[[], None] = nothing
    estimated_bytes: Callable[[str], float] = lambda phase: 0.0

    def run(self, phase: str, grad_output: Tensor) -> Run:
        """A call that returns (value,) or (value, gradients of ``leaves``)."""

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self.function(),)

        def both() -> tuple[Tensor, ...]:
            value = self.function()
            return value, *torch.autograd.grad(value, self.leaves, grad_output.to(value.dtype))

        return forward if phase == FORWARD else both


class Comparison(ABC):
    """All implementations of one operation at one size.

    case: the size, without implementation and phase. mm: rows and columns of the matrices by which torch.mm's rate is
    measured in the same rounds. baseline: the implementation that the value "speedup" refers to. clock: times a call.
    foreign: counts cores that other processes keep busy.
    """

    baseline = "published"
    clock: Callable[[Run, torch.device], float] = staticmethod(time_ms)
    foreign: Callable[[], ForeignCores] = ForeignCores

    def __init__(self, case: Case, names: Iterable[str], mm: tuple[int, int], device: torch.device) -> None:
        self.case, self.names, self.mm, self.device = case, tuple(names), mm, device
        self.grad_output = torch.ones((), device=device)
        self.calls: dict[str, tuple[Call, str]] = {}

    @abstractmethod
    def prepare(self, name: str) -> Call:
        """What to call.

        Raises:
            Unavailable: it cannot run here.
        """

    @abstractmethod
    def flop(self, phase: str) -> float:
        """The least FLOP that the operation needs."""

    @abstractmethod
    def heading(self) -> str:
        """What stands above the table."""

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        """What this benchmark reports of a call beside time and memory; "note" is appended to the row's."""
        return {}

    def observe(self, call: Call, run: Run) -> tuple[Sequence[Tensor], dict[str, Any], float]:
        """The outputs of one call, fields and values of its row, and how many ms it took."""
        outputs, peak, elapsed_ms = with_peak_bytes(run, self.device, forget=call.forget)
        return outputs, {"peak_bytes": peak}, elapsed_ms

    def measure(self, phase: str, budget: Budget, progress: Progress) -> list[Measurement]:
        """One measurement per implementation."""
        rows: dict[str, Measurement] = {}
        runs: dict[str, Run] = {}
        long: dict[str, list[float] | str] = {}
        for name in budget.order(self.names, lambda name: self._key(name, phase), self.flop(phase)):
            progress.describe(f"{self.case.form} {' '.join(map(str, self.case.sizes.values()))}, {phase}: {name}")
            rows[name], run, elapsed_ms = self._first_call(name, phase, budget)
            if run is not None and elapsed_ms > budget.long_s * 1e3:  # this was its only round
                long[name] = [elapsed_ms]
            elif run is not None:
                runs[name] = run
        if runs or long:
            products = matrix_products(*self.mm, getattr(torch, self.case.dtype), self.device)
            with self.foreign() as foreign:
                times = interleave({**products, **runs}, self.device, budget.seconds, self.clock) | long
            tflops = matrix_tflops({name: times[name] for name in products}, *self.mm)
            for name in [*runs, *long]:
                taken, row = times[name], replace(rows[name], foreign_cores=foreign.cores)
                failed = isinstance(taken, str)
                rows[name] = replace(row, status=taken) if failed else row.timed(taken, self.flop(phase), tflops)
        return self._with_speedups([rows[name] for name in self.names])

    def _key(self, name: str, phase: str) -> tuple[str, str, str]:
        return self.case.form, name, phase

    def _first_call(self, name: str, phase: str, budget: Budget) -> tuple[Measurement, Run | None, float]:
        """The row with everything but times, what to time if it ran, and how many ms the call took."""
        row, key, flop = replace(self.case, implementation=name, phase=phase), self._key(name, phase), self.flop(phase)
        measured, begin = Measurement(row), time.perf_counter()
        if name not in self.calls:
            self.calls[name] = attempt(lambda: self.prepare(name))
        call, status = self.calls[name]
        if status != OK:
            return replace(measured, status=status), None, 0.0
        if note := budget.refusal(key, flop):
            return replace(measured, status=SKIPPED, note=note), None, 0.0
        needed, free = call.estimated_bytes(phase), free_bytes(self.device)
        if free is not None and needed > 0.9 * free:
            note = f"not tried: about {in_bytes(str(needed))}, {in_bytes(str(free))} are free"
            return replace(measured, status=OUT_OF_MEMORY, note=note), None, 0.0
        run = call.run(phase, self.grad_output)
        _, status = attempt((call.warm_up or call).run(phase, self.grad_output))
        if status == OK:
            observed, status = attempt(lambda: self.observe(call, run))
        if status != OK:
            return replace(measured, status=status), None, 0.0
        outputs, fields, elapsed_ms = observed
        budget.record(key, flop, elapsed_ms / 1e3, time.perf_counter() - begin)
        fields |= self.values(name, phase, outputs)
        peak, note = fields.pop("peak_bytes"), fields.pop("note", "")
        if peak is None:
            note = "; ".join(filter(None, ("peak memory cannot be measured here", note)))
        return replace(measured, peak_bytes=peak, note=note, values=fields), run, elapsed_ms

    def _with_speedups(self, rows: list[Measurement]) -> list[Measurement]:
        """``rows`` with the time of the baseline over theirs."""
        base = next((row.time_ms_p50 for row in rows if row.case.implementation == self.baseline), None)
        return [row.with_values(speedup=base / row.time_ms_p50 if base and row.time_ms_p50 else None) for row in rows]


def mm_rate(rows: list[Row]) -> str:
    """torch.mm's rate, as part of a heading."""
    rates = [float(row["mm_tflops"]) for row in rows if row["mm_tflops"]]
    return f"   torch.mm {max(rates):.3g} TFLOP/s" if rates else ""
