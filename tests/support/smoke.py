"""Runs of the benchmarks' scripts, as a user starts them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT


def smoke_run(script: str, folder: Path) -> tuple[list[dict[str, str]], str]:
    """The rows that ``python benchmarks/<script> --smoke`` writes into a folder, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, ROOT / "benchmarks" / script, "--smoke", "--device", "cpu", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = folder.glob("*.csv")
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert not any(str(folder) in "".join(row.values()) for row in rows)
    return rows, done.stdout


def assert_timed(row: dict[str, str]) -> float:
    """The median in ms of a row that ran."""
    low, middle, high = (float(row[f"time_ms_{p}"]) for p in ("p20", "p50", "p80"))
    assert 0 < low <= middle <= high
    return middle


def assert_drawn(folder: Path) -> None:
    (figure,) = folder.glob("*.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"
