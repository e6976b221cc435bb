"""A limit of time is kept, by leaving out what is slow."""

import pytest
from common.budget import Budget

SECONDS_PER_FLOP = {"slow": 1e-9, "fast": 1e-10}
SIZES = [2e9, 8e9, 32e9, 128e9]


class Clock:
    """Seconds that pass only when they are told to."""

    now = 0.0

    def __call__(self):
        return self.now


def accepted(budget, clock, overhead_s=1.0):
    """What is run, where calls take as long as their FLOP say, and are made twice unless they are long."""
    run = []
    for flop in SIZES:
        for name in budget.order(SECONDS_PER_FLOP, str, flop):
            if not budget.refusal(name, flop):
                call_s = flop * SECONDS_PER_FLOP[name]
                clock.now += overhead_s + call_s * (1 if call_s > budget.long_s else 2)
                budget.record(name, flop, call_s, overhead_s + call_s)
                run.append((name, flop))
    return run


@pytest.mark.parametrize("minutes", [0.5, 1, 3])
def test_a_run_stays_within_its_limit(minutes):
    clock = Clock()
    run = accepted(Budget(minutes, clock=clock), clock)
    assert clock.now <= minutes * 60
    assert ("fast", 32e9) in run and ("slow", 2e9) in run
    assert ("slow", 128e9) not in run  # would take 128 s


def test_without_a_limit_everything_runs_in_the_order_given():
    clock = Clock()
    budget = Budget(clock=clock)
    assert len(accepted(budget, clock)) == 8
    assert budget.order(SECONDS_PER_FLOP, str, 1e12) == ["slow", "fast"]
    assert budget.seconds == 1.5


def test_the_fastest_come_first_under_a_limit():
    budget = Budget(3)
    budget.record("slow", 1e9, call_s=2, spent_s=2)
    budget.record("fast", 1e9, call_s=1, spent_s=1)
    assert budget.order(["slow", "new", "fast", "ours"], str, 4e9) == ["ours", "new", "fast", "slow"]


def test_compilation_counts_once_and_small_calls_not_at_all():
    clock = Clock()
    budget = Budget(1, clock=clock)
    budget.record("compiled", 1e9, call_s=0.1, spent_s=20.1)
    clock.now = 20
    assert "20.8 s expected, 37 s of --minutes 1 left" in budget.refusal("compiled", 4e9)
    budget.record("small", 1e6, call_s=1, spent_s=1)
    assert budget.refusal("small", 1e9) == ""


def test_nothing_begins_after_the_end():
    clock = Clock()
    budget = Budget(1, clock=clock)
    clock.now = 61
    assert "0 s of --minutes 1 left" in budget.refusal("new", 1)
    assert budget.seconds == 0
