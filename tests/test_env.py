"""The report of ``python -m betaclip.env`` is complete and true, and does not fail itself."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import betaclip
from betaclip import env, kernels
from betaclip.kernels import libbetaclip as cuda
from betaclip.kernels.backends import NAMES, resolve


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("BETACLIP_BACKEND", raising=False)


def test_versions_and_devices():
    report = env.report()
    assert report["versions"]["betaclip"] == betaclip.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["devices"]) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    assert report["versions"]["libbetaclip"] == cuda.status()
    assert report["environment"]["BETACLIP_BACKEND"] is None


@pytest.mark.parametrize("operation", env.OPERATIONS)
def test_backends_are_those_of_the_operation(operation):
    table, probes = env.OPERATIONS[operation], env.report()["operations"][operation]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    dtypes = ["float32", "bfloat16", "float64"]
    assert [(p["device"], p["dtype"]) for p in probes] == [(device, dtype) for device in devices for dtype in dtypes]
    for probe in probes:
        x = torch.zeros(36, 512, dtype=getattr(torch, probe["dtype"]), device=probe["device"])
        assert probe["backends"] == {name: why_not(x, x) for name, why_not in table.items()}
        assert probe["auto"] == resolve(operation, "auto", table, x, x)


def test_every_table_of_backends_is_reported():
    modules = [module.name for module in pkgutil.walk_packages(kernels.__path__, "betaclip.kernels.")]
    # Triton's own modules have no table, and cannot be imported where Triton is missing.
    imported = [importlib.import_module(name) for name in modules if "triton" not in name]
    tables = [module.BACKENDS for module in imported if hasattr(module, "BACKENDS")]
    assert tables and all(any(table is reported for reported in env.OPERATIONS.values()) for table in tables)


def test_every_name_of_a_backend_is_known():
    """BETACLIP_BACKEND accepts a name if any operation has it."""
    assert set(NAMES) == {name for table in env.OPERATIONS.values() for name in table}


def test_prints_each_backend_with_its_reasons(monkeypatch, capsys):
    table = {"first": lambda x, y: ["too blue", "too large"], "second": lambda x, y: []}
    monkeypatch.setattr(env, "OPERATIONS", {"operation": table})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["TRITON_INTERPRET", "1"] in lines
    assert ["BETACLIP_BACKEND", "unset"] in lines
    assert ["cpu", "bfloat16:", "auto", "takes", "second"] in lines
    assert ["first", "too", "blue;", "too", "large"] in lines
    assert ["second", "available"] in lines


def test_mistaken_backend_is_reported_not_raised(monkeypatch):
    monkeypatch.setenv("BETACLIP_BACKEND", "cublas")
    report = env.report()
    assert report["environment"]["BETACLIP_BACKEND"] == "cublas"
    for probes in report["operations"].values():
        assert all("got 'cublas'" in probe["auto"] for probe in probes)


def test_runs_without_triton():
    program = "import sys, runpy; sys.modules['triton'] = None; runpy.run_module('betaclip.env', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton            none (" in done.stdout
    assert "blockwise       available" in done.stdout
