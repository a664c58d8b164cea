"""Measures a backend of our own kernels on ViT-B/16: checks each kernel against the reference first, then times it.

The most valuable rows come first; what time does not allow is listed. ``timer`` and sizes are arguments, so that tests
run all of it without a GPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from benchmarks.built_case import Built, call_arguments, why_wrong
from benchmarks.device_check import CheckFailed, StageRun
from benchmarks.kernel_backend import KernelBackend, Problem, Tile
from benchmarks.kernel_cases import MIXED, AnyCase, AttentionCase, LinearCase
from benchmarks.kernel_targets import FOUR_BIT, WITH_NORM, four_bit, tile_choice
from benchmarks.microbench import Row, Timer, Timing, rotated, select, speedups
from benchmarks.row_cases import RowCase
from benchmarks.window_cases import window_cases
from vitq_kernels.ops import use_backend
from vitq_kernels.roofline import Peaks

TOKENS, CHANNELS, HEADS = 197, 768, 12  # ViT-B/16-224
BATCHES = (64, 8, 1)  # the most valuable first
WIDTHS = ((8,), (4,), (3,), MIXED, MIXED[:1])  # of weights; the widest of the mixed ones alone, to compare
BEST_TILES = 5
RESERVE_S = 10.0  # left when measuring stops
Task = tuple[AnyCase, Tile | None]


def linear_cases(
    batch: int,
    tokens: int = TOKENS,
    channels: int = CHANNELS,
    data: str = "uniform",
    widths: Sequence[tuple[int, ...]] = WIDTHS,
) -> list[LinearCase]:
    """The four layers at every width, the widths of one layer together."""
    c, m = channels, batch * tokens
    layers = (
        ("qkv", "linear_codes", 3 * c, c),
        ("proj", "linear_residual", c, c),
        ("fc1", "linear_gelu_codes", 4 * c, c),
        ("fc2", "linear_residual", c, 4 * c),
    )
    return [LinearCase(name, op, batch, m, n, k, bits, data) for name, op, n, k in layers for bits in widths]


def norm_cases(batch: int, tokens: int = TOKENS, channels: int = CHANNELS) -> list[LinearCase]:
    """The layers that write the residual stream, with the LayerNorm behind them."""
    op, m, n = "linear_residual_layernorm", batch * tokens, channels
    return [LinearCase(f"{name}{WITH_NORM}", op, batch, m, n, k, (8,)) for name, k in (("proj", n), ("fc2", 4 * n))]


def plan(with_4bit_products: bool = False) -> list[AnyCase]:
    """Every case of the stage, the most valuable first; W4A4 where it is another product than W4A8."""
    cases: list[AnyCase] = []
    for batch in BATCHES:
        cases += linear_cases(batch)
        if with_4bit_products:
            cases += linear_cases(batch, data=FOUR_BIT, widths=((4,),))
        cases += norm_cases(batch)
        cases += [AttentionCase(batch, s, HEADS, CHANNELS // HEADS) for s in (197, 577)]
        cases += window_cases(batch)
        cases += [RowCase(op, batch, batch * TOKENS, CHANNELS) for op in ("layernorm", "quantize")]
        if batch == BATCHES[0]:
            cases += linear_cases(batch, data="gaussian")
    return cases


def tile_plan(cases: Iterable[AnyCase]) -> list[LinearCase]:
    """The layers whose tiles are measured: the deepest and the widest product, unpacked and not; and with LayerNorm."""
    return [
        case
        for case in cases
        if isinstance(case, LinearCase)
        and (case.case in ("qkv", "fc2") or case.case.endswith(WITH_NORM))
        and case.widths in ((8,), (4,))
        and case.data == "uniform"
    ]


class Bench:
    """One run of the measurements; the rows are kept as they come."""

    def __init__(
        self, run: StageRun, backend: KernelBackend, device: str, timer: Timer, peaks: Peaks | None, l2_bytes: int
    ) -> None:
        self.run, self.backend, self.device, self.timer = run, backend, device, timer
        self.peaks, self.l2_bytes = peaks, l2_bytes
        self.gpu = backend.gpu(device)
        self.rows: list[Row] = []
        self.tile_rows: list[Row] = []
        self.wrong: list[Row] = []
        self.skipped: list[Row] = []
        self.left_out: list[str] = []
        self.baseline_us: dict[tuple[Any, ...], dict[str, list[Timing] | None]] = {}
        self.longest_s = 0.0

    def measure(self, cases: Sequence[AnyCase], tiled: Sequence[LinearCase]) -> None:
        """Runs every case and then the tiles of ``tiled``, as far as time goes.

        Raises:
            CheckFailed: a kernel gave wrong numbers or could not be timed, or time ran out.
        """
        self.run.keep(targets=[], speedups=[], tile_choice=[], wrong=[], skipped_baselines=[])
        for case in cases:
            self.in_time(_name(case), lambda case=case: self.case(case))
        for case in tiled:
            self.in_time(f"tiles of {_name(case)}", lambda case=case: self.tiles(case))
        reasons = [f"wrong: {', '.join(row['case'] for row in self.wrong)}"] if self.wrong else []
        if self.left_out:
            names = ", ".join(self.left_out)
            reasons.append(f"time ran out before {len(self.left_out)} of {len(cases) + len(tiled)}: {names}")
        if reasons:
            raise CheckFailed("; ".join(reasons))

    def in_time(self, name: str, step: Callable[[], None]) -> None:
        """Takes a step and keeps what there is, or writes down that there was no time for it."""
        if self.run.left_s < RESERVE_S + self.longest_s:
            self.left_out.append(name)
            self.run.keep(left_out=self.left_out)
            return
        start = time.monotonic()
        try:
            step()
        except Exception as error:  # such as a kernel that cannot be captured: the others are measured all the same
            self.wrong.append({"case": name, "why": f"{type(error).__name__}: {error}"[:500]})
        self.keep()
        self.longest_s = max(self.longest_s, time.monotonic() - start)

    def keep(self) -> None:
        """Keeps the rows and what follows from them."""
        w4a4, targets = four_bit(self.rows), self.backend.targets(self.rows, self.gpu)
        self.run.keep(
            headline=f"{len(select(targets, result='met'))} of {len(targets)} targets met",
            targets=targets,
            speedups=speedups(self.rows),
            tile_choice=tile_choice(self.tile_rows),
            **({"four_bit": w4a4} if w4a4 else {}),
            wrong=self.wrong,
            skipped_baselines=self.skipped,
            rows=self.rows,
            tiles=self.tile_rows,
        )

    def checked(self, case: AnyCase, built: Built, tile: Tile | None = None) -> bool:
        """Whether the kernel gives the reference's numbers; writes down if it does not."""
        why = why_wrong(built, self.backend.name, self.device)
        if why:
            name = f"{_name(case)}{f', {tile}' if tile else ''}"
            self.wrong.append({"case": name, "why": why})
        return not why

    def case(self, case: AnyCase) -> None:
        """Checks and times a case and its baselines, with cold and with hot buffers."""
        built = case.build(self.device)
        if not self.checked(case, built):
            return
        tile = str(self.backend.choose(self.problem(case), self.gpu)) if isinstance(case, LinearCase) else ""
        caches = ("cold", "hot") if case.data == "uniform" else ("cold",)
        with use_backend(self.backend.name):
            ours = self.timed(getattr(torch.ops.vitq, case.op), call_arguments(built, self.device), caches)
        baselines = self.baselines(case, built, caches)
        for cache, found in zip(caches, ours, strict=True):
            row = {"op": case.op, "case": case.case, "batch": case.batch, **case.sizes, "cache": cache, "tile": tile}
            row |= vars(found) | case.work.rates(found.us, self.peaks)
            for name, times in baselines.items():
                other = times[caches.index(cache)] if times else None
                compared = {"baseline_us": other.us, "speedup_x": other.us / found.us} if other else {}
                self.rows.append({**row, "baseline": name, "baseline_us": None, "speedup_x": None, **compared})

    def timed(self, function: Callable[..., object], arguments: Sequence[Any], caches: Sequence[str]) -> list[Timing]:
        """The time of a call with buffers that come from memory (cold) or are the same each time (hot)."""
        calls = rotated(function, arguments, self.l2_bytes)
        return [self.timer(calls if cache == "cold" else calls[:1]) for cache in caches]

    def baselines(self, case: AnyCase, built: Built, caches: Sequence[str]) -> dict[str, list[Timing] | None]:
        """Times of the baselines, measured once for all widths of a layer; None where torch cannot run one here."""
        key = (case.op, case.case, case.batch, case.data)
        if key not in self.baseline_us:
            found: dict[str, list[Timing] | None] = {}
            for name, (function, arguments) in case.baselines(built).items():
                try:
                    found[name] = self.timed(function, arguments, caches)
                except RuntimeError as error:  # SDPA says so where a backend does not take the shape or the device
                    found[name] = None
                    self.skipped.append({"baseline": name, "case": _name(case), "why": str(error)[:300]})
            self.baseline_us[key] = found
        return self.baseline_us[key]

    def tiles(self, case: LinearCase) -> None:
        """Times the tiles that the cost model likes best beside what it says of them, with cold buffers."""
        built = case.build(self.device)
        for place, (tile, predicted_us) in best_tiles(self.backend, self.problem(case), self.gpu):
            with self.backend.forced(tile):
                if not self.checked(case, built, tile):
                    continue
                with use_backend(self.backend.name):
                    arguments = call_arguments(built, self.device)
                    (found,) = self.timed(getattr(torch.ops.vitq, case.op), arguments, ("cold",))
            row = {"case": case.case, "batch": case.batch, **case.sizes, "tile": str(tile), "rank": place}
            ratio = {"predicted_us": predicted_us, "measured_over_predicted_x": found.us / predicted_us}
            self.tile_rows.append(row | vars(found) | ratio)

    def problem(self, case: LinearCase) -> Problem:
        """The case as the backend's choice of a tile sees it."""
        return self.backend.problem(case.layer, self.gpu)


