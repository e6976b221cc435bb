"""What the global batch costs: time, bytes sent and memory of a rank, against the number of ranks. Ours and others.

    python benchmarks/global_batch.py                                # starts 1, 2 and 4 processes by itself
    python benchmarks/global_batch.py --smoke                        # seconds, tiny sizes, everything once
    torchrun --nproc-per-node 2 benchmarks/global_batch.py           # the ranks that there are

Ranks share a batch of N = images × texts per image: with more of them each holds less, and the arithmetic of all
together stays the same. On the CPU a rank has one thread and ranks talk over gloo; more ranks than cores take turns.
Times are the slowest rank's, from a common start; bytes and memory are those of the rank with most.

Prints a table per form, size and number of ranks, appends one CSV row per case to results/<device>-global-batch.csv and
draws a figure from that file. "sent" is what NCCL's rings send for the calls that were made; gloo sends the bytes of a
reduce-scatter twice. Other columns are those of loss_throughput.py. Forms "ce" and "bce" are β-CAL, ours alone; "clip"
is CLIP's loss of as many pairs as there are texts, where other libraries join.
"""

import argparse
import gc
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common.batches import Batch, synthetic_batch
from common.budget import Budget
from common.comparison import Call, Comparison
from common.figures import Figure
from common.harness import ForeignCores, Run, relative_error, release, time_ms, with_peak_bytes
from common.losses import RANK_FORMS, Implementation, beta_cal_over_ranks, loss_flop, rank_implementations
from common.report import memory, number, untrustworthy
from common.rows import BOTH, Case, Row, read_rows
from common.session import Benchmark, Session, measure
from common.traffic import Traffic
from torch import Tensor

