"""A report for bug reports: versions, devices, settings, and which tensors each backend of each operation can serve.

``betaclip env`` and ``python -m betaclip.env`` print it; :func:`report` returns it.
"""

import importlib
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import betaclip
from betaclip.errors import closed_pipe_ends_output
from betaclip.kernels import libbetaclip as cuda
from betaclip.kernels.attention_pool import operators as attention_pool
from betaclip.kernels.backends import NotSupportedReasons, resolve
from betaclip.kernels.similarity import operators as similarity

OPERATIONS: dict[str, Mapping[str, NotSupportedReasons]] = {
    "similarity_logsumexp": similarity.BACKENDS,
    "similarity_softplus": similarity.BACKENDS,
    "attention_pool": attention_pool.BACKENDS,
}
VARIABLES = ("BETACLIP_BACKEND", "TRITON_INTERPRET")
_PROBE_SHAPE = (36, 512)
_PROBE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def report() -> dict[str, Any]:
    """Versions, devices, environment variables (None: unset) and backends, as plain data.

    ``["operations"][operation]`` is a list with one entry per device and dtype: ``{"device", "dtype",
    "auto": the backend that "auto" takes or why there is none, "backends": {name: reasons why not}}``. For
    attention_pool, whose "auto" also depends on sizes, "auto" is the backend for few queries.
    """
    return {
        "versions": {
            "betaclip": betaclip.__version__,
            "python": platform.python_version(),
            "torch": _version("torch"),
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "cuda": torch.version.cuda or "none",
            "libbetaclip": cuda.status(),
            "platform": platform.platform(),
        },
        "devices": _devices(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "operations": {
            operation: [_probe(operation, table, probe) for probe in _probes()]
            for operation, table in OPERATIONS.items()
        },
    }


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError as error:
        return f"none ({error})"


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _probes() -> Iterator[Tensor]:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in _PROBE_DTYPES:
            yield torch.zeros(_PROBE_SHAPE, dtype=dtype, device=device)


def _probe(operation: str, table: Mapping[str, NotSupportedReasons], probe: Tensor) -> dict[str, Any]:
    try:
        auto = resolve(operation, "auto", table, probe, probe)
    except (NotImplementedError, ValueError) as error:  # an invalid BETACLIP_BACKEND belongs in the report
        auto = f"none ({' '.join(str(error).split())})"
    return {
        "device": probe.device.type,
        "dtype": str(probe.dtype).removeprefix("torch."),
        "auto": auto,
        "backends": {name: not_supported_reasons(probe, probe) for name, not_supported_reasons in table.items()},
    }


def main() -> None:
    """Print the report."""
    with closed_pipe_ends_output():
        _print(report())


def _print(data: dict[str, Any]) -> None:
    for section in ("versions", "devices", "environment"):
        print(section)
        for name, value in data[section].items():
            print(f"  {name:<18}{'unset' if value is None else value}")
    for operation, probes in data["operations"].items():
        print(operation)
        for probe in probes:
            print(f"  {probe['device']} {probe['dtype']}: auto takes {probe['auto']}")
            for name, reasons in probe["backends"].items():
                print(f"    {name:<16}{'; '.join(reasons) or 'available'}")


if __name__ == "__main__":
    main()
