"""How fast are contrastive losses, how much memory do they take, and how exact are they? Ours and others.

    python benchmarks/loss_throughput.py                                 # what fits this machine and 3 minutes
    python benchmarks/loss_throughput.py --minutes 0                     # all sizes and rounds
    python benchmarks/loss_throughput.py --smoke                         # seconds, tiny sizes, everything once
    python benchmarks/loss_throughput.py --forms ce --sizes 9216 73728 --implementations dense betaclip

N = images × texts per image, the side of the matrix of similarities.

"speed-up" is against the published form (clip and siglip: open_clip). "of mm" is the least FLOP that the loss needs
(6 N²D, 2 N²D forward; 2 N²D more where a softmax keeps no exponentials), over the time, over the rate of torch.mm; all
in the same rounds. Extra memory is the peak above what existed before, gradients included. Errors are
max |difference| / max |truth| against betaclip's dense reference in float64.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common.batches import Batch, synthetic_batch
from common.budget import Budget
from common.comparison import Call, Comparison
from common.figures import Figure
from common.harness import Unavailable, free_bytes
from common.losses import FORMS, Implementation, implementations, loss_flop, reference
from common.report import LOSS_ERRORS, memory
from common.rows import Row
from common.session import Benchmark, Session, at_least

from betaclip.kernels.similarity.operators import keep_bytes

# The smallest are one device's share of a batch over many; sizes of several texts per image are multiples of 36.
SIZES = {"cpu": (108, 288, 2304, 4608, 9216), "cuda": (108, 288, 2304, 9216, 36864, 147456, 589824)}
PAIR_SIZES = {"cpu": (96, 288, 2304), "cuda": (96, 288, 36864)}  # of the forms of one text per image
PER_IMAGE = ("ce", "bce")  # forms of several texts per image
TRUTH_ROWS = {"cpu": 4608, "cuda": 9216}  # up to here the float64 truth is computed
MATRIX_ROWS = {"cpu": 4608, "cuda": 16384}  # up to here torch.mm's rate is measured at the same N


def bound_bytes(row: Row) -> float:
    """The peak that betaclip stays below: on the CPU twice the inputs, 96 MiB, of which some 15 MiB are scratch that a
    thread keeps between calls, and the exponentials; on GPUs four times the inputs and 512 MB."""
    kept = min(int(row.get("budget_bytes") or 0), 4 * int(row["n"]) ** 2)
    inputs = 2 * int(row["n"]) * int(row["dim"]) * getattr(torch, row["dtype"]).itemsize
    return 2 * inputs + 96 * 2**20 + kept if row["device"].startswith("cpu") else 4 * inputs + 512 * 10**6


BENCHMARK = Benchmark(
    name="loss_throughput",
    suffix="",
    minutes=3,
    columns={"budget": memory("budget_bytes"), **LOSS_ERRORS},
    figure=Figure(panel=("k", "K"), x=("n", "N = images × texts per image"), same=("dim",), bound=bound_bytes),
)


class LossComparison(Comparison):
    """All implementations of one form on one batch."""

    def __init__(self, form: str, batch: Batch, chosen: dict[str, Implementation], budget: Budget, keep: int = 0):
        images, k, dim = batch.image.shape
        self.batch, self.n, self.dim, self.keep = batch, images * k, dim, keep
        self.small = batch.to_leaves(images=slice(max(2, 512 // k)))
        chosen = {name: value for name, value in chosen.items() if form in value.forms}
        mm = min(self.n, MATRIX_ROWS[batch.image.device.type]), dim
        super().__init__(form, {"n": self.n, "k": k, "dim": dim}, chosen, batch.image, budget, mm)

    def flop(self, phase: str) -> float:
        return loss_flop(self.form, phase, self.n, self.dim, self.keep // max(4, self.dtype.itemsize))

    def values(self, name: str, *of_call: Any) -> dict[str, Any]:
        return {"budget_bytes": self.keep if name.startswith("betaclip") else None, **super().values(name, *of_call)}

    def prepare(self, name: str) -> Call:
        implementation = self.chosen[name]
        options = {"keep": self.keep} if name.startswith("betaclip") else {}
        loss = implementation.build(self.form, self.batch, **options)
        small = None if implementation.compiles else Call(lambda: loss(self.small), self.small.leaves)
        # A GPU only needs to be spared a matrix that cannot exist; the CPU's memory must not run out.
        itemsize = self.batch.image.itemsize if self.device.type == "cuda" else 4 * implementation.copies
        needed = self.n**2 * itemsize if implementation.copies else 0
        return Call(lambda: loss(self.batch), self.batch.leaves, small, needed)

    def exact(self) -> Call:
        max_rows, free = TRUTH_ROWS[self.device.type], free_bytes(self.device)
        if self.n > max_rows or (free is not None and 12 * 8 * self.n**2 > free):
            raise Unavailable(f"above N = {max_rows}, or without memory for it")
        exact = self.batch.to_leaves(torch.float64)
        loss = reference(self.form, exact)
        return Call(lambda: loss(exact), exact.leaves)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = BENCHMARK.parser(__doc__)
    add = parser.add_argument
    add("--forms", nargs="+", choices=FORMS, default=FORMS, help="clip and siglip have one text per image")
    add("--sizes", nargs="+", type=int, metavar="N", help="default: what fits the device")
    add("--texts", type=at_least(1), default=36, metavar="K", help="texts per image of ce and bce (default 36)")
    add("--dim", type=at_least(1), default=512, metavar="D", help="width of the embeddings (default 512)")
    add("--keep", type=at_least(0), metavar="BYTES", help="budget of betaclip (default: the device's)")
    args = BENCHMARK.parse(parser, argv, implementations(), {"sizes": [96], "texts": 12, "dim": 64})
    for n in args.sizes or ():
        if n % args.texts or n < 2 * args.texts:
            parser.error(f"--sizes: expected multiples of K = {args.texts} from {2 * args.texts} on, got {n}")
    return args


def comparisons(args: argparse.Namespace, session: Session) -> dict[str, Callable[[], list[Row]]]:
    """Functions that make each comparison: size by size, lest a limit of time leave out a whole form."""

    def compare(form: str, n: int) -> list[Row]:
        k = args.texts if form in PER_IMAGE else 1
        batch = synthetic_batch(n // k, k, args.dim, args.dtype, args.device)
        keep = keep_bytes("auto" if args.keep is None else args.keep, args.device) if form in ("ce", "clip") else 0
        return session.measure(LossComparison(form, batch, args.chosen, session.budget, keep))

    pairs, per_image = PAIR_SIZES[args.device.type], [n for n in SIZES[args.device.type] if n >= 2 * args.texts]
    sizes = {form: args.sizes or (per_image if form in PER_IMAGE else pairs) for form in args.forms}
    ascending = sorted({n for form in args.forms for n in sizes[form]})
    return {f"{form}, N = {n}": partial(compare, form, n) for n in ascending for form in args.forms if n in sizes[form]}


if __name__ == "__main__":
    sys.exit(BENCHMARK.main(arguments, comparisons))