def compile_tasks(
    cases: Sequence[AnyCase], tiled: Sequence[LinearCase], backend: KernelBackend, device: str = "cuda"
) -> list[Task]:
    """What ``Bench.measure`` needs compiled, in its order; the distribution of the codes changes nothing."""
    gpu = backend.gpu(device)
    tasks: list[Task] = [(case, None) for case in cases if case.data == "uniform"]
    for case in tiled:
        tasks += [(case, tile) for _, (tile, _) in best_tiles(backend, backend.problem(case.layer, gpu), gpu)]
    return tasks


def best_tiles(backend: KernelBackend, problem: Problem, gpu: Any) -> list[tuple[int, tuple[Tile, float]]]:
    """The tiles that the cost model likes best, by their rank; where LayerNorm follows, of both ways to launch it."""
    ranked = list(enumerate(backend.rank(problem, gpu), 1))
    ways = [[item for item in ranked if backend.with_norm(item[1][0]) == norm] for norm in (False, True)]
    return sorted(itertools.chain(*(way[:BEST_TILES] for way in ways)))


def compile_one(task: Task, backend: KernelBackend, device: str = "cuda") -> str:
    """Runs a case once, which leaves its kernels in the compiler's cache; what went wrong, or an empty string."""
    case, tile = task
    try:
        built = case.build(device)
        with use_backend(backend.name), backend.forced(tile):
            getattr(torch.ops.vitq, case.op)(*call_arguments(built, device))
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # ``Bench.checked`` meets it again and reports it
        return f"{_name(case)}: {type(error).__name__}: {error}"[:300]
    return ""


def _name(case: AnyCase) -> str:
    widths = f" w{case.sizes['bits_w']}" if case.sizes["bits_w"] else ""
    data = "" if case.data == "uniform" else f" {case.data}"
    return f"{case.op} {case.case}{widths}{data} at batch {case.batch}"
