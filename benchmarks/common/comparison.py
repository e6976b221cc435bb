"""The comparison of implementations at one size: each is called once, then all are timed in interleaved rounds."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common.budget import Budget
from common.harness import (
    Run,
    attempt,
    foreign_cores,
    free_bytes,
    interleave,
    matrix_products,
    matrix_tflops,
    relative_error,
    time_ms,
    usage,
    with_peak_bytes,
)
from common.report import in_bytes
from common.rows import BOTH, FORWARD, OK, OUT_OF_MEMORY, SKIPPED, Measurement, Row


@dataclass(frozen=True)
class Call:
    """``function()`` is what is measured; gradients are taken with respect to ``leaves``.

    warm_up: a smaller call of the same code, by which libraries initialise themselves; by default the call itself.
    estimated_bytes: peak memory, where a call that exceeds the free memory must not be tried.
    """

    function: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    warm_up: "Call | None" = None
    estimated_bytes: float = 0

    def run(self, phase: str, grad_output: Tensor) -> Run:
        """A call that returns (value,) or (value, gradients of those ``leaves`` that it depends on)."""

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self.function(),)

        def both() -> tuple[Tensor, ...]:
            value = self.function()
            gradients = torch.autograd.grad(value, self.leaves, grad_output.to(value.dtype), allow_unused=True)
            return value, *(gradient for gradient in gradients if gradient is not None)

        return forward if phase == FORWARD else both


class Comparison(ABC):
    """All implementations of one operation at one size.

    case: what all rows have in common. chosen: the implementations, by name. mm: rows and columns of the matrices by
    which torch.mm's rate is measured in the same rounds. baseline: the implementation that the value "speedup" refers
    to. error_fields: which fields hold the errors of the value, of the first two leaves' gradients, and of the other
    leaves'. error: how large one is. clock: times a call. own_s: how long this code has been busy.
    """

    baseline = "published"
    error_fields = ("loss_error", "gradient_error", "scale_error")
    error: Callable[[Tensor, Tensor], float] = staticmethod(relative_error)
    clock: Callable[[Run, torch.device], float] = staticmethod(time_ms)
    own_s: Callable[[], float] = staticmethod(time.process_time)

    def __init__(self, case: Measurement, chosen: Mapping[str, Any], mm: tuple[int, int], device: torch.device) -> None:
        self.case, self.chosen, self.mm, self.device = case, chosen, mm, device
        self.form, self.grad_output = case.form, torch.ones((), device=device)
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

    def exact(self) -> Call:
        """The same in float64, by which errors are measured.

        Raises:
            Unavailable: that would take too much.
        """
        raise NotImplementedError

    @cached_property
    def truth(self) -> tuple[Sequence[Tensor] | None, str]:
        """The value and its gradients in float64, or None and the reason."""
        truth, status = attempt(lambda: self.exact().run(BOTH, self.grad_output)())
        return truth, "" if status == OK else f"float64 truth {status}"

    def heading(self, rows: list[Row]) -> str:
        """What stands above the table."""
        sizes = (f"{x} = {value:,}" if isinstance(value, int) else value for x, value in self.case.sizes.items())
        rate = max((float(row["mm_tflops"]) for row in rows if row["mm_tflops"]), default=0.0)
        return "   ".join((self.case.form, *sizes, self.case.dtype, f"torch.mm {rate:.3g} TFLOP/s"))

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        """What this benchmark reports of a call beside time and memory; "note" is appended to the row's."""
        truth, reason = self.truth
        if truth is None:
            return {"note": reason}
        errors = [self.error(x, y) for x, y in zip(outputs, truth, strict=False)]
        worst = errors[:1] + [max(gradients) for gradients in (errors[1:3], errors[3:]) if gradients]
        return dict(zip(self.error_fields, worst, strict=False))

    def observe(self, call: Call, run: Run) -> tuple[Sequence[Tensor], dict[str, Any], float]:
        """The outputs of one call, fields and values of its row, and how many ms it took."""
        outputs, peak, elapsed_ms = with_peak_bytes(run, self.device)
        return outputs, {"peak_bytes": peak}, elapsed_ms

    def measure(self, phase: str, budget: Budget) -> list[Measurement]:
        """One measurement per implementation."""
        rows: dict[str, Measurement] = {}
        runs: dict[str, Run] = {}
        long: dict[str, list[float] | str] = {}
        for name in budget.order(self.chosen, lambda name: self._key(name, phase), self.flop(phase)):
            rows[name], run, elapsed_ms = self._first_call(name, phase, budget)
            if run is not None and elapsed_ms > budget.long_s * 1e3:  # this was its only round
                long[name] = [elapsed_ms]
            elif run is not None:
                runs[name] = run
        if runs or long:
            products = matrix_products(*self.mm, getattr(torch, self.case.dtype), self.device)
            begin = usage(self.own_s)
            times = interleave({**products, **runs}, self.device, budget.seconds, self.clock) | long
            foreign = foreign_cores(begin, usage(self.own_s))
            tflops = matrix_tflops({name: times[name] for name in products}, *self.mm)
            for name in [*runs, *long]:
                taken, row = times[name], replace(rows[name], foreign_cores=foreign)
                failed = isinstance(taken, str)
                rows[name] = replace(row, status=taken) if failed else row.timed(taken, self.flop(phase), tflops)
        return self._with_speedups([rows[name] for name in self.chosen])

    def _key(self, name: str, phase: str) -> tuple[str, str, str]:
        return self.case.form, name, phase

    def _first_call(self, name: str, phase: str, budget: Budget) -> tuple[Measurement, Run | None, float]:
        """The row with everything but times, what to time if it ran, and how many ms the call took."""
        measured, begin = replace(self.case, implementation=name, phase=phase), time.perf_counter()
        key, flop = self._key(name, phase), self.flop(phase)
        if name not in self.calls:
            self.calls[name] = attempt(lambda: self.prepare(name))
        call, status = self.calls[name]
        if status != OK:
            return replace(measured, status=status), None, 0.0
        if note := budget.refusal(key, flop):
            return replace(measured, status=SKIPPED, note=note), None, 0.0
        needed, free = call.estimated_bytes, free_bytes(self.device)
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
        base = next((row.time_ms_p50 for row in rows if row.implementation == self.baseline), None)
        ratios = (base / row.time_ms_p50 if base and row.time_ms_p50 else None for row in rows)
        return [replace(row, values={**row.values, "speedup": x}) for row, x in zip(rows, ratios, strict=True)]
