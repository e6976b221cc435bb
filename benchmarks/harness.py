"""What the benchmarks share: cases and measurements, timing, peak memory, errors, the matrix rate, CSV rows.

Rules kept here: implementations of one case are timed in interleaved rounds, in one process; running out of
memory is a result and becomes a row; nothing is reported that was not measured.
"""

import csv
import ctypes
import gc
import importlib.metadata
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Run = Callable[[], Any]
Measured = TypeVar("Measured", bound="Measurement")
OK, OUT_OF_MEMORY = "ok", "out of memory"


class Unavailable(Exception):
    """An implementation that cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """What is measured. form and implementation name the code; phase is "forward" or "forward+backward".

    Each benchmark adds the sizes of its operation.
    """

    benchmark: str
    form: str
    dtype: str
    device: str
    implementation: str
    phase: str


@dataclass(frozen=True)
class Measurement:
    """What came out. None: not measured, and ``note`` says why.

    status: ok, out of memory, skipped, or unavailable: or failed: with the reason. foreign_cores: how many cores
    other processes kept busy meanwhile; times of the CPU mean little unless it is near 0. Each benchmark adds errors
    and what else its operation is judged by.
    """

    case: Case
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

    def timed(self: Measured, times_ms: list[float], flop: float, mm_tflops: float) -> Measured:
        """With the statistics of ``times_ms`` and the share of the matrix rate that they amount to."""
        p20, p50, p80 = percentiles(times_ms)
        return replace(
            self,
            time_ms_p20=p20,
            time_ms_p50=p50,
            time_ms_p80=p80,
            rounds=len(times_ms),
            mm_tflops=mm_tflops,
            share_of_mm=flop / (p50 * 1e9) / mm_tflops,
        )


@dataclass(frozen=True)
class Provenance:
    """Where a row comes from."""

    torch: str
    triton: str
    betaclip: str
    commit: str
    date: str
    command: str


def percentiles(values: Iterable[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th, interpolated."""
    p20, p50, p80 = torch.tensor(list(values), dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return float(p20), float(p50), float(p80)


def failure(error: BaseException) -> str:
    """The status of a case that raised."""
    lines = str(error).strip().splitlines() or [""]
    exhausted = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(e in str(error).lower() for e in exhausted):
        return OUT_OF_MEMORY
    reason = re.sub(r"(/[\w.+-]+){2,}", "...", lines[0])[:100]  # no paths of this machine
    if isinstance(error, Unavailable):
        return f"unavailable: {reason}"
    return f"failed: {type(error).__name__}: {reason}"


def attempt(run: Run) -> tuple[Any, str]:
    """The result and "ok", or None and the status that says why there is none."""
    try:
        return run(), OK
    except Exception as error:
        status = failure(error)
    # Only here is the traceback gone, with the tensors its frames held.
    release()
    return None, status


def release() -> None:
    """Give freed memory back, so that one implementation's leftovers are no part of the next one's peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)


def time_ms(run: Run, device: torch.device) -> float:
    """One call. Its results are freed outside of the timed region."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end)
    else:
        begin = time.perf_counter()
        result = run()
        elapsed = (time.perf_counter() - begin) * 1e3
    del result
    return elapsed


def interleave(
    runs: Mapping[str, Run],
    device: torch.device,
    seconds: float,
    clock: Callable[[Run, torch.device], float] | None = None,
    max_rounds: int = 50,
) -> dict[str, list[float] | str]:
    """Times in ms of each run, in rounds of shuffled order; the status instead if it raised. clock: ``time_ms``.

    Each run may use an equal share of ``seconds``, and more for a third round if it is not too slow; each is
    called at least once. One that has had its share drops out, the others go on.
    """
    clock = clock or time_ms
    shuffle, share_ms = random.Random(0).shuffle, seconds * 1e3 / max(len(runs), 1)
    times: dict[str, list[float] | str] = {}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    active = list(runs)
    while active:
        shuffle(active)
        for name in list(active):
            elapsed, status = attempt(lambda run=runs[name]: clock(run, device))  # type: ignore[misc]
            if status != OK:
                times[name] = status
                active.remove(name)
                continue
            spent[name].append(elapsed)
            used, rounds = sum(spent[name]), len(spent[name])
            if rounds >= max_rounds or (used >= share_ms and (rounds >= 3 or used >= 400 * seconds)):
                active.remove(name)
    return {name: times.get(name, spent[name]) for name in runs}


class ForeignCores:
    """``cores``: how many cores other processes kept busy within a ``with`` block; None where that is unknown."""

    def __enter__(self) -> "ForeignCores":
        self.cores: float | None = None
        self._begin, self._busy_s = time.perf_counter(), self._foreign_s()
        return self

    def __exit__(self, *_: object) -> None:
        busy_s, elapsed_s = self._foreign_s(), time.perf_counter() - self._begin
        if busy_s is not None and self._busy_s is not None:
            self.cores = max(0.0, busy_s - self._busy_s) / max(elapsed_s, 1e-3)

    @staticmethod
    def _foreign_s() -> float | None:
        busy_s = busy_core_seconds()
        return None if busy_s is None else busy_s - time.process_time()


def busy_core_seconds() -> float | None:
    """Time that all cores together have been busy since the machine started; None where that is unknown."""
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, ticks)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def with_peak_bytes(
    run: Run, device: torch.device, seconds: float = 0.4, forget: Callable[[], None] = lambda: None
) -> tuple[Any, int | None, float]:
    """The result, how far memory rose above what was in use before (None where that cannot be measured), and ms.

    On the CPU it is resident memory, whose high-water mark Linux lets a process reset: it counts everything
    (libraries' scratch, temporaries, the results), needs no child process, and after ``release`` nothing
    freed earlier hides in it. A call of the same code should have gone before: what a library allocates once is
    not counted, save what ``forget`` lets go of: scratch that the code under test keeps between calls is its own.
    The heap's fragmentation varies, so it is the median of three calls if those fit ``seconds``.
    """
    peaks: list[int | None] = []
    begin, result, elapsed = time.perf_counter(), None, 0.0
    while not peaks or (len(peaks) < 3 and time.perf_counter() - begin < seconds * len(peaks) / 3):
        result = None
        forget()
        release()
        before = _reset_peak(device)
        called = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = (time.perf_counter() - called) * 1e3
        peaks.append(None if before is None else max(0, _peak(device) - before))
    known = [peak for peak in peaks if peak is not None]
    return result, statistics.median_low(known) if known else None, elapsed


