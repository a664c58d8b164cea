"""A case measured beside its baselines in one run: a wrong kernel is refused, candidates take turns.

What a timer is: ``microbench.py``; what a case is: ``kernel_cases.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.built_case import call_arguments, why_wrong
from benchmarks.clock_timer import ClockTimer
from benchmarks.device_check import query_gpu
from benchmarks.device_stages import cpu_name
from benchmarks.kernel_cases import AnyCase
from benchmarks.microbench import GraphTimer, Timer, rotated
from vitq_kernels.ops import use_backend
from vitq_kernels.roofline import Peaks, peaks_of


class WrongKernelError(AssertionError):
    """A kernel whose numbers are not the reference's; it is not timed."""


@dataclass(frozen=True)
class Setting:
    """Where and how cases are measured."""

    device: str  # "cpu" or "cuda"
    name: str  # of the GPU, or of the CPU with its threads
    timer: Timer
    peaks: Peaks | None
    l2_bytes: int
    caches: tuple[str, ...]  # "cold": buffers come from memory; "hot": they are the same each time
    driver: str = ""


@dataclass(frozen=True)
class Measured:
    """Microseconds of a call in each round, by cache and candidate; ours is first, under its backend's name."""

    case: AnyCase
    backend: str
    samples: dict[str, dict[str, list[float]]]
    skipped: dict[str, str] = field(default_factory=dict)  # baselines that cannot run here, with why


def setting_here(budget_s: float = 10.0) -> Setting:
    """The first GPU, else the CPU, where a case takes so many seconds at most beyond the fewest rounds."""
    if torch.cuda.is_available():
        properties, gpu = torch.cuda.get_device_properties(0), query_gpu()
        driver = gpu[1] if gpu else ""
        peaks = peaks_of(properties.name)
        return Setting("cuda", properties.name, GraphTimer(), peaks, properties.L2_cache_size, ("cold", "hot"), driver)
    name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return Setting("cpu", name, ClockTimer(budget_s=budget_s), None, l2_bytes=0, caches=("hot",))


def measure(case: AnyCase, backend: str, setting: Setting) -> Measured:
    """Times a backend on a case and then, in turns with it, the case's baselines.

    Raises:
        WrongKernelError: its outputs are not the reference's, or it does not run; nothing was timed.
    """
    built = case.build(setting.device)
    why = why_wrong(built, backend, setting.device)
    if why:
        raise WrongKernelError(f"{case.op} {case.case} on {backend} is not timed, its numbers are wrong: {why}")
    samples: dict[str, dict[str, list[float]]] = {}
    skipped: dict[str, str] = {}
    with use_backend(backend):
        op = getattr(torch.ops.vitq, case.op)
        candidates = {backend: (op, call_arguments(built, setting.device)), **case.baselines(built)}
        for cache in setting.caches:
            prepared = {}
            for name, (function, arguments) in candidates.items():
                if name in skipped:
                    continue
                try:
                    prepared[name] = _prepared(function, arguments, cache, setting)
                except RuntimeError as error:  # SDPA says so where a backend does not take the shape or the device
                    if name == backend:
                        raise
                    skipped[name] = (str(error).splitlines() or [type(error).__name__])[0][:300]
            samples[cache] = dict(zip(prepared, setting.timer.together(list(prepared.values())), strict=True))
    return Measured(case, backend, samples, skipped)


def _prepared(function: Callable[..., object], arguments: tuple[Any, ...], cache: str, setting: Setting) -> Any:
    if cache == "cold":
        return setting.timer.prepare(rotated(function, arguments, setting.l2_bytes))
    return setting.timer.prepare([lambda: function(*arguments)])
