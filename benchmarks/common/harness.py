"""Time, peak memory, disturbance by other processes, errors, and the rate of the matrix product.

All implementations of a case are timed in interleaved rounds, in one process; running out of memory is a result and
becomes a row; nothing is reported that was not measured.
"""

import ctypes
import gc
import importlib
import math
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betaclip.kernels.memory import forget
from common.rows import OK, OUT_OF_MEMORY, percentiles

Run = Callable[[], Any]
MAX_ROUNDS = 50


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


def peer(module: str, x: Tensor, needs_gpu: bool = False) -> Any:
    """Another library, imported to work on ``x``."""
    try:  # siglip_kernel looks for a GPU when imported, and raises RuntimeError if there is none
        found = importlib.import_module(module)
    except Exception as error:
        raise Unavailable(f"{module.split('.')[0]}: {error}") from error
    if needs_gpu and x.device.type != "cuda":
        raise Unavailable(f"{module}: needs a GPU")
    return found


def require(backend: str, x: Tensor, reasons: Sequence[str]) -> None:
    """Refuse a backend of ours that cannot work on ``x``, for the ``reasons`` it gives, or is not meant to."""
    if backend == "triton" and x.device.type != "cuda":
        raise Unavailable("needs a GPU (its interpreter is for tests)")
    if reasons:
        raise Unavailable("; ".join(reasons))


def compiled_afresh(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for static shapes, the fastest code, with no limit of recompilations to run into."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def failure(error: BaseException) -> str:
    """The status of a case that raised ``error``."""
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
    """Give freed memory back, lest the leftovers of one implementation hide the peak of the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)


def time_ms(run: Run, device: torch.device) -> float:
    """How long one call takes. Its results are freed outside the timed region."""
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
    runs: Mapping[str, Run], device: torch.device, seconds: float, clock: Callable[[Run, torch.device], float] = time_ms
) -> dict[str, list[float] | str]:
    """Times in ms of each run, taken in rounds of shuffled order; the status instead of times for a run that raised.

    Each run may use an equal share of ``seconds``, and more for a third round if it is not too slow; each is
    called at least once. A run that has had its share drops out, the others go on.
    """
    shuffle, share_ms = random.Random(0).shuffle, seconds * 1e3 / max(len(runs), 1)
    times: dict[str, Any] = {name: [] for name in runs}
    active = list(runs)
    while active:
        shuffle(active)
        for name in list(active):
            elapsed, status = attempt(partial(clock, runs[name], device))
            times[name] = [*times[name], elapsed] if status == OK else status
            used, rounds = (sum(times[name]), len(times[name])) if status == OK else (math.inf, MAX_ROUNDS)
            if rounds >= MAX_ROUNDS or (used >= share_ms and (rounds >= 3 or used >= 400 * seconds)):
                active.remove(name)
    return times


def usage(own_s: Callable[[], float] = time.process_time) -> tuple[float, float] | None:
    """Seconds that passed, and in which all cores together were busy with other processes; None if that is unknown."""
    passed, own, stat = time.perf_counter(), own_s(), Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return passed, (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own


def foreign_cores(begin: tuple[float, float] | None, end: tuple[float, float] | None) -> float | None:
    """How many cores other processes kept busy between two usages; None where that is unknown."""
    if begin is None or end is None:
        return None
    return max(0.0, end[1] - begin[1]) / max(end[0] - begin[0], 0.1)  # ticks are of 10 ms


def age_s() -> float:
    """How long ago this process started, as Linux says; elsewhere how long it has computed."""
    stat = Path("/proc/self/stat")
    ticks = int(stat.read_text().rpartition(")")[2].split()[19]) if stat.exists() else 0  # some containers say 0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") if ticks else time.process_time()


def with_peak_bytes(run: Run, device: torch.device, seconds: float) -> tuple[Any, int | None, float]:
    """The result, how far memory rose above what was in use before (None where that cannot be measured), and how many
    seconds one call took.

    On the CPU it is resident memory, whose high-water mark Linux lets a process reset: it counts everything
    (libraries' scratch, temporaries, the results), needs no child process, and after ``release`` nothing freed
    earlier hides in it. The same code must have been called before, since allocations that a library makes once do not
    count. Scratch that betaclip keeps between calls does count, because it is freed before the call. The heap's
    fragmentation varies, so the peak is the median of three calls if those fit into ``seconds``.
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
        elapsed = time.perf_counter() - called
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
    return _bytes("self/status", "VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _bytes("self/status", "VmHWM")


def _bytes(file: str, field: str) -> int:
    """A field of a file of /proc."""
    line = next(x for x in Path("/proc", file).read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation may take; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = _bytes("meminfo", "MemAvailable")
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
    """S = X Yᵀ of two (n, dim) matrices and the two products of its gradients, each of 2 n² dim FLOP, into memory that
    exists already."""
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
