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
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from batches import SIGLIP_BIAS, Batch, made_up_batch, real_batch
from harness import (
    OK,
    OUT_OF_MEMORY,
    Case,
    ForeignCores,
    Measurement,
    Provenance,
    Run,
    append_rows,
    as_row,
    attempt,
    device_name,
    free_bytes,
    interleave,
    matrix_products,
    matrix_tflops,
    provenance,
    read_rows,
    relative_error,
    release,
    slug,
    with_peak_bytes,
)
from implementations import FORMS, Implementation, Loss, implementations, loss_flop, memory_limit_bytes, reference
from report import Progress, Row, in_bytes, plot, summary, table
from torch import Tensor

BENCHMARK = "loss_throughput"
PHASES = ("forward+backward", "forward")
SIZES = {"cpu": (2304, 4608, 9216), "cuda": (2304, 9216, 36864, 147456, 589824)}
ONE_SIZE = {"cpu": (2304,), "cuda": (36864,)}  # of the forms of one text per image, unless sizes are given
TRUTH_ROWS = {"cpu": 4608, "cuda": 9216}  # up to here the float64 truth is computed
MATRIX_ROWS = {"cpu": 9216, "cuda": 16384}  # up to here torch.mm's rate is measured at the same N
LONG_S = 20.0  # a call that takes longer is not repeated to be interleaved with others
SLOWEST_S = {"cpu": 120.0, "cuda": 20.0}  # a call expected to take longer is not tried


def runner(loss: Loss, batch: Batch, phase: str) -> Run:
    """A call that returns (loss,) or (loss, gradients); the incoming gradient exists beforehand."""
    if phase == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(batch),)

        return forward
    one = torch.ones((), device=batch.image.device)

    def both() -> tuple[Tensor, ...]:
        value = loss(batch)
        return value, *torch.autograd.grad(value, batch.leaves, one.to(value.dtype))

    return both


