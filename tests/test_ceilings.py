"""The stage ``ceilings`` of ``benchmarks.device_check`` without a GPU: tiny sizes, the cpu backend, a fake timer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ceilings as stage
from benchmarks.ceilings import TINY, Ceiling, Measured, best, copies, products
from benchmarks.cuda_backend import CUDA
from benchmarks.device_check import CheckFailed, NotRun, StageRun
from benchmarks.dry_run import stand_in
from benchmarks.microbench import Timing
from tests.fake_timer import FakeTimer, off
from vitq_kernels.ops import cpu
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.cuda.tiles import TILES, rank
from vitq_kernels.roofline import Peaks

PEAKS = Peaks(1979, 989, 4800)


def stage_run(tmp_path: Path, limit_s: float = 600, dry_run: bool = False) -> StageRun:
    return StageRun(None, limit_s, tmp_path / "result.json", dry_run)


def two_us(calls: Sequence[Callable[[], object]]) -> Timing:
    calls[0]()
    return Timing(2.0, 1.0, 3.0)


def measured(run: StageRun, timer: Any = two_us) -> dict[str, Any]:
    Measured(run, "cpu", timer, TINY, PEAKS).everything([stand_in(CUDA)])
    return run.data


def test_a_rate_is_work_over_time() -> None:
    product = next(iter(products("cpu", 32))).row(two_us)
    assert (product["ceiling"], product["unit"]) == ("bf16 32^3, gaussian", "TOPS")
    assert product["value"] == pytest.approx(2 * 32**3 / 2e-6 / 1e12)
    memory, cache = (one.row(two_us) for one in copies("cpu", 1 << 20, 1 << 10))
    assert memory["value"] == pytest.approx(2 * (1 << 20) / 2e-6 / 1e9)
    assert (cache["ceiling"], cache["unit"]) == ("copy of 0.0009766 MiB inside L2, read and written", "GB/s")
    assert Ceiling("kernel", lambda: None).row(two_us) == {
        "ceiling": "kernel",
        "value": 2.0,
        "unit": "us",
        "us": 2.0,
        "us_p20": 1.0,
        "us_p80": 3.0,
    }


def test_a_copy_copies_and_a_product_is_of_both_kinds_of_codes() -> None:
    (copy, _) = copies("cpu", 4096, 64)
    assert copy.call().unique().numel() > 100  # random bytes, which no memory compresses
    results = {one.name: one.call() for one in products("cpu", 64)}
    assert list(results) == [
        *("bf16 64^3, gaussian", "_int_mm 64^3, gaussian codes"),
        *("bf16 64^3, uniform", "_int_mm 64^3, uniform codes"),
    ]
    power = {name: result.float().diagonal().mean() for name, result in results.items()}
    assert power["_int_mm 64^3, uniform codes"] > 3 * power["_int_mm 64^3, gaussian codes"]


def test_every_kind_of_ceiling_is_kept(tmp_path: Path) -> None:
    data = measured(stage_run(tmp_path))
    names = [row["ceiling"] for row in data["rows"]]
    assert len(names) == len(set(names))
    for word, count in {
        "our loop, cpu": 6,
        "bf16 32^3": 2,
        "_int_mm": 2,
        "F.linear": 4,
        "copy": 2,
        "in a graph": 3,
        "in a graph, no early start": 1,
    }.items():
        assert len([name for name in names if word in name]) == count, word
    assert {"gaussian", "uniform"} == {n.split("W8A8, ")[1].split()[0] for n in names if n.startswith("our loop")}
    assert {"clocks_before", "clocks_after_products", "clocks_after"} <= set(data)
    rows = {row["ceiling"]: row for row in data["rows"]}
    assert rows["bf16 32^3, uniform"]["pct_of_datasheet"] == 100 * rows["bf16 32^3, uniform"]["value"] / 989
    assert rows["_int_mm 32^3, uniform codes"]["pct_of_datasheet"] == pytest.approx(
        rows["bf16 32^3, uniform"]["pct_of_datasheet"] * 989 / 1979
    )
    inside, through = (next(row for row in data["rows"] if word in row["ceiling"]) for word in ("inside", "through"))
    assert (inside["pct_of_datasheet"], through["pct_of_datasheet"]) == (None, 100 * through["value"] / 4800)


def test_the_best_of_a_kind_is_its_ceiling() -> None:
    def row(ceiling: str, value: float, unit: str) -> dict[str, Any]:
        return {"ceiling": ceiling, "value": value, "unit": unit}

    found = best(
        [
            row("our loop, cuda, a", 1200.0, "TOPS"),
            row("our loop, cuda, b", 1400.0, "TOPS"),
            row("_int_mm 8192^3", 1300.0, "TOPS"),
            row("bf16 8192^3, uniform", 700.0, "TOPS"),
            row("bf16 F.linear qkv", 500.0, "TOPS"),
            row("copy of 1 MiB through memory", 4000.0, "GB/s"),
            row("copy of 1 MiB inside L2", 9000.0, "GB/s"),
            row("kernel of one element", 2.5, "us"),
            row("quantize of one row", 2.25, "us"),
        ]
    )
    assert found == {
        "int8_tops": 1400.0,
        "f16_tops": 700.0,
        "gbps": 4000.0,
        "l2_gbps": 9000.0,
        "graph_floor_us": 2.25,
    }
    assert set(best([]).values()) == {None}


def test_a_wrong_loop_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.linear_codes
    monkeypatch.setattr(cpu, "linear_codes", lambda *args: off(right(*args)))
    run = stage_run(tmp_path)
    with pytest.raises(CheckFailed, match=r"^wrong: our loop, cpu, 16x32x256 W8A8, gaussian codes, "):
        measured(run)
    assert not [row for row in run.data["rows"] if row["ceiling"].startswith("our loop")]
    assert len(run.data["wrong"]) == 6
    assert run.data["gbps"] > 0


def test_time_that_runs_out_leaves_a_reason(tmp_path: Path) -> None:
    run = stage_run(tmp_path, limit_s=0.0)
    with pytest.raises(CheckFailed, match=r"^time ran out before bf16 32\^3, gaussian, .*bf16 F\.linear fc2 "):
        measured(run, FakeTimer())


def test_hoppers_loop_is_on_wgmma() -> None:
    layer = stage.LinearCase("loop", "linear_codes", 0, *stage.Sizes().loop, (8,)).layer
    hopper = Gpu(90, 132)
    plans = [plan for plan, _ in rank(CUDA.problem(layer, hopper), hopper)[: stage.BEST_PLANS]]
    assert all(TILES[plan.tile].wgmma for plan in plans)


def test_it_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRun, match=r"^no GPU$"):
        stage.ceilings(stage_run(tmp_path))
