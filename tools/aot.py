"""Compile every Triton kernel for every architecture of the tile tables, without a GPU, and report its machine code.

    python tools/aot.py sm_90 bfloat16     # one line of JSON per kernel
    python tools/aot.py --update           # all targets, into tools/aot_verdicts.json
    python tools/aot.py --report           # what it says of speed, into benchmarks/results/machine-code-*.csv
    python tools/aot.py --older            # whether kernels compile with a Triton that the record is not of

This is a program of its own because it needs compiled kernels, where the tests' process has interpreted ones. The
launchers do all that they would do on a GPU, except that kernels are compiled and not started; their results are
meaningless.

Compiling all targets takes minutes, so the verdicts are recorded, under a hash of all that they depend on.
The tests use the record if the hash is that of the sources and the installed Triton, and compile otherwise.

The report holds the figures that were last accepted. A test compares the machine code with it, so that a kernel that
has grown, or stores in smaller pieces, fails until ``--report`` is run again.
"""

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from betaclip.kernels import architecture as architectures
from betaclip.kernels.attention_pool.folded import Patches, Result
from betaclip.kernels.attention_pool.triton_kernels import Fused
from betaclip.kernels.attention_pool.triton_rows import unit_rows_bwd, unit_rows_fwd
from betaclip.kernels.similarity import triton_rows
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.tiles import TILES
from betaclip.kernels.similarity.triton_kernels import Triton

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = ROOT / "tools" / "aot_verdicts.json"
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = [
    "tools/aot.py",
    "tools/machine_code.py",
    "kernels/architecture.py",
    "kernels/memory.py",
    "kernels/precision.py",
    *(
        f"kernels/{folder}/{name}.py"
        for folder in ("similarity", "attention_pool")
        for name in ("tiles", "triton_kernels")
    ),
    "kernels/attention_pool/folded.py",
    "kernels/attention_pool/triton_rows.py",
    "kernels/similarity/chunks.py",
    "kernels/similarity/contract.py",
    "kernels/similarity/exponent_range.py",
    "kernels/similarity/prefix_rows.py",
    "kernels/similarity/prefixes.py",
    "kernels/similarity/triton_rows.py",
    "kernels/similarity/triton_tiles.py",
]
_DTYPES = {2: ("bfloat16", "float16"), 4: ("float32",)}
TARGETS = [(name, dtype) for name, size in TILES if name != "interpreter" for dtype in _DTYPES[size]]
# Those that older Tritons must compile, in the lane `minimum`.
OLDER_TARGETS = [(name, dtype) for name in ("sm_80", "sm_90") for dtype in ("bfloat16", "float32")]
FLAGS = (
    "HAS_IMAGE_ID",
    "HAS_TEXT_ID",
    "HAS_BIAS",
    "HAS_GRADIENT",
    "NORMALIZE",
    "HAS_MASK",
    "MANY_BLOCKS",
    "HAS_SLOTS",
    "HAS_GAIN",
)  # of a launch
GROWTH = 1.05  # how many times the accepted instructions per tile a kernel may have
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnly:
    """A Triton driver that knows only its target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_launches(architecture: str) -> list[tuple[Any, dict[str, Any]]]:
    """Make launchers and compiler take ``architecture``; return the list to which compiled kernels will be added if
    they multiply, with the constants that they were launched with."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    driver.set_active(CompileOnly(target))
    architectures.architecture = lambda device: architecture
    architectures.multiprocessors = lambda device: 132
    compiled: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if "PRECISION" in kwargs:  # of products
            compiled.append((kernel, kwargs))
        return kernel

    JITFunction.run = compile_only
    return compiled


