"""Run the tests of what a GPU computes in several processes, so that none is lost to another's fault.

    python tools/gpu_tests.py --record tests.jsonl                  # all of them
    python tools/gpu_tests.py --record tests.jsonl --minutes 4      # as many as fit; the next call goes on

First come the tests marked gpu, of these bfloat16 and the smallest first. Each process has its share of the tests, and
writes each outcome as it comes to a record of its own (tests-0.jsonl, ...), beside its output (tests-0.log, ...); this
file is also the plugin that does so. In the end the records are gathered in one.

A test that hangs is stopped after 60 seconds. It then ends its process, as does a crash, or a fault after which the
device refuses all further work; the tests that follow run in a new process. The exit status is 0 if all passed, 1 if
any failed, 3 if some have not run yet.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST_LIMIT_S = 60.0  # the first test of a kernel compiles it
UNFINISHED = 3
BEGUN, FAILED, PASSED, SKIPPED = "begun", "failed", "passed", "skipped"
# Whose tests all compute on the GPU; those of other files are taken if they are marked.
ON_GPU = ("tests/kernels/", "tests/losses/", "tests/test_pooling")

Line = dict[str, Any]


class Record:
    """A file with one line of JSON per event: a number of tests collected, or a test with its outcome so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def lines(self) -> list[Line]:
        return [json.loads(x) for x in self.path.read_text(encoding="utf-8").splitlines()] if self.path.exists() else []

    def outcomes(self) -> dict[str, Line]:
        """The last line of each test that has ended."""
        return {x["test"]: x for x in self.lines() if x.get("outcome") not in (None, BEGUN)}

    def own(self, process: int) -> "Record":
        """The record of one process."""
        return Record(self.path.with_name(f"{self.path.stem}-{process}{self.path.suffix}"))

    def gather(self) -> None:
        """Move the outcomes of all processes here, and those of a call that was interrupted."""
        for path in sorted(self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}")):
            known = self.outcomes()  # each process finds a file that cannot be imported
            for test, line in Record(path).outcomes().items():
                if test not in known:
                    self.append(**line)
            path.unlink()

    def begun(self) -> str | None:
        """The test that has begun and not ended."""
        last = next(reversed(self.lines()), {})
        return last["test"] if last.get("outcome") == BEGUN else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="gather outcomes in this file, and run only tests it has none of")
    parser.addoption("--share", type=int, nargs=2, default=(0, 1), help="number of this process, and of all processes")
    parser.addoption("--on-gpu", action="store_true", help="leave out tests that need no GPU")
    parser.addoption("--seconds", type=float, help="begin no test after so many seconds")
    parser.addoption("--test-seconds", type=float, default=TEST_LIMIT_S, help="stop a test that takes longer")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--record"):
        options = (config.getoption(name) for name in ("--seconds", "--test-seconds", "--share", "--on-gpu"))
        config.pluginmanager.register(Recorder(Record(path), *options))


class Recorder:
    """The plugin. seconds: begin no test after so many, None: no limit. test_s: what one test may take. share: the
    number of this process, and of all. on_gpu: whether to leave out tests that need no GPU."""

    def __init__(
        self,
        record: Record,
        seconds: float | None,
        test_s: float,
        share: Sequence[int] = (0, 1),
        on_gpu: bool = False,
    ) -> None:
        self.gathered, self.record, self.test_s = record, record.own(share[0]), test_s
        self.share, self.on_gpu = share, on_gpu
        self.end = None if seconds is None else time.monotonic() + seconds
        self.reports: list[pytest.TestReport] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wanted = (item for item in items if not self.on_gpu or marked(item) or item.nodeid.startswith(ON_GPU))
        process, processes = self.share
        done = self.done()
        items[:] = [item for item in sorted(wanted, key=urgency)[process::processes] if item.nodeid not in done]
        self.record.append(collected=len(items))

    def done(self) -> Line:
        return self.gathered.outcomes() | self.record.outcomes()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.done():
            self.record.append(test=report.nodeid, outcome=FAILED, seconds=0, reason=last_line(report.longreprtext))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.reports, begin = [], time.monotonic()
        self.record.append(test=item.nodeid, outcome=BEGUN)
        # Not sys.stderr, which pytest captures. A kernel that never ends does not let Python run, but this thread.
        faulthandler.dump_traceback_later(self.test_s, exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        outcome, reason = verdict(self.reports)
        seconds = round(time.monotonic() - begin, 2)
        self.record.append(test=item.nodeid, outcome=outcome, seconds=seconds, reason=reason)
        if outcome == FAILED and (lost := device_fault()):
            item.session.shouldstop = f"the GPU takes no more work from this process: {lost}"
        elif self.end is not None and time.monotonic() > self.end:
            item.session.shouldstop = "out of time"
        release_memory()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)


