"""How a kernel is launched: on the current stream of the tensors' device, with the options that keep its numbers.

One door for all kernels of this backend. ``recorded_launches`` keeps what would have been launched instead of launching
it, which is how every shipped configuration is compiled ahead of time on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

OLDEST_TRITON = (3, 4)  # comes with torch 2.8; earlier ones refuse a condition that is half decided at compile time
if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
    raise ImportError(f"it needs triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or later, found {triton.__version__}")

# Read by triton when a kernel is defined, so it holds for the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@dataclass(frozen=True)
class Device:
    """What a launcher must know of a GPU to choose a configuration."""

    cc: int  # compute capability, 80 for 8.0
    sms: int  # streaming multiprocessors
    name: str = ""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what ``kernel[grid](*args, **named)`` was or would be."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    named: dict[str, Any]  # arguments by name, num_warps and num_stages


@dataclass
class _Recording:
    device: Device
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("vitq_triton_recording", default=None)


@contextlib.contextmanager
def recorded_launches(device: Device) -> Iterator[list[Launch]]:
    """Inside the ``with`` block nothing is launched: the launches for ``device`` are collected in the list."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(device, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def recording() -> bool:
    """Whether launches are recorded, not made."""
    return _recording.get() is not None


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count, properties.name)


def device_of(tensor: Tensor) -> Device:
    """The device that ``tensor`` lies on. The interpreter stands for an A100: its tiles are those of the oldest GPU."""
    recorder = _recording.get()
    if recorder is not None:
        return recorder.device
    return _cuda_device(tensor.device.index) if tensor.is_cuda else Device(80, 108, "interpreter")


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, /, *args: Any, **named: Any) -> None:
    """Launches ``kernel`` where ``like`` lies; an empty grid is no launch.

    ``a*b + c`` is never contracted: where one rounding is meant the kernels write ``fma``, and where they do not, the
    interpreter and every GPU round twice.
    """
    if 0 in grid:
        return
    recorder = _recording.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, args, named))
        return
    elsewhere = like.is_cuda and like.device.index != torch.cuda.current_device()
    with torch.cuda.device(like.device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=False, **named)