def launch_similarity(dtype: torch.dtype) -> None:
    """Launch at small, usual and largest depths and at one that TMA cannot read, with and without ids and bias, and for
    several prefixes."""
    for depth, with_ids, with_texts, bias, dims in (
        (512, True, False, True, ()),
        (512, True, True, True, ()),
        (512, False, False, False, ()),
        (64, True, False, False, ()),
        (1024, True, False, True, ()),
        (100, True, False, True, ()),
        (512, True, True, True, (128, 256, 512)),
    ):
        _launch_similarity(dtype, depth, with_ids, with_texts, bias, dims)
    for depth, texts, with_slots in ((512, 36, False), (768, 32, True), (100, 7, True)):
        _launch_rows(dtype, depth, texts, with_slots)


def _launch_similarity(
    dtype: torch.dtype, depth: int, with_ids: bool, with_texts: bool, bias: bool, dims: tuple[int, ...]
) -> None:
    """Call every launcher once, with N and M that are no multiples of a tile."""
    n, m = 300, 200
    x_id, y_id = (torch.arange(rows, dtype=torch.int32) if with_ids else None for rows in (n, m))
    x = Operand(torch.zeros(n, depth, dtype=dtype), x_id, None, dtype, x_id if with_texts else None, dims=dims)
    y = Operand(torch.zeros(m, depth, dtype=dtype), y_id, None, dtype, y_id if with_texts else None, dims=dims)
    scale, b = torch.tensor(10.0), torch.tensor(-1.0) if bias else None
    of_x, of_y = (torch.zeros(len(x.slices), rows) for rows in (n, m))
    Triton().similarity_logsumexp_fwd(x, y, scale)
    Triton().similarity_logsumexp_bwd(x, y, scale, of_x, of_y, of_x, of_y, True, True)
    Triton().similarity_softplus_fwd(x, y, scale, b)
    Triton().similarity_softplus_fwd_bwd(x, y, scale, b, of_x, True, True)


def _launch_rows(dtype: torch.dtype, depth: int, texts: int, with_slots: bool) -> None:
    images = 3
    x, norms = torch.zeros(images * texts, depth, dtype=dtype), torch.zeros(images * texts)
    between, weights = torch.zeros(x.shape), torch.zeros(images, texts, texts)
    slots = torch.zeros(images, texts, dtype=torch.int64) if with_slots else None
    triton_rows.inverse_norms(x, torch.zeros(len(x), dtype=torch.int32), 1e-12)
    triton_rows.unit_rows(x, norms, dtype)
    triton_rows.cosines(x, x, norms, norms, slots, weights)
    for gain in (None, torch.tensor(1.0)):
        triton_rows.raw_gradient(x, x, norms, norms, slots, between, weights.mT, gain)
    vectors = [torch.zeros(2, 300) for _ in range(4)]
    triton_rows.logsumexp_vectors(*vectors, 1.0, 128)


