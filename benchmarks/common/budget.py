"""A limit on how long a benchmark runs."""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import accumulate

Clock = Callable[[], float]
LONG_S = 20.0  # a call that takes longer is not repeated, whether or not time is left
FEW_FLOP = 1e9  # a call with fewer is mostly overhead, and its time says little about larger ones
RESERVE = 0.05  # of the time, for what nobody foresees


class Budget:
    """Keeps a run within ``minutes`` (0: no limit), by what the same code took at the size before.

    The limit is that of the process, which has run for ``started_s`` seconds; as much is kept for the end, since a
    figure is drawn no slower than libraries are loaded. Work that is expected to take more than half of the time left
    is refused, so it still fits if the machine becomes half as fast. Calls that take more than a sixtieth of the whole
    are made once.

    seconds: what the timed rounds of one comparison may take. clock: seconds, from any start.
    """

    def __init__(self, minutes: float = 0, seconds: float = 1.5, started_s: float = 0, clock: Clock = time.monotonic):
        self.minutes, self.clock, self._seconds = minutes, clock, seconds
        self._end = clock() + (minutes * 60 * (1 - RESERVE) - 2 * started_s if minutes else math.inf)
        self._last: dict[Hashable, tuple[float, float]] = {}  # seconds per FLOP, and of all but one call

    @property
    def left_s(self) -> float:
        return self._end - self.clock()

    @property
    def seconds(self) -> float:
        """How long the timed rounds of the next comparison may take."""
        return max(min(self._seconds, self.left_s / 16), 0.0)

    @property
    def long_s(self) -> float:
        """Calls that take longer are made once."""
        return max(self._seconds, min(LONG_S, self.minutes or LONG_S))

    def record(self, key: Hashable, flop: float, call_s: float, spent_s: float) -> None:
        """A call of ``key`` took ``call_s`` of the ``spent_s`` that it took to prepare and make."""
        self._last[key] = call_s / flop if flop >= FEW_FLOP else 0.0, max(spent_s - call_s, 0.0)

    def refusal(self, key: Hashable, flop: float) -> str:
        """Why ``key`` is not to be run with so much ``flop``; empty if it is."""
        expected_s = self._expected_s(key, flop)
        if self.left_s <= 0 or expected_s > self.left_s / 2:
            return f"about {expected_s:.1f} s expected, {max(self.left_s, 0):.0f} s of --minutes {self.minutes:g} left"
        return ""

    def order(self, names: Iterable[str], key: Callable[[str], Hashable], flop: float) -> list[str]:
        """``names`` as they come; under a limit the fastest first, for the slowest to be left out, and of those that
        are not known yet the last first: ours."""
        if not self.minutes:
            return list(names)
        return sorted(reversed(list(names)), key=lambda name: self._expected_s(key(name), flop))

    def affordable(self, calls_s: Mapping[str, float]) -> list[str]:
        """The calls, of those that took so many seconds each, that are made again: none that is long, and the fastest
        as far as half of the time left goes."""
        fastest = sorted(calls_s, key=calls_s.__getitem__)
        sums_s = accumulate(calls_s[name] for name in fastest)
        limit_s = self.left_s / 2
        return [n for n, sum_s in zip(fastest, sums_s, strict=True) if calls_s[n] <= self.long_s and sum_s <= limit_s]

    def _expected_s(self, key: Hashable, flop: float) -> float:
        """Seconds for preparing ``key`` (above all compilation), a call for the memory, and a timed one."""
        rate, overhead_s = self._last.get(key, (0.0, 0.0))
        call_s = rate * flop
        return overhead_s + call_s * (1 if call_s > self.long_s else 2)
