"""The stages of whole models in ``benchmarks.device_check``, on a CPU: jobs, what they keep, and how they go on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import model_stages
from benchmarks.device_check import CheckFailed, NotRun, StageRun
from benchmarks.device_plots import speedups_plot
from benchmarks.model_stages import (
    BUDGET_S,
    GUESSED_S,
    KINDS,
    RESERVE_S,
    TINY,
    Comparison,
    Job,
    Pairs,
    kernel_profiles,
    over_fp16,
    peaks_here,
    plan,
    whole_models,
)
from benchmarks.result_rows import read_rows
from tests.result_examples import MODELS_FOUND
from vitq_kernels.model_candidates import Candidate
from vitq_kernels.roofline import Peaks

EAGER = "eager and captured"
JOBS = [Job(TINY, batch, "cpu", EAGER) for batch in (2, 1)]


def stage_run(tmp_path: Path, limit_s: float = 600, dry_run: bool = False) -> StageRun:
    return StageRun(None, limit_s, tmp_path / "result.json", dry_run)


def keep_as(tmp_path: Path, stage: str, data: dict[str, Any]) -> None:
    """Writes a ``device.json`` in which a stage has kept this."""
    (tmp_path / "device.json").write_text(json.dumps({"stages": {stage: {"status": "failed", "data": data}}}))


def test_the_most_valuable_jobs_come_first() -> None:
    jobs = plan(["cuda", "triton"])
    assert len(set(jobs)) == len(jobs)
    assert [job.batch for job in jobs[:8]] == [64, 64, 8, 1, 256, 8, 1, 256]
    assert {(job.model, job.backend) for job in jobs[:8]} == {("ViT-B", "cuda")}
    assert [job.kind for job in jobs[:8]] == [EAGER, "compiled"] + [EAGER] * 3 + ["compiled"] * 3
    assert {job.backend for job in jobs[8:12]} == {"triton"}
    assert {job.model for job in jobs} == {"ViT-B", "ViT-S", "ViT-T", "ViT-L"}
    everything = {str(Candidate.parse(name)) for names in KINDS.values() for name in names}
    assert everything == {
        *("ours-captured", "ours_fused-captured", "float16", "bfloat16", "float16-captured"),
        *("float16-compiled", "float16-max-autotune"),
    }
    assert all("ours-captured" in names for names in KINDS.values())
    assert set(GUESSED_S) == set(KINDS)
    assert BUDGET_S < RESERVE_S


@pytest.fixture
def fake_bench(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every job finds ``MODELS_FOUND``; the list has what was asked for."""
    asked: list[Any] = []

    def bench(qmodel: Any, model: Any, batches: Any, image: Any, **options: Any) -> Any:
        asked.append((batches, options["against"]))
        return MODELS_FOUND

    monkeypatch.setattr(model_stages, "bench_models", bench)
    return asked


def test_rows_are_kept_and_recorded(tmp_path: Path, fake_bench: list[Any]) -> None:
    run = stage_run(tmp_path)
    Comparison(run, "cpu").measure(JOBS[:1])
    assert fake_bench == [([2], KINDS[EAGER])]
    rows = run.data["rows"]
    assert len(rows) == len(MODELS_FOUND.rows)
    row = next(row for row in rows if row["candidate"] == "float16")
    assert row == {
        **JOBS[0].key,
        "candidate": "float16",
        "p50_ms": 4.0,
        "p95_ms": 9.0,
        "images_per_s": 2000.0,
        "peak_mb": 80.0,
        "over_ours_x": 2.0,
        "over_captured_x": 4.0,
    }
    (recorded,) = tmp_path.glob("*.csv")
    assert {row["model"] for row in read_rows(recorded)} == {TINY}
    assert run.data["skipped"][0]["why"] == "no compiler"
    assert run.data["plots"] == ["whole_models.png"]
    assert (tmp_path / "whole_models.png").stat().st_size > 1000


def test_a_later_call_goes_on_with_the_other_jobs(tmp_path: Path, fake_bench: list[Any]) -> None:
    run = stage_run(tmp_path)
    Comparison(run, "cpu").measure(JOBS[:1])
    keep_as(tmp_path, "whole_models", run.data)
    again = stage_run(tmp_path)
    Comparison(again, "cpu").measure(JOBS)
    assert [batches for batches, _ in fake_bench] == [[2], [1]]
    assert [row["batch"] for row in again.data["rows"]] == [2] * len(MODELS_FOUND.rows) + [1] * len(MODELS_FOUND.rows)


