"""The stages of our kernels in ``benchmarks.device_check``, for each backend: its numbers on a GPU, then its times.

What is checked: ``kernel_checks.py``. What is measured: ``kernel_bench.py``, ``kernel_cases.py``; how:
``microbench.py``; the backends: ``kernel_backend.py``. No backend is imported before it is known that there is a GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeoutError
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.device_check import NotRun, StageRun

if TYPE_CHECKING:
    from benchmarks.kernel_backend import KernelBackend
    from benchmarks.microbench import Row

MOST_WORKERS = 10  # processes that compile; each has a GPU context of about 0.5 GB
WARM_SIZE = 8192  # of square products
COMPILE_PART = 0.45  # of the time of the microbenchmarks goes to compiling beforehand, at most


def need_gpu(run: StageRun) -> None:
    """Raises NotRun where torch sees no GPU and it is no dry run."""
    import torch

    if not run.dry_run and not torch.cuda.is_available():
        raise NotRun("no GPU")


def need_cuda_backend(run: StageRun) -> None:
    """Raises NotRun where the CUDA backend does not run on the GPU; keeps how it was built."""
    need_gpu(run)
    from vitq_kernels.ops import cuda

    if run.dry_run:
        run.keep(on_a_gpu=f"needs vitq_kernels._cuda; here: {cuda.state()}")
        return

    reason = cuda.unavailable("cuda")
    if reason:
        raise NotRun(reason)
    run.keep(extension=cuda.state())


def triton_correctness(run: StageRun) -> None:
    """Every case of the tests, every tile, a stream, a graph and real sizes, on the GPU."""
    need_gpu(run)
    from benchmarks.triton_backend import TRITON

    correctness(run, TRITON)


def triton_microbenchmarks(run: StageRun) -> None:
    """Times of the Triton kernels at ViT-B/16's sizes beside cuBLAS, SDPA and torch's own ops."""
    need_gpu(run)
    import triton

    from benchmarks.triton_backend import TRITON

    microbenchmarks(run, TRITON, triton=triton.__version__)


def cuda_correctness(run: StageRun) -> None:
    """As for Triton, and 4-bit products where the GPU has them."""
    need_cuda_backend(run)
    from benchmarks.cuda_backend import CUDA

    correctness(run, CUDA)


def cuda_microbenchmarks(run: StageRun) -> None:
    """As for Triton, and beside what ``triton_microbenchmarks`` measured."""
    need_cuda_backend(run)
    from benchmarks.cuda_backend import CUDA
    from benchmarks.kernel_targets import over_triton

    try:
        microbenchmarks(run, CUDA)
    finally:
        run.keep(over_triton=over_triton(run.data.get("rows", []), kept_rows(run, "triton_microbenchmarks")))


def kernel_backends(run: StageRun) -> list[KernelBackend]:
    """Those of our own kernels that run on the GPU, the hand-written one first; in a dry run its stand-in."""
    from benchmarks.cuda_backend import CUDA
    from benchmarks.triton_backend import TRITON
    from vitq_kernels.ops.backends import BACKENDS

    if run.dry_run:
        from benchmarks.dry_run import stand_in

        return [stand_in(CUDA)]
    return [b for b in (CUDA, TRITON) if BACKENDS[b.name].why_not("linear_codes", "cuda") is None]


def kept_data(run: StageRun, stage: str) -> dict[str, Any]:
    """What a stage of the same ``device.json`` has kept, in this call or an earlier one."""
    try:
        kept = json.loads((run.path.parent / "device.json").read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = kept.get(stage, {}).get("data", {})
    return found


def kept_rows(run: StageRun, stage: str) -> list[Row]:
    """What a stage has measured."""
    found: list[Row] = kept_data(run, stage).get("rows", [])
    return found


def correctness(run: StageRun, backend: KernelBackend) -> None:
    """Checks a backend on the GPU."""
    from benchmarks.kernel_checks import Checks

    if run.dry_run:
        from benchmarks.dry_run import dry_correctness

        dry_correctness(run, backend)
        return

    def spread(function: Callable[[Any], str], tasks: Sequence[Any], reserve_s: float) -> Iterator[tuple[Any, str]]:
        return in_processes(function, tasks, run.left_s - reserve_s)

    Checks(run, backend).everything(spread)


def microbenchmarks(run: StageRun, backend: KernelBackend, **versions: str) -> None:
    """Times a backend's kernels on the GPU."""
    if run.dry_run:
        from benchmarks.dry_run import dry_microbenchmarks

        dry_microbenchmarks(run, backend)
        return
    import torch

    from benchmarks.ceilings import products
    from benchmarks.device_plots import speedups_plot
    from benchmarks.kernel_bench import Bench, compile_one, compile_tasks, plan, tile_plan
    from benchmarks.microbench import REPLAYS, GraphTimer, clocks
    from vitq_kernels.roofline import peaks_of

    properties = torch.cuda.get_device_properties(0)
    peaks = peaks_of(properties.name)
    run.keep(
        gpu=properties.name,
        l2_bytes=properties.L2_cache_size,
        peaks=str(peaks),
        torch=torch.__version__,
        **versions,
        timing=f"CUDA graphs of many calls, median of {REPLAYS} replays; cold: buffers rotate past L2",
    )
    cases = plan(backend.has_4bit_products(backend.gpu("cuda")))
    tiled = tile_plan(cases)
    if backend.compiles:
        start, failures = time.monotonic(), []
        compile_task, tasks = partial(compile_one, backend=backend), compile_tasks(cases, tiled, backend)
        # Waits for what is being compiled when the time is over: nothing else may use the GPU while it is timed.
        for _, why in in_processes(compile_task, tasks, COMPILE_PART * run.left_s, wait=True):
            failures += [why] if why else []
        run.keep(compile_s=round(time.monotonic() - start, 1), compile_failures=failures[:5])

    timer = GraphTimer()
    for product in products("cuda", WARM_SIZE):  # about a second of work: an idle GPU has low clocks
        product.row(timer)
    run.keep(clocks_before=clocks())
    bench = Bench(run, backend, "cuda", timer, peaks, properties.L2_cache_size)
    try:
        bench.measure(cases, tiled)
    finally:
        means = run.data.get("speedups", [])
        plots = speedups_plot(means, f"{backend.name}_microbenchmarks", run.path.parent)
        run.keep(clocks_after=clocks(), plots=plots)


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