def marked(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


def urgency(item: pytest.Item) -> tuple[bool, int, int]:
    """Tests marked gpu first. Of these bfloat16 first, which training uses, then tests without a dtype; among equals
    the smallest sizes first."""
    parameters = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    dtypes = [str(x) for x in parameters if str(x).startswith("torch.")]
    size = 1
    for number in flat(parameters):
        size *= max(number, 1)
    return not marked(item), 1 if not dtypes else 0 if "torch.bfloat16" in dtypes else 2, size


def flat(values: Iterable[Any]) -> Iterator[int]:
    """The integers among ``values``, tuples looked into."""
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        elif isinstance(value, int):
            yield value


def verdict(reports: Sequence[pytest.TestReport]) -> tuple[str, str]:
    """The outcome of a test, and why it failed or was skipped."""
    for report in reports:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            return FAILED, f"{report.when}: {first_line(crash.message) if crash else last_line(report.longreprtext)}"
    for report in reports:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            return SKIPPED, reason.removeprefix("Skipped: ")
    return PASSED, ""


def first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:300]


def last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")[:300]


def device_fault() -> str:
    """The error that the device's context is left with, as after an access out of bounds; empty if it works."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return first_line(str(error))
    return ""


def release_memory() -> None:
    """Give back what a large test has left in this process's cache: other processes test on the same device."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        with suppress(RuntimeError):  # of a device that is lost
            torch.cuda.empty_cache()


def summary(record: Record) -> list[str]:
    """Numbers of outcomes, the failures, and the reasons of what was skipped."""
    lines = record.outcomes().values()
    counts = Counter(line["outcome"] for line in lines)
    reasons = Counter(line["reason"] for line in lines if line["outcome"] == SKIPPED)
    return [
        *(f"FAILED {line['test']}: {line['reason']}" for line in lines if line["outcome"] == FAILED),
        *(f"skipped {count}: {reason}" for reason, count in reasons.items()),
        ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, FAILED, SKIPPED)),
    ]


def run_all(record: Record, selection: Sequence[str], minutes: float | None, test_s: float, processes: int) -> int:
    """Let each process run its share. The exit status."""
    record.path.parent.mkdir(parents=True, exist_ok=True)
    record.gather()
    one = partial(run, record, selection, minutes, test_s, processes=processes)
    with ThreadPoolExecutor(processes) as pool:
        statuses = list(pool.map(one, range(processes)))
    record.gather()
    if UNFINISHED in statuses:
        return UNFINISHED
    return int(any(statuses) or any(line["outcome"] == FAILED for line in record.outcomes().values()))


def run(
    gathered: Record, selection: Sequence[str], minutes: float | None, test_s: float, process: int, processes: int
) -> int:
    """Start pytest as often as the share of one process takes. Its exit status."""
    record = gathered.own(process)
    # A test that begins now may take its whole limit.
    last = None if minutes is None else time.monotonic() + 60 * minutes - test_s
    path = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    if processes > 1:
        environment["OMP_NUM_THREADS"] = "1"
    command = [
        sys.executable, "-m", "pytest", "-p", "gpu_tests", "-o", "addopts=", "--import-mode=importlib", "-ra",
        "--capture=sys", "--continue-on-collection-errors", "--record", str(gathered.path.resolve()),
        "--share", str(process), str(processes), "--test-seconds", str(test_s), *selection,
    ]  # fmt: skip
    while True:
        before = len(record.lines())
        left = [] if last is None else ["--seconds", f"{max(last - time.monotonic(), 0):g}"]
        with record.path.with_suffix(".log").open("a", encoding="utf-8") as log:
            completed = subprocess.run(
                [*command, *left], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            status = completed.returncode
        if test := record.begun():
            how = f"hung for {test_s:g} s, or called exit" if status == 1 else f"ended its process: status {status}"
            record.append(test=test, outcome=FAILED, seconds=0, reason=how)
        events = record.lines()[before:]
        begin = next((i for i, line in enumerate(events) if "collected" in line), None)
        if begin is None:
            print(f"pytest ended with status {status} before it ran anything")
            return 1
        if sum(line.get("outcome") not in (None, BEGUN) for line in events[begin:]) >= events[begin]["collected"]:
            return int(any(line["outcome"] == FAILED for line in record.outcomes().values()))
        if last is not None and time.monotonic() >= last:
            return UNFINISHED


def files_on_gpu() -> list[str]:
    """The files that have tests for a GPU: others may need packages that are not there."""
    files = {str(x.relative_to(ROOT)): x for x in sorted((ROOT / "tests").rglob("test_*.py"))}
    return [
        name for name, x in files.items()
        if name.startswith(ON_GPU) or "\n@pytest.mark.gpu\n" in x.read_text(encoding="utf-8")
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--record", type=Path, required=True, help="file of outcomes; tests that it has an outcome of do not run again")
    add("--minutes", type=float, help="end within so many minutes, after one test at least")
    add("--test-seconds", type=float, default=TEST_LIMIT_S, help=f"of one test (default {TEST_LIMIT_S:g})")
    add("--processes", type=int, help="that run at the same time (default: one less than cores)")
    add(
        "--marker",
        help="which tests, as for pytest -m (default: those of kernels, losses and pooling, and those marked gpu)",
    )
    add("files", nargs="*", help="files or folders of tests (default: those with such tests)")
    args = parser.parse_args(argv)
    record = Record(args.record)
    selection = ["--on-gpu"] if args.marker is None else ["-m", args.marker]
    processes = max(1, args.processes or (os.cpu_count() or 2) - 1)
    status = run_all(record, [*selection, *(args.files or files_on_gpu())], args.minutes, args.test_seconds, processes)
    print(*summary(record), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
