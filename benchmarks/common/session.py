"""What the commands share: options, the run, its end, and the redrawing of figures."""

import argparse
import gc
import math
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.budget import Budget
from common.comparison import Comparison, mm_rate
from common.figures import Figure, draw
from common.harness import release
from common.report import Columns, Progress, kept_within, table, untrustworthy
from common.rows import PHASES, Row, append_rows, as_row, device_name, provenance, slug

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Benchmark:
    """One of the commands; ``suffix`` ends the names of its results, ``each`` is what --seconds is spent on.

    minutes: the default of --minutes; None: there is no such option. slowest_call_s: calls that are expected to take
    longer are not tried, by device. summary: lines below the tables.
    """

    name: str
    suffix: str
    each: str
    columns: Columns
    figure: Figure
    minutes: float | None = None
    slowest_call_s: Mapping[str, float] | None = None
    summary: Callable[[list[Row]], list[str]] = lambda rows: []

    def parser(self, description: str | None) -> argparse.ArgumentParser:
        """With the options that all benchmarks have."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = parser.add_argument
        add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="default: bfloat16 on a GPU")
        add("--implementations", nargs="+", metavar="NAME", help="those whose names begin so (default: all)")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        add("--seconds", type=float, default=1.5, help=f"timed per {self.each}, one round at least (default 1.5)")
        if self.minutes is not None:
            text = f"limit of the whole run, kept by fewer rounds and sizes (default {self.minutes:g}; 0: none)"
            add("--minutes", type=float, default=self.minutes, help=text)
        add("--smoke", action="store_true", help="tiny sizes, to see that all works; writes to a temporary folder")
        add("--output", type=Path, help="folder of CSV and PNG (default: results, beside this file)")
        add("--plot-only", type=Path, metavar="CSV", help="measure nothing: draw the figure of these rows beside them")
        return parser

    def resolve(self, parser: argparse.ArgumentParser, args: argparse.Namespace, known: Mapping[str, Any]) -> None:
        """Set defaults that depend on the device, and ``args.chosen``: the implementations asked for, of ``known``."""
        if args.smoke:
            args.seconds = 0.2
            args.output = args.output or Path(tempfile.mkdtemp(prefix=f"{self.name}_"))
        args.output = args.output or RESULTS
        args.device = torch.device(args.device)
        args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
        if args.device.type not in ("cpu", "cuda"):
            parser.error(f"--device: expected cpu or cuda, got {args.device}")
        prefixes = tuple(args.implementations or ("",))
        args.chosen = {name: value for name, value in known.items() if name.startswith(prefixes)}
        if not args.chosen:
            parser.error(f"--implementations: expected some of {', '.join(known)}, got {' '.join(prefixes)}")

    def redraw(self, path: Path) -> int:
        print(draw(path, self.name, self.figure))
        return 0


def expect_at_least(least: int, parser: argparse.ArgumentParser, args: argparse.Namespace, *options: str) -> None:
    """Refuse smaller values of ``options``, which are numbers or lists of numbers."""
    for option in options:
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        for size in [value] if isinstance(value, int) else value:
            if size < least:
                parser.error(f"{option}: expected at least {least}, got {size}")


def command(benchmark: str, argv: list[str]) -> str:
    """The command line as typed, without this machine's folders."""
    shown = (Path(x).name if Path(x).is_absolute() else x for x in argv)
    return shlex.join(["python", f"benchmarks/{benchmark}.py", *shown])


def measure(
    comparison: Comparison, benchmark: Benchmark, budget: Budget, source: Row, path: Path, shown: bool = True
) -> list[Row]:
    """The rows of both phases, appended to the file at ``path`` and printed, if ``shown``."""
    progress = Progress(shown)
    measured = [row for phase in PHASES for row in comparison.measure(phase, budget, progress)]
    rows = [as_row(row, source) for row in measured]
    if shown:
        append_rows(path, rows)
    progress.print(f"\n{comparison.heading()}{mm_rate(rows)}\n{table(rows, benchmark.columns)}")
    return rows


class Session:
    """One run of a benchmark: says what is measured where, measures, and says where the results are."""

    def __init__(self, benchmark: Benchmark, args: argparse.Namespace, argv: list[str]) -> None:
        slowest = (benchmark.slowest_call_s or {}).get(args.device.type, math.inf)
        self.budget = Budget(getattr(args, "minutes", 0), args.seconds, slowest)
        self.benchmark, self.source = benchmark, provenance(command(benchmark.name, argv))
        name = device_name(args.device)
        self.device = slug(name)
        self.path = args.output / f"{self.device}{benchmark.suffix}.csv"
        print(f"{name}   torch {self.source['torch']}   betaclip {self.source['betaclip']}   {self.source['date']}")
        print(
            "Times: median (20th-80th percentile) of interleaved rounds. Other columns: forward+backward; see --help."
        )
        gc.freeze()  # looking through all that was imported, again and again, takes longer than small cases

    def run(self, comparisons: Mapping[str, Callable[[], Comparison]]) -> int:
        """Measure what each function makes, by its name; print a table of it and append its rows to the CSV file.

        Then say where everything is and whether to trust it; the exit status.
        """
        rows: list[Row] = []
        begun = []
        for name, make in comparisons.items():
            if self.budget.left_s <= 0:
                break
            rows += measure(make(), self.benchmark, self.budget, self.source, self.path)
            begun.append(name)
            release()
        not_begun = [name for name in comparisons if name not in begun]
        said = kept_within(rows, self.budget.minutes, self.benchmark.figure.x, not_begun) + untrustworthy(rows)
        print("", *self.benchmark.summary(rows), *said, sep="\n")
        return self.finish(rows)

    def finish(self, rows: list[Row]) -> int:
        print(f"rows: {self.path}", draw(self.path, self.benchmark.name, self.benchmark.figure), sep="\n")
        ours = (row for row in rows if row["implementation"].startswith("betaclip"))
        return int(any(row["status"].startswith("failed") for row in ours))
