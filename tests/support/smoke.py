"""Runs of the benchmarks' scripts, as a user starts them, in this process: libraries are imported once."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
from support.paths import ROOT


def smoke_run(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *options: str
) -> tuple[list[dict[str, str]], str]:
    """The rows that ``python benchmarks/<script> --smoke`` writes into a folder, and what it prints."""
    given = ["--smoke", "--device", "cpu", "--output", str(folder), *options]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / script), *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert ended.value.code == 0
    (file,) = folder.glob("*.csv")
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert not any(str(folder) in "".join(row.values()) for row in rows)
    return rows, capfd.readouterr().out


def assert_timed(row: dict[str, str]) -> float:
    """The median in ms of a row that ran."""
    low, middle, high = (float(row[f"time_ms_{p}"]) for p in ("p20", "p50", "p80"))
    assert 0 < low <= middle <= high
    return middle


def assert_drawn(folder: Path) -> None:
    (figure,) = folder.glob("*.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"
