"""A limit of time is kept, by leaving out what is slow."""

import pytest
import torch
from common import comparison, rows
from common.budget import Budget

SECONDS_PER_FLOP = {"slow": 1e-9, "middle": 4e-10, "fast": 1e-10, "ours": 2e-10}
SIZES = [1e8, 2e9, 8e9, 32e9, 128e9]


class Clock:
    """Seconds that pass only when they are told to."""

    now = 0.0

    def __call__(self):
        return self.now


class TimedByFlop(comparison.Comparison):
    """Calls that take as long as their FLOP say, and longer as the machine becomes slower."""

    def __init__(self, flop, budget, compilation_s=0.0, slowness=lambda: 1.0):
        super().__init__("ce", {"n": int(flop)}, SECONDS_PER_FLOP, torch.zeros(1), budget, (2, 2))
        self._flop, self.compilation_s, self.slowness = flop, compilation_s, slowness
        self.clock = self.time_ms

    def time_ms(self, run, device):
        begin = self.budget.clock()
        run()
        return max((self.budget.clock() - begin) * 1e3, 0.1)  # products of matrices take no time

    def flop(self, phase):
        return self._flop * (1 if phase == rows.FORWARD else 3)

    def prepare(self, name):
        leaf = torch.ones((), requires_grad=True)

        def taking(seconds):
            self.budget.clock.now += seconds * self.slowness()
            return leaf * 1

        warm_up = comparison.Call(lambda: taking(self.compilation_s), [leaf])
        return comparison.Call(lambda: taking(SECONDS_PER_FLOP[name] * self._flop), [leaf], warm_up)

    def exact(self):
        return self.prepare("slow")

    def observe(self, run):
        begin = self.budget.clock()
        return run(), {"peak_bytes": 1}, self.budget.clock() - begin


def run_all(budget, **options):
    """The rows of a whole run, as a session makes them."""
    measured = []
    for flop in SIZES:
        if budget.left_s > 0:
            compared = TimedByFlop(flop, budget, **options)
            measured += [row for phase in rows.PHASES for row in compared.measure(phase)]
    return {(row.implementation, row.phase, row.sizes["n"]): row for row in measured}


@pytest.mark.parametrize("minutes", [0.5, 1, 3])
def test_a_run_stays_within_its_limit(minutes):
    """Whatever was spent before it began counts, and as much is left for its end."""
    clock = Clock()
    clock.now = started_s = 4.0
    measured = run_all(Budget(minutes, started_s=started_s, clock=clock))
    assert clock.now + started_s <= 0.95 * minutes * 60
    assert measured["fast", rows.FORWARD, 8e9].status == "ok"
    skipped = [row for row in measured.values() if row.status == "skipped"]
    assert {row.implementation for row in skipped} >= {"slow"} and all(row.rounds == 0 for row in skipped)


@pytest.mark.parametrize("slower_from_s", [5, 20, 60, 100])
def test_a_run_stays_within_its_limit_on_a_machine_that_becomes_half_as_fast(slower_from_s):
    clock = Clock()
    clock.now = started_s = 10.0
    budget = Budget(3, started_s=started_s, clock=clock)
    run_all(budget, compilation_s=3.0, slowness=lambda: 1.0 if clock.now < slower_from_s else 2.0)
    assert 60 < clock.now <= 180 - started_s


def test_without_a_limit_everything_runs_in_the_order_given():
    clock = Clock()
    budget = Budget(clock=clock)
    assert {row.status for row in run_all(budget).values()} == {"ok"}
    assert budget.order(SECONDS_PER_FLOP, str, 1e12) == list(SECONDS_PER_FLOP)
    assert budget.seconds == 1.5


def test_the_fastest_come_first_under_a_limit():
    budget = Budget(3)
    budget.record("slow", 1e9, call_s=2, spent_s=2)
    budget.record("fast", 1e9, call_s=1, spent_s=1)
    assert budget.order(["slow", "new", "fast", "ours"], str, 4e9) == ["ours", "new", "fast", "slow"]


def test_compilation_counts_once_and_the_rate_of_small_calls_not_at_all():
    clock = Clock()
    budget = Budget(1, clock=clock)
    budget.record("compiled", 1e9, call_s=0.1, spent_s=20.1)
    clock.now = 20
    assert "20.8 s expected, 37 s of --minutes 1 left" in budget.refusal("compiled", 4e9)
    budget.record("small", 1e6, call_s=1, spent_s=1)
    assert budget.refusal("small", 1e9) == ""
    budget.record("small, compiled", 1e6, call_s=1, spent_s=21)
    assert "20.0 s expected" in budget.refusal("small, compiled", 1e9)


def test_only_what_fits_is_called_again():
    clock = Clock()
    budget = Budget(1, clock=clock)
    clock.now = 57 - 8.0
    assert budget.affordable({"long": 1.6, "slow": 1.5, "a": 1.0, "b": 1.4}) == ["a", "b", "slow"]
    clock.now = 57 - 6.0
    assert budget.affordable({"long": 1.6, "slow": 1.5, "a": 1.0, "b": 1.4}) == ["a", "b"]
    assert Budget().affordable({"long": 21, "slow": 19}) == ["slow"]


def test_nothing_begins_after_the_end():
    clock = Clock()
    budget = Budget(1, clock=clock)
    clock.now = 61
    assert "0 s of --minutes 1 left" in budget.refusal("new", 1)
    assert budget.seconds == 0 and budget.affordable({"new": 1e-3}) == []
