"""Every entry of the tile tables, launched and compiled without a GPU: no spills, and the matrix units in use."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from support.paths import ROOT

from betaclip.kernels.attention_pool import tiles as attention_pool_tiles
from betaclip.kernels.similarity import tiles as similarity_tiles
from betaclip.kernels.similarity.tiles import rectangles

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_UNIT = {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}
ENTRIES = list(similarity_tiles.TILES)
DTYPES = {2: ["bfloat16", "float16"], 4: ["float32"]}
KERNELS = {
    "_similarity_logsumexp_fwd_kernel",
    "_similarity_logsumexp_merge_kernel",
    "_similarity_logsumexp_bwd_kernel",
    "_similarity_softplus_kernel",
    "_attention_pool_fwd_kernel",
    "_attention_pool_bwd_kernel",
}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("architecture, dtype", [(name, dtype) for name, size in ENTRIES for dtype in DTYPES[size]])
def test_launches_compile_without_spills(architecture, dtype, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools" / "aot.py", architecture, dtype],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    counts = Counter(kernel["kernel"] for kernel in kernels)
    assert counts.keys() == KERNELS and min(counts.values()) >= 5, counts
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_BYTES[architecture], kernel
        assert kernel[MATRIX_UNIT[architecture]], kernel
    # Aligned rows come through the tensor memory accelerator on sm_90, and only there; patches by plain loads.
    assert {kernel["kernel"].split("_")[1] for kernel in kernels if kernel["tma"]} == (
        {"similarity"} if architecture == "sm_90" else set()
    )


def test_every_table_has_every_entry():
    tables = (similarity_tiles.TILES, attention_pool_tiles.FORWARD, attention_pool_tiles.BACKWARD)
    assert all(list(table) == ENTRIES for table in tables)


@pytest.mark.parametrize(
    "row_tiles, col_tiles, programs", [(1, 1, 132), (18, 18, 132), (5, 700, 132), (4608, 4608, 264)]
)
def test_rectangles_cover_the_matrix(row_tiles, col_tiles, programs):
    strips, ranges = rectangles(row_tiles, col_tiles, programs)
    assert strips * ranges <= programs
    height, width = -(-row_tiles // strips), -(-col_tiles // ranges)
    assert height * strips >= row_tiles and width * ranges >= col_tiles
    # No program has much more than its share.
    assert height * width <= 1.35 * max(1, row_tiles * col_tiles / programs) + 1
