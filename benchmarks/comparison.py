"""What the benchmarks' scripts share: the comparison of implementations at one size, options, the run, its end."""

import argparse
import shlex
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

import torch
from harness import (
    OK,
    ForeignCores,
    Measured,
    Provenance,
    Run,
    append_rows,
    as_row,
    attempt,
    device_name,
    interleave,
    matrix_products,
    matrix_tflops,
    provenance,
    read_rows,
    release,
    slug,
    time_ms,
    with_peak_bytes,
)
from report import Columns, Progress, Row, table
from torch import Tensor

PHASES = ("forward+backward", "forward")
LONG_S = 20.0  # a call that takes longer is not repeated to be interleaved with others


def phase_run(function: Callable[[], Tensor], leaves: Sequence[Tensor], incoming: Tensor, phase: str) -> Run:
    """A call that returns (value,) or (value, gradients of ``leaves``); the incoming gradient exists beforehand."""
    if phase == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(),)

        return forward

    def both() -> tuple[Tensor, ...]:
        value = function()
        return value, *torch.autograd.grad(value, leaves, incoming.to(value.dtype))

    return both


class Comparison(ABC, Generic[Measured]):
    """All implementations of one operation at one size: each called once, then timed in interleaved rounds.

    label: names the size for the progress bar. mm_rows: torch.mm's rate is measured with (mm_rows, dim) matrices.
    ``clock`` times a call, ``foreign`` counts cores that others keep busy. ``alongside``: more runs of the same rounds;
    ``times`` in ms, of these, of the products and of the implementations.
    """

    clock: Callable[[Run, torch.device], float] = staticmethod(time_ms)
    foreign = ForeignCores

    def __init__(
        self, label: str, names: Iterable[str], mm_rows: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.label, self.names, self.mm_rows, self.dim, self.device = label, tuple(names), mm_rows, dim, device
        self.products = matrix_products(mm_rows, dim, dtype, device)
        self.alongside: dict[str, Run] = {}
        self.times: dict[str, list[float] | str] = {}

    @abstractmethod
    def first_call(self, name: str, phase: str, previous: list[Row]) -> tuple[Measured, Run | None, float]:
        """Can it run, how much memory does it take, what is its error? And what to time if it can, and ms it took."""

    @abstractmethod
    def flop(self, phase: str) -> float:
        """The least that the operation needs."""

    @abstractmethod
    def heading(self, rows: list[Row]) -> str:
        """Above the table of ``rows``."""

    def measure(self, phase: str, seconds: float, progress: Progress, previous: list[Row]) -> list[Measured]:
        """One row per implementation. ``previous``: rows of smaller sizes, by which hopeless runs are left out."""
        rows: dict[str, Measured] = {}
        runs: dict[str, Run] = {}
        slow: dict[str, list[float] | str] = {}
        for name in self.names:
            progress.step(f"{self.label}, {phase}: {name}")
            rows[name], run, elapsed_ms = self.first_call(name, phase, previous)
            if elapsed_ms > max(seconds, LONG_S) * 1e3:  # not again: it was a round
                slow[name] = [elapsed_ms]
            elif run is not None:
                runs[name] = run
        if not runs and not slow:
            return list(rows.values())
        with self.foreign() as foreign:
            times = interleave({**self.products, **self.alongside, **runs}, self.device, seconds, self.clock) | slow
        self.times = times
        tflops = matrix_tflops({name: times[name] for name in self.products}, self.mm_rows, self.dim)
        for name in [*runs, *slow]:
            taken, row = times[name], replace(rows[name], foreign_cores=foreign.cores)
            if isinstance(taken, str):
                rows[name] = replace(row, status=taken)
            else:
                rows[name] = row.timed(taken, self.flop(phase), tflops)
        return list(rows.values())

    def call(
        self, row: Measured, run: Run, warm_up: Run, forget: Callable[[], None] = lambda: None
    ) -> tuple[Measured, Any, float]:
        """The row with the peak memory of a call, or with the status that says why not; its results; ms it took."""
        result, status = attempt(warm_up)
        if status == OK:
            result, status = attempt(lambda: with_peak_bytes(run, self.device, forget=forget))
        if status != OK:
            return replace(row, status=status), None, 0.0
        outputs, peak, elapsed_ms = result
        note = "" if peak is not None else "peak memory cannot be measured here"
        return replace(row, peak_bytes=peak, note=note), outputs, elapsed_ms


def add_common_options(parser: argparse.ArgumentParser, each: str) -> None:
    """``each``: what --seconds is spent on."""
    add = parser.add_argument
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="default: bfloat16 on a GPU")
    add("--implementations", nargs="+", metavar="NAME", help="those whose names begin so (default: all)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=1.5, help=f"timed per {each}, one round at least (default 1.5)")
    add("--smoke", action="store_true", help="tiny sizes, to see that all works; writes to a temporary folder")
    add("--output", type=Path, help="folder of CSV and PNG (default: results, beside this file)")


def resolve_common_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, benchmark: str, known: Mapping[str, Any]
) -> None:
    """Defaults that depend on the device; ``args.chosen``: the implementations asked for, of those ``known``."""
    if args.smoke:
        args.seconds = 0.2
        args.output = args.output or Path(tempfile.mkdtemp(prefix=f"{benchmark}_"))
    args.output = args.output or Path(__file__).parent / "results"
    args.device = torch.device(args.device)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {args.device}")
    prefixes = tuple(args.implementations or ("",))
    args.chosen = {name: value for name, value in known.items() if name.startswith(prefixes)}
    if not args.chosen:
        parser.error(f"--implementations: expected some of {', '.join(known)}")


