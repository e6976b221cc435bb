"""The program for compute-sanitizer runs every kernel, and says what is missing."""

import subprocess
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = subprocess.run([sys.executable, SANITIZE], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "no GPU: torch.cuda.is_available() is False\n"
