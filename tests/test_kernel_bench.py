"""What ``benchmarks.kernel_bench`` measures, without a GPU: tiny sizes, a fake timer, and for a backend the cpu's ops
with Triton's tiles, the interpreted or the emulated kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.baselines import CUBLAS_F16, SDPA
from benchmarks.cuda_backend import CUDA
from benchmarks.device_check import CheckFailed, StageRun
from benchmarks.kernel_backend import KernelBackend
from benchmarks.kernel_bench import (
    RESERVE_S,
    Bench,
    compile_one,
    compile_tasks,
    linear_cases,
    norm_cases,
    plan,
    tile_plan,
)
from benchmarks.kernel_cases import AttentionCase, LinearCase
from benchmarks.kernel_targets import CUBLAS, FOUR_BIT, INT_MM, UNFUSED, WITH_NORM
from benchmarks.microbench import Timer, Timing
from benchmarks.row_cases import RowCase
from benchmarks.triton_backend import TRITON
from tests.conftest import BackendCase
from tests.fake_timer import FakeTimer, off
from vitq_kernels.ops import cpu
from vitq_kernels.ops import cuda as cuda_ops
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.triton.launch import INTERPRETED
from vitq_kernels.roofline import Peaks

CPU = replace(TRITON, name="cpu")  # Triton's tiles are named, the cpu backend runs
PEAKS = Peaks(1979, 989, 4800)
CASES = [
    *linear_cases(2, 9, 16),
    *norm_cases(2, 9, 16),
    AttentionCase(2, 9, 2, 8),
    RowCase("layernorm", 2, 18, 16),
    RowCase("quantize", 2, 18, 16),
]
COLUMNS = {"op", "case", "batch", "bits_w", "data", "cache", "tile", "us", "us_p20", "us_p80", "pct_of_peak"}
LAYER = LinearCase("qkv", "linear_codes", 1, 17, 24, 64, (4,))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="triton is compiled in this process")


def stage_run(tmp_path: Path, limit_s: float = 600) -> StageRun:
    return StageRun(None, limit_s, tmp_path / "result.json")


def bench(run: StageRun, timer: Timer, backend: KernelBackend = CPU) -> Bench:
    return Bench(run, backend, "cpu", timer, PEAKS, l2_bytes=1000)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the microbenchmarks keep of the tiny cases."""
    run, timer = stage_run(tmp_path_factory.mktemp("bench")), FakeTimer()
    bench(run, timer).measure([*CASES, *linear_cases(2, 9, 16, "gaussian")], [LAYER])
    return run.data | {"calls": timer.called}


def test_rows_are_complete(measured: dict[str, Any]) -> None:
    rows = measured["rows"]
    assert all(row.keys() >= COLUMNS for row in rows)
    assert all(row.keys() >= ({"M", "K"} if "K" in row else {"B", "H", "S", "D"}) for row in rows)
    assert all(("gbps" if row["op"] in ("layernorm", "quantize") else "tops") in row for row in rows)
    kinds = [(r["case"], r["bits_w"], r["data"], r["cache"]) for r in rows if r["baseline"] == CUBLAS]
    layers, widths = ("qkv", "proj", "fc1", "fc2"), ("8", "4", "3", "3/4/6", "6")
    uniform = [(name, bits, "uniform", cache) for name in layers for bits in widths for cache in ("cold", "hot")]
    norms = [(f"{name}{WITH_NORM}", "8", "uniform", cache) for name in ("proj", "fc2") for cache in ("cold", "hot")]
    assert kinds == uniform + norms + [(name, bits, "gaussian", "cold") for name in layers for bits in widths]
    assert {r["baseline"] for r in rows if r["case"] == "fc1"} == {CUBLAS, CUBLAS_F16, INT_MM, UNFUSED}
    assert {r["baseline"] for r in rows if r["op"] == "attention"} == set(SDPA)


def test_ratios_are_of_the_two_times(measured: dict[str, Any]) -> None:
    compared = [row for row in measured["rows"] if row["baseline_us"]]
    assert len(compared) > 100
    assert all(row["speedup_x"] == row["baseline_us"] / row["us"] for row in compared)
    assert all((row["us_p20"], row["us_p80"]) == (0.9 * row["us"], 1.1 * row["us"]) for row in compared)
    row = compared[0]
    assert row["tops"] == 2 * 18 * 48 * 16 / row["us"] / 1e6
    assert row["pct_of_peak"] == pytest.approx(100 * row["tops"] / 1979)


def test_baselines_are_timed_once_a_layer(measured: dict[str, Any]) -> None:
    layer = [row for row in measured["rows"] if (row["case"], row["data"], row["cache"]) == ("qkv", "uniform", "hot")]
    assert len({row["us"] for row in layer}) == 5
    assert len({row["baseline_us"] for row in layer}) == 4