def command(benchmark: str, argv: list[str]) -> str:
    """As typed, without this machine's folders."""
    return shlex.join(
        ["python", f"benchmarks/{benchmark}.py", *(Path(x).name if Path(x).is_absolute() else x for x in argv)]
    )


def begin(args: argparse.Namespace, benchmark: str, argv: list[str]) -> tuple[Provenance, str]:
    """Says what is measured where; what goes into each row: where it comes from, and the device."""
    name, source = device_name(args.device), provenance(command(benchmark, argv))
    print(f"{name}   torch {source.torch}   betaclip {source.betaclip}   {source.date}")
    return source, slug(name)


def run(
    comparisons: Iterable[Comparison[Any]], seconds: float, source: Provenance, path: Path, cases: int, columns: Columns
) -> list[Row]:
    """Measures, prints a table for each and appends its rows to ``path``."""
    progress = Progress(cases)
    rows: list[Row] = []
    for comparison in comparisons:
        fresh = [
            as_row(measurement, source)
            for phase in PHASES
            for measurement in comparison.measure(phase, seconds, progress, rows)
        ]
        append_rows(path, fresh)
        progress.print(comparison.heading(fresh) + "\n" + table(fresh, columns))
        rows += fresh
        del comparison
        release()
    progress.close()
    return rows


def mm_rate(rows: list[Row]) -> str:
    """Part of a heading."""
    rates = [float(row["mm_tflops"]) for row in rows if row["mm_tflops"]]
    return f"torch.mm {max(rates):.3g} TFLOP/s   " if rates else ""


def figure(path: Path, benchmark: str, draw: Callable[[list[Row], Path], str | None]) -> str:
    """The figure beside a CSV, ``draw``n from its rows; where it is, or why there is none."""
    to = path.with_suffix(".png")
    reason = draw([row for row in read_rows(path) if row["benchmark"] == benchmark], to)
    return f"figure: {to}" if reason is None else f"no figure: {reason}"


def end(rows: list[Row], path: Path, drawn: str) -> int:
    """Says where everything is, and whether to trust it; the exit status."""
    disturbance = max((float(row["foreign_cores"]) for row in rows if row["foreign_cores"]), default=0.0)
    if disturbance > 0.1:
        print(f"\nDisturbed: other processes kept up to {disturbance:.1f} cores busy. Trust no time above.")
    print("", f"rows: {path}", drawn, sep="\n")
    failed = [
        row for row in rows if row["status"].startswith("failed") and row["implementation"].startswith("betaclip")
    ]
    return 1 if failed else 0
