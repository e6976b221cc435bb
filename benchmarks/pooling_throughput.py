"""How fast is text-conditioned pooling of patches, and what does autograd keep of it? Ours and others.

    python benchmarks/pooling_throughput.py                               # what fits this machine, in minutes
    python benchmarks/pooling_throughput.py --smoke                       # seconds, tiny sizes, everything once
    python benchmarks/pooling_throughput.py --parts block --texts 6 36 --patches 256 --dim 768
    python benchmarks/pooling_throughput.py --crossover                   # does the cost model choose well?

Each of K texts pools its image's P patches by multi-head cross-attention; B images. Parts: "attention", from raw
patches and queries to the output projection, and "block", the same and the MLP, which is alike everywhere.
Gradients are those of patches, queries and all parameters of the part.

"speed-up" and "saved ÷" are against nn.MultiheadAttention as published, in the same rounds. "saved" is what autograd
keeps from forward to backward beside the inputs and the parameters, each storage counted once. "of mm" is the least
FLOP (common/pools.py: folded or projected) over the time, over the rate of torch.mm in the same dtype and rounds.
Extra memory is the peak above what existed before, gradients included. Errors are max |difference| / max |truth|
against the published form in float64.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from common.budget import Budget
from common.comparison import BASELINES, Call, Comparison
from common.figures import TIME, Figure
from common.harness import Run
from common.pools import PARTS, PoolBatch, least_flop, pool_implementations, published, synthetic_pool_batch
from common.report import in_ms, memory, number
from common.rows import BOTH, OK, Row
from common.session import Benchmark, Session, at_least
from torch import Tensor

from betaclip.kernels.attention_pool.cost import folding_pays
from betaclip.kernels.attention_pool.operators import FOLDED

BATCH = {"cpu": 64, "cuda": 256}
PATCHES = {"cpu": (196, 576), "cuda": (196, 256, 576)}
TEXTS = (1, 6, 36, 64)
DIMS = {"cpu": (512,), "cuda": (512, 768)}
DEFAULT_PARTS = {"cpu": ("attention",), "cuda": PARTS}  # the block takes minutes on a CPU, and adds little
CROSSOVER_TEXTS = (8, 16, 24, 32, 36, 40, 44, 48, 56, 64)
MATRIX_ROWS = {"cpu": 2304, "cuda": 9216}  # up to here torch.mm's rate is measured at the patches' number
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
    summary=crossover,
    columns={
        "path": lambda row: row.get("path", ""),
        "saved": memory("saved_bytes"),
        "saved ÷": number("saved_ratio", ".2f"),
        "error: output": number("output_error", ".1e"),
        "gradients": number("gradient_error", ".1e"),
        "parameters": number("parameter_error", ".1e"),
    },
    figure=Figure(
        panel=("patches", "P"),
        x=("texts", "K, texts per image"),
        same=("images", "dim", "heads"),
        quantities=(TIME, ("saved_bytes", "saved activations, MiB", 2.0**20)),
    ),
)


def saved_bytes(forward: Run, given: Iterable[Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps of ``forward()`` beside what it is ``given``."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # keeps the storage, so that no other takes its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    for x in given:
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class PoolComparison(Comparison):
    """All implementations of one part on one batch.

    Values: path, "folds" or "projects", and chosen, what betaclip's cost model says of this size; saved_bytes, what
    autograd keeps beside inputs and parameters; saved_ratio, to that of the published form, which comes first.
    """

    error_fields = ("output_error", "gradient_error", "parameter_error")

    def __init__(self, part: str, batch: PoolBatch, chosen: dict[str, Any], budget: Budget) -> None:
        images, patches, dim = batch.patches.shape
        k, heads = batch.queries.shape[1], batch.pool.attn.num_heads
        sizes = {"images": images, "texts": k, "patches": patches, "dim": dim, "heads": heads}
        mm = min(images * patches, MATRIX_ROWS[batch.patches.device.type]), dim
        super().__init__(part, sizes, chosen, batch.patches, budget, mm)
        self.batch, self.sizes = batch, tuple(sizes.values())
        self.grad_output = torch.randn_like(batch.queries)
        self.published_bytes = 0
        self.model_folds = folding_pays(*self.sizes, self.dtype, self.device.type)

    def flop(self, phase: str) -> float:
        return least_flop(self.form, phase, *self.sizes)

    def prepare(self, name: str) -> Call:
        pool = self.chosen[name](self.form, self.batch)
        return Call(pool, self.batch.leaves(self.form))

    def exact(self) -> Call:
        batch = self.batch.to(torch.float64)
        return Call(published(self.form, batch), batch.leaves(self.form))

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        values = super().values(name, phase, outputs)
        folds = self.model_folds if name == "betaclip/auto" else name.removeprefix("betaclip/") in FOLDED
        values["path"] = FOLDS if folds else PROJECTS
        values["chosen"] = FOLDS if self.model_folds else PROJECTS
        if phase == BOTH:
            call, _ = self.calls[name]
            values["saved_bytes"] = saved_bytes(call.function, call.leaves)
            if name in BASELINES:
                self.published_bytes = values["saved_bytes"]
            values["saved_ratio"] = values["saved_bytes"] / self.published_bytes if self.published_bytes else None
        return values


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = BENCHMARK.parser(__doc__)
    add = parser.add_argument
    size = at_least(1)
    add("--batch", type=size, metavar="B", help="images (default: 64, on a GPU 256)")
    add("--patches", nargs="+", type=size, metavar="P", help="per image (default: 196 576, on a GPU 256 too)")
    add("--texts", nargs="+", type=size, metavar="K", help="per image (default: 1 6 36 64)")
    add("--dim", nargs="+", type=size, metavar="D", help="width of the embeddings (default: 512, on a GPU 768 too)")
    add("--heads", type=size, default=8, metavar="H", help="of the attention (default 8)")
    add("--parts", nargs="+", choices=PARTS, help="default: attention, on a GPU both")
    add("--crossover", action="store_true", help="only: fold or project, K from 8 to 64, and what the cost model says")
    smoke = {"batch": 3, "patches": [10], "texts": [4], "dim": [32], "parts": PARTS}
    by_device = {"batch": BATCH, "dim": DIMS, "patches": PATCHES}
    args = BENCHMARK.parse(parser, argv, pool_implementations(), smoke, by_device)
    args.parts = args.parts or (PARTS[:1] if args.crossover else DEFAULT_PARTS[args.device.type])
    args.texts = args.texts or (CROSSOVER_TEXTS if args.crossover else TEXTS)
    if args.crossover and args.implementations is None:
        args.chosen = {k: v for k, v in args.chosen.items() if k.startswith("betaclip/") and k != "betaclip/auto"}
    for dim in args.dim:
        if dim % args.heads:
            parser.error(f"--dim: expected multiples of {args.heads} heads, got {dim}")
    return args


def comparisons(args: argparse.Namespace, session: Session) -> dict[str, Callable[[], list[Row]]]:
    def compare(part: str, dim: int, patches: int, k: int) -> list[Row]:
        batch = synthetic_pool_batch(args.batch, k, patches, dim, args.heads, args.dtype, args.device)
        return session.measure(PoolComparison(part, batch, args.chosen, session.budget))

    sizes = product(args.parts, args.dim, args.patches, args.texts)
    return {f"{part}, D = {d}, P = {p}, K = {k}": partial(compare, part, d, p, k) for part, d, p, k in sizes}


if __name__ == "__main__":
    sys.exit(BENCHMARK.main(arguments, comparisons))
