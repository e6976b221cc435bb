"""Measures what the global batch costs a rank: time, bytes sent and memory, against the number of ranks.

    python benchmarks/global_batch.py                                # 1, 2 and 4 processes
    python benchmarks/global_batch.py --smoke                        # seconds, tiny sizes, everything once

Ranks share a batch of N = images × texts per image: with more of them each holds less, and the arithmetic of all
together stays the same. On the CPU a rank has one thread and ranks talk over gloo; more ranks than cores take turns.
Times are the slowest rank's, from a common start; bytes and memory are those of the rank with most.

"sent" is what NCCL's rings send for the calls that were made; gloo sends the bytes of a reduce-scatter twice. Other
columns are those of loss_throughput.py. Forms "ce" and "bce" are β-CAL, which only betaclip has; "clip" is CLIP's loss
of as many pairs as there are texts, in which other libraries are measured, too.
"""

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common.batches import Batch, synthetic_batch
from common.budget import Budget
from common.comparison import Call, Comparison
from common.figures import PEAK, TIME, Figure
from common.harness import Run, relative_error, release, time_ms, with_peak_bytes
from common.losses import RANK_FORMS, Implementation, loss_flop, rank_implementations, reference
from common.report import LOSS_ERRORS, memory
from common.rows import BOTH, Row, read_rows
from common.session import Benchmark, Session, at_least
from common.traffic import Traffic
from torch import Tensor

SIZES = (1152, 4608)
TRUTH_ROWS = 4608  # up to here the first rank computes the float64 truth
TIMEOUT = timedelta(minutes=5)  # of a collective, in case a rank died or makes other calls
BENCHMARK = Benchmark(
    name="global_batch",
    suffix="-global-batch",
    columns={
        "sent": memory("nccl_bytes"),
        "calls": lambda row: row.get("calls", ""),
        **LOSS_ERRORS,
    },
    figure=Figure(
        panel=("n", "N"),
        x=("ranks", "ranks"),
        same=("dim",),
        quantities=(TIME, ("nccl_bytes", "sent by a rank, MiB", 2.0**20), PEAK),
    ),
)


