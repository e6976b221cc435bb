"""Are the tiles and chunks of the tables the fastest? The variants around them, in interleaved rounds, with errors.

    python tools/tile_variants.py loss                       # a GPU: 9 216 and 36 864 texts, both forms
    python tools/tile_variants.py pooling --minutes 3
    python tools/tile_variants.py loss --smoke               # seconds; on a CPU the blocks of its own backends

Columns and options are those of benchmarks/loss_throughput.py and benchmarks/pooling_throughput.py. A variant that
does not compile, or needs more shared memory than there is, is a row that says so. Nothing is changed: a faster
variant goes into the table by hand, once its machine code has been looked at (tools/aot.py).
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betaclip import BetaCALLoss, TextConditionedPool
from betaclip.kernels.architecture import Tile, architecture, choose
from betaclip.kernels.attention_pool.folded import SCRATCH_BYTES, Eager
from betaclip.kernels.attention_pool.tiles import BACKWARD, FORWARD, PRODUCTS
from betaclip.kernels.similarity import operators as similarity
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.cuda_backend import Cuda
from betaclip.kernels.similarity.tiles import CHUNK_ROWS, TILES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import loss_throughput
import pooling_throughput
from common.batches import Batch, synthetic_batch
from common.harness import require
from common.losses import BETA, Implementation, Loss
from common.pools import MLP_RATIO, Pool, PoolBatch, bound, synthetic_pool_batch
from common.report import in_ms
from common.rows import BOTH, OK, Row
from common.session import Benchmark, Session, at_least

CHOSEN = "betaclip/"  # begins the names of what the tables say
FORMS = ("ce", "bce")
SIZES = {"cpu": (2304,), "cuda": (36864, 9216)}  # errors are known at the second, but the first decides
TEXTS = (6, 36)  # per image, of pooling
PATCHES, HEADS = 196, 8

Variants = dict[str, Any]  # backends by name, those of the tables last


def tile_variants(tile: Tile) -> dict[str, Tile]:
    """Tiles that differ from ``tile`` in one field, by that field and its value."""
    values = {
        "block_m": (tile.block_m // 2, tile.block_m * 2),
        "block_n": (tile.block_n // 2, tile.block_n * 2),
        "block_d": (tile.block_d // 2, tile.block_d * 2),
        "num_warps": (tile.num_warps // 2, tile.num_warps * 2),
        "num_stages": (tile.num_stages - 1, tile.num_stages + 1),
        "programs": (tile.programs + 1,),
        "tma": (not tile.tma,),
    }
    least = {"block_m": 16, "block_n": 16, "block_d": 16}  # what a product takes
    return {
        f"{field} {value}": replace(tile, **{field: value})
        for field, tried in values.items()
        for value in tried
        if value >= least.get(field, 1) or field == "tma"
    }


def loss_variants(device: torch.device, itemsize: int) -> Variants:
    """Backends of the losses by name. On the CPU they are those of "blockwise"."""
    if device.type != "cuda":
        sides = {f"blockwise, {side} rows": Blockwise(side, side) for side in (256, 1024)}
        return {**sides, f"{CHOSEN}blockwise": Blockwise()}
    from betaclip.kernels.similarity.triton_kernels import Triton  # Triton may not be installed

    target = architecture(device)
    tiles = tile_variants(choose(TILES, target, itemsize))
    chunk = choose(CHUNK_ROWS, target, itemsize)
    sides = [side for side in (chunk // 2, chunk * 2, chunk * 4) if side > 0]
    return {
        **{f"triton, {name}": Triton(tile=tile) for name, tile in tiles.items()},
        **{f"triton, chunk {side}": Triton(chunk_rows=side) for side in sides},
        **{f"cuda, chunk {side}": Cuda(side) for side in (Cuda().chunk_rows // 2, Cuda().chunk_rows * 2)},
        f"{CHOSEN}cuda": Cuda(),
        f"{CHOSEN}triton": Triton(),
    }


def pool_variants(device: torch.device, itemsize: int) -> Variants:
    """Backends of pooling by name, all of which fold. On the CPU they are those of "folded"."""
    usual = SCRATCH_BYTES[device.type]
    scratch = {f"scratch {size >> 20} MiB": size for size in (usual // 32, usual // 4, usual * 4)}
    if device.type != "cuda":
        return {**{name: Eager(scratch_bytes=size) for name, size in scratch.items()}, f"{CHOSEN}folded": Eager()}
    from betaclip.kernels.attention_pool.triton_kernels import Fused  # Triton may not be installed

    tables = {"forward": FORWARD, "backward": BACKWARD, "products": PRODUCTS}
    chosen = {step: choose(table, architecture(device), itemsize) for step, table in tables.items()}
    without_tma = ("programs", "tma")  # which these kernels do not have
    return {
        **{
            f"{step}, {name}": Fused(**{f"{step}_tile": tile})
            for step, table_tile in chosen.items()
            for name, tile in tile_variants(table_tile).items()
            if not name.startswith(without_tma)
        },
        **{name: Fused(scratch_bytes=size) for name, size in scratch.items()},
        f"{CHOSEN}triton": Fused(),
    }


def build_loss(backend: Any, form: str, batch: Batch, keep: int = 0) -> Loss:
    if isinstance(backend, Cuda):
        x, y = batch.image.flatten(0, 1), batch.text.flatten(0, 1)
        require("cuda", x, similarity.BACKENDS["cuda"](x, y))
    loss = BetaCALLoss(form, BETA, backend=backend, gather=False, keep=keep)
    return lambda b: loss(b.image, b.text, b.scale)


def build_pool(backend: Any, part: str, batch: PoolBatch) -> Pool:
    dim, heads = batch.pool.attn.embed_dim, batch.pool.attn.num_heads
    return bound(TextConditionedPool(dim, heads, MLP_RATIO, backend=backend), part, batch)


class PoolVariants(pooling_throughput.PoolComparison):
    """All variants on one batch; all of them fold."""

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        return super().values(name, phase, outputs) | {"path": pooling_throughput.FOLDS}


def outcome(rows: list[Row]) -> list[str]:
    """Per case and backend, the fastest variant beside what the table says."""
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["phase"] == BOTH and row["status"] == OK:
            size = f"N = {row['n']}" if "n" in row else f"K = {row['texts']}"
            cases.setdefault(f"{row['form']}, {size}", {})[row["implementation"]] = float(row["time_ms_p50"])
    lines = ["Fastest variant, forward+backward:"]
    for case, times in cases.items():
        for chosen in (name for name in times if name.startswith(CHOSEN)):
            others = {name: ms for name, ms in times.items() if not name.startswith(CHOSEN)}
            best = min(others, key=others.__getitem__, default=chosen)
            change = times[best] / times[chosen] - 1
            lines.append(f"{case}:   {chosen} {in_ms(str(times[chosen]))} ms   {best} {change:+.0%}")
    return lines[len(lines) == 1 :]


def _command(benchmark: Benchmark, operation: str) -> Benchmark:
    own = {"name": "tile_variants", "suffix": f"-tiles-{operation}", "folder": "tools"}
    return replace(benchmark, **own, minutes=0, summary=outcome)


BENCHMARKS: Mapping[str, Benchmark] = {
    "loss": _command(loss_throughput.BENCHMARK, "loss"),
    "pooling": _command(pooling_throughput.BENCHMARK, "pooling"),
}


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options; ``chosen`` are the backends by name."""
    benchmark = BENCHMARKS[argv[0]]
    parser = benchmark.parser(__doc__)
    add = parser.add_argument
    add("operation", choices=BENCHMARKS)
    add("--dim", type=at_least(1), default=512, metavar="D", help="width of the embeddings (default 512)")
    if argv[0] == "loss":
        add("--forms", nargs="+", choices=FORMS, default=FORMS)
        add("--sizes", nargs="+", type=at_least(72), metavar="N", help="texts, multiples of 36 (default by device)")
        known, smoke = loss_variants, {"sizes": [72], "dim": 64}
    else:
        add("--batch", type=at_least(1), metavar="B", help="images (default: 64, on a GPU 256)")
        known, smoke = pool_variants, {"batch": 2, "dim": 64}
    given = parser.parse_args(argv)
    device, dtype = torch.device(given.device), given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    by_device = {"sizes": SIZES} if argv[0] == "loss" else {"batch": pooling_throughput.BATCH}
    args = benchmark.parse(parser, argv, known(device, getattr(torch, dtype).itemsize), smoke, by_device)
    for n in args.sizes if argv[0] == "loss" else ():
        if n % 36:
            parser.error(f"--sizes: expected multiples of 36, got {n}")
    return args


