"""Ahead-of-time compilation of the Triton kernels without a GPU, and what their machine code says.

Run as a program, in a process of its own: the kernels must be compiled ones, not the interpreter's. Takes a JSON
list of cases on standard input and prints one JSON line per case.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from betaclip.kernels import similarity_triton_kernels
from betaclip.kernels.similarity_tiles import choose
from betaclip.kernels.similarity_triton import precision

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TRITON_NAME = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def compile_case(kernel: str, architecture: str, dtype: str, depth: int, tma: bool, flags: dict[str, bool]) -> dict:
    """Compile a kernel as a launch would; its spilled bytes, and whether it uses wgmma, mma or AMD's mfma."""
    function, element = getattr(similarity_triton_kernels, kernel), TRITON_NAME[dtype]
    tile = choose(architecture, 4 if dtype == "float32" else 2)
    tma = tma and tile.tma
    import torch

    constants = flags | {
        "D": depth,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "TMA": tma,
        "PRECISION": precision(architecture, getattr(torch, dtype)),
        "ACC": tl.float32,
        "LEAST": 1e-25,
    }
    signature, attributes, used = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], used[name] = "constexpr", constants[name]
        elif name in ("x", "y") and tma:
            rows = tile.block_m if name == "x" else tile.block_n
            signature[name] = f"tensordesc<{element}[{rows},{tile.block_d}]>"
        elif name in ("x", "y", "ds_ptr"):
            signature[name] = f"*{element}"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if "group" in name or name == "narrow_ptr" else "*fp32"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name.startswith("stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(ASTSource(function, signature, used, attributes), target=target, options=options)
    text = compiled.asm["amdgcn" if amd else "ptx"]
    return {
        "spilled": amd_spills(text) if amd else nvidia_spills(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in text,
        "mma": "mma.sync" in text,
        "mfma": "v_mfma" in text,
    }


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


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(compile_case(**case)), flush=True)
