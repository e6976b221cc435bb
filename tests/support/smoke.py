"""Runs of the benchmarks' scripts, as a user starts them. Those who import this put benchmarks/ on the path."""

import os
import subprocess
import sys
from pathlib import Path

import harness
from support.paths import ROOT


def smoke_run(script: str, folder: Path) -> tuple[list[dict[str, str]], str]:
    """The rows that ``python benchmarks/<script> --smoke`` writes into a folder, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, ROOT / "benchmarks" / script, "--smoke", "--device", "cpu", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = folder.glob("*.csv")
    rows = harness.read_rows(file)
    assert not any(str(folder) in "".join(row.values()) for row in rows)
    return rows, done.stdout


def assert_timed(row: dict[str, str]) -> float:
    """The median in ms of a row that ran."""
    low, middle, high = (float(row[f"time_ms_{p}"]) for p in ("p20", "p50", "p80"))
    assert 0 < low <= middle <= high
    return middle
