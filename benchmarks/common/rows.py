"""Measurements and their provenance, and the CSV files whose rows they become."""

import csv
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from betaclip.env import report

OK, OUT_OF_MEMORY, SKIPPED = "ok", "out of memory", "skipped"
FORWARD, BOTH = "forward", "forward+backward"
PHASES = (BOTH, FORWARD)
Row = dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """``form`` and ``implementation`` name the code, ``phase`` is one of ``PHASES``. A result that is None was not
    measured, and ``note`` says why.

    sizes: the columns that say how large the operation is, of each benchmark its own.
    status: ok, out of memory, skipped, or "unavailable: " or "failed: " with the reason.
    foreign_cores: how many cores other processes kept busy meanwhile; CPU times mean little unless it is near 0.
    values: errors and whatever else this benchmark reports.
    """

    form: str
    dtype: str
    implementation: str = ""
    phase: str = ""
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    status: str = OK
    time_ms_p20: float | None = None
    time_ms_p50: float | None = None
    time_ms_p80: float | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    mm_tflops: float | None = None
    share_of_mm: float | None = None
    foreign_cores: float | None = None
    note: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def timed(self, times_ms: list[float], flop: float, mm_tflops: float | None) -> "Measurement":
        """This measurement with the percentiles of ``times_ms`` and their share of the matrix product's rate."""
        p20, p50, p80 = percentiles(times_ms)
        times: dict[str, Any] = {"time_ms_p20": p20, "time_ms_p50": p50, "time_ms_p80": p80, "rounds": len(times_ms)}
        share = flop / (p50 * 1e9) / mm_tflops if mm_tflops else None
        return replace(self, **times, mm_tflops=mm_tflops, share_of_mm=share)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, interpolated."""
    points = torch.tensor((0.2, 0.5, 0.8), dtype=torch.float64)
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return p20, p50, p80


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", cpu.read_text() if cpu.exists() else "", re.MULTILINE)
    model = named[1] if named else platform.processor() or platform.machine()
    return f"CPU {torch.get_num_threads()}x {re.sub(r'[(](R|TM)[)]', '', model)}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def provenance(benchmark: str, device: str, argv: list[str], folder: str = "benchmarks") -> Row:
    """The columns that say where a row comes from: the benchmark, the device, versions, commit, date, and the command
    as typed, without this machine's folders; the program lies in ``folder``."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        try:
            return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    versions = report()["versions"]
    typed = (Path(x).name if Path(x).is_absolute() else x for x in argv)
    changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return {
        "benchmark": benchmark,
        "device": device,
        **{name: versions[name] for name in ("torch", "triton", "betaclip")},
        "commit": (git("rev-parse", "--short", "HEAD") or "none") + ("+changes" if changed else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"{folder}/{benchmark}.py", *typed]),
    }


def as_row(measurement: Measurement, source: Row) -> Row:
    """One CSV row: the measurement, and where it comes from."""
    cells: dict[str, Any] = {}
    for x in fields(measurement):
        value = getattr(measurement, x.name)
        cells |= value if isinstance(value, Mapping) else {x.name: value}
    return {name: _cell(value) for name, value in {**cells, **source}.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def append_rows(path: Path, rows: list[Row]) -> None:
    """Append to a CSV file, which is rewritten if the rows bring new columns."""
    old = read_rows(path) if path.exists() else []
    names = list(dict.fromkeys(name for row in [*old[:1], *rows] for name in row))
    fresh = not old or list(old[0]) != names
    os.makedirs(path.parent, exist_ok=True)
    with path.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()
            writer.writerows(old)
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