def _reset_peak(device: torch.device) -> int | None:
    """Bytes in use now; None if the high-water mark cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes("VmHWM")


def _resident_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation may take; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None
    try:  # a container's own limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{x}").read_text().strip() for x in ("max", "current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|"""
    value, truth = value.detach().to(truth.dtype), truth.detach()
    largest = truth.abs().max().clamp_min(torch.finfo(truth.dtype).tiny)
    return float((value - truth).abs().max() / largest)


def matrix_products(n: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """S = X Yᵀ of two (n, dim) and its gradients' two products, 2 n² dim FLOP each, into existing memory."""
    x, y = (torch.randn(n, dim, device=device).to(dtype) for _ in range(2))
    square, tall = torch.empty(n, n, dtype=dtype, device=device), torch.empty(n, dim, dtype=dtype, device=device)
    products: dict[str, Run] = {
        "mm: S = X Yᵀ": lambda: torch.mm(x, y.T, out=square),
        "mm: dX = S Y": lambda: torch.mm(square, y, out=tall),
        "mm: dY = Sᵀ X": lambda: torch.mm(square.T, x, out=tall),
    }
    for product in products.values():
        product()  # libraries set up their scratch, which they keep
    return products


def matrix_tflops(times: Mapping[str, list[float] | str], n: int, dim: int) -> float:
    """The rate of the fastest of ``matrix_products``, by its median: the strictest measure of a share."""
    medians = [percentiles(values)[1] for values in times.values() if not isinstance(values, str)]
    return 2 * n * n * dim / (min(medians) * 1e9)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"CPU {torch.get_num_threads()}x {re.sub(r'[(](R|TM)[)]', '', model)}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def provenance(command: str) -> Provenance:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    import betaclip

    root = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    commit = (git("rev-parse", "--short", "HEAD") or "none") + ("+changes" if changed else "")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Provenance(torch.__version__, version("triton"), betaclip.__version__, commit, date, command)


def as_row(measurement: Measurement, source: Provenance) -> dict[str, str]:
    """One CSV row: the case, the measurement, where it comes from."""
    values = {f.name: getattr(measurement, f.name) for f in fields(measurement) if f.name != "case"}
    values = {**asdict(measurement.case), **values, **asdict(source)}
    return {name: _cell(value) for name, value in values.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def append_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Add rows to a CSV, which is rewritten if they bring new columns."""
    old = read_rows(path) if path.exists() else []
    names = list(dict.fromkeys(name for row in [*old[:1], *rows] for name in row))
    fresh = not old or list(old[0]) != names
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()
            writer.writerows(old)
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
