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

BASELINES = ("published", "open_clip")  # the value "speedup" refers to the one that is there

Sizes, Chosen = Mapping[str, int | str], Mapping[str, Any]


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

    sizes: the columns that say how large it is. chosen: the implementations, by name. like: a tensor of their dtype and
    device. mm: rows and columns of the matrices by which torch.mm's rate is measured in the same rounds, if FLOP are
    counted. error_fields: which fields hold the errors of the value, of the first two leaves' gradients, and of the
    other leaves'. error: how large one is. clock: times a call. own_s: how long this code has been busy.
    """

    error_fields = ("loss_error", "gradient_error", "scale_error")
    error: Callable[[Tensor, Tensor], float] = staticmethod(relative_error)
    clock: Callable[[Run, torch.device], float] = staticmethod(time_ms)
    own_s: Callable[[], float] = staticmethod(time.process_time)

    def __init__(
        self, form: str, sizes: Sizes, chosen: Chosen, like: Tensor, budget: Budget, mm: tuple[int, int] = (0, 0)
    ):
        self.form, self.chosen, self.mm, self.budget = form, chosen, mm, budget
        self.dtype, self.device = like.dtype, like.device
        self.case = Measurement(form, str(like.dtype)[6:], sizes=sizes)
        self.grad_output = torch.ones((), device=like.device)
        self.calls: dict[str, tuple[Call, str]] = {}

    @abstractmethod
    def prepare(self, name: str) -> Call:
        """Build the call that is measured.

        Raises:
            Unavailable: it cannot run here.
        """

    def flop(self, phase: str) -> float:
        """The least FLOP that the operation needs; 0 if nobody has counted them."""
        return 0.0

    def exact(self) -> Call:
        """The same in float64, by which errors are measured.

        Raises:
            Unavailable: that would take too much.
        """
        raise NotImplementedError

    @cached_property
    def truth(self) -> tuple[Sequence[Tensor] | None, str]:
        """The value and its gradients in float64, or None and the reason."""
        key, flop, begin = self._key("float64", BOTH), self.flop(BOTH), self.budget.clock()
        if note := self.budget.refusal(key, flop):
            return None, f"no float64 truth: {note}"
        truth, status = attempt(lambda: self.exact().run(BOTH, self.grad_output)())
        spent_s = self.budget.clock() - begin
        self.budget.record(key, flop, spent_s, spent_s)
        return truth, "" if status == OK else f"float64 truth {status}"

    def heading(self, rows: list[Row]) -> str:
        """The heading of the table."""
        sizes = (f"{x} = {value:,}" if isinstance(value, int) else value for x, value in self.case.sizes.items())
        rate = [f"torch.mm {float(row['mm_tflops']):.3g} TFLOP/s" for row in rows if row["mm_tflops"]][:1]
        return "   ".join((self.form, *sizes, self.case.dtype, *rate))

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        """The values that this benchmark reports of a call besides time and memory; "note" is appended to the row's."""
        truth, reason = self.truth
        if truth is None:
            return {"note": reason}
        errors = [self.error(x, y) for x, y in zip(outputs, truth, strict=False)]
        worst = errors[:1] + [max(gradients) for gradients in (errors[1:3], errors[3:]) if gradients]
        return dict(zip(self.error_fields, worst, strict=False))

    def observe(self, run: Run) -> tuple[Sequence[Tensor], dict[str, Any], float]:
        """The outputs of one call, fields and values of its row, and how many seconds it took."""
        outputs, peak, elapsed_s = with_peak_bytes(run, self.device, self.budget.seconds / 4)
        return outputs, {"peak_bytes": peak}, elapsed_s

    def measure(self, phase: str) -> list[Measurement]:
        """One measurement per implementation."""
        flop = self.flop(phase)
        rows: dict[str, Measurement] = {}
        runs: dict[str, Run] = {}
        first: dict[str, float] = {}  # seconds
        for name in self.budget.order(self.chosen, lambda name: self._key(name, phase), flop):
            rows[name], run, elapsed_s = self._first_call(name, phase)
            if run is not None:
                runs[name], first[name] = run, elapsed_s
        if runs:
            again = {name: runs[name] for name in self.budget.affordable(first)}
            products = matrix_products(*self.mm, self.dtype, self.device) if flop else {}
            begin = usage(self.own_s)
            times = interleave({**products, **again}, self.device, self.budget.seconds, self.clock)
            times |= {name: [first[name] * 1e3] for name in runs if name not in again}
            foreign = foreign_cores(begin, usage(self.own_s))
            tflops = matrix_tflops({name: times[name] for name in products}, *self.mm) if flop else None
            for name in runs:
                taken, row = times[name], replace(rows[name], foreign_cores=foreign)
                rows[name] = replace(row, status=taken) if isinstance(taken, str) else row.timed(taken, flop, tflops)
        return self._with_speedups([rows[name] for name in self.chosen])

    def _key(self, name: str, phase: str) -> tuple[str, str, str]:
        return self.form, name, phase

    def _first_call(self, name: str, phase: str) -> tuple[Measurement, Run | None, float]:
        """The row with everything but times, what to time if it ran, and how many seconds the call took."""
        row, begin = replace(self.case, implementation=name, phase=phase), self.budget.clock()
        key, flop = self._key(name, phase), self.flop(phase)
        if name not in self.calls:
            self.calls[name] = attempt(lambda: self.prepare(name))
        call, status = self.calls[name]
        if status != OK:
            return replace(row, status=status), None, 0.0
        if note := self.budget.refusal(key, flop):
            return replace(row, status=SKIPPED, note=note), None, 0.0
        needed, free = call.estimated_bytes, free_bytes(self.device)
        if free is not None and needed > 0.9 * free:
            note = f"not tried: about {in_bytes(str(needed))}, {in_bytes(str(free))} are free"
            return replace(row, status=OUT_OF_MEMORY, note=note), None, 0.0
        run = call.run(phase, self.grad_output)
        _, status = attempt((call.warm_up or call).run(phase, self.grad_output))
        if status == OK:
            observed, status = attempt(lambda: self.observe(run))
        if status != OK:
            return replace(row, status=status), None, 0.0
        outputs, fields, elapsed_s = observed
        self.budget.record(key, flop, elapsed_s, self.budget.clock() - begin)
        fields |= self.values(name, phase, outputs)
        peak, note = fields.pop("peak_bytes"), fields.pop("note", "")
        if peak is None:
            note = "; ".join(filter(None, ("peak memory cannot be measured here", note)))
        return replace(row, peak_bytes=peak, note=note, values=fields), run, elapsed_s

    def _with_speedups(self, rows: list[Measurement]) -> list[Measurement]:
        """``rows`` with the time of the baseline over theirs."""
        base = next((row.time_ms_p50 for row in rows if row.implementation in BASELINES), None)
        ratios = (base / row.time_ms_p50 if base and row.time_ms_p50 else None for row in rows)
        return [replace(row, values={**row.values, "speedup": x}) for row, x in zip(rows, ratios, strict=True)]
