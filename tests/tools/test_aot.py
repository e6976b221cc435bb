"""Every entry of the tile tables, launched and compiled without a GPU: how much spills, and the matrix units in use."""

import json
from collections import Counter

import pytest
from support.paths import ROOT
from support.programs import load_program

pytest.importorskip("triton")
aot = load_program(ROOT / "tools" / "aot.py")

SHARED_BYTES = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB
MATRIX_UNIT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma"}
KERNELS = {
    "_similarity_logsumexp_fwd_kernel",
    "_similarity_logsumexp_merge_kernel",
    "_similarity_logsumexp_bwd_kernel",
    "_similarity_softplus_kernel",
    "_attention_pool_fwd_kernel",
    "_attention_pool_bwd_kernel",
    "_attention_pool_products_kernel",
}
WITHIN_IMAGES = {"_similarity_cosines_kernel", "_similarity_received_kernel"}
# Bytes of registers that may spill. On an H200 the tile of sm_90 in 16 bits is 12 to 25 % faster than the fastest that
# does not spill. The others are a few bytes of one kernel each.
SPILLS = {("sm_90", "bfloat16"): 696, ("sm_90", "float16"): 696, ("sm_100", "bfloat16"): 24, ("sm_100", "float16"): 24}
SPILLS |= {("sm_80", "bfloat16"): 8, ("sm_80", "float32"): 8}


@pytest.mark.slow
@pytest.mark.parametrize("architecture, dtype", aot.TARGETS)
def test_launches_compile_and_spill_no_more_than_allowed(architecture, dtype):
    """The verdicts are those recorded if neither kernels nor Triton have changed since, else they are compiled."""
    kernels = aot.verdicts(architecture, dtype)
    counts = Counter(kernel["kernel"] for kernel in kernels)
    assert counts.keys() == KERNELS | WITHIN_IMAGES and min(counts.values()) >= 3, counts
    for kernel in kernels:
        assert kernel["spilled"] <= SPILLS.get((architecture, dtype), 0), kernel
        assert kernel["shared"] <= SHARED_BYTES[architecture] * 1024, kernel
        within_images = kernel["kernel"] in WITHIN_IMAGES  # whose tiles are too small for warpgroups
        assert kernel["mma"] or kernel["mfma"] if within_images else kernel[MATRIX_UNIT[architecture]], kernel
        assert not kernel["swaps"], kernel
    # Aligned rows come through the tensor memory accelerator from sm_90 on; patches by plain loads.
    assert {kernel["kernel"].split("_")[1] for kernel in kernels if kernel["tma"]} == (
        {"similarity"} if architecture in ("sm_90", "sm_100", "sm_120") else set()
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", dict(aot.TARGETS))
def test_kernels_are_no_worse_than_the_report(architecture):
    """5 % more instructions per tile or narrower stores are accepted by python tools/aot.py --report alone."""
    assert aot.regressions(architecture) == []
    writes_ds = [
        row
        for row in aot.report_rows(architecture)
        if row["kernel"] == "_similarity_logsumexp_bwd_kernel" or "has_gradient" in row["launch"]
    ]
    assert len(writes_ds) >= 20
    assert min(row["store_bytes"] for row in writes_ds) >= (16 if architecture.startswith("sm_") else 8)


@pytest.fixture
def accepted(tmp_path, monkeypatch):
    """A function that changes a kernel's description after its report was written."""
    kernel = {
        **{"kernel": "_kernel", "launch": "D=64", "registers": 200, "shared": 1024, "spilled": 0, "store_bytes": 16},
        **{"instructions": {"matrix": 100, "other": 100}, "least": 150, "matrix_share": 0.5},
    }
    kernels = [kernel]
    monkeypatch.setattr(aot, "RESULTS", tmp_path)
    monkeypatch.setattr(aot, "TARGETS", [("sm_90", "bfloat16")])
    monkeypatch.setattr(aot, "verdicts", lambda architecture, dtype: kernels)
    aot.report()

    def change(**values):
        kernels[:] = [kernel | values]
        return aot.regressions("sm_90")

    return change


def test_the_report_accepts_what_it_was_written_from(accepted):
    assert accepted() == []
    assert accepted(registers=255, store_bytes=32, instructions={"matrix": 100, "other": 110}) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"instructions": {"matrix": 100, "other": 111}}, "211 instructions per tile, accepted were 200"),
        ({"least": 158}, "158 instructions in most tiles, accepted were 150"),
        ({"store_bytes": 2}, "stores 2 bytes at a time, accepted were 16"),
        ({"launch": "D=128"}, "D=128: not in the report"),
        ({"launch": "D=128"}, "D=64: in the report, but not compiled"),
    ],
)
def test_a_kernel_worse_than_the_report_is_named(change, message, accepted):
    found = accepted(**change)
    assert any(message in line for line in found), found
    aot.report()
    assert aot.regressions("sm_90") == []


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


def test_an_older_triton_compiles_and_the_recorded_one_need_not(tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(aot, "VERDICTS", tmp_path / "verdicts.json")
    monkeypatch.setattr(aot, "verdicts", lambda *target: compiled.append(target) or ["a kernel"])
    aot.VERDICTS.write_text(json.dumps({"key": "of other kernels", "triton": aot.triton.__version__}))
    aot.main("--older")
    assert not compiled and "the record is of this version" in capsys.readouterr().out
    monkeypatch.setattr(aot.triton, "__version__", "3.5.0")
    aot.main("--older")
    assert sorted(compiled) == [
        ("sm_80", "bfloat16"), ("sm_80", "float32"), ("sm_90", "bfloat16"), ("sm_90", "float32")
    ]  # fmt: skip
    assert "Triton 3.5.0, sm_80 bfloat16: 1 kernels compile" in capsys.readouterr().out


def test_a_kernel_that_an_older_triton_does_not_compile_is_an_error(tmp_path, monkeypatch):
    failed = aot.subprocess.CompletedProcess([], 1, "", "CompilationError: at 7:4")
    monkeypatch.setattr(aot, "VERDICTS", tmp_path / "verdicts.json")
    monkeypatch.setattr(aot.subprocess, "run", lambda *args, **options: failed)
    monkeypatch.setattr(aot.triton, "__version__", "3.5.0")
    with pytest.raises(RuntimeError, match="sm_80 bfloat16: CompilationError"):
        aot.main("--older")


def test_the_key_follows_kernels_and_triton(monkeypatch):
    key = aot.key()
    monkeypatch.setattr(aot.triton, "__version__", "0")
    assert aot.key() != key
    assert {
        f"kernels/{name}/{file}.py" for name in ("similarity", "attention_pool") for file in ("tiles", "triton_kernels")
    } <= set(aot.SOURCES)
