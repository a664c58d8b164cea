"""Times of single kernels, and what is said of a time: rate, part of peak, speedup, means, targets.

A ``Timer`` takes calls that do the same work on different buffers and gives the time of one. ``GraphTimer`` is that of
a GPU: events around single calls would measure Triton's launcher, so a CUDA graph of many calls is timed.
``clock_timer.py`` has that of a CPU.
"""

from __future__ import annotations

import math
import statistics
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from vitq_kernels.stopwatch import Call, percentile, turns

Row = dict[str, Any]
REPLAYS = 20
SHORTEST_GRAPH_US = 400.0  # what launching a graph leaves of a gap, a few us, is below 1% then
MOST_CALLS = 400  # in a graph
FEWEST_CALLS = 10
ROTATE = 3.0  # cold: the buffers of all calls are this many times the L2 cache
MOST_BUFFERS = 128


@dataclass(frozen=True)
class Timing:
    """Time of one call: median and percentiles over replays, each of which is a mean over the calls of a graph."""

    us: float
    us_p20: float
    us_p80: float


class Timer(Protocol):
    """Times calls that do the same work on different buffers."""

    def __call__(self, calls: Sequence[Call]) -> Timing:
        """The time of one call."""

    def prepare(self, calls: Sequence[Call]) -> Any:
        """Warms up; what ``together`` takes. What cannot be timed raises here."""

    def together(self, prepared: Sequence[Any]) -> list[list[float]]:
        """Microseconds of a call of each candidate in each round; candidates take turns in a round."""


def timing(samples: Sequence[float]) -> Timing:
    """Median and percentiles of microseconds."""
    return Timing(statistics.median(samples), percentile(samples, 0.2), percentile(samples, 0.8))


class GraphTimer:
    """Replays a CUDA graph of many calls that take turns; outputs of as many calls as take turns are kept apart."""

    def __init__(self, replays: int = REPLAYS) -> None:
        self.replays = replays

    def __call__(self, calls: Sequence[Call]) -> Timing:
        """The time of one call."""
        graph, count = self.prepare(calls)
        return timing([us / count for us in self.replay([graph] * self.replays)])

    def together(self, prepared: Sequence[tuple[torch.cuda.CUDAGraph, int]]) -> list[list[float]]:
        """As of ``Timer``. Before each replay that counts one does not: L2 holds what another candidate left there."""
        order = [index for turn in turns(len(prepared), self.replays) for index in turn]
        times = self.replay([prepared[index][0] for index in order for _ in range(2)])[1::2]
        found: list[list[float]] = [[] for _ in prepared]
        for index, us in zip(order, times, strict=True):
            found[index].append(us / prepared[index][1])
        return found

    def prepare(self, calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
        """A graph that takes long enough, and its number of calls."""
        self.warm_up(calls)
        count = max(len(calls), FEWEST_CALLS)
        graph = self.capture(calls, count)
        self.replay([graph] * 2)
        total_us = min(self.replay([graph] * 3))
        if total_us < SHORTEST_GRAPH_US and count < MOST_CALLS:
            count = min(MOST_CALLS, math.ceil(count * SHORTEST_GRAPH_US / max(total_us, 1.0)))
            graph = self.capture(calls, count)
            self.replay([graph] * 2)
        return graph, count

    @staticmethod
    def warm_up(calls: Sequence[Call]) -> None:
        """Compiles, makes handles and workspaces: not possible while capturing."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    @staticmethod
    def capture(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
        """A graph of ``count`` calls."""
        graph, outputs = torch.cuda.CUDAGraph(), deque[object](maxlen=len(calls) - 1)
        with torch.cuda.graph(graph):
            for i in range(count):
                outputs.append(calls[i % len(calls)]())
        return graph

    @staticmethod
    def replay(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
        """Microseconds of each replay; all are queued at once, so that the GPU does not wait for the host."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(graphs) + 1)]
        events[0].record()
        for graph, event in zip(graphs, events[1:], strict=True):
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]


def storage_bytes(values: Sequence[Any]) -> int:
    """Bytes of the tensors' storages in (nested) values, each once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for entry in value for tensor in _tensors(entry)] if isinstance(value, (list, tuple)) else []


def copied(value: Any, storages: dict[int, Any] | None = None) -> Any:
    """A copy of (nested) values: strides stay, and views of one storage are views of one storage again."""
    storages = {} if storages is None else storages
    if isinstance(value, (list, tuple)):
        return type(value)(copied(entry, storages) for entry in value)
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in storages:
        storages[storage.data_ptr()] = storage.clone()
    new = storages[storage.data_ptr()]
    return value.new_empty(0).set_(new, value.storage_offset(), value.shape, value.stride())


def rotated(function: Callable[..., object], arguments: Sequence[Any], l2_bytes: int) -> list[Call]:
    """Calls on as many copies of the arguments as push each other, with their outputs, out of L2."""
    each = storage_bytes(arguments) + storage_bytes([function(*arguments)])
    count = max(2, min(MOST_BUFFERS, math.ceil(ROTATE * l2_bytes / max(1, each))))
    copies = [arguments, *(copied(arguments) for _ in range(count - 1))]
    return [lambda given=given: function(*given) for given in copies]


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def speedups(rows: Sequence[Row]) -> list[Row]:
    """Geometric means of ``speedup_x`` by op, batch, data and baseline, with cold and with hot buffers."""
    result = []
    compared = [row for row in rows if row["speedup_x"] is not None]
    keys = dict.fromkeys(tuple(row[key] for key in ("op", "batch", "data", "baseline")) for row in compared)
    for op, batch, data, baseline in keys:
        group = select(compared, op=op, batch=batch, data=data, baseline=baseline)
        means = {
            f"{cache}_x": geometric_mean([row["speedup_x"] for row in select(group, cache=cache)])
            for cache in ("cold", "hot")
        }
        cases = len({(row["case"], row["bits_w"]) for row in group})
        result.append({"op": op, "batch": batch, "data": data, "baseline": baseline, "cases": cases, **means})
    return result


def target(name: str, value: float | None, bound: float, at_least: bool) -> Row:
    """A line of the table of targets."""
    met = "not measured" if value is None else "met" if (value >= bound if at_least else value <= bound) else "not met"
    return {"target": name, "bound": f"{'>=' if at_least else '<='} {bound}", "measured": value, "result": met}


def clocks() -> str:
    """SM clock, power and temperature now, as nvidia-smi has them."""
    query = "clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known"