def over_ranks(value: float, how: Any = dist.ReduceOp.MAX) -> float:
    """The largest of all ranks' values, or their sum."""
    t = torch.tensor(value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(t, how)
    return float(t)


def slowest_ms(run: Run, device: torch.device) -> float:
    """One call on every rank, from a common start. The same number everywhere, so that all go on to the same call."""
    dist.barrier()
    return over_ranks(time_ms(run, device))


class RankComparison(Comparison):
    """All implementations of one form on one batch, of which this rank has a part."""

    clock = staticmethod(slowest_ms)
    error = staticmethod(lambda x, y: over_ranks(relative_error(x, y)))
    own_s = staticmethod(lambda: over_ranks(time.process_time(), dist.ReduceOp.SUM))

    def __init__(self, form: str, whole: Batch, chosen: dict[str, Implementation], budget: Budget) -> None:
        (images, k, dim), self.ranks = whole.image.shape, dist.get_world_size()
        chosen = {name: value for name, value in chosen.items() if form in value.forms}
        first, last = (rank * images // self.ranks for rank in (dist.get_rank(), dist.get_rank() + 1))
        self.whole, self.own, self.n = whole, slice(first, last), images * k
        self.batch = whole.to_leaves(images=self.own)
        sizes = {"n": self.n, "k": k, "dim": dim, "ranks": self.ranks}
        super().__init__(form, sizes, chosen, whole.image, budget, (self.n // self.ranks, dim))

    @cached_property
    def truth(self) -> tuple[list[Tensor] | None, str]:
        """The loss of the whole batch, and its gradients by this rank's rows and by the scale; the first rank's."""
        if self.n > TRUTH_ROWS:
            return None, f"no float64 truth above N = {TRUTH_ROWS}"
        exact = self.whole.to_leaves(torch.float64)
        outputs = [torch.zeros((), dtype=torch.float64, device=self.device), *map(torch.zeros_like, exact.leaves[:3])]
        if dist.get_rank() == 0:
            loss = reference(self.form, exact)
            outputs = list(Call(lambda: loss(exact), exact.leaves).run(BOTH, self.grad_output)())
        for t in outputs:
            dist.broadcast(t.detach(), 0)
        loss, image, text, scale = outputs
        return [loss, image[self.own], text[self.own], scale], ""

    def flop(self, phase: str) -> float:
        """FLOP of one rank."""
        return loss_flop(self.form, phase, self.n, self.batch.image.shape[-1]) / self.ranks

    def prepare(self, name: str) -> Call:
        loss = self.chosen[name].build(self.form, self.batch)
        return Call(lambda: loss(self.batch), self.batch.leaves)

    def observe(self, run: Run) -> tuple[Sequence[Tensor], dict[str, Any], float]:
        """Measure one call: bytes sent, memory and time, of the rank with most. All ranks call equally often."""
        with Traffic() as traffic:
            run()
        outputs, peak, _ = with_peak_bytes(run, self.device, math.inf)
        observed = {
            "nccl_bytes": int(over_ranks(traffic.sent_bytes)),
            "calls": int(over_ranks(sum(count for name, count in traffic.calls.items() if name != "recv"))),
            "peak_bytes": None if peak is None else int(over_ranks(peak)),
        }
        return outputs, observed, 0.0

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        averages = [t.detach().double() / self.ranks for t in outputs]
        for shared in (averages[0], *averages[3:]):
            dist.all_reduce(shared)
        return super().values(name, phase, averages)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = BENCHMARK.parser(__doc__)
    add, size = parser.add_argument, at_least(1)
    add("--ranks", nargs="+", type=size, metavar="W", help="default: 1, 2, 4 on the CPU; up to all GPUs")
    add("--forms", nargs="+", choices=RANK_FORMS, default=RANK_FORMS, help="clip has one text per image")
    add("--sizes", nargs="+", type=size, metavar="N", default=SIZES, help="texts of all ranks (default %(default)s)")
    add("--texts", type=size, default=36, metavar="K", help="texts per image of ce and bce (default 36)")
    add("--dim", type=size, default=512, metavar="D", help="width of the embeddings (default 512)")
    smoke = {"sizes": [96], "texts": 12, "dim": 64, "ranks": [2]}
    args = BENCHMARK.parse(parser, argv, rank_implementations(), smoke)
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 4
    args.ranks = args.ranks or [2**i for i in range(max(1, gpus).bit_length())]
    for count in args.ranks:
        if args.device.type == "cuda" and count > gpus:
            parser.error(f"--ranks: expected at most the number of GPUs, {gpus}, got {count}")
        for n in args.sizes:
            if n % (args.texts * count):
                parser.error(f"--sizes: expected multiples of {count} ranks × {args.texts} texts, got {n}")
    return args


def run_rank(rank: int, count: int, init_method: str, args: argparse.Namespace, source: Row, path: Path) -> None:
    """Measure everything on one of ``count`` ranks; the first of them prints, and appends rows to ``path``."""
    gc.freeze()
    torch.set_num_threads(1)
    if args.device.type == "cuda":
        args.device = torch.device("cuda", rank)
        torch.cuda.set_device(args.device)
    backend = "nccl" if args.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=count, timeout=TIMEOUT)
    session = Session(BENCHMARK, source, path, Budget(seconds=args.seconds))
    for form, n in product(args.forms, args.sizes):
        k = 1 if form == "clip" else args.texts
        whole = synthetic_batch(n // k, k, args.dim, args.dtype, args.device)
        session.measure(RankComparison(form, whole, args.chosen, session.budget), shown=rank == 0)
        release()
    dist.destroy_process_group()


def comparisons(args: argparse.Namespace, session: Session) -> dict[str, Callable[[], list[Row]]]:
    def compare(count: int) -> list[Row]:
        """In new processes, as torch.distributed.nn keeps the first group that it has seen."""
        before = len(read_rows(session.path)) if session.path.exists() else 0
        with tempfile.TemporaryDirectory() as folder:
            same = count, f"file://{folder}/ranks", args, session.source, session.path
            # A fork need not import everything again; CUDA cannot be forked.
            method = "fork" if sys.platform == "linux" and args.device.type == "cpu" else "spawn"
            mp.start_processes(run_rank, same, count, start_method=method)
        return read_rows(session.path)[before:]

    return {f"{count} ranks": partial(compare, count) for count in args.ranks}


if __name__ == "__main__":
    sys.exit(BENCHMARK.main(arguments, comparisons))
