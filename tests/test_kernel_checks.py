"""What ``benchmarks.kernel_checks`` counts, names and forces, without a GPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_checks
from benchmarks.cuda_backend import CUDA
from benchmarks.device_check import CheckFailed, StageRun
from benchmarks.kernel_backend import KernelBackend, Layer
from benchmarks.kernel_cases import LinearCase
from benchmarks.kernel_checks import ALL_CASES, Block, Checks, Task, check_one, tile_tasks
from benchmarks.kernel_targets import FOUR_BIT
from benchmarks.triton_backend import TRITON
from tests.conftest import BackendCase
from vitq_kernels.ops import cpu, use_backend
from vitq_kernels.ops.cuda import linear as cuda_linear
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.cuda.tiles import TILES
from vitq_kernels.ops.triton import linear as linear_ops
from vitq_kernels.ops.triton.launch import INTERPRETED
from vitq_kernels.spec import RowGroups

CPU = replace(TRITON, name="cpu")  # Triton's tiles are named, the cpu backend runs
LAYER = LinearCase("qkv", "linear_codes", 1, 17, 24, 64, (4,))


def stage_run(tmp_path: Path, limit_s: float = 600) -> StageRun:
    return StageRun(None, limit_s, tmp_path / "result.json")


def fake_spread(results: dict[Task, str]) -> Callable[..., Iterator[tuple[Task, str]]]:
    return lambda function, tasks, reserve_s: iter([(task, results[task]) for task in tasks if task in results])


def test_checks_count_what_came_and_name_the_rest(tmp_path: Path) -> None:
    checks = Checks(stage_run(tmp_path), TRITON)
    tasks = [("case", 0), ("case", 1), ("case", 2)]
    checks.spread(fake_spread({tasks[0]: "", tasks[1]: "AssertionError: 3 of 4 differ"}), tasks, 0)
    op, labels = ALL_CASES[0].op, [case.label for case in ALL_CASES[:3]]
    assert checks.run.data["counts"] == [{"checked": op, "passed": 1, "failed": 1, "not_run": 1}]
    assert checks.run.data["failures"] == [{"checked": op, "case": labels[1], "why": "AssertionError: 3 of 4 differ"}]
    with pytest.raises(
        CheckFailed, match=rf"^1 failed: {op} {labels[1]}; time ran out before 1 checks: {op} {labels[2]}$"
    ):
        checks.conclude()


@pytest.mark.parametrize(("backend", "reals"), [(TRITON, 18), (CUDA, 22)], ids=["triton", "cuda"])
def test_all_parts_run(backend: KernelBackend, reals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "check_stream", lambda self: "")
    monkeypatch.setattr(Checks, "check_graph", lambda self: 1 / 0)
    monkeypatch.setattr(Checks, "check_real", lambda self, case: "")
    checks = Checks(stage_run(tmp_path), backend, "cpu")

    def spread(function: Any, tasks: Any, reserve_s: float) -> Iterator[tuple[Task, str]]:
        pickle.dumps((function, tasks))  # as processes get them
        return ((task, "") for task in tasks)

    with pytest.raises(CheckFailed, match=r"^1 failed: graph block replayed with other inputs$"):
        checks.everything(spread)
    passed = {row["checked"]: row["passed"] for row in checks.run.data["counts"]}
    assert sum(passed.values()) == len(ALL_CASES) + 1 + reals + len(tile_tasks(backend, "cpu"))
    assert passed["real sizes"] == reals
    assert [name for name in passed if name.startswith("tiles")] == [f"tiles, {name}" for name in backend.shapes]


def test_a_part_without_time_is_left_out(tmp_path: Path) -> None:
    checks = Checks(stage_run(tmp_path, 1), TRITON)
    checks.part("stream", "block", lambda: "never")
    with pytest.raises(CheckFailed, match=r"^time ran out before 1 checks: stream block$"):
        checks.conclude()


def test_a_case_of_the_tests_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    index = next(i for i, case in enumerate(ALL_CASES) if case.op == "quantize")
    assert check_one(("case", index), CPU, "cpu") == ""
    right = cpu.quantize
    monkeypatch.setattr(cpu, "quantize", lambda *args: right(*args).bitwise_xor(1))
    assert "elements differ" in check_one(("case", index), CPU, "cpu")


# The GPU that the emulation stands for is an A100.
MMA_TILES = {number for number, tile in enumerate(TILES) if not tile.wgmma}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes, as small as they can be: cuda's rows of mixed widths are reordered inside groups of 64."""
    mixed = RowGroups(200, (3, 2, 4, 4, 4, 2, 3), 32)
    shapes = {
        "uniform": (Layer(17, 256, RowGroups.uniform(64, 4)), "extreme"),
        "mixed": (Layer(17, 128, mixed), "extreme"),
        "4 bits": (Layer(17, 256, RowGroups.uniform(64, 4), input_bits=4), "one_sided"),
        "mixed, 4 bits": (Layer(17, 128, mixed, input_bits=4), "extreme"),
    }
    monkeypatch.setattr(kernel_checks, "TILE_SHAPES", shapes)
    kernel_checks.tile_case.cache_clear()
    kernel_checks.tile_outputs.cache_clear()
    yield
    kernel_checks.tile_case.cache_clear()
    kernel_checks.tile_outputs.cache_clear()


