"""Times on a CPU, as ``microbench.GraphTimer`` has them on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.microbench import REPLAYS, Timing, timing
from vitq_kernels.stopwatch import Call, wall_times_us

FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Repeated:
    """Calls of a candidate, as many of them as make a sample."""

    calls: Sequence[Call]
    count: int
    us: float  # that the first of them took, warm

    def __call__(self) -> None:
        """Runs a sample."""
        for i in range(self.count):
            self.calls[i % len(self.calls)]()


class ClockTimer:
    """Wall time on a CPU: many calls a sample where one is short, fewer samples where one is long."""

    def __init__(self, rounds: int = REPLAYS, shortest_us: float = 1000.0, budget_s: float = 10.0) -> None:
        self.rounds, self.shortest_us, self.budget_s = rounds, shortest_us, budget_s

    def __call__(self, calls: Sequence[Call]) -> Timing:
        """The time of one call."""
        return timing(self.together([self.prepare(calls)])[0])

    def prepare(self, calls: Sequence[Call]) -> Repeated:
        """Warms up, and takes a first time."""
        calls[0]()
        ((us,),) = wall_times_us(calls[:1], 1)
        return Repeated(calls, max(1, math.ceil(self.shortest_us / max(us, 0.1))), us)

    def together(self, prepared: Sequence[Repeated]) -> list[list[float]]:
        """As of ``Timer``; at least FEWEST_ROUNDS, however long they take."""
        round_us = sum(one.us * one.count for one in prepared)
        rounds = max(min(FEWEST_ROUNDS, self.rounds), min(self.rounds, int(self.budget_s * 1e6 / max(round_us, 1.0))))
        samples = wall_times_us(prepared, rounds)
        return [[us / one.count for us in times] for one, times in zip(prepared, samples, strict=True)]


def quick_timer() -> ClockTimer:
    """Of a dry run: calls everything, and takes no care of the time."""
    return ClockTimer(rounds=1, shortest_us=1.0, budget_s=0.0)
