"""Code that all benchmark commands share: options, the run, and its end."""

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from common.budget import Budget
from common.comparison import Comparison
from common.figures import Figure, draw
from common.harness import age_s, release
from common.report import Columns, kept_within, table, untrustworthy
from common.rows import PHASES, Row, append_rows, as_row, device_name, provenance, slug

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Benchmark:
    """One of the commands; ``suffix`` ends the names of its results.

    columns: of the tables, after those that all have. minutes: the default of --minutes; None: there is no such option.
    summary: lines below the tables. folder: where the command lies.
    """

    name: str
    suffix: str
    columns: Columns
    figure: Figure
    minutes: float | None = None
    summary: Callable[[list[Row]], list[str]] = lambda rows: []
    folder: str = "benchmarks"

    def parser(self, description: str | None) -> argparse.ArgumentParser:
        """Make a parser with the options that all benchmarks have."""
        parser = argparse.ArgumentParser(
            description=description,
            epilog="Prints tables, appends one row per case to <device>*.csv, and draws a figure from that file.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add = parser.add_argument
        add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="default: bfloat16 on a GPU")
        add("--implementations", nargs="+", metavar="NAME", help="those whose names begin with NAME (default: all)")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        add("--seconds", type=float, default=1.5, help="timed per table and phase, one round at least (default 1.5)")
        if self.minutes is not None:
            text = f"limit of the whole run, kept by fewer rounds and sizes (default {self.minutes:g}; 0: none)"
            add("--minutes", type=float, default=self.minutes, help=text)
        add("--smoke", action="store_true", help="tiny sizes, to see that all works; writes to a temporary folder")
        add("--output", type=Path, help="folder of CSV and PNG (default: results, beside this file)")
        add("--plot-only", type=Path, metavar="CSV", help="measure nothing: draw the figure of these rows beside them")
        return parser

    def parse(
        self,
        parser: argparse.ArgumentParser,
        argv: list[str] | None,
        known: Mapping[str, Any],
        smoke: Mapping[str, Any],
        by_device: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> argparse.Namespace:
        """The options, with the defaults of ``smoke`` if that is asked for, and others that depend on the device.

        ``chosen`` are the implementations asked for, of ``known``.
        """
        args = parser.parse_args(argv)
        if args.smoke:
            parser.set_defaults(**smoke, seconds=0, minutes=0)
            args = parser.parse_args(argv)
        args.device = torch.device(args.device)
        if args.device.type not in ("cpu", "cuda"):
            parser.error(f"--device: expected cpu or cuda, got {args.device}")
        args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
        prefixes = tuple(args.implementations or ("",))
        args.chosen = {name: value for name, value in known.items() if name.startswith(prefixes)}
        if not args.chosen:
            parser.error(f"--implementations: expected some of {', '.join(known)}, got {' '.join(prefixes)}")
        if args.smoke:
            args.output = args.output or Path(tempfile.mkdtemp(prefix=f"{self.name}_"))
            if not args.implementations:  # compilation takes longer than everything else together
                args.chosen = {name: value for name, value in args.chosen.items() if "compiled" not in name}
        args.output = args.output or RESULTS
        for name, default in by_device.items():
            setattr(args, name, getattr(args, name) or default[args.device.type])
        return args

    def main(
        self,
        arguments: Callable[[list[str]], argparse.Namespace],
        comparisons: Callable[[argparse.Namespace, "Session"], Mapping[str, Callable[[], list[Row]]]],
        argv: list[str] | None = None,
    ) -> int:
        """Run the command; the exit status."""
        argv = sys.argv[1:] if argv is None else argv
        args = arguments(argv)
        if args.plot_only:
            print(draw(args.plot_only, self.name, self.figure))
            return 0
        budget, device = Budget(getattr(args, "minutes", 0), args.seconds, started_s=age_s()), device_name(args.device)
        source = provenance(self.name, slug(device), argv, self.folder)
        print(f"{device}   torch {source['torch']}   betaclip {source['betaclip']}   {source['date']}")
        print("Times: median (20th-80th percentile) of interleaved rounds. Other columns: of forward+backward; --help.")
        gc.freeze()  # looking through all that was imported, again and again, takes longer than small cases
        session = Session(self, source, args.output / f"{slug(device)}{self.suffix}.csv", budget)
        return session.run(comparisons(args, session))


@dataclass(frozen=True)
class Session:
    """One run of a benchmark: measures, and says where the results are.

    source: the columns that say where rows come from. path: the file that they are appended to.
    """

    benchmark: Benchmark
    source: Row
    path: Path
    budget: Budget

    def measure(self, comparison: Comparison, shown: bool = True) -> list[Row]:
        """The rows of both phases; appended to the file and printed, if ``shown``."""
        rows = [as_row(row, self.source) for phase in PHASES for row in comparison.measure(phase)]
        if shown:
            append_rows(self.path, rows)
            print(f"\n{comparison.heading(rows)}\n{table(rows, self.benchmark.columns)}", flush=True)
        return rows

    def run(self, comparisons: Mapping[str, Callable[[], list[Row]]]) -> int:
        """Call each function, which measures something and is known by its name; then say where everything is and
        whether to trust it. The exit status."""
        rows: list[Row] = []
        left = dict(comparisons)
        while left and self.budget.left_s > 0:
            rows += left.pop(next(iter(left)))()
            release()
        said = kept_within(rows, self.budget.minutes, self.benchmark.figure.x[0], list(left)) + untrustworthy(rows)
        print("", *self.benchmark.summary(rows), *said, f"rows: {self.path}", sep="\n")
        print(draw(self.path, self.benchmark.name, self.benchmark.figure))
        ours = (row for row in rows if row["implementation"].startswith("betaclip"))
        return int(any(row["status"].startswith("failed") for row in ours))


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a number, for argparse."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return number