@pytest.mark.skipif(not INTERPRETED, reason="triton is compiled in this process")
def test_a_tile_is_forced_and_checked(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, launch = [], linear_ops.launch

    def spy(kernel: Any, grid: Any, like: Tensor, *args: Any, **meta: Any) -> None:
        seen.append((meta["ROWS"], meta["TOKENS"]))
        launch(kernel, grid, like, *args, **meta)

    monkeypatch.setattr(linear_ops, "launch", spy)
    tiles = [tile for name, tile in tile_tasks(TRITON, "cpu") if name == "uniform"]
    assert max(tile.splits for tile in tiles) == 1
    assert [check_one(("uniform", tile), TRITON, "cpu") for tile in tiles[-2:]] == ["", ""]
    assert seen == [(tile.rows, tile.tokens) for tile in tiles[-2:]]


SMALL_CUDA = replace(CUDA, shapes=("uniform", "mixed", "4 bits", "mixed, 4 bits"))


def test_every_plan_is_forced_and_checked(small: None, emulated: BackendCase, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, launch = [], cuda_linear.launch

    def spy(name: str, *args: Any) -> None:
        seen.append(args[-5:-1])  # tile, 4-bit products, parts, ...
        launch(name, *args)

    monkeypatch.setattr(cuda_linear, "launch", spy)
    tasks = tile_tasks(SMALL_CUDA, "cpu")
    assert {check_one(task, SMALL_CUDA, "cpu") for task in tasks} == {""}
    wanted = [(plan.tile, "4 bits" in name, plan.parts) for name, plan in tasks]
    assert [call[:3] for call in seen] == wanted
    for shape in ("uniform", "mixed"):
        assert {plan.tile for name, plan in tasks if name == shape} == MMA_TILES
    assert {plan.parts for _, plan in tasks} == {1, 2}


def test_a_wrong_plan_is_found(small: None, planted: Any) -> None:
    task = tile_tasks(SMALL_CUDA, "cpu")[0]
    planted.plant(swapped_fragment=True)
    assert "elements differ" in check_one(task, SMALL_CUDA, "cpu")


def test_products_of_another_width_are_found(
    small: None, emulated: BackendCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that has no 4-bit products, and a kernel that uses them."""
    (task, *_) = (task for task in tile_tasks(SMALL_CUDA, "cpu") if task[0] == "4 bits")
    without = replace(SMALL_CUDA, gpu_of=lambda tensor: Gpu(90, 132))
    assert "native4=True, words=False, norm=False)], expected [Problem(" in check_one(task, without, "cpu")


def test_the_shapes_are_what_they_are_listed_for() -> None:
    layers = {name: layer for name, (layer, _) in kernel_checks.TILE_SHAPES.items()}
    assert TRITON.problem(layers["mixed"], TRITON.gpu("cpu")).widths == (3, 4, 6)
    found = {name: CUDA.problem(layers[name], Gpu(80, 108)) for name in CUDA.shapes}
    mixed = ["mixed", "mixed, 4 bits", "LayerNorm, mixed"]
    assert [name for name, problem in found.items() if problem.reordered] == mixed
    assert [name for name, problem in found.items() if problem.norm] == ["LayerNorm", "LayerNorm, mixed"]
    assert [name for name, problem in found.items() if problem.native4] == ["4 bits", "mixed, 4 bits"]
    assert len(set(layers["mixed in order"].groups.bits)) == 4
    assert not any(CUDA.problem(layer, Gpu(90, 132)).native4 for layer in layers.values())
    tasks = tile_tasks(CUDA, "cpu")
    assert {(name, plan.tile) for name, plan in tasks if name == "mixed in order"} == {
        ("mixed in order", tile) for tile in MMA_TILES
    }
    assert max(plan.parts for _, plan in tasks) == 12


def test_the_block_is_the_same_on_every_backend(emulated: BackendCase) -> None:
    outputs = []
    for backend in ("cpu", "reference", "cuda"):
        with use_backend(backend):
            block = Block("cpu", batch=1, s=9, heads=2, head_dim=16)
            outputs.append(block(block.input(1)))
            assert not torch.equal(outputs[-1], block(block.input(2)))
    assert torch.equal(*outputs[:2])
    assert torch.allclose(*outputs[1:], atol=0.05)  # LayerNorm and GELU are bounded, and a code may differ


def test_real_sizes_are_compared_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = Checks(stage_run(tmp_path), CPU, "cpu")
    assert checks.check_real(LAYER) == ""
    right = cpu.linear_codes

    def last_wrong(*args: Any) -> Tensor:
        outputs = right(*args)
        outputs[-1, -1] ^= 1
        return outputs

    monkeypatch.setattr(cpu, "linear_codes", last_wrong)
    assert "1 of 408 elements differ; first at (16, 23)" in checks.check_real(LAYER)


def test_real_sizes_of_narrow_inputs(emulated: BackendCase, tmp_path: Path) -> None:
    checks = Checks(stage_run(tmp_path), CUDA, "cpu")
    assert [checks.check_real(replace(LAYER, data=data)) for data in ("uniform", FOUR_BIT)] == ["", ""]
