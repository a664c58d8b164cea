"""The most memory that a call holds at once, on a GPU by torch's allocator, on a CPU by torch's profiler."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")
Event = Mapping[str, Any]
CPU = 0  # as a trace writes the type of a device


def peak_bytes_of(call: Callable[[], object], device: str) -> int:
    """Bytes that a call allocates and holds at its worst moment, beyond what there was before it.

    What compiled code or a backend allocates counts like any tensor; what it keeps from call to call, such as the pool
    of a captured graph, does not.
    """
    if torch.device(device).type != "cuda":
        return max(running_bytes(_traced(call)[1]))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def made_with_bytes(make: Callable[[], T], device: str) -> tuple[T, int]:
    """Makes something, and says how many bytes stay allocated for it: weights, buffers, pools of graphs.

    On a GPU they are counted as its allocator reserves them, in blocks of 2 MB and more.
    """
    if torch.device(device).type != "cuda":
        made, events = _traced(make)
        return made, max(0, running_bytes(events)[-1])
    before = _reserved(device)
    made = make()
    return made, max(0, _reserved(device) - before)


def _reserved(device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _traced(call: Callable[[], T]) -> tuple[T, list[Event]]:
    """The result of a call, and the events that the profiler recorded meanwhile."""
    with silent_profiler([ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events: list[Event] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return result, events


def running_bytes(events: Iterable[Event]) -> list[int]:
    """What is held, from 0 on, after each of a trace's events that allocate or free on the CPU, in order of time."""
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == CPU]
    memory.sort(key=lambda event: event["ts"])
    return list(accumulate((event["args"]["Bytes"] for event in memory), initial=0))


@contextlib.contextmanager
def silent_profiler(activities: Iterable[ProfilerActivity], profile_memory: bool = False) -> Iterator[profile]:
    """torch's profiler around the ``with`` block, without what it writes to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # a machine without GPU is told so at every start
    profiler = profile(activities=list(activities), profile_memory=profile_memory)
    with _silent_native_stderr():
        profiler.start()
    try:
        yield profiler
    finally:
        with _silent_native_stderr():
            profiler.stop()


@contextlib.contextmanager
def _silent_native_stderr() -> Iterator[None]:
    """Some builds of the profiler write what they do to file descriptor 2."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
