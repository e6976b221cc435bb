"""Every kernel configuration of the tile table, compiled without a GPU: no spills, and the matrix units in use."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from betaclip.kernels.similarity_tiles import TILES

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_UNIT = {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}
FORWARD, MERGE = "_similarity_logsumexp_fwd_kernel", "_similarity_logsumexp_merge_kernel"
BACKWARD, SOFTPLUS = "_similarity_logsumexp_bwd_kernel", "_similarity_softplus_kernel"


def cases(architecture: str, itemsize: int) -> list[dict]:
    """Each kernel with every flag, and the fullest form also in the other dtype, at the depths' ends, and ragged."""
    kernels = [(name, {"HAS_GROUP": group}) for name in (FORWARD, MERGE, BACKWARD) for group in (True, False)]
    kernels += [
        (SOFTPLUS, {"HAS_GROUP": group, "HAS_BIAS": bias, "HAS_GRADIENT": gradient})
        for group, bias, gradient in ((True, True, True), (True, False, True), (True, True, False), (False, True, True))
    ]
    dtypes = ["bfloat16", "float16"] if itemsize == 2 else ["float32"]
    todo = []
    for name, flags in kernels:
        variants = [(512, True, dtypes[0])]
        if all(flags.values()):
            variants += [(512, True, dtype) for dtype in dtypes[1:]]
            variants += [(depth, True, dtypes[0]) for depth in (64, 1024)] + [(96, False, dtypes[0])]
        todo += [
            {"kernel": name, "architecture": architecture, "dtype": dtype, "depth": depth, "tma": tma, "flags": flags}
            for depth, tma, dtype in variants
        ]
    return todo


@pytest.mark.parametrize("architecture, itemsize", TILES)
def test_compiles_without_spills(architecture, itemsize, tmp_path):
    todo = cases(architecture, itemsize)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).parent / "aot.py"],
        input=json.dumps(todo),
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == len(todo)
    for case, result in zip(todo, results, strict=True):
        assert result["spilled"] == 0, (case, result)
        assert result["shared"] <= SHARED_BYTES[architecture], (case, result)
        assert result[MATRIX_UNIT[architecture]], (case, result)
