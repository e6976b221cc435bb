"""Tests on a GPU: a hang, a crash or a lost device costs no other test, and a call goes on where the last one ended."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import gpu_tests
import pytest
import torch
from gpu_tests import Record, urgency

TESTS = """
import os, time, pytest

@pytest.mark.parametrize("n", [9, 3])
def test_sizes(n):
    assert n == 3

def test_that_hangs():
    time.sleep(60)

def test_that_dies():
    os.kill(os.getpid(), 9)

def test_that_is_skipped():
    pytest.skip("for a reason")

@pytest.mark.slow
def test_that_is_not_asked_for():
    raise AssertionError
"""


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.jsonl")


def outcomes(record):
    return {Path(name.split("::")[-1]).name: (x["outcome"], x["reason"]) for name, x in record.outcomes().items()}


def test_every_test_has_an_outcome(tmp_path, record, capfd, monkeypatch):
    (tmp_path / "packages").mkdir()  # all that is asked of PyTorch, whose import takes longer than all else
    (tmp_path / "packages" / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    (tmp_path / "test_x.py").write_text(TESTS)
    (tmp_path / "test_y.py").write_text("import no_such_package\n")
    files = [str(tmp_path / name) for name in ("test_x.py", "test_y.py")]
    options = ["--test-seconds", "1", "--marker", "not slow", "--processes", "2"]
    assert gpu_tests.main(["--record", str(record.path), *options, *files]) == 1
    found = outcomes(record)
    assert found.pop("test_y.py")[0] == "failed"
    assert found == {
        "test_that_hangs": ("failed", "hung for 1 s, or called exit"),
        "test_that_dies": ("failed", "ended its process: status -9"),
        "test_that_is_skipped": ("skipped", "for a reason"),
        "test_sizes[3]": ("passed", ""),
        "test_sizes[9]": ("failed", "call: assert 9 == 3"),
    }
    assert "1 passed, 4 failed, 1 skipped" in capfd.readouterr().out
    assert [x["outcome"] for x in record.lines()] == [x["outcome"] for x in record.outcomes().values()]
    logs = [(tmp_path / f"record-{process}.log").read_text() for process in range(2)]
    assert sum(log.count("test_sizes[9]") > 0 for log in logs) == 1  # each test in one process
    assert not list(tmp_path.glob("record-*.jsonl"))


class Pytest:
    """A stand-in for the processes: each writes lines and ends with a status."""

    def __init__(self, monkeypatch, record, *runs):
        self.record, self.runs, self.commands = record.own(0), list(runs), []
        monkeypatch.setattr(gpu_tests.subprocess, "run", self)

    def __call__(self, command, cwd, env, stdout, stderr):
        self.commands.append(command)
        status, lines = self.runs.pop(0)
        for line in lines:
            self.record.append(**line)
        return SimpleNamespace(returncode=status)


def ended(name, outcome="passed"):
    return {"test": name, "outcome": outcome, "seconds": 1, "reason": ""}


def test_a_process_that_stops_early_is_followed_by_another(monkeypatch, record):
    """As one does whose device is lost."""
    runs = (1, [{"collected": 2}, ended("a", "failed")]), (0, [{"collected": 1}, ended("b")])
    started = Pytest(monkeypatch, record, *runs)
    assert gpu_tests.run_all(record, [], None, 9, 1) == 1 and len(started.commands) == 2
    assert not any("--seconds" in command for command in started.commands)


def test_time_runs_out(monkeypatch, record):
    """A test that begins may take 9 of the 60 seconds."""
    started = Pytest(monkeypatch, record, (0, [{"collected": 3}, ended("a")]), (0, [{"collected": 2}, ended("b")]))
    now = iter((0.0, 1.0, 50.0, 50.5, 51.0))
    monkeypatch.setattr(gpu_tests.time, "monotonic", lambda: next(now))
    assert gpu_tests.run_all(record, [], 1.0, 9, 1) == gpu_tests.UNFINISHED
    assert [command[-2:] for command in started.commands] == [["--seconds", "50"], ["--seconds", "0.5"]]
    Pytest(monkeypatch, record, (0, [{"collected": 1}, ended("c")]))
    assert gpu_tests.run_all(record, [], None, 9, 1) == 0


def test_a_process_that_collects_nothing_fails(monkeypatch, record, capsys):
    Pytest(monkeypatch, record, (4, []))
    assert gpu_tests.run_all(record, [], None, 9, 1) == 1
    assert "status 4 before it ran anything" in capsys.readouterr().out


def test_a_test_that_was_interrupted_has_no_outcome(record):
    """Whoever stops this program, as the end of a window does, finds it run again; what other processes have written
    is kept."""
    own = record.own(1)
    own.append(collected=2)
    own.append(test="a", outcome="begun")
    assert own.begun() == "a" and not own.outcomes()
    record.own(0).append(**ended("b", "failed"))
    record.gather()
    assert set(record.outcomes()) == {"b"} and not own.path.exists()
    own.append(**ended("a"))
    assert own.begun() is None and set(own.outcomes()) == {"a"}


def item(name="x", marked=False, **parameters):
    found = SimpleNamespace(nodeid=name, get_closest_marker=lambda marker: marker if marked else None)
    if parameters:
        found.callspec = SimpleNamespace(params=parameters)
    return found


def test_bfloat16_first_and_small_first(record):
    record.append(**ended("done"))
    items = [
        item("float32", dtype=torch.float32, n=1),
        item("large", dtype=torch.bfloat16, n=64, m=64),
        item("plain"),
        item("done", dtype=torch.bfloat16, n=1),
        item("flat", dtype=torch.bfloat16, shape=(9, 300), n=1),
        item("small", n=8, dtype=torch.bfloat16, m=0),
    ]
    gpu_tests.Recorder(record, None, 1).pytest_collection_modifyitems(items)
    assert [x.nodeid for x in items] == ["small", "flat", "large", "plain", "float32"]
    assert json.loads(record.own(0).path.read_text().splitlines()[-1]) == {"collected": 5}
    assert urgency(items[0]) < urgency(items[-1])


def test_shares_of_the_processes(record):
    """Together all tests of what a GPU computes, those marked first, whatever has run."""
    names = [f"tests/kernels/test_{i}.py::x" for i in range(4)]
    items = [
        *(item(name) for name in names),
        item("tests/test_cli.py::x"),
        item("tests/model/test_x.py::x", marked=True),
    ]
    for done in (False, True):
        found = []
        for process in range(2):
            mine = list(items)
            gpu_tests.Recorder(record, None, 1, (process, 2), on_gpu=True).pytest_collection_modifyitems(mine)
            found.append([x.nodeid for x in mine])
        if not done:
            assert found == [["tests/model/test_x.py::x", names[1], names[3]], [names[0], names[2]]]
            record.append(**ended(names[1]))
    assert found == [["tests/model/test_x.py::x", names[3]], [names[0], names[2]]]


def run_protocol(recorder, report, test="x"):
    """Whether the session stops after a test with such a report."""
    session = SimpleNamespace(shouldstop=False)
    protocol = recorder.pytest_runtest_protocol(SimpleNamespace(nodeid=test, session=session))
    next(protocol)
    recorder.pytest_runtest_logreport(report)
    with pytest.raises(StopIteration):
        protocol.send(None)
    return session.shouldstop


def report(outcome):
    return pytest.TestReport(
        "x", ("x.py", 1, "x"), {}, outcome, "AssertionError: no" if outcome == "failed" else None, "call"
    )


def test_a_lost_device_ends_the_process(monkeypatch, record):
    lost = []
    monkeypatch.setattr(gpu_tests, "device_fault", lambda: lost[0] if lost else "")
    recorder = gpu_tests.Recorder(record, None, 60)
    assert not run_protocol(recorder, report("failed"))
    lost.append("CUDA error: an illegal memory access")
    assert not run_protocol(recorder, report("passed"))
    assert "illegal memory access" in run_protocol(recorder, report("failed"))
    assert record.own(0).outcomes()["x"]["reason"] == "call: AssertionError: no"


def test_no_test_begins_after_the_limit(record):
    assert run_protocol(gpu_tests.Recorder(record, 0.0, 60), report("passed")) == "out of time"
    assert not run_protocol(gpu_tests.Recorder(record, 60.0, 60), report("passed"))


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: unspecified launch failure\nmore")])
def test_device_fault(monkeypatch, error):
    def synchronize():
        if error:
            raise error

    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu_tests.device_fault() == ("CUDA error: unspecified launch failure" if error else "")


def test_files_with_tests_for_a_gpu():
    files = gpu_tests.files_on_gpu()
    assert {"tests/kernels/test_memory.py", "tests/test_pooling_score.py", "tests/model/test_text_tower.py"} <= set(
        files
    )
    assert "tests/tools/test_gpu_tests.py" not in files
