"""Measurements become rows, and rows stay in their file."""

from dataclasses import replace

import pytest
import torch
from common import rows


def test_percentiles():
    assert rows.percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert rows.percentiles([float(x) for x in range(101)]) == pytest.approx((20.0, 50.0, 80.0))


def test_share_of_the_matrix_rate():
    row = rows.Measurement("ce", "float32").timed([8.0, 10.0, 12.0], flop=3e9, mm_tflops=0.6)
    assert (row.time_ms_p50, row.rounds) == (10.0, 3)
    assert row.share_of_mm == pytest.approx(0.5)  # 3e9 FLOP in 10 ms are 0.3 TFLOP/s
    assert rows.Measurement("step", "float32").timed([8.0], flop=0.0, mm_tflops=None).share_of_mm is None


def test_rows_are_appended_and_columns_may_be_added(tmp_path):
    path = tmp_path / "new" / "x.csv"
    rows.append_rows(path, [{"a": "1", "b": "2,3"}])
    rows.append_rows(path, [{"a": "4", "b": "5"}])
    rows.append_rows(path, [{"a": "6", "c": "7"}])
    assert rows.read_rows(path) == [
        {"a": "1", "b": "2,3", "c": ""},
        {"a": "4", "b": "5", "c": ""},
        {"a": "6", "b": "", "c": "7"},
    ]


def test_a_row_holds_sizes_values_and_provenance():
    sizes, values = {"n": 72, "model": "x"}, {"loss_error": None, "speedup": 2.0}
    case = rows.Measurement("ce", "float32", "dense", "forward", sizes)
    measured = replace(case, time_ms_p50=1.234567, values=values)
    row = rows.as_row(measured, {"commit": "abc"})
    assert (row["n"], row["model"], row["implementation"], row["commit"]) == ("72", "x", "dense", "abc")
    assert (row["time_ms_p50"], row["loss_error"], row["speedup"], row["peak_bytes"]) == ("1.2346", "", "2", "")
    assert "sizes" not in row and "values" not in row


def test_provenance_names_versions_and_the_command():
    source = rows.provenance("loss_throughput", "cpu-2x", ["--output", "/srv/me/x", "--sizes", "72"])
    assert (source["benchmark"], source["device"]) == ("loss_throughput", "cpu-2x")
    assert (
        source["command"] == "python benchmarks/loss_throughput.py --output x --sizes 72"
    )  # no folder of this machine
    assert rows.provenance("x", "cpu", [], "tools")["command"] == "python tools/x.py"
    assert source["torch"] == torch.__version__
    assert all(source[name] for name in ("betaclip", "triton", "commit", "date"))


def test_device_names_make_file_names():
    assert rows.slug("CPU 2x Intel Xeon(R) @ 2.1GHz") == "cpu-2x-intel-xeon-r-2-1ghz"
