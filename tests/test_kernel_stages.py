"""The stages of our kernels in ``benchmarks.device_check``: when they do not run, and the processes they use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_sanitizer, kernel_stages
from benchmarks.device_check import NotRun, StageRun
from vitq_kernels.ops import cuda as cuda_ops


def stage_run(tmp_path: Path) -> StageRun:
    return StageRun(None, 600, tmp_path / "result.json")


STAGES = (
    kernel_stages.triton_correctness,
    kernel_stages.triton_microbenchmarks,
    kernel_stages.cuda_correctness,
    kernel_stages.cuda_microbenchmarks,
    cuda_sanitizer.cuda_sanitizer,
)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_without_a_gpu_nothing_runs(
    stage: Callable[[StageRun], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRun, match=r"^no GPU$"):
        stage(stage_run(tmp_path))


@pytest.mark.parametrize("stage", STAGES[2:], ids=lambda stage: stage.__name__)
def test_without_the_extension_nothing_runs(
    stage: Callable[[StageRun], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_ops, "unavailable", {"cuda": "vitq_kernels._cuda is not built: no nvcc"}.get)
    with pytest.raises(NotRun, match=r"^vitq_kernels\._cuda is not built: no nvcc$"):
        stage(stage_run(tmp_path))


def test_rows_of_an_earlier_stage_are_found(tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    assert kernel_stages.kept_rows(run, "triton_microbenchmarks") == []
    stages = {"triton_microbenchmarks": {"status": "timeout", "data": {"rows": [{"us": 3.0}]}}}
    (tmp_path / "device.json").write_text(json.dumps({"stages": stages}))
    assert kernel_stages.kept_rows(run, "triton_microbenchmarks") == [{"us": 3.0}]
    assert kernel_stages.kept_rows(run, "tests") == []


def test_processes_give_what_comes_in_time() -> None:
    assert dict(kernel_stages.in_processes(str, [1, 2], 60, workers=1)) == {1: "1", 2: "2"}
    assert dict(kernel_stages.in_processes(str, [1], 0.0, workers=1)) == {}


def test_a_process_that_dies_is_a_result() -> None:
    ((_, why),) = kernel_stages.in_processes(os._exit, [3], 60, workers=1)
    assert why.startswith("BrokenProcessPool: ")
