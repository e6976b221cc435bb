"""The decision to build the CUDA library, and the build itself, with a stand-in for nvcc, in seconds."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from support.nvcc import commands, write_cutlass, write_nvcc
from support.paths import ROOT
from support.programs import load_program

needs_ninja = pytest.mark.skipif(not shutil.which("ninja"), reason="ninja is not installed")


@pytest.fixture
def build(tmp_path, monkeypatch) -> ModuleType:
    """csrc/build_library.py over a folder with two sources, on a machine without nvcc."""
    module = load_program(ROOT / "csrc" / "build_library.py")
    sources = tmp_path / "a folder" / "csrc"
    sources.mkdir(parents=True)
    for name in ("first.cu", "second.cu"):
        (sources / name).touch()
    monkeypatch.setattr(module, "CSRC", sources)
    monkeypatch.setattr(module, "BUILD", tmp_path / "a folder" / "build")
    for variable in (module.VARIABLE, "CUDA_HOME", "CUTLASS_PATH", "MAX_JOBS"):
        monkeypatch.delenv(variable, raising=False)
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
    tools = tmp_path / "tools"  # those of the folders that were left out
    tools.mkdir()
    for name in ("ninja", "sh", "sed"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tools), *path]))
    return module


@pytest.fixture
def nvcc(build, tmp_path, monkeypatch) -> Path:
    """Put a stand-in for nvcc on PATH, and make headers of CUTLASS."""
    compiler = write_nvcc(tmp_path / "cuda" / "bin")
    monkeypatch.setenv("PATH", f"{compiler.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUTLASS_PATH", str(write_cutlass(tmp_path / "a folder" / "cutlass")))
    return compiler


@pytest.mark.parametrize("value", ["yes", "True", "", "2", "AUTO"])
def test_variable_takes_three_values(build, monkeypatch, value):
    monkeypatch.setenv("BETACLIP_BUILD_CUDA", value)
    with pytest.raises(RuntimeError, match=f"BETACLIP_BUILD_CUDA: expected auto, 0 or 1, got '{value}'"):
        build.requirements()


def test_without_a_compiler(build, tmp_path, monkeypatch, capsys):
    """There is a one-line reason, a record, no requirement and no earlier library; demanding one is an error."""
    (tmp_path / build.LIBRARY).touch()
    build.install(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "betaclip: installing without the CUDA library: no nvcc on PATH, and no CUDA_HOME"
    ]
    assert json.loads((tmp_path / build.RECORD).read_text()) == {"missing": "no nvcc on PATH, and no CUDA_HOME"}
    assert not (tmp_path / build.LIBRARY).exists()
    assert build.requirements() == []
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert build.reason_not_to_build() == f"no nvcc on PATH nor in CUDA_HOME={tmp_path / 'nowhere'}"
    monkeypatch.setenv("BETACLIP_BUILD_CUDA", "1")
    with pytest.raises(RuntimeError, match="BETACLIP_BUILD_CUDA=1, but no nvcc on PATH nor in CUDA_HOME="):
        build.install(tmp_path)


def test_variable_leaves_the_library_out(build, nvcc, tmp_path, monkeypatch):
    assert build.reason_not_to_build() is None
    monkeypatch.setenv("BETACLIP_BUILD_CUDA", "0")
    build.install(tmp_path)
    assert json.loads((tmp_path / build.RECORD).read_text()) == {"missing": "left out by BETACLIP_BUILD_CUDA=0"}
    assert commands(nvcc) == [] and build.requirements() == []


def test_compiler_of_cuda_home_comes_first(build, nvcc, tmp_path, monkeypatch):
    old = write_nvcc(tmp_path / "old" / "bin", version="11.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    assert build.reason_not_to_build() == f"{old} of CUDA 11 cannot compile for sm_90a: needs 12"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # has no bin/nvcc
    assert build.reason_not_to_build() is None


def test_requirements(build, nvcc, monkeypatch):
    """Always ninja, since builds by different versions of it compile everything anew; pip, to fetch headers."""
    assert build.requirements() == ["ninja"]
    for unset in (lambda: monkeypatch.delenv("CUTLASS_PATH"), lambda: monkeypatch.setenv("CUTLASS_PATH", "")):
        unset()
        assert build.requirements() == ["ninja", "pip"]


@needs_ninja
def test_builds_what_changed(build, nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "1")
    build.install(tmp_path)
    assert (tmp_path / build.LIBRARY).read_text() == "built\n"
    record = json.loads((tmp_path / build.RECORD).read_text())
    assert record == {"architectures": ["sm_90a"], "nvcc": "13.0.88", "cutlass": "4.2.1"}
    first, second, link = commands(nvcc)
    for command, name in ((first, "first"), (second, "second")):
        assert f"|-c|{build.CSRC / name}.cu|-o|{name}.o|" in command
        assert f"|-isystem|{tmp_path}/a folder/cutlass/include|" in command
        assert "-gencode=arch=compute_90a,code=sm_90a|" in command
    assert "|-shared|first.o|second.o|" in link and "|-cudart|static|" in link
    build.install(tmp_path)
    assert commands(nvcc) == []
    (build.CSRC / "second.cu").touch()
    build.install(tmp_path)
    assert len(commands(nvcc)) == 2
    write_nvcc(nvcc.parent, version="13.1")
    build.install(tmp_path)
    assert len(commands(nvcc)) == 3
    (build.CSRC / "third.cu").touch()
    build.install(tmp_path)
    assert len(commands(nvcc)) == 2


@needs_ninja
def test_sources_that_do_not_compile(build, nvcc):
    nvcc.write_text(nvcc.read_text() + "exit 1\n")
    with pytest.raises(RuntimeError, match=r"does not compile \(BETACLIP_BUILD_CUDA=0 installs without it"):
        build.build()


def test_headers_that_are_none(build, nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=f"CUTLASS_PATH={tmp_path}: no include/cutlass/version.h below it"):
        build.build()


def test_headers_come_from_the_pinned_wheel_and_no_other(build, nvcc, tmp_path, monkeypatch):
    """A wheel of the right name with one byte changed is refused."""
    wheel = tmp_path / "index" / "nvidia_cutlass-4.2.0.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as contents:
        for folder in build.CUTLASS_FOLDERS:
            contents.writestr(f"cutlass_library/source/{folder}/cutlass/version.h", "#define CUTLASS_MAJOR 4\n")
        contents.writestr("cutlass_library/source/examples/large.cu", "")
        information = "nvidia_cutlass-4.2.0.0.dist-info"
        contents.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: nvidia-cutlass\nVersion: 4.2.0.0\n")
        contents.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.delenv("CUTLASS_PATH")
    build.BUILD.mkdir()
    with pytest.raises(
        RuntimeError, match=r"nvidia-cutlass==4\.2\.0\.0 could not be fetched(?s:.*)DO NOT MATCH THE HASHES"
    ):
        build.cutlass_includes()
    assert not list(build.BUILD.iterdir())
    monkeypatch.setattr(build, "CUTLASS_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    for _ in range(2):  # the second time without fetching
        includes = build.cutlass_includes()
        assert all((folder / "cutlass" / "version.h").is_file() for folder in includes)
        assert not (build.BUILD / "nvidia-cutlass-4.2.0.0" / "examples").exists()
        wheel.unlink(missing_ok=True)
    assert build.requirements() == ["ninja"]
