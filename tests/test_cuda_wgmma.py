"""Hopper's linear kernel in the emulation: what its roles and copies must not get wrong, and that it is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance import Case
from tests.test_cuda_linear import MIXED, QUARTERS, barrier_lines, check, fails_under_some_seed, linear_case
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.cuda.tiles import TILES, Plan, Problem, candidates, forced
from vitq_kernels.spec import RowGroups

WGMMA_TILES = [number for number, tile in enumerate(TILES) if tile.wgmma]
SMALL = WGMMA_TILES[-1]


@pytest.mark.parametrize("tile", [n for n in WGMMA_TILES if TILES[n].cluster > 1])
def test_every_wait_is_needed(planted: Any, tile: int) -> None:
    """The cluster's at the begin and the end, full and empty stages, and the two around what is staged."""
    # A block with two tiles, whose slices are more than the stages together but not alone: a worker may run into the
    # next one. Words, of which a tile is staged in four passes.
    codes = linear_case(RowGroups.uniform(200, 4), 300, 300)
    given = {name: codes.arguments[name] for name in ("a", "weight", "multiplier", "bias_q")}
    case = Case("linear_real", "words", given | {"out_dtype": torch.float32})
    with forced(Plan(tile)):
        lines = barrier_lines(case)
        assert len(lines) == 6
        for line in lines:
            planted.plant(skipped_barrier=line)
            assert fails_under_some_seed(case), f"without the wait of line {line} the numbers are the same"


@pytest.mark.parametrize("tile", WGMMA_TILES)
def test_every_wait_of_parts_is_needed(planted: Any, tile: int) -> None:
    """The cluster's at the begin, when sums are staged and at the end; stages; and that before they are overwritten."""
    # More slices than stages, so that sums land where others still multiply.
    case = linear_case(RowGroups.uniform(200, 4), 70, 1200)
    with forced(Plan(tile, 2)):
        lines = barrier_lines(case)
        assert len(lines) == 6
        for line in lines:
            planted.plant(skipped_barrier=line)
            assert fails_under_some_seed(case), f"without the wait of line {line} the numbers are the same"


@pytest.mark.parametrize(
    "groups",
    [RowGroups.uniform(130, 5), RowGroups.uniform(136, 8), MIXED, QUARTERS],
    ids=["5", "8", "mixed", "odd-mixed"],
)
@pytest.mark.parametrize("m", [1, 16, 17, 63, 65, 257])
@pytest.mark.parametrize("tile", WGMMA_TILES)
def test_every_share_of_the_tokens(planted: Any, tile: int, m: int, groups: RowGroups) -> None:
    """Of a block that has none, some or all; odd rows, and those that are stored in another order."""
    with forced(Plan(tile, 4)):
        check(linear_case(groups, m, 464, kind="extreme"), "cpu")


@pytest.mark.parametrize("fault", ["no_fence", "no_swizzle", "wrong_parity", "extra_pending"])
def test_a_planted_fault_is_caught(planted: Any, fault: str) -> None:
    planted.plant(**{fault: 1})
    with forced(Plan(SMALL)):
        assert fails_under_some_seed(linear_case(RowGroups.uniform(64, 8), 40, 300))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tile", WGMMA_TILES)
def test_any_schedule_gives_the_same(planted: Any, tile: int, seed: int) -> None:
    planted.set_seed(seed)
    with forced(Plan(tile, 2)):
        check(linear_case(MIXED, 100, 400, kind="extreme"), "cpu")


@pytest.mark.parametrize("m", [1, 7, 63, 64, 65, 257])
@pytest.mark.parametrize("k", [16, 64, 65, 129, 384])
def test_every_remainder(planted: Any, m: int, k: int) -> None:
    """Of tokens and columns: the boxes' bounds."""
    with forced(Plan(SMALL)):
        check(linear_case(RowGroups.uniform(130, 5), m, k), "cpu")


@pytest.mark.parametrize("cc", [80, 89, 90, 100, 120])
def test_it_is_chosen_on_hopper_alone(cc: int) -> None:
    plans = candidates(Problem(12608, 768, 3072, 8, False, False), Gpu(cc, 132))
    assert any(TILES[plan.tile].wgmma for plan in plans) == (cc == 90)


def test_parts_are_those_that_fill_a_stage_twice() -> None:
    """On Hopper in one launch; beside them mma.sync's, whose sums go through memory."""
    plans = candidates(Problem(197, 768, 768, 8, False, False), Gpu(90, 132))
    assert {plan.parts for plan in plans if plan.tile in WGMMA_TILES} == {1, 2}
    assert not any(plan.has_workspace for plan in plans if plan.tile in WGMMA_TILES)
    assert all(plan.has_workspace == (plan.parts > 1) for plan in plans if plan.tile not in WGMMA_TILES)
