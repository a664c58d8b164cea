"""What ``benchmarks.triton_checks`` counts, names and forces, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import triton_checks
from benchmarks.device_check import CheckFailed, StageRun
from benchmarks.triton_cases import LinearCase
from benchmarks.triton_checks import ALL_CASES, Block, Checks, Task, check_one, tile_tasks
from vitq_kernels.ops import cpu, use_backend
from vitq_kernels.ops.bit_planes import place_rows
from vitq_kernels.ops.triton import linear as linear_ops
from vitq_kernels.ops.triton.launch import INTERPRETED
from vitq_kernels.spec import RowGroups

LAYER = LinearCase("qkv", "linear_codes", 1, 17, 24, 64, (4,))


def stage_run(tmp_path: Path, limit_s: float = 600) -> StageRun:
    return StageRun(None, limit_s, tmp_path / "result.json")


def fake_spread(results: dict[Task, str]) -> Callable[..., Iterator[tuple[Task, str]]]:
    return lambda function, tasks, reserve_s: iter([(task, results[task]) for task in tasks if task in results])


def test_checks_count_what_came_and_name_the_rest(tmp_path: Path) -> None:
    checks = Checks(stage_run(tmp_path))
    tasks = [("case", 0), ("case", 1), ("case", 2)]
    checks.spread(fake_spread({tasks[0]: "", tasks[1]: "AssertionError: 3 of 4 differ"}), tasks, 0)
    op, labels = ALL_CASES[0].op, [case.label for case in ALL_CASES[:3]]
    assert checks.run.data["counts"] == [{"checked": op, "passed": 1, "failed": 1, "not_run": 1}]
    assert checks.run.data["failures"] == [{"checked": op, "case": labels[1], "why": "AssertionError: 3 of 4 differ"}]
    with pytest.raises(
        CheckFailed, match=rf"^1 failed: {op} {labels[1]}; time ran out before 1 checks: {op} {labels[2]}$"
    ):
        checks.conclude()


def test_all_parts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "check_stream", lambda self: "")
    monkeypatch.setattr(Checks, "check_graph", lambda self: 1 / 0)
    monkeypatch.setattr(Checks, "check_real", lambda self, case: "")
    checks = Checks(stage_run(tmp_path), "cpu", "cpu")
    with pytest.raises(CheckFailed, match=r"^1 failed: graph block replayed with other inputs$"):
        checks.everything(lambda function, tasks, reserve_s: ((task, "") for task in tasks))
    passed = {row["checked"]: row["passed"] for row in checks.run.data["counts"]}
    assert sum(passed.values()) == len(ALL_CASES) + 1 + 15 + len(tile_tasks("cpu"))
    assert passed["real sizes"] == 15


def test_a_part_without_time_is_left_out(tmp_path: Path) -> None:
    checks = Checks(stage_run(tmp_path, 1))
    checks.part("stream", "block", lambda: "never")
    with pytest.raises(CheckFailed, match=r"^time ran out before 1 checks: stream block$"):
        checks.conclude()


def test_a_case_of_the_tests_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    index = next(i for i, case in enumerate(ALL_CASES) if case.op == "quantize")
    assert check_one(("case", index), "cpu", "cpu") == ""
    right = cpu.quantize
    monkeypatch.setattr(cpu, "quantize", lambda *args: right(*args).bitwise_xor(1))
    assert "elements differ" in check_one(("case", index), "cpu", "cpu")


@pytest.mark.skipif(not INTERPRETED, reason="triton is compiled in this process")
def test_a_tile_is_forced_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(triton_checks.TILE_SHAPES, "small", (17, 256, RowGroups.uniform(64, 4), "extreme"))
    monkeypatch.setattr(triton_checks, "TILE_PROBLEMS", {"small": (4,), "mixed": (3, 4, 6), "uniform": (4,)})
    seen, launch = [], linear_ops.launch

    def spy(kernel: Any, grid: Any, like: Tensor, *args: Any, **meta: Any) -> None:
        seen.append((meta["ROWS"], meta["TOKENS"]))
        launch(kernel, grid, like, *args, **meta)

    monkeypatch.setattr(linear_ops, "launch", spy)
    small = [tile for name, tile in tile_tasks("cpu") if name == "small"]
    assert max(tile.splits for tile in small) == 1
    assert [check_one(("small", tile), "triton", "cpu") for tile in small[-2:]] == ["", ""]
    assert seen == [(tile.rows, tile.tokens) for tile in small[-2:]]


def test_the_tile_cases_are_of_the_widths_that_they_are_listed_under() -> None:
    for name, (_, _, groups, _) in triton_checks.TILE_SHAPES.items():
        assert tuple(sorted(set(place_rows(groups)[1]))) == triton_checks.TILE_PROBLEMS[name]


def test_the_block_is_the_same_on_every_backend() -> None:
    outputs = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            block = Block("cpu", batch=1, s=9, heads=2, head_dim=16)
            outputs.append(block(block.input(1)))
            assert not torch.equal(outputs[-1], block(block.input(2)))
    assert torch.equal(*outputs)


def test_real_sizes_are_compared_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = Checks(stage_run(tmp_path), "cpu", "cpu")
    assert checks.check_real(LAYER) == ""
    right = cpu.linear_codes

    def last_wrong(*args: Any) -> Tensor:
        outputs = right(*args)
        outputs[-1, -1] ^= 1
        return outputs

    monkeypatch.setattr(cpu, "linear_codes", last_wrong)
    assert "1 of 408 elements differ; first at (16, 23)" in checks.check_real(LAYER)