class Comparison:
    """All implementations of one form on one batch."""

    def __init__(self, form: str, batch: Batch, chosen: dict[str, Implementation], device: str) -> None:
        self.form, self.batch, self.device = form, batch, batch.image.device
        self.chosen = {name: value for name, value in chosen.items() if form in value.forms}
        images, self.k, self.dim = batch.image.shape
        self.n, self.dtype = images * self.k, batch.image.dtype
        self.case = Case(BENCHMARK, form, self.n, self.k, self.dim, str(self.dtype)[6:], device, "", "")
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
        self.mm_rows = min(self.n, MATRIX_ROWS[self.device.type])
        self.products = matrix_products(self.mm_rows, self.dim, self.dtype, self.device)

    def measure(self, phase: str, seconds: float, progress: Progress, previous: list[Row]) -> list[Measurement]:
        """One row per implementation. ``previous``: rows of smaller sizes, by which hopeless runs are left out."""
        rows, runs, slow = {}, {}, {}
        for name in self.chosen:
            progress.step(f"{self.form}, N = {self.n}, {phase}: {name}")
            rows[name], run, elapsed_ms = self.first_call(name, phase, previous)
            if elapsed_ms > max(seconds, LONG_S) * 1e3:  # not again: it was a round
                slow[name] = [elapsed_ms]
            elif run is not None:
                runs[name] = run
        if not runs and not slow:
            return list(rows.values())
        with ForeignCores() as foreign:
            times = interleave({**self.products, **runs}, self.device, seconds) | slow
        tflops = matrix_tflops({name: times[name] for name in self.products}, self.mm_rows, self.dim)
        flop = loss_flop(self.form, phase, self.n, self.dim)
        for name in [*runs, *slow]:
            taken, row = times[name], replace(rows[name], foreign_cores=foreign.cores)
            rows[name] = replace(row, status=taken) if isinstance(taken, str) else row.timed(taken, flop, tflops)
        return list(rows.values())

    def first_call(self, name: str, phase: str, previous: list[Row]) -> tuple[Measurement, Run | None, float]:
        """Can it run, how much memory does it take, what is its error? And what to time if it can, and ms it took."""
        row = Measurement(replace(self.case, implementation=name, phase=phase), limit_bytes=self.limit_bytes)
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
        _, status = attempt(warm_up)
        if status == OK:
            result, status = attempt(lambda: with_peak_bytes(run, self.device, forget=implementation.forget))
        if status != OK:
            return replace(row, status=status), None, 0.0
        outputs, peak, elapsed_ms = result
        row = replace(row, peak_bytes=peak, note="" if peak is not None else "peak memory cannot be measured here")
        return self.with_errors(row, outputs), run, elapsed_ms

    def refusal(self, case: Case, previous: list[Row]) -> tuple[str, str] | None:
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

    def with_errors(self, row: Measurement, outputs: tuple[Tensor, ...]) -> Measurement:
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
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="default: bfloat16 on a GPU")
    add("--implementations", nargs="+", metavar="NAME", help="those whose names begin so (default: all)")
    add("--embeddings", type=Path, metavar="FILE.safetensors", help="a real batch: image_embeds, text_embeds ...")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=1.5, help="timed per form, size and phase, one round at least (default 1.5)")
    add("--smoke", action="store_true", help="tiny sizes, to see that all works; writes to a temporary folder")
    add("--output", type=Path, help="folder of CSV and PNG (default: results, beside this file)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.sizes, args.texts, args.dim, args.seconds = [96], 12, 64, 0.2
        args.output = args.output or Path(tempfile.mkdtemp(prefix="loss_throughput_"))
    args.output = args.output or Path(__file__).parent / "results"
    args.device = torch.device(args.device)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    if args.device.type not in SIZES:
        parser.error(f"--device: expected cpu or cuda, got {args.device}")
    for n in args.sizes or ():
        if n % args.texts or n < 2 * args.texts:
            parser.error(f"--sizes: expected multiples of K = {args.texts} from {2 * args.texts} on, got {n}")
    prefixes = tuple(args.implementations or ("",))
    args.chosen = {name: value for name, value in implementations().items() if name.startswith(prefixes)}
    if not args.chosen:
        parser.error(f"--implementations: expected some of {', '.join(implementations())}")
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


def command(argv: list[str]) -> str:
    """As typed, without this machine's folders."""
    return shlex.join(
        ["python", f"benchmarks/{BENCHMARK}.py", *(Path(x).name if Path(x).is_absolute() else x for x in argv)]
    )


def heading(comparison: Comparison, rows: list[Row]) -> str:
    rates = [float(row["mm_tflops"]) for row in rows if row["mm_tflops"]]
    rate = f"torch.mm {max(rates):.3g} TFLOP/s   " if rates else ""
    images = f"{comparison.n // comparison.k:,} images × {comparison.k} text{'s' * (comparison.k > 1)}"
    limit = in_bytes(str(comparison.limit_bytes))
    return (
        f"\n{comparison.form}   N = {comparison.n:,} ({images})   D = {comparison.dim}   {comparison.case.dtype}   "
        f"{rate}limit of extra memory for betaclip {limit}"
    )


def run(args: argparse.Namespace, source: Provenance, path: Path, device: str) -> list[Row]:
    progress = Progress(count_cases(args))
    rows: list[Row] = []
    for form, batch in batches(args):
        comparison = Comparison(form, batch, args.chosen, device)
        fresh = [
            as_row(measurement, source)
            for phase in PHASES
            for measurement in comparison.measure(phase, args.seconds, progress, rows)
        ]
        append_rows(path, fresh)
        progress.print(heading(comparison, fresh) + "\n" + table(fresh))
        rows += fresh
        del comparison, batch
        release()
    progress.close()
    return rows


def draw(path: Path) -> str:
    """The figure beside a CSV, of the configuration that its last row has; where it is, or why there is none."""
    rows = [row for row in read_rows(path) if row["benchmark"] == BENCHMARK]
    last = {row["form"]: row for row in rows}
    rows = [
        row
        for row in rows
        if all(row[key] == rows[-1][key] for key in ("dim", "dtype")) and row["k"] == last[row["form"]]["k"]
    ]
    title = f"{rows[-1]['device']}, {rows[-1]['dtype']}, D = {rows[-1]['dim']}"
    figure = path.with_suffix(".png")
    reason = plot(rows, figure, title)
    return f"figure: {figure}" if reason is None else f"no figure: {reason}"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, source = arguments(argv), provenance(command(argv))
    name = device_name(args.device)
    path = args.output / f"{slug(name)}.csv"
    print(f"{name}   torch {source.torch}   betaclip {source.betaclip}   {source.date}")
    print("Times: median (20th-80th percentile) of interleaved rounds. Of mm, extra memory and errors against float64:")
    print("of forward+backward; see --help.")
    rows = run(args, source, path, slug(name))
    compared = summary(rows, "betaclip/", ("published", "dense", "compiled"))
    if compared and not args.smoke:  # tiny sizes tell nothing
        print("", *compared, sep="\n")
    disturbance = max((float(row["foreign_cores"]) for row in rows if row["foreign_cores"]), default=0.0)
    if disturbance > 0.1:
        print(f"\nDisturbed: other processes kept up to {disturbance:.1f} cores busy. Trust no time above.")
    print("", f"rows: {path}", draw(path), sep="\n")
    failed = [
        row for row in rows if row["status"].startswith("failed") and row["implementation"].startswith("betaclip")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
