"""Candidates take turns, and a time is what the clock says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from benchmarks.clock_timer import FEWEST_ROUNDS, ClockTimer
from vitq_kernels.stopwatch import percentile, turns, wall_times_us


@pytest.mark.parametrize(("count", "rounds"), [(1, 3), (2, 4), (3, 9), (5, 20)])
def test_everyone_is_first_as_often(count: int, rounds: int) -> None:
    orders = list(turns(count, rounds))
    assert all(sorted(order) == list(range(count)) for order in orders)
    firsts = Counter(order[0] for order in orders)
    assert max(firsts.values()) - min(firsts.values()) <= 1
    assert len(firsts) == min(count, rounds)


class Machine:
    """A clock that calls advance, and a device that works until it is waited for."""

    def __init__(self) -> None:
        self.ns, self.queued_ns, self.called = 0, 0, ""

    def now(self) -> int:
        return self.ns

    def wait(self) -> None:
        self.ns, self.queued_ns = self.ns + self.queued_ns, 0

    def call(self, name: str, ns: int) -> Callable[[], None]:
        def run() -> None:
            self.called += name
            self.ns += 1  # of the host
            self.queued_ns += ns

        return run


def test_a_time_waits_for_the_device_and_charges_no_other() -> None:
    machine = Machine()
    calls = [machine.call("a", 1_999), machine.call("b", 4_999)]
    assert wall_times_us(calls, 3, machine.wait, machine.now) == [[2.0] * 3, [5.0] * 3]
    assert machine.called == "abbaab"


@pytest.mark.parametrize(("part", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.95, 5.0), (1.0, 5.0)])
def test_percentiles_are_samples(part: float, expected: float) -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], part) == expected


@pytest.mark.parametrize(
    ("us", "budget_s", "count", "rounds"),
    [(10.0, 1.0, 100, 20), (5e3, 1.0, 1, 20), (1e5, 1.0, 1, 10), (1e6, 1.0, 1, FEWEST_ROUNDS)],
    ids=["short", "long enough", "less often", "as seldom as may be"],
)
def test_a_cpu_sample_is_long_enough(
    us: float, budget_s: float, count: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []

    def fake(calls: list[Callable[[], None]], rounds: int) -> list[list[float]]:
        found = []
        for call in calls:
            before = len(called)
            call()
            found.append([us * (len(called) - before)] * rounds)
        return found

    monkeypatch.setattr("benchmarks.clock_timer.wall_times_us", fake)
    timer = ClockTimer(rounds=20, budget_s=budget_s)
    prepared = timer.prepare([lambda: called.append(0), lambda: called.append(1)])
    assert prepared.count == count
    (samples,) = timer.together([prepared])
    assert samples == [pytest.approx(us)] * rounds
    assert called[-2:] == ([0, 1] if count > 1 else [0, 0])
    assert timer(prepared.calls).us == pytest.approx(us)
