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
FLOP (common/pools.py: folded or projected) over the time, over the rate of torch.mm in the same dtype and rounds.
Extra memory is the peak above what existed before, gradients included. Errors are max |difference| / max |truth|
against the published form in float64.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from common.budget import Budget
from common.comparison import Call, Comparison
from common.figures import Figure
from common.harness import Run, attempt, relative_error
from common.pools import (
    PARTS,
    PoolBatch,
    PoolImplementation,
    least_flop,
    pool_implementations,
    published,
    synthetic_pool_batch,
)
from common.report import Progress, in_ms, memory, number
from common.rows import BOTH, OK, Case, Measurement, Row
from common.session import Benchmark, Session, expect_at_least
from torch import Tensor

from betaclip.kernels.attention_pool.cost import folding_pays
from betaclip.kernels.memory import forget

BATCH = {"cpu": 64, "cuda": 256}
PATCHES = {"cpu": (196, 576), "cuda": (196, 256, 576)}
TEXTS = (1, 6, 36, 64)
DIMS = {"cpu": (512,), "cuda": (512, 768)}
DEFAULT_PARTS = {"cpu": ("attention",), "cuda": PARTS}  # the block takes minutes on a CPU, and adds little
CROSSOVER_TEXTS = (8, 16, 24, 32, 36, 40, 44, 48, 56, 64)
MATRIX_ROWS = {"cpu": 2304, "cuda": 9216}  # torch.mm's rate is measured with
FOLDS, PROJECTS = "folds", "projects"


def crossover(rows: list[Row]) -> list[str]:
    """Per case the fastest of ours that folds, that projects, and what the cost model's choice loses."""
    best: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["status"] == OK and row["phase"] == BOTH and row["implementation"].startswith("betaclip/"):
            ways = best.setdefault(tuple(row[key] for key in ("form", "dim", "patches", "texts", "chosen")), {})
            time = float(row["time_ms_p50"])
            ways[row["path"]] = min(time, ways.get(row["path"], time))
    lines = ["Folding or projecting, forward+backward:"]
    for (form, dim, patches, k, chosen), ways in best.items():
        if len(ways) == 2:
            faster = min(ways, key=ways.__getitem__)
            times = "   ".join(f"{way} {in_ms(str(ways[way])):>6} ms" for way in (FOLDS, PROJECTS))
            lost = f"{ways[chosen] / ways[faster]:.2f}× the faster's time"
            lines.append(f"{form}, D = {dim}, P = {patches}, K = {k:>2}:   {times}   the model {chosen}: {lost}")
    return lines[len(lines) == 1 :]


BENCHMARK = Benchmark(
    name="pooling_throughput",
    suffix="-pooling",
    each="part, size and phase",
    summary=crossover,
    columns={
        "path": lambda row: row["path"],
        "speed-up": number("speedup", ".2f"),
        "of mm": number("share_of_mm", ".2f"),
        "extra memory": memory("peak_bytes"),
        "saved": memory("saved_bytes"),
        "saved ÷": number("saved_ratio", ".2f"),
        "error: output": number("output_error", ".1e"),
        "gradients": number("gradient_error", ".1e"),
        "parameters": number("parameter_error", ".1e"),
    },
    figure=Figure(
        panel=lambda row: f"{row['form']}, P = {row['patches']}",
        x="texts",
        x_label="K, texts per image",
        quantities=(("time_ms_p50", "forward + backward, ms", 1.0), ("saved_bytes", "saved activations, MiB", 2.0**20)),
        same=("images", "dim", "heads", "dtype"),
        title=lambda row: (
            f"{row['device']}, {row['dtype']}, B = {row['images']}, D = {row['dim']}, {row['heads']} heads"
        ),
    ),
)


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


