"""Run the Triton launchers without a GPU, compiling for one, and report what the machine code says.

    python tests/aot.py sm_90 bfloat16

Run as a program of its own, since the kernels must be compiled ones and not the interpreter's. The launchers do
all that they would do on a GPU, except that a kernel is compiled and not started; each compiled kernel is one
line of JSON. What they return is meaningless.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from betaclip.kernels import architecture as triton_support
from betaclip.kernels.attention_pool.folded import Patches
from betaclip.kernels.attention_pool.triton_backend import Fused
from betaclip.kernels.similarity import triton_backend as similarity_triton
from betaclip.kernels.similarity.operand import Operand

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnly:
    """A Triton driver that knows its target and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_launches(architecture: str) -> list[Any]:
    """Point launchers and compiler at ``architecture``; the list that every compiled kernel will be added to."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    driver.set_active(CompileOnly(target))
    triton_support.architecture = lambda device: architecture
    triton_support.processors = lambda device: 132
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    JITFunction.run = compile_only
    return compiled


def launch_similarity(dtype: torch.dtype) -> None:
    """The depths' ends and the usual one; one whose rows are not aligned for TMA; with and without groups and bias."""
    for depth, groups, bias in (
        (512, True, True),
        (512, False, False),
        (64, True, False),
        (1024, True, True),
        (100, True, True),
    ):
        _launch_similarity(dtype, depth, groups, bias)


def _launch_similarity(dtype: torch.dtype, depth: int, groups: bool, bias: bool) -> None:
    """Every launcher once, N and M no multiple of a tile."""
    n, m = 300, 200
    x_group, y_group = (torch.arange(rows, dtype=torch.int32) if groups else None for rows in (n, m))
    x = Operand(torch.zeros(n, depth, dtype=dtype), x_group, None, dtype)
    y = Operand(torch.zeros(m, depth, dtype=dtype), y_group, None, dtype)
    scale, b, of_x, of_y = torch.tensor(10.0), torch.tensor(-1.0) if bias else None, torch.zeros(n), torch.zeros(m)
    similarity_triton.similarity_logsumexp_fwd(x, y, scale)
    similarity_triton.similarity_logsumexp_bwd(x, y, scale, of_x, of_y, of_x, of_y, True, True)
    similarity_triton.similarity_softplus_fwd(x, y, scale, b)
    similarity_triton.similarity_softplus_fwd_bwd(x, y, scale, b, of_x, True, True)


def launch_attention_pool(dtype: torch.dtype) -> None:
    """Both kernels at aligned and odd widths and numbers of patches, in one block and in several, masked and not."""
    for width, heads, patches, masked, least in (
        (64, 8, 196, False, 1e-12),
        (96, 4, 577, True, None),
        (512, 8, 196, False, 1e-12),
        (768, 12, 577, True, 1e-12),
        (1024, 16, 1024, True, 1e-12),
    ):
        images, texts = 2, 9
        # As in training: the patches are a view that leaves out the class token.
        rows = torch.zeros(images, patches + 1, width, dtype=dtype)[:, 1:]
        x = Patches(rows, torch.ones(images, patches, dtype=torch.bool) if masked else None, least)
        z, spare = torch.zeros(images, texts * heads, width, dtype=dtype), torch.empty(0)
        lse = Fused().forward(x, z, torch.empty_like(z), spare)
        zg, weights = (torch.zeros(images, texts, 2, heads, n, dtype=dtype) for n in (width, patches))
        Fused().backward(x, zg, lse, lse.view(images, texts, heads, 1), weights, spare)


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
    """Vector registers spilled and bytes of scratch memory; scalar registers spill to vector ones, not to memory."""
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


def main(architecture: str, dtype: str) -> None:
    compiled = compile_launches(architecture)
    launch_similarity(getattr(torch, dtype))
    launch_attention_pool(getattr(torch, dtype))
    for kernel in {id(kernel): kernel for kernel in compiled}.values():
        print(json.dumps(describe(kernel)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