def test_a_baseline_that_raises_is_named(measured: dict[str, Any]) -> None:
    skipped = {row["baseline"]: row["case"] for row in measured["skipped_baselines"]}
    assert skipped["SDPA cudnn fp16"] == "attention S=9 at batch 2"
    rows = [row for row in measured["rows"] if row["baseline"] == "SDPA cudnn fp16"]
    assert [(row["baseline_us"], row["speedup_x"]) for row in rows] == [(None, None)] * 2


def test_cold_calls_take_turns_and_hot_ones_do_not(measured: dict[str, Any]) -> None:
    assert measured["calls"][1] == 1
    assert measured["calls"][0] >= 2


def test_tiles_of_the_model_are_measured(measured: dict[str, Any]) -> None:
    rows = measured["tiles"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["measured_over_predicted_x"] == row["us"] / row["predicted_us"] for row in rows)
    assert sorted(row["predicted_us"] for row in rows) == [row["predicted_us"] for row in rows]
    (choice,) = measured["tile_choice"]
    assert (choice["best"], choice["cost_of_choice_x"]) == (rows[0]["tile"], 1.0)  # the fake timer's first is its least


@interpreted
def test_the_interpreter_names_its_tile(tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    bench(run, FakeTimer(), TRITON).measure([LAYER], [])
    assert {row["tile"] for row in run.data["rows"]} == {"64 rows x 16 tokens, 4 warps, 4 stages"}


def test_the_cuda_backend_is_measured_as_triton_is(emulated: BackendCase, tmp_path: Path) -> None:
    run, w4a4 = stage_run(tmp_path), replace(LAYER, data=FOUR_BIT)
    bench(run, FakeTimer(), CUDA).measure([LAYER, w4a4, AttentionCase(2, 9, 2, 8), *CASES[-2:]], [LAYER])
    rows, tiles = run.data["rows"], run.data["tiles"]
    assert all(row.keys() >= COLUMNS for row in rows)
    assert {row["baseline"] for row in rows if row["case"] == "qkv"} == {CUBLAS, CUBLAS_F16, INT_MM, UNFUSED}
    assert {row["tile"] for row in rows if row["case"] == "qkv"} == {tiles[0]["tile"]}
    assert [row["rank"] for row in tiles] == [1, 2, 3, 4, 5]
    assert "tokens, " in tiles[0]["tile"]
    assert sorted(row["predicted_us"] for row in tiles) == [row["predicted_us"] for row in tiles]
    us = {row["data"]: row["us"] for row in rows if row["case"] == "qkv" and row["cache"] == "cold"}
    (ratio,) = run.data["four_bit"]
    assert ratio["w4a4_over_w4a8_x"] == pytest.approx(us["uniform"] / us[FOUR_BIT])
    wide, narrow = (next(r for r in rows if r["data"] == data and r["case"] == "qkv") for data in ("uniform", FOUR_BIT))
    assert narrow["pct_of_peak"] * narrow["us"] == pytest.approx(wide["pct_of_peak"] * wide["us"] / 2)


def test_narrow_inputs_are_measured_where_they_are_another_product() -> None:
    def narrow(cc: int) -> list[Any]:
        return [case for case in plan(CUDA.has_4bit_products(Gpu(cc, 100))) if case.data == FOUR_BIT]

    assert [case.case for case in narrow(80)] == ["qkv", "proj", "fc1", "fc2"] * 3
    assert {case.widths for case in narrow(80)} == {(4,)}
    assert [narrow(cc) for cc in (90, 100, 120)] == [[]] * 3
    assert not TRITON.has_4bit_products(TRITON.gpu("cpu"))
    problems = [CUDA.problem(narrow(80)[0].layer, Gpu(cc, 100)).native4 for cc in (80, 86, 89, 90, 120)]
    assert problems == [True, True, True, False, False]


@pytest.mark.parametrize("case", {case.op: case for case in CASES}.values(), ids=lambda case: case.op)
def test_a_wrong_kernel_is_not_timed(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(cpu, case.op)
    monkeypatch.setattr(cpu, case.op, lambda *args: off(right(*args)))
    run, timer = stage_run(tmp_path), FakeTimer()
    with pytest.raises(CheckFailed, match=rf"^wrong: {case.op} .* at batch 2$"):
        bench(run, timer).measure([case], [])
    assert timer.called == []
    assert run.data["rows"] == []
    assert "AssertionError: " in run.data["wrong"][0]["why"]


@pytest.mark.parametrize("case", {case.op: case for case in CASES}.values(), ids=lambda case: case.op)
def test_a_wrong_cuda_kernel_is_not_timed(
    case: Any, emulated: BackendCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(cuda_ops, case.op)
    monkeypatch.setattr(cuda_ops, case.op, lambda *args: off(right(*args)))
    refused(bench(stage_run(tmp_path), FakeTimer(), CUDA), case)


@interpreted
def test_a_wrong_triton_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitq_kernels.ops import triton as triton_ops

    right = triton_ops.linear_codes
    monkeypatch.setattr(triton_ops, "linear_codes", lambda *args: off(right(*args)))
    refused(bench(stage_run(tmp_path), FakeTimer(), TRITON), LAYER)


def test_a_fault_inside_the_kernel_is_not_timed(planted: Any, tmp_path: Path) -> None:
    planted.plant(swapped_fragment=True)
    refused(bench(stage_run(tmp_path), FakeTimer(), CUDA), LAYER)


def refused(bench: Bench, case: Any) -> None:
    """Neither the case nor one of its tiles is timed."""
    with pytest.raises(CheckFailed, match=rf"^wrong: {case.op} "):
        bench.measure([case], [case] if isinstance(case, LinearCase) else [])
    assert bench.timer.called == []
    assert bench.run.data["rows"] == bench.run.data["tiles"] == []
    assert all("AssertionError: " in row["why"] for row in bench.run.data["wrong"])
    assert len(bench.run.data["wrong"]) == (6 if isinstance(case, LinearCase) else 1)


def test_a_wrong_kernel_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "linear_codes", lambda *args: 1 / 0)
    run = stage_run(tmp_path)
    with pytest.raises(CheckFailed, match=r"^wrong: linear_codes qkv w8 at batch 2$"):
        bench(run, FakeTimer()).measure([CASES[0], CASES[-1]], [])
    assert run.data["wrong"][0]["why"] == "ZeroDivisionError: division by zero"
    assert {row["op"] for row in run.data["rows"]} == {"quantize"}


def test_a_kernel_that_cannot_be_timed_is_named(tmp_path: Path) -> None:
    def timer(calls: Sequence[Callable[[], object]]) -> Timing:
        raise RuntimeError("operation not permitted when stream is capturing")

    run = stage_run(tmp_path)
    with pytest.raises(CheckFailed, match=r"^wrong: layernorm K=16 at batch 2, quantize K=16 at batch 2$"):
        bench(run, timer).measure(CASES[-2:], [])
    assert run.data["wrong"][0]["why"] == "RuntimeError: operation not permitted when stream is capturing"


def test_a_kernel_that_writes_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = torch.zeros(18, 16, dtype=torch.int8)
    monkeypatch.setattr(cpu, "quantize", lambda *args: output)
    with pytest.raises(CheckFailed, match=r"^wrong: quantize"):
        bench(stage_run(tmp_path), FakeTimer()).measure([CASES[-1]], [])
    assert set(output.flatten().tolist()) == {0x5A}  # poisoned before the call that counts


def test_time_that_runs_out_leaves_a_reason(tmp_path: Path) -> None:
    run = stage_run(tmp_path, RESERVE_S)
    with pytest.raises(CheckFailed, match=r"^time ran out before 26 of 26: linear_codes qkv w8 at batch 2, "):
        bench(run, FakeTimer()).measure(CASES, [LAYER])
    assert len(run.data["left_out"]) == 26


def test_the_plan_starts_with_what_is_worth_most() -> None:
    cases = plan()
    assert [case.batch for case in cases] == sorted((case.batch for case in cases), reverse=True)
    assert {case.m for case in cases if isinstance(case, LinearCase)} == {197, 1576, 12608}
    assert TRITON.problem(cases[3].layer, TRITON.gpu("cpu")).widths == (4, 6)
    tiled = tile_plan(cases)
    assert len(tiled) == 12 + 2 * 3  # with LayerNorm
    tasks = compile_tasks(cases, tiled, TRITON, "cpu")
    assert len(tasks) == len([case for case in cases if case.data == "uniform"]) + 5 * len(tiled)


def test_both_ways_to_launch_a_layernorm_are_timed(emulated: BackendCase, tmp_path: Path) -> None:
    """As on a H100: the best tiles in one launch beside those in two, each checked first."""
    hopper, (case, _) = replace(CUDA, gpu_of=lambda tensor: Gpu(90, 132)), norm_cases(1, 9, 128)
    run = stage_run(tmp_path)
    bench(run, FakeTimer(), hopper).measure([], [case])
    rows = run.data["tiles"]
    assert len(rows) == 5 + 3
    assert len([row for row in rows if row["tile"].endswith(", LayerNorm")]) == 3
    assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)
    assert run.data["wrong"] == []


def test_compiling_runs_the_case() -> None:
    assert compile_one((LAYER, None), CPU, "cpu") == ""
    assert compile_one((LAYER, None), CPU, "meta").startswith("linear_codes qkv w4 at batch 1: ")
