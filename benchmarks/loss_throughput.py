"""How fast are contrastive losses, how much memory do they take, and how exact are they? Ours and others.

    python benchmarks/loss_throughput.py                                 # what fits this machine, in minutes
    python benchmarks/loss_throughput.py --smoke                         # seconds, tiny sizes, everything once
    python benchmarks/loss_throughput.py --forms ce --sizes 9216 73728 --implementations dense betaclip
    python benchmarks/loss_throughput.py --embeddings batch.safetensors  # a real batch instead of a made-up one

Prints a table per form and size, appends one CSV row per case to results/<device>.csv, and draws
results/<device>.png from that file. N = images × texts per image, the side of the matrix of similarities.

"of mm" is the least FLOP that the loss needs without keeping the matrix (8 N²D softmax, 6 N²D sigmoid, 2 N²D
forward; see implementations.loss_flop), over the time, over the rate of torch.mm in the same dtype, sizes and
rounds. Extra memory is the peak above what existed before, gradients included. Errors are
max |difference| / max |truth| against betaclip's dense reference in float64.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from batches import SIGLIP_BIAS, Batch, made_up_batch, real_batch
from comparison import (
    PHASES,
    Comparison,
    add_common_options,
    begin,
    end,
    figure,
    mm_rate,
    phase_run,
    resolve_common_options,
    run,
)
from harness import OK, OUT_OF_MEMORY, Case, Measurement, Run, attempt, free_bytes, relative_error
from implementations import FORMS, Implementation, Loss, implementations, loss_flop, memory_limit_bytes, reference
from report import Figure, Row, in_bytes, number, plot, summary
from torch import Tensor

BENCHMARK = "loss_throughput"
SIZES = {"cpu": (2304, 4608, 9216), "cuda": (2304, 9216, 36864, 147456, 589824)}
ONE_SIZE = {"cpu": (2304,), "cuda": (36864,)}  # of the forms of one text per image, unless sizes are given
TRUTH_ROWS = {"cpu": 4608, "cuda": 9216}  # up to here the float64 truth is computed
MATRIX_ROWS = {"cpu": 9216, "cuda": 16384}  # up to here torch.mm's rate is measured at the same N
SLOWEST_S = {"cpu": 120.0, "cuda": 20.0}  # a call expected to take longer is not tried


@dataclass(frozen=True)
class LossCase(Case):
    """n: side of the matrix of similarities, k: texts per image."""

    n: int
    k: int
    dim: int


@dataclass(frozen=True)
class LossMeasurement(Measurement):
    """limit_bytes: what betaclip promises to take at the most."""

    case: LossCase
    limit_bytes: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    scale_error: float | None = None


def in_limit(row: Row) -> str:
    """Does betaclip keep its promise?"""
    if not row["implementation"].startswith("betaclip") or not row["peak_bytes"]:
        return ""
    return "yes" if float(row["peak_bytes"]) <= float(row["limit_bytes"]) else "no"


COLUMNS = {
    "of mm": lambda row: number(row["share_of_mm"], ".2f"),
    "extra memory": lambda row: in_bytes(row["peak_bytes"]),
    "in limit": in_limit,
    "error: loss": lambda row: number(row["loss_error"], ".1e"),
    "gradients": lambda row: number(row["gradient_error"], ".1e"),
    "scale": lambda row: number(row["scale_error"], ".1e"),
}
FIGURE = Figure(
    panel=lambda row: f"{row['form']}, K = {row['k']}",
    x="n",
    x_label="N = images × texts per image",
    quantities=(("time_ms_p50", "forward + backward, ms", 1.0), ("peak_bytes", "peak extra memory, MiB", 2.0**20)),
)


def runner(loss: Loss, batch: Batch, phase: str) -> Run:
    """A call that returns (loss,) or (loss, gradients)."""
    return phase_run(lambda: loss(batch), batch.leaves, torch.ones((), device=batch.image.device), phase)


class LossComparison(Comparison[LossMeasurement]):
    """All implementations of one form on one batch."""

    def __init__(self, form: str, batch: Batch, chosen: dict[str, Implementation], device: str) -> None:
        self.form, self.batch = form, batch
        self.chosen = {name: value for name, value in chosen.items() if form in value.forms}
        images, self.k, dim = batch.image.shape
        self.n, self.dtype = images * self.k, batch.image.dtype
        rows = min(self.n, MATRIX_ROWS[batch.image.device.type])
        super().__init__(f"{form}, N = {self.n}", self.chosen, rows, dim, self.dtype, batch.image.device)
        self.case = LossCase(BENCHMARK, form, str(self.dtype)[6:], device, "", "", self.n, self.k, dim)
        self.limit_bytes = memory_limit_bytes(self.device.type, self.n, self.dim, self.dtype.itemsize)
        self.losses: dict[str, Loss] = {}
        self.small = batch.to_leaves(images=max(2, 512 // self.k))
        self.truth: tuple[Tensor, ...] | None = None
        self.no_truth = f"no float64 truth above N = {TRUTH_ROWS[self.device.type]}, or without memory for it"
        free = free_bytes(self.device)
        if self.n <= TRUTH_ROWS[self.device.type] and (free is None or 12 * 8 * self.n**2 < free):
            exact = batch.to_leaves(torch.float64)
            self.truth, status = attempt(runner(reference(form, exact), exact, PHASES[0]))
            self.no_truth = f"float64 truth: {status}"

    def flop(self, phase: str) -> float:
        return loss_flop(self.form, phase, self.n, self.dim)

    def heading(self, rows: list[Row]) -> str:
        images = f"{self.n // self.k:,} images × {self.k} text{'s' * (self.k > 1)}"
        limit = in_bytes(str(self.limit_bytes))
        return (
            f"\n{self.form}   N = {self.n:,} ({images})   D = {self.dim}   {self.case.dtype}   "
            f"{mm_rate(rows)}limit of extra memory for betaclip {limit}"
        )

    def first_call(self, name: str, phase: str, previous: list[Row]) -> tuple[LossMeasurement, Run | None, float]:
        row = LossMeasurement(replace(self.case, implementation=name, phase=phase), limit_bytes=self.limit_bytes)
        implementation = self.chosen[name]
        if name not in self.losses:
            loss, status = attempt(lambda: implementation.build(self.form, self.batch))
            if status != OK:
                return replace(row, status=status), None, 0.0
            self.losses[name] = loss
        refusal = self.refusal(row.case, previous)
        if refusal is not None:
            return replace(row, status=refusal[0], note=refusal[1]), None, 0.0
        # Libraries initialise themselves and compilers compile in a first call, which is not what is measured.
        warm_up = runner(self.losses[name], self.batch if implementation.compiles else self.small, phase)
        run = runner(self.losses[name], self.batch, phase)
        row, outputs, elapsed_ms = self.call(row, run, warm_up, implementation.forget)
        if row.status != OK:
            return row, None, 0.0
        return self.with_errors(row, outputs), run, elapsed_ms

    def refusal(self, case: LossCase, previous: list[Row]) -> tuple[str, str] | None:
        """Status and note of a run that is not tried: it would exhaust the machine's memory, or everyone's patience."""
        implementation, free = self.chosen[case.implementation], free_bytes(self.device)
        needed = implementation.estimated_bytes(case.phase, self.n, self.dim, self.dtype.itemsize)
        if self.device.type == "cuda":  # tries safely: left out is what holds a matrix that cannot exist
            needed = self.n**2 * self.dtype.itemsize if implementation.copies[0] else 0
        if free is not None and needed > 0.9 * free:
            return OUT_OF_MEMORY, f"not tried: about {in_bytes(str(needed))}, {in_bytes(str(free))} are free"
        for row in reversed(previous):
            same = all(row[key] == getattr(case, key) for key in ("form", "implementation", "phase"))
            if same and row["time_ms_p50"]:
                expected_s = float(row["time_ms_p50"]) / 1e3 * (self.n / int(row["n"])) ** 2
                if expected_s > SLOWEST_S[self.device.type]:
                    return "skipped", f"about {expected_s:.0f} s expected, from N = {row['n']}"
                return None
        return None

    def with_errors(self, row: LossMeasurement, outputs: tuple[Tensor, ...]) -> LossMeasurement:
        if self.truth is None:
            return replace(row, note="; ".join(filter(None, (row.note, self.no_truth))))
        loss, *gradients = (relative_error(x, y) for x, y in zip(outputs, self.truth, strict=False))
        if not gradients:
            return replace(row, loss_error=loss)
        return replace(row, loss_error=loss, gradient_error=max(gradients[:2]), scale_error=max(gradients[2:]))


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--forms", nargs="+", choices=FORMS, default=FORMS, help="clip and siglip have one text per image")
    add("--sizes", nargs="+", type=int, metavar="N", help="default: what fits the device")
    add("--texts", type=int, default=36, metavar="K", help="texts per image of ce and bce (default 36)")
    add("--dim", type=int, default=512, metavar="D", help="width of the embeddings (default 512)")
    add("--embeddings", type=Path, metavar="FILE.safetensors", help="a real batch: image_embeds, text_embeds ...")
    add_common_options(parser, each="form, size and phase")
    args = parser.parse_args(argv)
    if args.smoke:
        args.sizes, args.texts, args.dim = [96], 12, 64
    resolve_common_options(parser, args, BENCHMARK, implementations())
    for n in args.sizes or ():
        if n % args.texts or n < 2 * args.texts:
            parser.error(f"--sizes: expected multiples of K = {args.texts} from {2 * args.texts} on, got {n}")
    if args.embeddings is not None:
        try:
            args.embeddings = real_batch(args.embeddings, args.dtype, args.device)
        except (ImportError, ValueError, OSError) as error:
            parser.error(f"--embeddings: {error}")
    return args


def batches(args: argparse.Namespace) -> Iterator[tuple[str, Batch]]:
    """Form by form, size by size. Forms of one text per image run at one size unless sizes are given."""
    if args.embeddings is not None:
        single = args.embeddings.image.shape[1] == 1 and args.embeddings.mask is None
        for form in args.forms:
            if single or form in ("ce", "bce"):
                yield form, args.embeddings.to_leaves(bias=SIGLIP_BIAS if form == "siglip" else None)
        return
    sizes = tuple(args.sizes or SIZES[args.device.type])
    for form in args.forms:
        texts = args.texts if form in ("ce", "bce") else 1
        for n in sizes if texts > 1 or args.sizes else ONE_SIZE[args.device.type]:
            batch = made_up_batch(n // texts, texts, args.dim, args.dtype, args.device)
            yield form, batch.to_leaves(bias=SIGLIP_BIAS) if form == "siglip" else batch


def count_cases(args: argparse.Namespace) -> int:
    sizes = len(args.sizes or SIZES[args.device.type]) if args.embeddings is None else 1
    return len(PHASES) * sum(
        (sizes if form in ("ce", "bce") or args.sizes else 1) * sum(form in x.forms for x in args.chosen.values())
        for form in args.forms
    )


def draw(rows: list[Row], path: Path) -> str | None:
    """Of the configuration that the last row has."""
    last = {row["form"]: row for row in rows}
    rows = [
        row
        for row in rows
        if all(row[key] == rows[-1][key] for key in ("dim", "dtype")) and row["k"] == last[row["form"]]["k"]
    ]
    return plot(rows, path, f"{rows[-1]['device']}, {rows[-1]['dtype']}, D = {rows[-1]['dim']}", FIGURE)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    source, device = begin(args, BENCHMARK, argv)
    path = args.output / f"{device}.csv"
    print("Times: median (20th-80th percentile) of interleaved rounds. Of mm, extra memory and errors against float64:")
    print("of forward+backward; see --help.")
    comparisons = (LossComparison(form, batch, args.chosen, device) for form, batch in batches(args))
    rows = run(comparisons, args.seconds, source, path, count_cases(args), COLUMNS)
    compared = summary(rows, "betaclip/", ("published", "dense", "compiled"))
    if compared and not args.smoke:  # tiny sizes tell nothing
        print("", *compared, sep="\n")
    return end(rows, path, figure(path, BENCHMARK, draw))


if __name__ == "__main__":
    sys.exit(main())
