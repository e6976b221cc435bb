"""What the global batch costs: time, bytes sent and memory of a rank, against the number of ranks, and a model of it.

    python benchmarks/global_batch.py                                # starts 1, 2 and 4 processes by itself
    python benchmarks/global_batch.py --smoke                        # seconds, tiny sizes, everything once
    torchrun --nproc-per-node 2 benchmarks/global_batch.py           # the ranks that there are

Ranks share a batch of N = images × texts per image: with more of them each holds less, and the arithmetic of all
together stays the same. On the CPU a rank has one thread and ranks talk over gloo; more ranks than cores take turns.
Times are the slowest rank's, from a common start; bytes and memory are those of the rank with most.

Prints a table per form, size and number of ranks, appends one CSV row per case to results/<device>-global-batch.csv and
draws a figure from that file. "predicted" is ``global_batch_cost``'s time, from the rates of the local kernel and of
one message, measured in the same rounds; what the same model says of GPUs comes last. Other columns are those of
loss_throughput.py.
"""

import argparse
import gc
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import Batch, made_up_batch
from comparison import PHASES, add_common_options, begin, end, figure, resolve_common_options
from global_batch_cost import gpu_table
from global_comparison import BENCHMARK, COLUMNS, FIGURE, GlobalComparison
from global_losses import FORMS, global_losses
from harness import Provenance, append_rows, as_row, read_rows, release
from report import Progress, Row, plot, table

from betaclip.losses.across_ranks import TRANSPORTS

SIZES = (1152, 4608)
TIMEOUT = timedelta(minutes=5)  # of a collective: a rank that died, or goes another way, is not waited for for ever


class Silent(Progress):
    """Of all ranks but the first."""

    def __init__(self) -> None:
        pass

    def step(self, what: str) -> None:
        pass

    def print(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, metavar="W", help="default: 1, 2, 4 on the CPU; up to all GPUs")
    add("--forms", nargs="+", choices=FORMS, default=FORMS, help="clip has one text per image")
    add("--sizes", nargs="+", type=int, metavar="N", default=SIZES, help="texts of all ranks (default %(default)s)")
    add("--texts", type=int, default=36, metavar="K", help="texts per image of ce and bce (default 36)")
    add("--dim", type=int, default=512, metavar="D", help="width of the embeddings (default 512)")
    add_common_options(parser, each="form, size, number of ranks and phase")
    args = parser.parse_args(argv)
    if args.smoke:
        args.sizes, args.texts, args.dim, args.ranks = [96], 12, 64, args.ranks or [1, 2]
    resolve_common_options(parser, args, BENCHMARK, global_losses())
    if "LOCAL_RANK" in os.environ:  # torchrun
        args.ranks = [int(os.environ["WORLD_SIZE"])]
    most = torch.cuda.device_count() if args.device.type == "cuda" else 4
    args.ranks = args.ranks or [2**i for i in range(max(1, most).bit_length())]
    for count in args.ranks:
        if count < 1 or (args.device.type == "cuda" and count > most):
            parser.error(f"--ranks: expected at least 1 and at most the number of GPUs, got {count}")
        for n in args.sizes:
            if n < 1 or n % (args.texts * count):
                parser.error(f"--sizes: expected multiples of {count} ranks × {args.texts} texts, got {n}")
    return args


def batches(args: argparse.Namespace) -> Iterator[tuple[str, Batch]]:
    for form in args.forms:
        texts = 1 if form == "clip" else args.texts
        for n in args.sizes:
            yield form, made_up_batch(n // texts, texts, args.dim, args.dtype, args.device)


def measure(args: argparse.Namespace, source: Provenance, device: str, path: Path) -> None:
    """All cases on the ranks of the default group; the first of them prints and appends rows to ``path``."""
    first = dist.get_rank() == 0
    cases = len(PHASES) * len(args.sizes) * sum(form in x.forms for form in args.forms for x in args.chosen.values())
    progress = Progress(cases) if first else Silent()
    for form, batch in batches(args):
        comparison = GlobalComparison(form, batch, args.chosen, device)
        measured = [row for phase in PHASES for row in comparison.measure(phase, args.seconds, progress, [])]
        rows = [as_row(row, source) for row in measured]
        if first:
            append_rows(path, rows)
            progress.print(comparison.heading(rows) + "\n" + table(rows, COLUMNS))
        del comparison
        release()
        gc.freeze()  # looking through all that was imported, again and again, takes longer than small cases
    progress.close()


def prepare(args: argparse.Namespace, local_rank: int) -> str:
    """One thread and a place for this rank; the backend of its group."""
    torch.set_num_threads(1)
    if args.device.type == "cpu":
        return "gloo"
    args.device = torch.device("cuda", local_rank)
    torch.cuda.set_device(args.device)
    return "nccl"


def process(
    rank: int, count: int, folder: str, args: argparse.Namespace, source: Provenance, device: str, path: Path
) -> None:
    """One of ``count`` that this script starts."""
    method = f"file://{folder}/{count}"
    dist.init_process_group(prepare(args, rank), init_method=method, rank=rank, world_size=count, timeout=TIMEOUT)
    measure(args, source, device, path)
    dist.destroy_process_group()


def draw(rows: list[Row], path: Path) -> str | None:
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in ("dim", "dtype"))]
    return plot(rows, path, f"{rows[-1]['device']}, {rows[-1]['dtype']}, D = {rows[-1]['dim']}", FIGURE)


def efficiencies(rows: list[Row]) -> list[str]:
    """The time of one rank over that of W ranks, each W times: 1 is all that more ranks can give."""
    times = {
        (row["form"], int(row["n"]), row["implementation"], int(row["ranks"])): float(row["time_ms_p50"])
        for row in rows
        if row["status"] == "ok" and row["phase"] == PHASES[0]
    }
    lines = []
    for (*same, ranks), alone in times.items():
        more = [f"{alone / (w * t):.2f} on {w}" for (*other, w), t in times.items() if other == same and w > ranks == 1]
        if more:
            lines.append(f"{same[0]}, N = {same[1]:,}: {same[2]} has the efficiency {', '.join(more)} ranks")
    return lines


def finish(source: Provenance, path: Path) -> int:
    rows = [row for row in read_rows(path) if row["benchmark"] == BENCHMARK and row["date"] == source.date]
    print("", *efficiencies(rows), sep="\n")
    print("\nThe model for H100 or H200, softmax form, bfloat16, D = 512 (of assumed rates: see global_batch_cost.py):")
    print(gpu_table(TRANSPORTS))
    return end(rows, path, figure(path, BENCHMARK, draw))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    torch.set_num_threads(os.cpu_count() or 1)  # by which the device is called; torchrun allows one
    if "LOCAL_RANK" not in os.environ:
        source, device = begin(args, BENCHMARK, argv)
        path = args.output / f"{device}-global-batch.csv"
        with tempfile.TemporaryDirectory() as folder:
            for count in args.ranks:  # new processes: torch.distributed.nn keeps the first group that it has seen
                mp.spawn(process, (count, folder, args, source, device, path), count)
        return finish(source, path)
    first = os.environ["RANK"] == "0"
    with redirect_stdout(sys.stdout if first else io.StringIO()):
        source, device = begin(args, BENCHMARK, argv)
    path = args.output / f"{device}-global-batch.csv"
    dist.init_process_group(prepare(args, int(os.environ["LOCAL_RANK"])), timeout=TIMEOUT)
    measure(args, source, device, path)
    dist.destroy_process_group()
    return finish(source, path) if first else 0


if __name__ == "__main__":
    sys.exit(main())
