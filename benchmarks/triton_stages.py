"""The Triton backend's stages of ``benchmarks.device_check``: its numbers on a GPU, then its times.

What is checked: ``triton_checks.py``. What is measured: ``triton_bench.py``, ``triton_cases.py``; how:
``microbench.py``. Nothing here imports Triton before it is known that there is a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeoutError
from typing import Any

from benchmarks.device_check import NotRun, StageRun

MOST_WORKERS = 10  # processes that compile; each has a GPU context of about 0.5 GB
COMPILE_PART = 0.45  # of the time of the microbenchmarks goes to compiling beforehand, at most


def need_gpu() -> None:
    """Raises NotRun where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NotRun("no GPU")


def triton_correctness(run: StageRun) -> None:
    """Every case of the tests, every tile, a stream, a graph and real sizes, on the GPU."""
    need_gpu()
    from benchmarks.triton_checks import Checks

    def spread(function: Callable[[Any], str], tasks: Sequence[Any], reserve_s: float) -> Iterator[tuple[Any, str]]:
        return in_processes(function, tasks, run.left_s - reserve_s)

    Checks(run).everything(spread)


def triton_microbenchmarks(run: StageRun) -> None:
    """Times of the kernels at ViT-B/16's sizes beside cuBLAS, SDPA and torch's own ops."""
    need_gpu()
    import torch
    import triton

    from benchmarks.microbench import REPLAYS, GraphTimer, ceilings, clocks, peaks_of
    from benchmarks.triton_bench import Bench, compile_one, compile_tasks, plan, tile_plan

    properties = torch.cuda.get_device_properties(0)
    peaks = peaks_of(properties.name)
    run.keep(
        gpu=properties.name,
        l2_bytes=properties.L2_cache_size,
        peaks=str(peaks),
        torch=torch.__version__,
        triton=triton.__version__,
        timing=f"CUDA graphs of many calls, median of {REPLAYS} replays; cold: buffers rotate past L2",
    )
    cases = plan()
    tiled = tile_plan(cases)
    start, failures = time.monotonic(), []
    # Waits for what is being compiled when the time is over: nothing else may use the GPU while it is timed.
    for _, why in in_processes(compile_one, compile_tasks(cases, tiled), COMPILE_PART * run.left_s, wait=True):
        failures += [why] if why else []
    run.keep(compile_s=round(time.monotonic() - start, 1), compile_failures=failures[:5])

    timer = GraphTimer()
    ceilings(timer, "cuda")  # about a second of work: an idle GPU has low clocks
    run.keep(clocks_before=clocks(), ceilings=ceilings(timer, "cuda"))
    bench = Bench(run, "triton", "cuda", timer, peaks, properties.L2_cache_size)
    try:
        bench.measure(cases, tiled)
    finally:
        run.keep(clocks_after=clocks())


def in_processes(
    function: Callable[[Any], str],
    tasks: Sequence[Any],
    limit_s: float,
    workers: int | None = None,
    wait: bool = False,
) -> Iterator[tuple[Any, str]]:
    """Yields (task, result) of ``function`` as they come from several processes, until ``limit_s`` is over.

    A process that dies takes the others with it: every task that did not come has that as its result. ``wait``: in the
    end, for what the processes have begun.
    """
    count = workers or max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2, len(tasks)))
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=one_thread)
    try:
        futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures, max(0.0, limit_s)):
            error = future.exception()
            yield futures[future], future.result() if error is None else f"{type(error).__name__}: {error}"
    except FuturesTimeoutError:
        pass  # what did not come is the caller's to name
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


def one_thread() -> None:
    """In a process of several: torch's own threads would fight over the cores."""
    import torch

    torch.set_num_threads(1)
