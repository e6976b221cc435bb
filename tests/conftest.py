"""Set up all tests: the number of processes, Triton's interpreter where there is no GPU, the ``gpu`` marker, a seed."""

import ctypes
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so set before any is imported
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are processes of their own, which import torch first
# The first backward decides on autograd's threads: after a compilation, which pretends that there is a GPU, it would
# start some, and processes that tests fork could not go backward.
torch.ones((), requires_grad=True).backward()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for programs that tests start
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores if a folder is named, since many tests wait for other processes; a single one, whose
    output is seen at once, for tests named by file or by function, and for all where they share a GPU."""
    folders = any(os.path.isdir(argument) for argument in config.args)
    return (os.cpu_count() or 1) + 1 if folders and not torch.cuda.is_available() else 0


def pytest_configure() -> None:
    if not torch.cuda.is_available() and find_spec("triton"):
        from support.interpreted_bfloat16 import mend
        from support.quick_interpreter import hasten

        mend()
        hasten()


def pytest_collection_finish() -> None:
    gc.freeze()  # benchmarks collect garbage before each measurement; this spares them a walk over every module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First what takes longest: at the end, one process would wait for the other, or set up the same fixture once more.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    """Let each test compile as a new process would: PyTorch compiles a function for 8 kinds of arguments at most."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Give PyTorch two threads where each process of the tests has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interpreter_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend "triton" refuse bfloat16 where it is interpreted, as it does for users."""
    from betaclip.kernels import architecture

    monkeypatch.setattr(architecture, "INTERPRETED_DTYPES", architecture.INTERPRETED_DTYPES - {torch.bfloat16})


@pytest.fixture(scope="session")
def stand_in_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The interface of csrc/betaclip.h, compiled for the CPU."""
    from betaclip.kernels import libbetaclip as cuda

    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler")
    tests, library = Path(__file__).parent, tmp_path_factory.mktemp("stand_in") / "libbetaclip.so"
    options = ["-std=c11", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{tests.parent / 'csrc'}"]
    subprocess.run([compiler, *options, tests / "csrc" / "betaclip_cpu.c", "-o", library, "-lm"], check=True)
    return cuda.load(library)


@pytest.fixture
def cuda_on_cpu(stand_in_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Let the backend "cuda" serve CPU tensors."""
    from betaclip.kernels import libbetaclip as cuda

    monkeypatch.setattr(cuda, "_library", stand_in_library)
    monkeypatch.setattr(cuda, "not_supported_reasons", lambda device: [])
    monkeypatch.setattr(cuda, "current", lambda device: nullcontext(0))
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 4)
    return stand_in_library


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> None:
    """Provide the backend "cuda": the real one on a GPU, elsewhere its binding over the stand-in library."""
    from betaclip.kernels import libbetaclip

    if not torch.cuda.is_available():
        request.getfixturevalue("cuda_on_cpu")
    elif reasons := libbetaclip.not_supported_reasons(torch.device("cuda")):
        pytest.skip("; ".join(reasons))


@pytest.fixture(autouse=True)
def _skip_missing_backend(request: pytest.FixtureRequest) -> None:
    """Skip a test whose backend can serve nothing on this machine, and give the backend's own reasons."""
    from betaclip.env import OPERATIONS

    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "cuda":
        request.getfixturevalue("cuda")
    probes = [torch.zeros(1, 8, dtype=dtype, device=device) for dtype in (torch.float32, torch.float16)]
    for table in OPERATIONS.values():
        if backend in table and (reasons := [table[backend](probe, probe) for probe in probes]) and all(reasons):
            pytest.skip(f"{backend}: {'; '.join(reasons[-1])}")