def launch_attention_pool(dtype: torch.dtype) -> None:
    """Launch all kernels at aligned and odd widths, with patches in one block and in several, masked and not."""
    for width, heads, patches, masked, normalize in (
        (64, 8, 196, False, True),
        (96, 4, 577, True, False),
        (512, 8, 196, False, True),
        (768, 12, 577, True, True),
        (1024, 16, 1024, True, True),
    ):
        images, queries = 2, 9
        # As in training: the patches are a view that leaves out the class token.
        rows = torch.zeros(images, patches + 1, width, dtype=dtype)[:, 1:]
        mask = torch.ones(images, patches, dtype=torch.bool) if masked else None
        x = Patches(rows, mask, torch.ones(images, patches) if normalize else None, None)
        lse, pitch, none = torch.zeros(images, queries * heads), -(-patches // 16) * 16, torch.empty(0)
        out = torch.zeros(images, queries, width, dtype=dtype)
        zg, products, weights = (
            torch.zeros(images, queries, 2, heads, n, dtype=dtype).movedim(2, 0) for n in (width, width, pitch)
        )
        z = torch.zeros(images, queries * heads, width, dtype=dtype)
        Fused().forward(x, z, torch.empty_like(z), lse, None, none)
        result = Result(out, out, out[0, 0] if normalize else None)
        dx = torch.empty(images, patches, width, dtype=dtype)
        Fused().backward(x, zg, lse, None, result, weights[..., :patches], products, dx, none)
        norms = torch.empty(images, patches)
        for unit in (None, dx):
            unit_rows_fwd(rows, 1e-12, norms, unit)
        unit_rows_bwd(dx, norms, dx)


def nvidia_code(cubin: bytes, tensor_flop: int) -> tuple[machine_code.Code, int, int]:
    """The code, its registers per thread, and its bytes of stack and local memory per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump: unexpected output: {usage}")
    return machine_code.nvidia(sass, tensor_flop), int(found[1]), int(found[2]) + int(found[3])


def amd_code(text: str) -> tuple[machine_code.Code, int, int]:
    """The code, its vector registers, and how many spilled plus bytes of scratch memory; scalar registers spill to
    vector ones, not to memory."""
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    found = [re.search(rf"\.{name}:\s*(\d+)", text) for name in names]
    if None in found:
        raise ValueError("no register counts in the AMD assembly")
    registers, *spilled = (int(match[1]) for match in found if match)
    return machine_code.amd(text), registers, sum(spilled)


def describe(kernel: Any, constants: dict[str, Any], architecture: str, itemsize: int) -> dict[str, Any]:
    amd = "amdgcn" in kernel.asm
    text = kernel.asm["amdgcn" if amd else "ptx"]
    rows, cols, block = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    ends = constants.get("ENDS") or (constants["D"],)  # of prefixes, for which a tile's other instructions count once
    depth = ends[-1]
    # Pooling forms two products per tile: logits and sums, or the gradients of logits and weights.
    name = kernel.metadata.name
    products = 1 + ("attention_pool" in name and "products" not in name)
    # 32 bytes of depth at a time; the two products have different sizes.
    tensor_flop = 2 * rows * cols * (32 // itemsize) // constants["num_warps"] if products == 1 else 0
    code, registers, spilled = amd_code(text) if amd else nvidia_code(kernel.asm["cubin"], tensor_flop)
    step_flop, steps = 2 * rows * cols * block * products, -(-depth // block)
    read = (rows * products + cols) * depth * itemsize
    passes = 3 if constants["PRECISION"] == "tf32x3" else 1
    flop = passes * step_flop // constants["num_warps"]
    if "products" in name or "received" in name:  # whose depth is a number of patches or texts: all code counts once
        in_steps, rest = Counter(), Counter(map(code.pipe, code.opcodes))
        least, share = rest, None
    else:
        in_steps, rest = code.per_tile(flop, steps)
        _, least = code.per_tile(flop, steps, shortest=True)
        share = machine_code.MACHINES[architecture].matrix_share(
            itemsize, step_flop * steps, read, constants["num_warps"], in_steps, least
        )
    return {
        "kernel": kernel.metadata.name,
        "launch": " ".join([f"D={','.join(map(str, ends))}", *(flag.lower() for flag in FLAGS if constants.get(flag))]),
        "spilled": spilled,
        "shared": kernel.metadata.shared,
        "registers": registers,
        "store_bytes": code.widest_store(),
        "instructions": {pipe: in_steps[pipe] + rest[pipe] for pipe in machine_code.PIPES},
        "least": in_steps.total() + least.total(),
        "matrix_share": None if share is None or ("tcgen05.mma" in text and products > 1) else round(share, 2),
        "swaps": "cmpswap" in text or ".cas." in text,  # a sum in memory by a loop of compare-and-swap
        "tma": "cp.async.bulk.tensor" in text,
        "wgmma": "wgmma.mma_async" in text,
        "tcgen05": "tcgen05.mma" in text,
        "mma": "mma.sync" in text,
        "mfma": "v_mfma" in text,
    }


def key() -> str:
    """The hash of everything that the verdicts depend on."""
    parts = [triton.__version__.encode(), *((ROOT / source).read_bytes() for source in SOURCES)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def record() -> dict[str, Any]:
    return json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}


def verdicts(architecture: str, dtype: str) -> list[dict[str, Any]]:
    """The description of each kernel's machine code, from the record if it is valid, else by compiling in a process."""
    kept = record()
    if kept.get("key") == key():
        return kept["targets"][f"{architecture} {dtype}"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        run = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, architecture, dtype],
            env=environment | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    if run.returncode != 0:
        raise RuntimeError(f"{architecture} {dtype}: {run.stderr[-3000:]}")
    return [json.loads(line) for line in run.stdout.splitlines()]


def compile_with_older() -> None:
    """Compile with the installed Triton, unless the record is of that version; what older ones make is not judged.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    if record().get("triton") == triton.__version__:
        print(f"Triton {triton.__version__}: the record is of this version")
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda target: verdicts(*target), OLDER_TARGETS)
        for target, kernels in zip(OLDER_TARGETS, found, strict=True):
            print(f"Triton {triton.__version__}, {' '.join(target)}: {len(kernels)} kernels compile", flush=True)


def update() -> None:
    """Compile all targets and record their verdicts."""
    VERDICTS.unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda target: verdicts(*target), TARGETS)
    targets = {" ".join(target): kernels for target, kernels in zip(TARGETS, found, strict=True)}
    lines = ",\n".join(
        f'  "{target}": [\n' + ",\n".join(f"    {json.dumps(kernel)}" for kernel in kernels) + "\n  ]"
        for target, kernels in targets.items()
    )
    head = f'{{\n"key": "{key()}",\n"triton": "{triton.__version__}",\n'
    VERDICTS.write_text(f'{head}"targets": {{\n{lines}\n}}\n}}\n')


def report_rows(architecture: str) -> list[dict[str, Any]]:
    """A row per dtype, kernel and launch: what the machine code says of its speed, as in :mod:`machine_code`."""
    return [
        {
            "dtype": dtype,
            **{name: kernel[name] for name in ("kernel", "launch", "registers", "shared", "spilled", "store_bytes")},
            **kernel["instructions"],
            "total": sum(kernel["instructions"].values()),
            "least": kernel["least"],
            "matrix_share": kernel["matrix_share"],
        }
        for name, dtype in TARGETS
        if name == architecture
        for kernel in verdicts(name, dtype)
    ]


def report_file(architecture: str) -> Path:
    return RESULTS / f"machine-code-{architecture}.csv"


def report() -> None:
    """Accept the kernels as they are: write the reports of all architectures."""
    for architecture in dict(TARGETS):
        rows = report_rows(architecture)
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        report_file(architecture).write_text(out.getvalue())


def regressions(architecture: str) -> list[str]:
    """What has become worse since the report was written, kernel by kernel."""
    with report_file(architecture).open(newline="") as file:
        accepted = {(row["dtype"], row["kernel"], row["launch"]): row for row in csv.DictReader(file)}
    found = []
    for row in report_rows(architecture):
        name = f"{architecture} {row['dtype']} {row['kernel']} {row['launch']}"
        before = accepted.pop((row["dtype"], row["kernel"], row["launch"]), None)
        if before is None:
            found.append(f"{name}: not in the report")
            continue
        for column, tiles in (("total", "per tile"), ("least", "in most tiles")):
            if row[column] > GROWTH * int(before[column]):
                found.append(f"{name}: {row[column]} instructions {tiles}, accepted were {before[column]}")
        if row["store_bytes"] < int(before["store_bytes"]):
            found.append(f"{name}: stores {row['store_bytes']} bytes at a time, accepted were {before['store_bytes']}")
    return found + [f"{architecture} {' '.join(key)}: in the report, but not compiled" for key in accepted]


def main(architecture: str, dtype: str = "") -> None:
    commands = {"--update": update, "--report": report, "--older": compile_with_older}
    if architecture in commands:
        return commands[architecture]()
    compiled = compile_launches(architecture)
    launch_similarity(getattr(torch, dtype))
    launch_attention_pool(getattr(torch, dtype))
    for kernel, constants in {id(kernel): (kernel, constants) for kernel, constants in compiled}.values():
        print(json.dumps(describe(kernel, constants, architecture, getattr(torch, dtype).itemsize)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
