"""A dry run of the stages of our kernels: their code on a CPU, tiny sizes, the cpu backend in place of the kernels.

What it cannot walk, it names: streams, graphs, compilers. Tiles are chosen by the backend's own model all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from benchmarks.clock_timer import quick_timer
from benchmarks.device_check import StageRun
from benchmarks.device_plots import speedups_plot
from benchmarks.kernel_backend import KernelBackend
from benchmarks.kernel_bench import Bench, compile_one, compile_tasks, linear_cases, plan, tile_plan
from benchmarks.kernel_cases import MIXED, AnyCase, AttentionCase, LinearCase
from benchmarks.kernel_checks import ALL_CASES, Block, Checks, Task, tile_tasks
from benchmarks.row_cases import RowCase

BATCH, TOKENS, CHANNELS, HEADS = 2, 9, 16, 2
LAYER = LinearCase("qkv", "linear_codes", 1, 17, 24, 64, (4,))
L2_BYTES = 1000


def stand_in(backend: KernelBackend) -> KernelBackend:
    """A backend's own tiles and plans, with the cpu backend's ops."""
    return replace(
        backend, name="cpu", compiles=False, ways_to_launch=dict.fromkeys(backend.ways_to_launch, nullcontext)
    )


def dry_correctness(run: StageRun, backend: KernelBackend) -> None:
    """A case of each op, a block, and the list of the tiles."""
    tiles = tile_tasks(backend, "cpu")
    run.keep(on_a_gpu=f"{len(ALL_CASES)} cases, {len(tiles)} tiles on {len(backend.shapes)} shapes, a stream, a graph")
    checks = Checks(run, stand_in(backend), "cpu")
    first = {case.op: index for index, case in reversed(list(enumerate(ALL_CASES)))}

    def here(function: Callable[[Task], str], tasks: Sequence[Task], reserve_s: float) -> Iterator[tuple[Task, str]]:
        return ((task, function(task)) for task in tasks)

    checks.spread(here, [("case", index) for index in first.values()], 0.0)
    block = Block("cpu", 1, TOKENS, HEADS, CHANNELS // HEADS)
    checks.part("block", "eager", lambda: "" if block(block.input(1)).isfinite().all() else "not finite")
    for case in (LAYER, AttentionCase(BATCH, TOKENS, HEADS, CHANNELS // HEADS)):
        checks.part("sizes", f"{case.op} {case.sizes}", lambda case=case: checks.check_real(case))
    checks.conclude()


def dry_microbenchmarks(run: StageRun, backend: KernelBackend) -> None:
    """Every kind of case with its baselines, and the tiles of a layer."""
    cases = plan(backend.has_4bit_products(backend.gpu("cpu")))
    tiled = tile_plan(cases)
    tasks = compile_tasks(cases, tiled, backend, "cpu")
    run.keep(on_a_gpu=f"{len(cases)} cases, tiles of {len(tiled)} layers; {len(tasks)} to compile beforehand")
    tiny: list[AnyCase] = [
        *linear_cases(BATCH, TOKENS, CHANNELS, widths=((8,), MIXED)),
        AttentionCase(BATCH, TOKENS, HEADS, CHANNELS // HEADS),
        *(RowCase(op, BATCH, BATCH * TOKENS, CHANNELS) for op in ("layernorm", "quantize")),
    ]
    here = stand_in(backend)
    failures = [why for case in tiny for why in [compile_one((case, None), here, "cpu")] if why]
    run.keep(compile_failures=failures)
    Bench(run, here, "cpu", quick_timer(), None, L2_BYTES).measure(tiny, [LAYER])
    run.keep(plots=speedups_plot(run.data["speedups"], f"{backend.name}_microbenchmarks", run.path.parent))
