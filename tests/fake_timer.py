"""What stands in for time and for kernels in tests of benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.microbench import Timing


class FakeTimer:
    """Runs what it is given once and says 1, 2, 3, ... microseconds."""

    def __init__(self) -> None:
        self.called: list[int] = []  # how many calls took turns

    def __call__(self, calls: Sequence[Callable[[], object]]) -> Timing:
        for call in calls[:2]:
            call()
        self.called.append(len(calls))
        us = float(len(self.called))
        return Timing(us, 0.9 * us, 1.1 * us)

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Sequence[Callable[[], object]]:
        return calls

    def together(self, prepared: Sequence[Sequence[Callable[[], object]]]) -> list[list[float]]:
        return [[self(calls).us] for calls in prepared]


def off(outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """What a wrong kernel gives: codes off by one, reals by a percent; of several outputs the last."""
    if isinstance(outputs, tuple):
        return (*outputs[:-1], off(outputs[-1]))
    return outputs.bitwise_xor(1) if outputs.dtype == torch.int8 else outputs * 1.01
