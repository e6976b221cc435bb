"""A limit on how long a benchmark runs."""

import math
import time
from collections.abc import Callable, Hashable, Iterable

LONG_S = 20.0  # a call that takes longer is not repeated, whether or not time is left
FEW_FLOP = 1e9  # a call with fewer is mostly overhead, and says little about larger ones
RESERVE = 0.05  # of the time, for what no implementation does: starting, drawing


class Budget:
    """Keeps a run within ``minutes`` (0: no limit), by what the same code took at the size before.

    Work that is expected to take more than half of the time left is refused, so all that is accepted fits. Calls that
    take more than a sixtieth of the whole are made once.

    seconds: what the timed rounds of one comparison may take. clock: seconds, from any start.
    """

    def __init__(self, minutes: float = 0, seconds: float = 1.5, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self._seconds, self._clock = minutes, seconds, clock
        self._end = clock() + (minutes * 60 * (1 - RESERVE) or math.inf)
        self._last: dict[Hashable, tuple[float, float, float]] = {}

    @property
    def left_s(self) -> float:
        return self._end - self._clock()

    @property
    def seconds(self) -> float:
        """What the timed rounds of the next comparison may take."""
        return max(min(self._seconds, self.left_s / 8), 0.0)

    @property
    def long_s(self) -> float:
        """Calls that take longer are made once."""
        return max(self._seconds, min(LONG_S, self.minutes or LONG_S))

    def record(self, key: Hashable, flop: float, call_s: float, spent_s: float) -> None:
        """A call of ``key`` took ``call_s`` of the ``spent_s`` that it took to prepare and make."""
        if flop >= FEW_FLOP:
            self._last[key] = (flop, call_s, max(spent_s - call_s, 0.0))

    def refusal(self, key: Hashable, flop: float) -> str:
        """Why ``key`` is not to be run with so much ``flop``; empty if it is."""
        _, all_s = self._expected(key, flop)
        if self.left_s <= 0 or all_s > self.left_s / 2:
            return f"about {all_s:.1f} s expected, {max(self.left_s, 0):.0f} s of --minutes {self.minutes:g} left"
        return ""

    def order(self, names: Iterable[str], key: Callable[[str], Hashable], flop: float) -> list[str]:
        """``names`` as they come; under a limit the fastest first, for the slowest to be left out, and of those that
        are not known yet the last first: ours."""
        if not self.minutes:
            return list(names)
        return sorted(reversed(list(names)), key=lambda name: self._expected(key(name), flop)[1])

    def _expected(self, key: Hashable, flop: float) -> tuple[float, float]:
        """Seconds of one call, and of all that is made of it: preparation, a call for the memory, a timed one."""
        if key not in self._last:
            return 0.0, 0.0
        last_flop, last_s, overhead_s = self._last[key]  # overhead: above all compilation
        call_s = last_s * flop / last_flop
        return call_s, overhead_s + call_s * (1 if call_s > self.long_s else 2)