def test_time_that_runs_out_leaves_a_reason_and_what_there_was(tmp_path: Path, fake_bench: list[Any]) -> None:
    keep_as(tmp_path, "whole_models", {"rows": [{**JOBS[0].key, "candidate": "ours", "images_per_s": 1.0}]})
    run = stage_run(tmp_path, limit_s=RESERVE_S)
    run.data.clear()
    with pytest.raises(CheckFailed, match=rf"^time ran out before 1 of 2 jobs: {TINY} 1 cpu {EAGER}$"):
        Comparison(run, "cpu").measure(JOBS)
    assert [row["batch"] for row in run.data["rows"]] == [2]
    assert fake_bench == []


def test_a_job_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(qmodel: Any, model: Any, batches: Any, image: Any, **options: Any) -> Any:
        if batches == [2]:
            raise torch.OutOfMemoryError("too large")
        return MODELS_FOUND

    monkeypatch.setattr(model_stages, "bench_models", bench)
    run = stage_run(tmp_path)
    with pytest.raises(CheckFailed, match=r"^failed: OutOfMemoryError: too large$"):
        Comparison(run, "cpu").measure(JOBS)
    assert {row["batch"] for row in run.data["rows"]} == {1}


def test_the_floor_is_over_the_fastest_of_fp16() -> None:
    def row(kind: str, candidate: str, over: float | None) -> dict[str, Any]:
        return {"model": "ViT-B", "batch": 64, "kind": kind, "candidate": candidate, "over_captured_x": over}

    rows = [
        row(EAGER, "float16-captured", 1.1),  # nothing was compiled in that run
        row("compiled", "ours", 1.05),
        row("compiled", "float16-captured", 1.9),
        row("compiled", "float16-compiled", 1.8),
    ]
    found = {entry["target"]: entry for entry in over_fp16(rows)}
    assert len(found) == 4
    at_64 = found["ViT-B batch 64 over the fastest FP16"]
    assert (at_64["measured"], at_64["bound"], at_64["result"]) == (1.8, ">= 1.6", "met")
    rows.append(row("max-autotune", "float16-max-autotune", 1.5))
    assert over_fp16(rows)[2]["result"] == "not met"
    assert {entry["result"] for entry in over_fp16([])} == {"not measured"}


def test_the_roofline_is_what_was_measured_before(tmp_path: Path) -> None:
    keep_as(tmp_path, "ceilings", {"int8_tops": 1400.0, "f16_tops": 700.0, "gbps": 4000.0})
    assert peaks_here(stage_run(tmp_path), "cpu", torch.float32) == Peaks(1400.0, 700.0, 4000.0)
    keep_as(tmp_path, "ceilings", {"int8_tops": 1400.0, "f16_tops": None})
    assert peaks_here(stage_run(tmp_path), "cpu", torch.float32).int8_tops < 1000


@pytest.mark.parametrize("stage", [whole_models, kernel_profiles], ids=lambda stage: stage.__name__)
def test_they_need_a_gpu(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRun, match=r"^no GPU$"):
        stage(stage_run(tmp_path))


def test_without_a_backend_of_ours_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model_stages, "kernel_backends", lambda run: [])
    with pytest.raises(NotRun, match=r"^neither backend of our kernels runs on this GPU$"):
        whole_models(stage_run(tmp_path))


def test_copies_of_a_block_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, model = Pairs().get(TINY)
    weights = [block.attn.qkv.weight_packed for block in quantized.blocks]
    assert len(weights) == len(model.blocks) == 2
    assert weights[0].data_ptr() != weights[1].data_ptr()
    assert torch.equal(*weights)
    with torch.no_grad():
        logits = quantized(torch.randn(3, 3, 16, 16))
    assert logits.shape == (3, 4)
    assert logits.isfinite().all()
    assert logits.std() > 0
    made: list[str] = []
    monkeypatch.setattr(model_stages, "float_vit", lambda name, **_: made.append(name) or model)
    monkeypatch.setattr(model_stages, "quantized", lambda *_: copy.deepcopy(quantized))
    pairs = Pairs()
    for name in ("ViT-B", "ViT-B", "ViT-S"):
        pairs.get(name)
    assert made == ["ViT-B"] * 2 + ["ViT-S"] * 2
    assert list(pairs.made) == ["ViT-S"]  # one at a time


def test_speedups_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    mean = {"op": "layernorm", "batch": 8, "data": "uniform", "baseline": "torch", "cold_x": 2.0}
    assert speedups_plot([{**mean, "cold_x": None}], "cuda_microbenchmarks", tmp_path) == []
    assert speedups_plot([mean], "cuda_microbenchmarks", tmp_path) == ["cuda_microbenchmarks.png"]
    assert (tmp_path / "cuda_microbenchmarks.png").read_bytes().startswith(b"\x89PNG")
