"""Times, peak memory, foreign cores and errors are what they say."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from common import harness

CPU = torch.device("cpu")


def needs_peak_memory():
    if harness.with_peak_bytes(lambda: None, CPU, 0)[1] is None:
        pytest.skip("peak memory needs Linux's /proc/self/clear_refs")


def test_peak_memory_counts_temporaries_and_results():
    needs_peak_memory()
    mebi = 2**20

    def blocks(mebibytes):
        return [torch.ones(mebi // 4) for _ in range(mebibytes)]

    def run():
        result = blocks(10)
        blocks(40)  # gone again before the end
        return result

    for _ in range(2):
        fragments = blocks(100)
        fragments = fragments[::2]  # leaves holes in the heap, where what is measured next would hide
        result, peak, _ = harness.with_peak_bytes(run, CPU, seconds=0)
        assert len(result) == 10
        assert len(fragments) == 50
        assert 48 * mebi < peak < 58 * mebi


def test_relative_error():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert harness.relative_error(torch.tensor([1.5, -4.0]), truth) == pytest.approx(0.125)
    assert harness.relative_error(torch.tensor([torch.nan, -4.0]), truth) != 0.0


def test_rounds_are_interleaved_and_slow_runs_drop_out():
    calls = []
    durations_ms = {"fast": 10.0, "middle": 40.0, "slow": 900.0}

    def fake_time_ms(run, device):
        calls.append(run())
        return durations_ms[calls[-1]]

    times = harness.interleave({name: lambda name=name: name for name in durations_ms}, CPU, 0.3, fake_time_ms)
    assert times == {"fast": [10.0] * 10, "middle": [40.0] * 3, "slow": [900.0]}
    assert sorted(calls[:3]) == ["fast", "middle", "slow"]
    assert sorted(calls[3:5]) == sorted(calls[5:7]) == ["fast", "middle"]


def test_rounds_differ_in_order():
    """Or one implementation would always find the cache as another leaves it."""
    calls = []
    names = "abcdef"
    harness.interleave(
        {name: lambda name=name: name for name in names}, CPU, 0.06, lambda run, device: calls.append(run()) or 1.0
    )
    rounds = ["".join(calls[i : i + len(names)]) for i in range(0, len(calls), len(names))]
    assert len(rounds) == 10
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert len(set(rounds)) > 5


def test_a_run_that_fails_while_timed_leaves_the_others():
    def broken():
        raise ValueError("no")

    times = harness.interleave({"broken": broken, "good": lambda: None}, CPU, 0.01, lambda run, device: run() or 1.0)
    assert times["broken"] == "failed: ValueError: no"
    assert len(times["good"]) >= 3


def test_matrix_rate_takes_the_fastest_median():
    times = {"a": [2.0, 1.0, 3.0], "b": [5.0], "c": "out of memory"}
    assert harness.matrix_tflops(times, n=1000, dim=500) == pytest.approx(2 * 1000**2 * 500 / 2e-3 / 1e12)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (harness.Unavailable("needs a GPU"), "unavailable: needs a GPU"),
        (RuntimeError("bad\nlong story"), "failed: RuntimeError: bad"),
        (OSError("no /srv/me/secret/file here"), "failed: OSError: no ... here"),
    ],
)
def test_status_of_a_failure(error, status):
    assert harness.failure(error) == status


def test_out_of_memory_is_recognised_as_pytorch_raises_it():
    _, status = harness.attempt(lambda: torch.empty(2**58, dtype=torch.uint8))
    assert status == "out of memory"


def test_foreign_cores_counts_other_processes_only():
    """In 10 s all cores together were busy for 19 s, 7 of them with this process."""
    assert harness.foreign_cores((100.0, 1000.0), (110.0, 1012.0)) == pytest.approx((19 - 7) / 10)
    assert harness.foreign_cores(None, None) is None
    assert harness.foreign_cores((0.0, 0.0), (1.0, -0.5)) == 0.0  # the clocks differ in resolution
    assert harness.foreign_cores((0.0, 0.0), (1e-3, 0.01)) == pytest.approx(0.1)  # one tick says nothing


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc/stat")
def test_usage_takes_the_given_clock():
    own, none = harness.usage(lambda: 1e6), harness.usage(lambda: 0.0)
    assert none[1] - own[1] == pytest.approx(1e6, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ps"), reason="needs Linux and ps")
def test_age_is_that_of_the_process():
    before_s = harness.age_s()
    shown = subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    assert before_s - 2 <= int(shown.stdout) <= harness.age_s() + 2  # whole seconds
