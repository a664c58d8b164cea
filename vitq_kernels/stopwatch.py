"""Times of several calls in one run, fairly: they take turns, and each is first as often as the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

Call = Callable[[], object]


def turns(count: int, rounds: int) -> Iterator[list[int]]:
    """The order of ``count`` calls in each round: a rotation, so that no call always follows the same state.

    What slows a machine for a while (another process, a clock that falls as the chip warms) then meets all of them.
    """
    for number in range(rounds):
        yield [(number + place) % count for place in range(count)]


def waiter(device: str) -> Callable[[], None]:
    """What waits until a device has done what was asked of it."""
    if torch.device(device).type == "cuda":
        return partial(torch.cuda.synchronize, device)
    return lambda: None


def wall_times_us(
    calls: Sequence[Call],
    rounds: int,
    wait: Callable[[], None] = lambda: None,
    now_ns: Callable[[], int] = time.perf_counter_ns,
) -> list[list[float]]:
    """Wall time in microseconds of each call in each round, from an idle device until the result is there.

    Args:
        calls: what takes turns; each was called before, so that nothing is compiled or allocated for the first time.
        rounds: how often each is called.
        wait: returns when the device is idle.
        now_ns: the clock.
    """
    found: list[list[float]] = [[] for _ in calls]
    for order in turns(len(calls), rounds):
        for index in order:
            wait()
            start = now_ns()
            calls[index]()
            wait()
            found[index].append((now_ns() - start) / 1e3)
    return found


def percentile(samples: Sequence[float], part: float) -> float:
    """The sample below which ``part`` of them lie, in 0..1 (nearest rank)."""
    ordered = sorted(samples)
    return ordered[round(part * (len(ordered) - 1))]
