"""How fast are contrastive losses, how much memory do they take, and how exact are they? Ours and others.

    python benchmarks/loss_throughput.py                                 # what fits this machine and 3 minutes
    python benchmarks/loss_throughput.py --minutes 0                     # all sizes and rounds
    python benchmarks/loss_throughput.py --smoke                         # seconds, tiny sizes, everything once
    python benchmarks/loss_throughput.py --forms ce --sizes 9216 73728 --implementations dense betaclip

Prints a table per form and size, appends one CSV row per case to results/<device>.csv, and draws results/<device>.png
from that file (--plot-only does only that). N = images × texts per image, the side of the matrix of similarities.

"speed-up" is against the published form (clip and siglip: open_clip). "of mm" is the least FLOP that the loss needs
without keeping the matrix (8 N²D softmax, 6 N²D sigmoid, 2 N²D forward), over the time, over the rate of torch.mm; all
in the same rounds. Extra memory is the peak above what existed before, gradients included. Errors are
max |difference| / max |truth| against betaclip's dense reference in float64.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from common.batches import SIGLIP_BIAS, Batch, synthetic_batch
from common.comparison import Call, Comparison
from common.figures import Figure
from common.harness import attempt, free_bytes, relative_error
from common.losses import FORMS, Implementation, implementations, loss_flop, memory_bound_bytes, reference
from common.report import in_bytes, memory, number
from common.rows import BOTH, OK, Case, Row
from common.session import Benchmark, Session
from torch import Tensor

# The smallest are one device's share of a batch over many; sizes of several texts per image are multiples of 36.
SIZES = {"cpu": (108, 288, 2304, 4608, 9216), "cuda": (108, 288, 2304, 9216, 36864, 147456, 589824)}
PAIR_SIZES = {"cpu": (96, 288, 2304), "cuda": (96, 288, 36864)}  # of the forms of one text per image
PER_IMAGE = ("ce", "bce")  # forms of several texts per image
TRUTH_ROWS = {"cpu": 4608, "cuda": 9216}  # up to here the float64 truth is computed
MATRIX_ROWS = {"cpu": 4608, "cuda": 16384}  # up to here torch.mm's rate is measured at the same N


def bound_bytes(row: Row) -> float:
    itemsize = getattr(torch, row["dtype"]).itemsize
    return memory_bound_bytes(
        "cpu" if row["device"].startswith("cpu") else "cuda", int(row["n"]), int(row["dim"]), itemsize
    )


def in_bound(row: Row) -> str:
    """Whether betaclip's peak memory is what it promises."""
    if not row["implementation"].startswith("betaclip") or not row["peak_bytes"]:
        return ""
    return "yes" if float(row["peak_bytes"]) <= bound_bytes(row) else "no"


BENCHMARK = Benchmark(
    name="loss_throughput",
    suffix="",
    each="form, size and phase",
    minutes=3,
    slowest_call_s={"cpu": 120.0, "cuda": 20.0},
    columns={
        "speed-up": number("speedup", ".2f"),
        "of mm": number("share_of_mm", ".2f"),
        "extra memory": memory("peak_bytes"),
        "in bound": in_bound,
        "error: loss": number("loss_error", ".1e"),
        "gradients": number("gradient_error", ".1e"),
        "scale": number("scale_error", ".1e"),
    },
    figure=Figure(
        panel=lambda row: f"{row['form']}, K = {row['k']}",
        x="n",
        x_label="N = images × texts per image",
        quantities=(("time_ms_p50", "forward + backward, ms", 1.0), ("peak_bytes", "peak extra memory, MiB", 2.0**20)),
        same=("dim", "dtype"),
        title=lambda row: f"{row['device']}, {row['dtype']}, D = {row['dim']}",
        bound=bound_bytes,
        bound_label="bound of betaclip",
    ),
)


