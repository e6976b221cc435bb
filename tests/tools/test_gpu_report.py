"""The report of a bring-up names failures, and puts what was measured beside what was predicted."""

import csv
import json

import gpu_report
import pytest

FACTS = {
    "device": "nvidia-h200", "name": "NVIDIA H200", "devices": {"cuda:0": "141 GiB"}, "betaclip": "0.1.0",
    "versions": {"torch": "2.11", "triton": "3.6", "cuda": "12.8", "python": "3.12", "libbetaclip": "for sm_90a"},
    "packages": {"liger-kernel": "", "pytest": "9.0"}, "commit": "abc", "command": "python tools/gpu.py", "date": "now",
}  # fmt: skip


def row(implementation, ms="", status="ok", form="ce", **others):
    return {
        "form": form, "implementation": implementation, "phase": "forward+backward", "status": status,
        "time_ms_p50": str(ms), "dtype": "bfloat16", "share_of_mm": "0.5",
        "n": "65536", "k": "32", "dim": "768", **others,
    }  # fmt: skip


def step(outcome, commit="abc", **others):
    return {
        "stage": "tests", "outcome": outcome, "seconds": 12.0, "reason": "", "command": "python x.py", "commit": commit,
        **others,
    }  # fmt: skip


def predicted_line(*rows):
    table = gpu_report.predictions(rows, gpu_report.TUNING.read_text(encoding="utf-8"))
    return table[2] if table else None


@pytest.mark.parametrize(
    ("ms", "said"), [(45, "as predicted"), (43, "as predicted"), (94, "2.00× the prediction"), (21.5, "0.50× the")]
)
def test_beside_a_prediction(ms, said):
    line = predicted_line(row("betaclip/cuda", 1e9), row("betaclip/cuda", ms))
    assert "| ce, n = 65536, dim = 768 | betaclip/cuda | 43–47 ms |" in line and f"| {ms} ms | {said}" in line


@pytest.mark.parametrize(
    "other",
    [
        row("betaclip/cuda", 50, n="36864"),
        row("betaclip/cuda", 50, dim="512"),
        row("betaclip/cuda", 50, form="clip"),
        row("betaclip/cuda", 50, dtype="float32"),
        row("betaclip/cuda", 50, phase="forward"),
        row("betaclip/cuda", status="out of memory"),
        row("dense", 50),
    ],
)
def test_no_other_row_stands_beside_a_prediction(other):
    assert predicted_line(other) is None


def test_every_prediction_is_read():
    tuning = gpu_report.TUNING.read_text(encoding="utf-8")
    section = tuning.partition("## Whole losses and pooling")[2].partition("\n## ")[0]
    assert len(list(gpu_report.predicted(tuning))) == section.count("\n| ") - 1 >= 6


def test_report(tmp_path):
    folder = tmp_path / "bringup-nvidia-h200"
    folder.mkdir()
    (folder / "memcheck.log").write_text("first\n" * 50 + "an address in /srv/me/x.py\n\n")
    events = [{"collected": 3}, {"test": "t.py::a", "outcome": "begun"}]
    events += [{"test": f"t.py::{x}", "outcome": "failed", "reason": f"call: {x} differs"} for x in range(30)]
    events += [{"test": "t.py::s", "outcome": "skipped", "reason": "one GPU"}]
    (folder / gpu_report.RECORD).write_text("".join(json.dumps(x) + "\n" for x in events))
    measured = [
        row("published", status="out of memory"),
        row("liger", status="unavailable: liger_kernel: not there"),
        row("quack", status="failed: ValueError: 108"),
        row("linear_cross_entropy", 90),
        row("dense", 95),
        row("betaclip/blockwise", 500),
        row("betaclip/cuda", status="failed: RuntimeError: no"),
        row("betaclip/triton", 120),
        row("betaclip/triton", 50),
    ]
    with (tmp_path / "nvidia-h200.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, measured[0])
        writer.writeheader()
        writer.writerows(measured)
    recorded = {"memcheck": step("failed"), "old": step("passed", "123")}
    text = gpu_report.report(FACTS, {"memcheck": "tests", "old": "tests", "later": "step"}, recorded, tmp_path)
    assert text.startswith("# Bring-up of NVIDIA H200\n\n**1 failed, 1 passed, 1 left**, of 3 steps. ")
    assert "Tests: 30 failed, 1 skipped.\nSkipped 1: one GPU." in text and "liger-kernel missing" in text
    assert "| tests | [memcheck](bringup-nvidia-h200/memcheck.log) | failed | 12 s |  |" in text
    assert "| tests | old | passed | 12 s | at 123 |" in text and "| step | later | left | | |" in text
    assert text.count("differs") == gpu_report.MOST_FAILURES and "* and 10 more" in text
    assert "* ce, n = 65536, k = 32, dim = 768, betaclip/cuda, forward+backward: failed: RuntimeError: no" in text
    assert text.count("first\n") == gpu_report.TAIL_LINES - 1 and "an address in x.py\n```" in text
    case = "ce, n = 65536, k = 32, dim = 768"
    assert f"| {case} | betaclip/triton, 50 ms | 0.50 | linear_cross_entropy, 90 ms | 1.80× |" in text
    assert (
        "* liger unavailable: liger_kernel: not there\n" in text and f"* quack failed: ValueError: 108 ({case})" in text
    )
    assert "| ce, n = 65536, dim = 768 | betaclip/triton | 47–53 ms | 50 ms | as predicted |" in text
    assert text.count("<details>") == text.count("</details>") == 1 and ".png" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('File "/srv/me/x/y.py", line 3', 'File "y.py", line 3'),
        ("[log](bringup-a/b/c.log) | forward/backward | 12/36/7", None),
        ("</details>\n</summary>", None),
        ("FAILED tests/tools/x.py::a", None),
    ],
)
def test_folders_of_the_machine_are_left_out(text, shown):
    assert gpu_report.without_folders(text) == (shown or text)


def test_times():
    assert [gpu_report.in_ms(x) for x in (0.51234, 99.94, 1234.4)] == ["0.512 ms", "99.9 ms", "1,234 ms"]


def test_report_of_nothing(tmp_path):
    text = gpu_report.report(FACTS, {"a": "tests"}, {}, tmp_path)
    assert "**1 left**, of 1 steps." in text and "##" in text
    assert all(heading not in text for heading in ("Failures", "Beside", "Figures", "Tests:"))
