"""One job over the processes of torch.distributed, with exactly the numbers that one process gives.

Work is cut into the same pieces as in one process, each piece is done by one process, and what comes out is handed to
every process in the order of the pieces. Sums over it therefore round alike everywhere. The pieces themselves round
alike on equal machines with equal numbers of threads (torchrun sets OMP_NUM_THREADS=1 where it is not set).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process


def world_size() -> int:
    """Processes that share the job; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def in_order(items: Iterable[T], compute: Callable[[T], R]) -> Iterator[R]:
    """``map(compute, items)`` on every process, though each item is computed by one: item i by process i % size.

    Processes go round by round: each computes one item of a round, then all hand over what they have. Only one round is
    held. Every process must ask for all results.

    Args:
        items: the same ones on every process. Of a sequence a process takes its own items alone; an iterator is run
            through by every process.
        compute: its results travel by pickle, so tensors should be on the CPU.

    Raises:
        Exception: what ``compute`` raised, for the first item that failed, on every process.
    """
    indexed = isinstance(items, Sequence)
    todo: Iterator[Any] = iter(range(len(items)) if isinstance(items, Sequence) else items)
    while turn := list(islice(todo, world_size())):
        mine = turn[rank() : rank() + 1]
        result: tuple[list[R], Exception | None]
        try:
            result = [compute(items[i] if indexed else i) for i in mine], None  # type: ignore[index]
        except Exception as error:  # the others wait: they must hear of it
            if world_size() == 1:
                raise
            result = [], error
        for values, failed in _gathered(result):
            if failed is not None:
                raise failed
            yield from values


def from_first(make: Callable[[], R]) -> R:
    """What ``make`` returns on the first process, on every process; ``make`` is called on the first alone."""
    return next(in_order([make], lambda call: call()))


def _gathered(value: R) -> list[R]:
    """The values of all processes, in order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def process_group() -> Iterator[None]:
    """The process group that torchrun describes in the environment; nothing where it does not, or where one exists.

    Process i of a machine gets its GPU i, as ``"cuda"``. Only results travel between processes, as Python objects, so
    the backend is gloo also beside GPUs. A group that a caller made with NCCL serves as well.
    """
    if not all(name in os.environ for name in TORCHRUN) or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