class LossComparison(Comparison):
    """All implementations of one form on one batch."""

    def __init__(self, form: str, batch: Batch, chosen: dict[str, Implementation], device: str) -> None:
        (images, k, dim), dtype, on = batch.image.shape, batch.image.dtype, batch.image.device
        self.form, self.batch, self.n, self.dim = form, batch, images * k, dim
        self.baseline = "published" if form in PER_IMAGE else "open_clip"
        self.chosen = {name: value for name, value in chosen.items() if form in value.forms}
        self.small = batch.to_leaves(images=slice(max(2, 512 // k)))
        case = Case(BENCHMARK.name, form, str(dtype)[6:], device, {"n": self.n, "k": k, "dim": dim})
        super().__init__(case, self.chosen, (min(self.n, MATRIX_ROWS[on.type]), dim), on)

    def flop(self, phase: str) -> float:
        return loss_flop(self.form, phase, self.n, self.dim)

    def heading(self) -> str:
        k, dtype = self.case.sizes["k"], self.case.dtype
        bound = memory_bound_bytes(self.device.type, self.n, self.dim, getattr(torch, dtype).itemsize)
        return (
            f"{self.form}   N = {self.n:,} ({self.n // k:,} images × {k} text{'s' * (k > 1)})   D = {self.dim}   "
            f"{dtype}   bound of betaclip's extra memory {in_bytes(str(bound))}"
        )

    def prepare(self, name: str) -> Call:
        implementation = self.chosen[name]
        loss = implementation.build(self.form, self.batch)
        small = None if implementation.compiles else Call(lambda: loss(self.small), self.small.leaves)

        def estimated_bytes(phase: str) -> float:
            itemsize = self.batch.image.itemsize
            if self.device.type == "cuda":  # tries safely: left out is what holds a matrix that cannot exist
                return self.n**2 * itemsize if implementation.copies[0] else 0
            return implementation.estimated_bytes(phase, self.n, self.dim, itemsize)

        return Call(lambda: loss(self.batch), self.batch.leaves, small, implementation.forget, estimated_bytes)

    @cached_property
    def truth(self) -> tuple[tuple[Tensor, ...] | None, str]:
        """The loss and its gradients in float64, or None and the reason."""
        most, free = TRUTH_ROWS[self.device.type], free_bytes(self.device)
        if self.n > most or (free is not None and 12 * 8 * self.n**2 > free):
            return None, f"no float64 truth above N = {most}, or without memory for it"
        exact = self.batch.to_leaves(torch.float64)
        loss = reference(self.form, exact)
        truth, status = attempt(Call(lambda: loss(exact), exact.leaves).run(BOTH, self.grad_output))
        return truth, "" if status == OK else f"float64 truth: {status}"

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        truth, reason = self.truth
        if truth is None:
            return {"loss_error": None, "gradient_error": None, "scale_error": None, "note": reason}
        loss, *gradients = (relative_error(x, y) for x, y in zip(outputs, truth, strict=False))
        errors = {"gradient_error": max(gradients[:2]), "scale_error": max(gradients[2:])} if gradients else {}
        return {"loss_error": loss, **errors}


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = BENCHMARK.parser(__doc__)
    add = parser.add_argument
    add("--forms", nargs="+", choices=FORMS, default=FORMS, help="clip and siglip have one text per image")
    add("--sizes", nargs="+", type=int, metavar="N", help="default: what fits the device")
    add("--texts", type=int, default=36, metavar="K", help="texts per image of ce and bce (default 36)")
    add("--dim", type=int, default=512, metavar="D", help="width of the embeddings (default 512)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.sizes, args.texts, args.dim = [96], 12, 64
    BENCHMARK.resolve(parser, args, implementations())
    if args.smoke and not args.implementations:
        args.chosen.pop("compiled", None)  # takes longer than all others together
    for n in args.sizes or ():
        if n % args.texts or n < 2 * args.texts:
            parser.error(f"--sizes: expected multiples of K = {args.texts} from {2 * args.texts} on, got {n}")
    return args


def comparisons(args: argparse.Namespace, device: str) -> dict[str, Callable[[], LossComparison]]:
    """Functions that make each comparison: size by size, lest a limit of time leave out a whole form."""

    def compare(form: str, n: int) -> LossComparison:
        k = args.texts if form in PER_IMAGE else 1
        batch = synthetic_batch(n // k, k, args.dim, args.dtype, args.device)
        batch = batch.to_leaves(bias=SIGLIP_BIAS) if form == "siglip" else batch
        return LossComparison(form, batch, args.chosen, device)

    kind = args.device.type
    sizes = {form: args.sizes or (SIZES if form in PER_IMAGE else PAIR_SIZES)[kind] for form in args.forms}
    ascending = sorted({n for form in args.forms for n in sizes[form]})
    return {f"{form}, N = {n}": partial(compare, form, n) for n in ascending for form in args.forms if n in sizes[form]}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.plot_only:
        return BENCHMARK.redraw(args.plot_only)
    session = Session(BENCHMARK, args, argv)
    return session.run(comparisons(args, session.device))


if __name__ == "__main__":
    sys.exit(main())
