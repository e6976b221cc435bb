"""How fast is text-conditioned pooling of patches, and what does autograd keep of it? Ours and others.

    python benchmarks/pooling_throughput.py                               # what fits this machine, in minutes
    python benchmarks/pooling_throughput.py --smoke                       # seconds, tiny sizes, everything once
    python benchmarks/pooling_throughput.py --parts block --texts 6 36 --patches 256 --dim 768
    python benchmarks/pooling_throughput.py --crossover                   # does the cost model choose well?

Each of K texts pools its image's P patches by multi-head cross-attention; B images. Parts: "attention", from raw
patches and queries to the output projection, and "block", the same and the MLP, which is alike everywhere.

Prints a table per part and size, appends one CSV row per case to results/<device>-pooling.csv, and draws
results/<device>-pooling.png from that file. Gradients are those of patches, queries and all parameters of the part.

"speed-up" and "saved ÷" are against nn.MultiheadAttention as published, in the same rounds. "saved" is what autograd
keeps from forward to backward beside the inputs and the parameters, each storage counted once. "of mm" is the least
FLOP (pools.least_flop: folded or projected) over the time, over the rate of torch.mm in the same dtype and rounds.
Extra memory is the peak above what existed before, gradients included. Errors are max |difference| / max |truth|
against the published form in float64.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
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
from harness import OK, Case, Measurement, Run, attempt, relative_error
from pools import (
    PARTS,
    Pool,
    PoolBatch,
    PoolImplementation,
    least_flop,
    made_up_pool_batch,
    pool_implementations,
    published,
)
from report import Figure, Progress, Row, in_bytes, in_ms, number, plot
from torch import Tensor

from betaclip.kernels import memory as scratch
from betaclip.kernels.attention_pool.cost import folding_pays

BENCHMARK = "pooling_throughput"
BATCH = {"cpu": 64, "cuda": 256}
PATCHES = {"cpu": (196, 576), "cuda": (196, 256, 576)}
TEXTS = (1, 6, 36, 64)
DIMS = {"cpu": (512,), "cuda": (512, 768)}
BLOCK = {"patches": (196,), "texts": (6, 36)}  # on the CPU, of the part "block", unless sizes are given
CROSSOVER_TEXTS = (8, 16, 24, 32, 36, 40, 44, 48, 56, 64)
MATRIX_ROWS = {"cpu": 2304, "cuda": 9216}  # torch.mm's rate is measured with
FOLDS, PROJECTS = "folds", "projects"
COLUMNS = {
    "path": lambda row: row["path"],
    "speed-up": lambda row: number(row["speedup"], ".2f"),
    "of mm": lambda row: number(row["share_of_mm"], ".2f"),
    "extra memory": lambda row: in_bytes(row["peak_bytes"]),
    "saved": lambda row: in_bytes(row["saved_bytes"]),
    "saved ÷": lambda row: number(row["saved_ratio"], ".2f"),
    "error: output": lambda row: number(row["output_error"], ".1e"),
    "gradients": lambda row: number(row["gradient_error"], ".1e"),
    "parameters": lambda row: number(row["parameter_error"], ".1e"),
}
FIGURE = Figure(
    panel=lambda row: f"{row['form']}, P = {row['patches']}",
    x="texts",
    x_label="K, texts per image",
    quantities=(("time_ms_p50", "forward + backward, ms", 1.0), ("saved_bytes", "saved activations, MiB", 2.0**20)),
)


@dataclass(frozen=True)
class PoolCase(Case):
    """B images, K texts and P patches of each, width D, H heads."""

    images: int
    texts: int
    patches: int
    dim: int
    heads: int


@dataclass(frozen=True)
class PoolMeasurement(Measurement):
    """path: "folds" or "projects", and chosen: what betaclip's cost model says of this size.

    saved_bytes: what autograd keeps beside inputs and parameters; saved_with_inputs_bytes: and the inputs, if kept.
    speedup, saved_ratio: time of the published form over this, and saved_bytes of this over its.
    """

    case: PoolCase
    path: str = ""
    chosen: str = ""
    saved_bytes: int | None = None
    saved_with_inputs_bytes: int | None = None
    speedup: float | None = None
    saved_ratio: float | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    parameter_error: float | None = None


def saved_bytes(forward: Run, parameters: Iterable[Tensor], inputs: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of distinct storages that autograd keeps of ``forward()`` beside parameters and inputs, and with inputs."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # keeps the storage, so that no other takes its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    for x in parameters:
        kept.pop(x.untyped_storage().data_ptr(), None)
    with_inputs = sum(kept.values())
    for x in inputs:
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values()), with_inputs


class PoolComparison(Comparison[PoolMeasurement]):
    """All implementations of one part on one batch."""

    def __init__(self, part: str, batch: PoolBatch, chosen: dict[str, PoolImplementation], device: str) -> None:
        (images, patches, dim), texts = batch.patches.shape, batch.queries.shape[1]
        dtype, on = batch.patches.dtype, batch.patches.device
        label = f"{part}, P = {patches}, K = {texts}, D = {dim}"
        super().__init__(label, chosen, MATRIX_ROWS[on.type], dim, dtype, on)
        self.part, self.batch, self.chosen, self.leaves = part, batch, chosen, batch.leaves(part)
        self.sizes = (images, texts, patches, dim, batch.heads)
        self.case = PoolCase(BENCHMARK, part, str(dtype)[6:], device, "", "", *self.sizes)
        self.incoming = torch.randn(images, texts, dim, device=on).to(dtype)
        exact = batch.to(torch.float64)
        truth = phase_run(published(part, exact), exact.leaves(part), self.incoming, PHASES[0])
        self.truth, self.truth_status = attempt(truth)
        self.pools: dict[str, Pool] = {}
        self.model_folds = folding_pays(*self.sizes, dtype, on.type)

    def flop(self, phase: str) -> float:
        return least_flop(self.part, phase, *self.sizes)

    def heading(self, rows: list[Row]) -> str:
        images, texts, patches, dim, heads = self.sizes
        return (
            f"\n{self.part}   {images:,} images × {texts} text{'s' * (texts > 1)}   {patches} patches   D = {dim}   "
            f"{heads} heads   {self.case.dtype}   {mm_rate(rows)}".rstrip()
        )

    def measure(self, phase: str, seconds: float, progress: Progress, previous: list[Row]) -> list[PoolMeasurement]:
        rows = super().measure(phase, seconds, progress, previous)
        base = next((row for row in rows if row.case.implementation == "published"), None)
        return rows if base is None else [compared(row, base) for row in rows]

    def first_call(self, name: str, phase: str, previous: list[Row]) -> tuple[PoolMeasurement, Run | None, float]:
        implementation = self.chosen[name]
        folding = self.model_folds if implementation.folds is None else implementation.folds
        path, chosen = (FOLDS if x else PROJECTS for x in (folding, self.model_folds))
        row = PoolMeasurement(replace(self.case, implementation=name, phase=phase), path=path, chosen=chosen)
        if name not in self.pools:
            pool, status = attempt(lambda: implementation.build(self.part, self.batch))
            if status != OK:
                return replace(row, status=status), None, 0.0
            self.pools[name] = pool
        pool = self.pools[name]
        timed = phase_run(pool, self.leaves, self.incoming, phase)
        row, outputs, elapsed_ms = self.call(row, timed, timed, scratch.forget)
        if row.status != OK:
            return row, None, 0.0
        row = self.with_errors(row, outputs)
        if phase == PHASES[0]:
            saved, with_inputs = saved_bytes(pool, parameters=self.leaves[2:], inputs=self.leaves[:2])
            row = replace(row, saved_bytes=saved, saved_with_inputs_bytes=with_inputs)
        return row, timed, elapsed_ms

    def with_errors(self, row: PoolMeasurement, outputs: tuple[Tensor, ...]) -> PoolMeasurement:
        if self.truth is None:
            return replace(row, note="; ".join(filter(None, (row.note, f"float64 truth: {self.truth_status}"))))
        output, *gradients = (relative_error(x, y) for x, y in zip(outputs, self.truth, strict=False))
        if not gradients:
            return replace(row, output_error=output)
        inputs, parameters = gradients[:2], gradients[2:]
        return replace(row, output_error=output, gradient_error=max(inputs), parameter_error=max(parameters))


def compared(row: PoolMeasurement, base: PoolMeasurement) -> PoolMeasurement:
    """With its ratios to the published form."""

    def ratio(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else x / y

    speedup = ratio(base.time_ms_p50, row.time_ms_p50)
    return replace(row, speedup=speedup, saved_ratio=ratio(row.saved_bytes, base.saved_bytes))


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, metavar="B", help="images (default: 64, on a GPU 256)")
    add("--patches", nargs="+", type=int, metavar="P", help="per image (default: 196 576, on a GPU 256 too)")
    add("--texts", nargs="+", type=int, metavar="K", help="per image (default: 1 6 36 64)")
    add("--dim", nargs="+", type=int, metavar="D", help="width of the embeddings (default: 512, on a GPU 768 too)")
    add("--heads", type=int, default=8, metavar="H", help="of the attention (default 8)")
    add("--parts", nargs="+", choices=PARTS, help="default: both, the block at fewer sizes unless sizes are given")
    add("--crossover", action="store_true", help="only: fold or project, K from 8 to 64, and what the cost model says")
    add_common_options(parser, each="part, size and phase")
    args = parser.parse_args(argv)
    resolve_common_options(parser, args, BENCHMARK, pool_implementations())
    kind = args.device.type
    if args.smoke:
        args.batch, args.patches, args.texts, args.dim, args.parts = 3, [10], [4], [32], args.parts or PARTS
    if args.crossover:
        args.parts, args.texts = args.parts or PARTS[:1], args.texts or CROSSOVER_TEXTS
        if args.implementations is None:
            args.chosen = {k: v for k, v in args.chosen.items() if k.startswith("betaclip/") and k != "betaclip/auto"}
    # On the CPU the block takes minutes at all sizes, and adds nothing to what the attention shows.
    args.few_blocks = kind == "cpu" and not (args.parts or args.patches or args.texts)
    args.parts = args.parts or PARTS
    args.batch, args.dim = args.batch or BATCH[kind], args.dim or DIMS[kind]
    args.patches, args.texts = args.patches or PATCHES[kind], args.texts or TEXTS
    for name in ("batch", "patches", "texts", "dim", "heads"):
        value = getattr(args, name)
        for size in [value] if isinstance(value, int) else value:
            if size < 1:
                parser.error(f"--{name}: expected at least 1, got {size}")
    for dim in args.dim:
        if dim % args.heads:
            parser.error(f"--dim: expected multiples of {args.heads} heads, got {dim}")
    return args


def sizes(args: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """Part, D, P, K"""
    for part in args.parts:
        few = args.few_blocks and part == "block"
        patches, texts = (BLOCK["patches"], BLOCK["texts"]) if few else (args.patches, args.texts)
        yield from product([part], args.dim, patches, texts)


def comparisons(args: argparse.Namespace, device: str) -> Iterator[PoolComparison]:
    for part, dim, patches, texts in sizes(args):
        batch = made_up_pool_batch(args.batch, texts, patches, dim, args.heads, args.dtype, args.device)
        yield PoolComparison(part, batch, args.chosen, device)


def crossover(rows: list[Row]) -> list[str]:
    """Per case: the fastest of ours that folds, that projects, and what the cost model's choice loses."""
    best: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["status"] == OK and row["phase"] == PHASES[0] and row["implementation"].startswith("betaclip/"):
            ways = best.setdefault(tuple(row[key] for key in ("form", "dim", "patches", "texts", "chosen")), {})
            time = float(row["time_ms_p50"])
            ways[row["path"]] = min(time, ways.get(row["path"], time))
    lines = []
    for (form, dim, patches, texts, chosen), ways in best.items():
        if len(ways) == 2:
            faster = min(ways, key=ways.__getitem__)
            times = "   ".join(f"{way} {in_ms(str(ways[way])):>6} ms" for way in (FOLDS, PROJECTS))
            lost = f"{ways[chosen] / ways[faster]:.2f}× the faster's time"
            lines.append(f"{form}, D = {dim}, P = {patches}, K = {texts:>2}:   {times}   the model {chosen}: {lost}")
    return lines


def draw(rows: list[Row], path: Path) -> str | None:
    """Of the configuration that the last row has."""
    same = ("images", "dim", "heads", "dtype")
    last = rows[-1]
    rows = [row for row in rows if all(row[key] == last[key] for key in same)]
    title = f"{last['device']}, {last['dtype']}, B = {last['images']}, D = {last['dim']}, {last['heads']} heads"
    return plot(rows, path, title, FIGURE)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    source, device = begin(args, BENCHMARK, argv)
    path = args.output / f"{device}-pooling.csv"
    print("Times: median (20th-80th percentile) of interleaved rounds. All from speed-up on: of forward+backward;")
    print("see --help.")
    cases = len(PHASES) * len(args.chosen) * sum(1 for _ in sizes(args))
    rows = run(comparisons(args, device), args.seconds, source, path, cases, COLUMNS)
    chosen = crossover(rows)
    if chosen:
        print("\nFolding or projecting, forward+backward:", *chosen, sep="\n")
    return end(rows, path, figure(path, BENCHMARK, draw))


if __name__ == "__main__":
    sys.exit(main())