SIZES = (1152, 4608)
TRUTH_ROWS = 4608  # up to here the first rank computes the float64 truth
TIMEOUT = timedelta(minutes=5)  # of a collective, in case a rank died or makes other calls
BENCHMARK = Benchmark(
    name="global_batch",
    suffix="-global-batch",
    each="form, size, number of ranks and phase",
    columns={
        "of mm": number("share_of_mm", ".2f"),
        "sent": memory("nccl_bytes"),
        "calls": lambda row: row.get("calls", ""),
        "extra memory": memory("peak_bytes"),
        "error: loss": number("loss_error", ".1e"),
        "gradients": number("gradient_error", ".1e"),
        "scale": number("scale_error", ".1e"),
    },
    figure=Figure(
        panel=lambda row: f"{row['form']}, N = {int(row['n']):,}",
        x="ranks",
        x_label="ranks",
        quantities=(
            ("time_ms_p50", "forward + backward, ms", 1.0),
            ("nccl_bytes", "sent by a rank, MiB", 2.0**20),
            ("peak_bytes", "peak extra memory of a rank, MiB", 2.0**20),
        ),
        same=("dim", "dtype"),
        title=lambda row: f"{row['device']}, {row['dtype']}, D = {row['dim']}",
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
    foreign = staticmethod(lambda: ForeignCores(own_s=lambda: over_ranks(time.process_time(), dist.ReduceOp.SUM)))
    baseline = "open_clip"

    def __init__(self, form: str, whole: Batch, chosen: dict[str, Implementation], device: str) -> None:
        (images, self.k, dim), dtype = whole.image.shape, whole.image.dtype
        self.form, self.whole, self.ranks = form, whole, dist.get_world_size()
        self.chosen = {name: value for name, value in chosen.items() if form in value.forms}
        first, last = (rank * images // self.ranks for rank in (dist.get_rank(), dist.get_rank() + 1))
        self.own, self.n = slice(first, last), images * self.k
        self.batch = whole.to_leaves(images=self.own)
        sizes = {"n": self.n, "k": self.k, "dim": dim, "ranks": self.ranks}
        case = Case(BENCHMARK.name, form, str(dtype)[6:], device, sizes)
        super().__init__(case, self.chosen, (self.n // self.ranks, dim), whole.image.device)

    @cached_property
    def truth(self) -> list[Tensor]:
        """The loss of the whole batch, and its gradients by this rank's rows and by the scale; the first rank's."""
        exact = self.whole.to_leaves(torch.float64)
        outputs = [torch.zeros((), dtype=torch.float64, device=self.device), *map(torch.zeros_like, exact.leaves)]
        if dist.get_rank() == 0:
            loss = beta_cal_over_ranks(False, self.form, exact, "reference")
            outputs = list(Call(lambda: loss(exact), exact.leaves).run(BOTH, self.grad_output)())
        for t in outputs:
            dist.broadcast(t.detach(), 0)
        loss, image, text, scale = outputs
        return [loss, image[self.own], text[self.own], scale]

    def flop(self, phase: str) -> float:
        """Of one rank."""
        return loss_flop(self.form, phase, self.n, self.batch.image.shape[-1]) / self.ranks

    def heading(self) -> str:
        return (
            f"{self.form}   N = {self.n:,} ({self.n // self.k:,} images × {self.k})   D = {self.case.sizes['dim']}   "
            f"{self.case.dtype}   {self.ranks} ranks, {self.n // self.ranks:,} rows each"
        )

    def prepare(self, name: str) -> Call:
        loss = self.chosen[name].build(self.form, self.batch)
        return Call(lambda: loss(self.batch), self.batch.leaves, forget=self.chosen[name].forget)

    def observe(self, call: Call, run: Run) -> tuple[Sequence[Tensor], dict[str, Any], float]:
        """What one call sends and takes, on the rank with most of it. Each rank calls as often as the others."""
        with Traffic() as traffic:
            outputs = run()
        peaks = [with_peak_bytes(run, self.device, 0.0, call.forget)[1] for _ in range(3)]
        known = [peak for peak in peaks if peak is not None]
        observed = {
            "nccl_bytes": int(over_ranks(traffic.sent_bytes)),
            "calls": int(over_ranks(sum(count for name, count in traffic.calls.items() if name != "recv_"))),
            "peak_bytes": int(over_ranks(statistics.median(known))) if known else None,
        }
        return outputs, observed, 0.0

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        if self.n > TRUTH_ROWS:
            return {"note": f"no float64 truth above N = {TRUTH_ROWS}"}
        averages = [t.detach().double() / self.ranks for t in outputs]
        for shared in (averages[0], *averages[3:]):
            dist.all_reduce(shared)
        errors = [over_ranks(relative_error(x, y)) for x, y in zip(averages, self.truth, strict=False)]
        gradients = {"gradient_error": max(errors[1:3]), "scale_error": errors[3]} if errors[1:] else {}
        return {"loss_error": errors[0], **gradients}


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = BENCHMARK.parser(__doc__)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, metavar="W", help="default: 1, 2, 4 on the CPU; up to all GPUs")
    add("--forms", nargs="+", choices=RANK_FORMS, default=RANK_FORMS, help="clip has one text per image")
    add("--sizes", nargs="+", type=int, metavar="N", default=SIZES, help="texts of all ranks (default %(default)s)")
    add("--texts", type=int, default=36, metavar="K", help="texts per image of ce and bce (default 36)")
    add("--dim", type=int, default=512, metavar="D", help="width of the embeddings (default 512)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.sizes, args.texts, args.dim, args.ranks = [96], 12, 64, args.ranks or [2]
    BENCHMARK.resolve(parser, args, rank_implementations())
    if "LOCAL_RANK" in os.environ:  # torchrun
        args.ranks = [int(os.environ["WORLD_SIZE"])]
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 4
    args.ranks = args.ranks or [2**i for i in range(max(1, gpus).bit_length())]
    for count in args.ranks:
        if count < 1 or (args.device.type == "cuda" and count > gpus):
            parser.error(f"--ranks: expected at least 1 and at most the number of GPUs, got {count}")
        for n in args.sizes:
            if n < 1 or n % (args.texts * count):
                parser.error(f"--sizes: expected multiples of {count} ranks × {args.texts} texts, got {n}")
    return args


def run_rank(
    rank: int, count: int, init_method: str, args: argparse.Namespace, source: Row, device: str, path: Path
) -> None:
    """Measure everything on one of ``count`` ranks; the first of them prints, and appends rows to ``path``."""
    gc.freeze()
    torch.set_num_threads(1)
    if args.device.type == "cuda":
        args.device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(args.device)
    backend = "nccl" if args.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=count, timeout=TIMEOUT)
    for form in args.forms:
        k = 1 if form == "clip" else args.texts
        for n in args.sizes:
            whole = synthetic_batch(n // k, k, args.dim, args.dtype, args.device)
            comparison = RankComparison(form, whole, args.chosen, device)
            measure(comparison, BENCHMARK, Budget(0, args.seconds), source, path, shown=rank == 0)
            del comparison
            release()
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.plot_only:
        return BENCHMARK.redraw(args.plot_only)
    torch.set_num_threads(os.cpu_count() or 1)  # the device's name says how many; torchrun allows one
    rank = int(os.environ.get("RANK", 0))
    with redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        session = Session(BENCHMARK, args, argv)
    same = args, session.source, session.device, session.path
    if "LOCAL_RANK" in os.environ:
        run_rank(rank, args.ranks[0], "env://", *same)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for count in args.ranks:  # new processes: torch.distributed.nn keeps the first group that it has seen
                mp.spawn(run_rank, (count, f"file://{folder}/{count}", *same), count)
    if rank > 0:
        return 0
    rows = [row for row in read_rows(session.path) if row["date"] == session.source["date"]]
    print("", *untrustworthy(rows), sep="\n")
    return session.finish(rows)


if __name__ == "__main__":
    sys.exit(main())
