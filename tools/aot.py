"""Compile every Triton kernel for every architecture of the tile tables, without a GPU, and report its machine code.

    python tools/aot.py sm_90 bfloat16     # one line of JSON per kernel
    python tools/aot.py --update           # all targets, into tools/aot_verdicts.json

This is a program of its own because it needs compiled kernels, where the tests' process has interpreted ones. The
launchers do all that they would do on a GPU, except that kernels are compiled and not started; their results are
meaningless.

Compiling all targets takes minutes, so the verdicts are recorded, under a hash of all that they depend on.
The tests use the record if the hash is that of the sources and the installed Triton, and compile otherwise.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from betaclip.kernels import architecture as architectures
from betaclip.kernels.attention_pool.folded import Patches
from betaclip.kernels.attention_pool.triton_kernels import Fused
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.tiles import TILES
from betaclip.kernels.similarity.triton_kernels import Triton

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = ROOT / "tools" / "aot_verdicts.json"
SOURCES = [
    "tools/aot.py",
    "kernels/architecture.py",
    "kernels/memory.py",
    "kernels/precision.py",
    *(
        f"kernels/{folder}/{name}.py"
        for folder in ("similarity", "attention_pool")
        for name in ("tiles", "triton_kernels")
    ),
    "kernels/attention_pool/folded.py",
    "kernels/similarity/chunks.py",
    "kernels/similarity/contract.py",
    "kernels/similarity/exponent_range.py",
]
_DTYPES = {2: ("bfloat16", "float16"), 4: ("float32",)}
TARGETS = [(name, dtype) for name, size in TILES if name != "interpreter" for dtype in _DTYPES[size]]
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


def compile_launches(architecture: str) -> list[Any]:
    """Make launchers and compiler take ``architecture``; return the list to which compiled kernels will be added."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    driver.set_active(CompileOnly(target))
    architectures.architecture = lambda device: architecture
    architectures.multiprocessors = lambda device: 132
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    JITFunction.run = compile_only
    return compiled


def launch_similarity(dtype: torch.dtype) -> None:
    """Launch at small, usual and largest depths and at one that TMA cannot read, with and without ids and bias."""
    for depth, with_ids, bias in (
        (512, True, True),
        (512, False, False),
        (64, True, False),
        (1024, True, True),
        (100, True, True),
    ):
        _launch_similarity(dtype, depth, with_ids, bias)


def _launch_similarity(dtype: torch.dtype, depth: int, with_ids: bool, bias: bool) -> None:
    """Call every launcher once, with N and M that are no multiples of a tile."""
    n, m = 300, 200
    x_id, y_id = (torch.arange(rows, dtype=torch.int32) if with_ids else None for rows in (n, m))
    x = Operand(torch.zeros(n, depth, dtype=dtype), x_id, None, dtype)
    y = Operand(torch.zeros(m, depth, dtype=dtype), y_id, None, dtype)
    scale, b, of_x, of_y = torch.tensor(10.0), torch.tensor(-1.0) if bias else None, torch.zeros(n), torch.zeros(m)
    Triton().similarity_logsumexp_fwd(x, y, scale)
    Triton().similarity_logsumexp_bwd(x, y, scale, of_x, of_y, of_x, of_y, True, True)
    Triton().similarity_softplus_fwd(x, y, scale, b)
    Triton().similarity_softplus_fwd_bwd(x, y, scale, b, of_x, True, True)


def launch_attention_pool(dtype: torch.dtype) -> None:
    """Launch both kernels at aligned and odd widths, with patches in one block and in several, masked and not."""
    for width, heads, patches, masked, norm_eps in (
        (64, 8, 196, False, 1e-12),
        (96, 4, 577, True, None),
        (512, 8, 196, False, 1e-12),
        (768, 12, 577, True, 1e-12),
        (1024, 16, 1024, True, 1e-12),
    ):
        images, queries = 2, 9
        # As in training: the patches are a view that leaves out the class token.
        rows = torch.zeros(images, patches + 1, width, dtype=dtype)[:, 1:]
        x = Patches(rows, torch.ones(images, patches, dtype=torch.bool) if masked else None, norm_eps)
        z, no_tiles = torch.zeros(images, queries * heads, width, dtype=dtype), torch.empty(0)
        lse = Fused().forward(x, z, torch.empty_like(z), no_tiles)
        zg, weights = (torch.zeros(images, queries, 2, heads, n, dtype=dtype) for n in (width, patches))
        Fused().backward(x, zg, lse, lse.view(images, queries, heads, 1), weights, no_tiles)


def nvidia_spills(cubin: bytes) -> int:
    """Bytes of stack and local memory per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump: unexpected output: {usage}")
    return int(found[1]) + int(found[2])


def amd_spills(text: str) -> int:
    """Spilled vector registers plus bytes of scratch memory; scalar registers spill to vector ones, not to memory."""
    found = [re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_spill_count", "private_segment_fixed_size")]
    if None in found:
        raise ValueError("no spill counts in the AMD assembly")
    return sum(int(match[1]) for match in found if match)


def describe(kernel: Any) -> dict[str, Any]:
    amd = "amdgcn" in kernel.asm
    text = kernel.asm["amdgcn" if amd else "ptx"]
    return {
        "kernel": kernel.metadata.name,
        "spilled": amd_spills(text) if amd else nvidia_spills(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "tma": "cp.async.bulk.tensor" in text,
        "wgmma": "wgmma.mma_async" in text,
        "mma": "mma.sync" in text,
        "mfma": "v_mfma" in text,
    }


def key() -> str:
    """The hash of everything that the verdicts depend on."""
    parts = [triton.__version__.encode(), *((ROOT / source).read_bytes() for source in SOURCES)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def verdicts(architecture: str, dtype: str) -> list[dict[str, Any]]:
    """The description of each kernel's machine code, from the record if it is valid, else by compiling in a process."""
    kept = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
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


def main(architecture: str, dtype: str = "") -> None:
    if architecture == "--update":
        return update()
    compiled = compile_launches(architecture)
    launch_similarity(getattr(torch, dtype))
    launch_attention_pool(getattr(torch, dtype))
    for kernel in {id(kernel): kernel for kernel in compiled}.values():
        print(json.dumps(describe(kernel)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
