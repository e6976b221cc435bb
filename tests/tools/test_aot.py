"""Every entry of the tile tables, launched and compiled without a GPU: no spills, and the matrix units in use."""

import json
from collections import Counter

import pytest
from support.paths import ROOT
from support.programs import load_program

pytest.importorskip("triton")
aot = load_program(ROOT / "tools" / "aot.py")

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_UNIT = {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}
KERNELS = {
    "_similarity_logsumexp_fwd_kernel",
    "_similarity_logsumexp_merge_kernel",
    "_similarity_logsumexp_bwd_kernel",
    "_similarity_softplus_kernel",
    "_attention_pool_fwd_kernel",
    "_attention_pool_bwd_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture, dtype", aot.TARGETS)
def test_launches_compile_without_spills(architecture, dtype):
    """The verdicts are those recorded if neither kernels nor Triton have changed since, else they are compiled."""
    kernels = aot.verdicts(architecture, dtype)
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


def test_stale_and_missing_verdicts_are_compiled_anew(tmp_path, monkeypatch):
    class Compiled(Exception):
        pass

    def compiling(*args, **options):
        raise Compiled

    monkeypatch.setattr(aot, "VERDICTS", tmp_path / "verdicts.json")
    monkeypatch.setattr(aot.subprocess, "run", compiling)
    record = {"key": aot.key(), "targets": {"sm_90 float32": [{"kernel": "kept"}]}}
    aot.VERDICTS.write_text(json.dumps(record))
    assert aot.verdicts("sm_90", "float32") == [{"kernel": "kept"}]
    with pytest.raises(KeyError):  # a target that was not recorded
        aot.verdicts("sm_80", "float32")
    aot.VERDICTS.write_text(json.dumps(record | {"key": "of other kernels"}))
    with pytest.raises(Compiled):
        aot.verdicts("sm_90", "float32")
    aot.VERDICTS.unlink()
    with pytest.raises(Compiled):
        aot.verdicts("sm_90", "float32")


def test_the_key_follows_kernels_and_triton(monkeypatch):
    key = aot.key()
    monkeypatch.setattr(aot.triton, "__version__", "0")
    assert aot.key() != key
    assert {
        f"kernels/{name}/{file}.py" for name in ("similarity", "attention_pool") for file in ("tiles", "triton_kernels")
    } <= set(aot.SOURCES)
