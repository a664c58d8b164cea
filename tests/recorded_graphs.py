"""CUDA graphs as ``vitq_kernels.buckets`` uses them, on a CPU: ops are recorded in a capture and repeated by a replay.

What this can show: static buffers, what is captured when, who waits for whom. What a GPU does with it, it cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Stream:
    """Its waits and records go into the log."""

    log: list[tuple[Any, ...]]
    name: str

    def wait_event(self, event: Event) -> None:
        self.log.append(("wait", self.name))

    def wait_stream(self, other: Stream) -> None:
        self.log.append(("wait for", self.name, other.name))


@dataclass
class Event:
    """A point on a stream."""

    log: list[tuple[Any, ...]]

    def record(self, stream: Stream) -> None:
        self.log.append(("record", stream.name))


class RecordedGraph(TorchDispatchMode):
    """Executes and keeps every op of a capture; ``replay`` writes their results where the capture's results lie."""

    def __init__(self, cuda: RecordedCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        self.cuda.log.append(("replay", self.cuda.current.name))
        for func, args, kwargs, results in self.calls:
            for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@dataclass
class RecordedCuda:
    """The parts of ``torch.cuda``."""

    log: list[tuple[Any, ...]] = field(default_factory=list)
    streams: int = 0

    def __post_init__(self) -> None:
        self.current = Stream(self.log, "default")

    def new_stream(self) -> Stream:
        self.streams += 1
        return Stream(self.log, f"side {self.streams}")

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: RecordedGraph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.log.append(("capture", stream.name, pool, capture_error_mode))
        with self.stream(stream), graph:
            yield

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Takes the place of ``torch.cuda``'s."""
        patch.setattr("vitq_kernels.buckets.GRAPHED", ("cpu",))
        for name, fake in {
            "Stream": self.new_stream,
            "Event": lambda: Event(self.log),
            "CUDAGraph": lambda: RecordedGraph(self),
            "graph": self.graph,
            "graph_pool_handle": lambda: "the pool",
            "current_stream": lambda: self.current,
            "stream": self.stream,
            "device": lambda device: contextlib.nullcontext(),
        }.items():
            patch.setattr(torch.cuda, name, fake)
