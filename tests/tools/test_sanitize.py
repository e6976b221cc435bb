"""The program for compute-sanitizer runs every kernel, and says what is missing."""

import sys

import pytest
import torch
from support.paths import ROOT
from support.programs import load_program

SANITIZE = ROOT / "tools" / "sanitize.py"


def test_runs_every_kernel_of_the_library(cuda_on_cpu, monkeypatch):
    """Against the stand-in library, whose calls are counted."""
    from betaclip.kernels import libbetaclip

    called = set()

    class Counted:
        def __getattr__(self, name):
            called.add(name)
            return getattr(cuda_on_cpu, name)

    monkeypatch.setattr(libbetaclip, "_library", Counted())
    assert load_program(SANITIZE).run_kernels("cpu", [(1, 1, 8), (60, 70, 16)]) == 16
    operations = ("logsumexp_forward", "logsumexp_ds", "softplus_forward", "softplus_ds")
    assert called >= {f"betaclip_{name}" for name in operations}


def test_runs_the_kernels_of_triton(monkeypatch):
    kernels = pytest.importorskip("betaclip.kernels.similarity.triton_kernels", reason="Triton is not installed")
    called = set()
    for name in ("similarity_logsumexp_fwd", "similarity_logsumexp_bwd", "similarity_softplus_fwd_bwd"):
        run = getattr(kernels.Triton, name)
        monkeypatch.setattr(kernels.Triton, name, lambda *given, name=name, run=run: (called.add(name), run(*given))[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_program(SANITIZE).run_kernels(device, [(1, 1, 8)], "triton") == 8 and len(called) == 3


def test_shapes_of_each_backend(monkeypatch):
    program, seen = load_program(SANITIZE), set()

    def lse(x, y, scale, *ids, backend):
        seen.add((backend, len(x), len(y), x.shape[1]))
        return x.sum(1), y.sum(1)

    monkeypatch.setattr(program, "similarity_logsumexp", lse)
    monkeypatch.setattr(program, "similarity_softplus", lambda x, y, scale, *rest, backend: x.sum())
    assert [program.run_kernels("cpu", backend=backend) for backend in ("cuda", "triton")] == [32, 16]
    assert {x[0] for x in seen} == {"cuda", "triton"} and ("cuda", 513, 200, 1024) in seen and len(seen) == 6


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_command(monkeypatch, backend):
    program, started = load_program(SANITIZE), []
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(program.subprocess, "run", lambda command, **options: started.append(command))
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--tools", "racecheck", "--backend", backend])
    program.main()
    (command,) = started
    assert command[:3] == ["/usr/bin/compute-sanitizer", "--tool", "racecheck"]
    assert command[-3:] == ["--inside", "--backend", backend]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    with pytest.raises(SystemExit, match=r"^no GPU: torch.cuda.is_available\(\) is False$"):
        load_program(SANITIZE).main()