class PoolComparison(Comparison):
    """All implementations of one part on one batch.

    Values: path, "folds" or "projects", and chosen, what betaclip's cost model says of this size; saved_bytes, what
    autograd keeps beside inputs and parameters; saved_ratio, to that of the published form.
    """

    baseline = "published"

    def __init__(self, part: str, batch: PoolBatch, chosen: dict[str, PoolImplementation], device: str) -> None:
        (images, patches, dim), k = batch.patches.shape, batch.queries.shape[1]
        dtype, on = batch.patches.dtype, batch.patches.device
        sizes = {"images": images, "texts": k, "patches": patches, "dim": dim, "heads": batch.heads}
        case = Case(BENCHMARK.name, part, str(dtype)[6:], device, sizes)
        super().__init__(case, chosen, (MATRIX_ROWS[on.type], dim), on)
        self.part, self.batch, self.chosen, self.sizes = part, batch, chosen, tuple(sizes.values())
        self.grad_output = torch.randn(images, k, dim, device=on).to(dtype)
        self.model_folds = folding_pays(*self.sizes, dtype, on.type)

    def flop(self, phase: str) -> float:
        return least_flop(self.part, phase, *self.sizes)

    def heading(self) -> str:
        images, k, patches, dim, heads = self.sizes
        return (
            f"{self.part}   {images:,} images × {k} text{'s' * (k > 1)}   {patches} patches   D = {dim}   "
            f"{heads} heads   {self.case.dtype}"
        )

    def prepare(self, name: str) -> Call:
        pool = self.chosen[name].build(self.part, self.batch)
        return Call(pool, self.batch.leaves(self.part), forget=forget)

    @cached_property
    def truth(self) -> tuple[tuple[Tensor, ...] | None, str]:
        exact = self.batch.to(torch.float64)
        call = Call(published(self.part, exact), exact.leaves(self.part))
        truth, status = attempt(call.run(BOTH, self.grad_output))
        return truth, "" if status == OK else f"float64 truth: {status}"

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if phase == BOTH:
            call, _ = self.calls[name]
            saved = saved_bytes(call.function, parameters=call.leaves[2:], inputs=call.leaves[:2])
            kept = dict(zip(("saved_bytes", "saved_with_inputs_bytes"), saved, strict=True))
        truth, reason = self.truth
        if truth is None:
            return {**kept, "note": reason}
        output, *gradients = (relative_error(x, y) for x, y in zip(outputs, truth, strict=False))
        errors = {"gradient_error": max(gradients[:2]), "parameter_error": max(gradients[2:])} if gradients else {}
        return {**kept, "output_error": output, **errors}

    def measure(self, phase: str, budget: Budget, progress: Progress) -> list[Measurement]:
        rows = super().measure(phase, budget, progress)
        base = next((x.values.get("saved_bytes") for x in rows if x.case.implementation == self.baseline), None)
        return [self._with_path(row, base) for row in rows]

    def _with_path(self, row: Measurement, base: int | None) -> Measurement:
        folds, saved = self.chosen[row.case.implementation].folds, row.values.get("saved_bytes")
        path, chosen = (
            FOLDS if x else PROJECTS for x in (self.model_folds if folds is None else folds, self.model_folds)
        )
        ratio = None if base is None or saved is None else saved / base
        return row.with_values(path=path, chosen=chosen, saved_ratio=ratio)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = BENCHMARK.parser(__doc__)
    add = parser.add_argument
    add("--batch", type=int, metavar="B", help="images (default: 64, on a GPU 256)")
    add("--patches", nargs="+", type=int, metavar="P", help="per image (default: 196 576, on a GPU 256 too)")
    add("--texts", nargs="+", type=int, metavar="K", help="per image (default: 1 6 36 64)")
    add("--dim", nargs="+", type=int, metavar="D", help="width of the embeddings (default: 512, on a GPU 768 too)")
    add("--heads", type=int, default=8, metavar="H", help="of the attention (default 8)")
    add("--parts", nargs="+", choices=PARTS, help="default: attention, on a GPU both")
    add("--crossover", action="store_true", help="only: fold or project, K from 8 to 64, and what the cost model says")
    args = parser.parse_args(argv)
    BENCHMARK.resolve(parser, args, pool_implementations())
    if args.smoke:
        args.batch, args.patches, args.texts, args.dim, args.parts = 3, [10], [4], [32], args.parts or PARTS
        args.chosen = {k: v for k, v in args.chosen.items() if "compiled" not in k or args.implementations}
    if args.crossover:
        args.parts, args.texts = args.parts or PARTS[:1], args.texts or CROSSOVER_TEXTS
        if args.implementations is None:
            args.chosen = {k: v for k, v in args.chosen.items() if k.startswith("betaclip/") and k != "betaclip/auto"}
    kind = args.device.type
    defaults = {"batch": BATCH, "dim": DIMS, "patches": PATCHES, "parts": DEFAULT_PARTS}
    for name, default in defaults.items():
        setattr(args, name, getattr(args, name) or default[kind])
    args.texts = args.texts or TEXTS
    expect_at_least(1, parser, args, "--batch", "--patches", "--texts", "--dim", "--heads")
    for dim in args.dim:
        if dim % args.heads:
            parser.error(f"--dim: expected multiples of {args.heads} heads, got {dim}")
    return args


def comparisons(args: argparse.Namespace, device: str) -> dict[str, Callable[[], PoolComparison]]:
    def compare(part: str, dim: int, patches: int, k: int) -> PoolComparison:
        batch = synthetic_pool_batch(args.batch, k, patches, dim, args.heads, args.dtype, args.device)
        return PoolComparison(part, batch, args.chosen, device)

    sizes = product(args.parts, args.dim, args.patches, args.texts)
    return {f"{part}, D = {d}, P = {p}, K = {k}": partial(compare, part, d, p, k) for part, d, p, k in sizes}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.plot_only:
        return BENCHMARK.redraw(args.plot_only)
    session = Session(BENCHMARK, args, argv)
    return session.run(comparisons(args, session.device))


if __name__ == "__main__":
    sys.exit(main())