def comparisons(args: argparse.Namespace, session: Session) -> dict[str, Callable[[], list[Row]]]:
    chosen: dict[str, Any]
    if args.operation == "loss":
        chosen = {name: Implementation(FORMS, partial(build_loss, x)) for name, x in args.chosen.items()}

        def compare_losses(form: str, n: int) -> list[Row]:
            batch = synthetic_batch(n // 36, 36, args.dim, args.dtype, args.device)
            return session.measure(loss_throughput.LossComparison(form, batch, chosen, session.budget))

        return {f"{form}, N = {n}": partial(compare_losses, form, n) for n in args.sizes for form in args.forms}
    chosen = {name: partial(build_pool, x) for name, x in args.chosen.items()}

    def compare_pools(k: int) -> list[Row]:
        batch = synthetic_pool_batch(args.batch, k, PATCHES, args.dim, HEADS, args.dtype, args.device)
        return session.measure(PoolVariants("attention", batch, chosen, session.budget))

    return {f"K = {k}": partial(compare_pools, k) for k in TEXTS}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in BENCHMARKS:
        sys.exit(f"expected {' or '.join(BENCHMARKS)} first, got {argv[0] if argv else 'nothing'}\n\n{__doc__}")
    return BENCHMARKS[argv[0]].main(arguments, comparisons, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
