"""Print, as JSON, what a bring-up of a GPU depends on: the device, versions, the peers that are there, the backends.

python tools/gpu_facts.py
"""

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from betaclip.env import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common.rows import device_name, provenance, slug

PEERS = ("open_clip_torch", "siglip-kernel", "inf_cl", "liger-kernel", "quack-kernels", "xformers")
NEEDED = ("matplotlib", "pytest")


def facts() -> dict[str, Any]:
    """``backends``: for each backend of the losses, the reasons why it cannot serve bfloat16 on the GPU."""
    environment = report()
    name = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        **provenance("gpu", slug(name), [], "tools"),
        "name": name,
        "devices": environment["devices"],
        "versions": environment["versions"],
        "packages": {package: installed(package) for package in (*PEERS, *NEEDED)},
        "sanitizer": shutil.which("compute-sanitizer") or "",
        "backends": backends(environment),
    }


def installed(package: str) -> str:
    """The version of a package, empty if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def backends(environment: dict[str, Any]) -> dict[str, list[str]]:
    for probe in environment["operations"]["similarity_logsumexp"]:
        if probe["device"].startswith("cuda") and probe["dtype"] == "bfloat16":
            return {name: list(reasons) for name, reasons in probe["backends"].items()}
    return {name: ["there is no GPU"] for name in ("triton", "cuda")}


if __name__ == "__main__":
    print(json.dumps(facts()))
