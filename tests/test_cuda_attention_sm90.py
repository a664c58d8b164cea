"""Hopper's attention kernel in the emulation: every shape, turns and shares of heads, waits and fences, its choice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.conftest import BackendCase
from tests.numerics import assert_bitwise_equal, codes, integers, uniform
from tests.test_cuda_attention import KINDS, LEVELS, arguments
from vitq_kernels.ops import reference
from vitq_kernels.ops.cuda.attention_sm90 import attention_sm90, suits
from vitq_kernels.ops.cuda.gpus import Gpu

DIMS = (32, 64, 80, 96, 128)
LENGTHS = (1, 16, 65, 128, 129, 197, 208, 209, 256, 257, 289, 321, 433)
GRID = [(d, s, LEVELS[i % 6], KINDS[i % 4], i) for i, (d, s) in enumerate(itertools.product(DIMS, LENGTHS))]


def check(given: dict[str, Any]) -> None:
    mine = {name: value for name, value in given.items() if name not in ("bias_q", "inv_tau")}
    assert_bitwise_equal(attention_sm90(**mine), reference.attention(**given))


@pytest.mark.parametrize(("d", "s", "levels", "kind", "seed"), GRID, ids=lambda value: str(value))
def test_every_length_of_a_head_dim(emulated: BackendCase, d: int, s: int, levels: int, kind: str, seed: int) -> None:
    check(arguments(s, d, levels, kind=kind, seed=seed))


@pytest.mark.parametrize("levels", [*LEVELS, 1])
@pytest.mark.parametrize("s", [150, 290], ids=["one-pass", "two-passes"])
def test_every_table(emulated: BackendCase, s: int, levels: int) -> None:
    given = arguments(s, 64, levels, seed=levels)
    if levels == 11:  # levels need not fall, nor the last be 0
        given["levels"] = integers(1, 256, given["levels"].shape, levels).to(torch.uint8)
    check(given)


def test_ties_round_to_even(emulated: BackendCase) -> None:
    given = arguments(140, 32, 256)
    given["kappa"] = torch.full_like(given["kappa"], 2.0**-9)  # distances that are odd multiples of 256 are ties
    given["q"], given["k"] = given["q"] & -16, given["k"] & -16
    check(given)


def many_heads(batch: int, heads: int, s: int, d: int, kind: str = "random") -> dict[str, Any]:
    """More items than the emulation's three SMs, each head with tables and codes of its own."""
    given = arguments(s, d)
    qkv = codes(kind, (batch, s, 3, heads, d), seed=heads)
    given["q"], given["k"], given["v"] = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    given["kappa"] = given["kappa"][:1] * uniform(0.5, 1.5, (heads,), 1).float()
    falling = torch.arange(16, 0, -1)[None] * torch.arange(1, heads + 1)[:, None]
    given["levels"] = (falling * 255 // falling.max()).to(torch.uint8)
    given["multiplier"] = uniform(0.5, 2, (heads, d), 2).float()
    given["zero_point"] = integers(-20, 20, (heads, d), 3)
    return given


@pytest.mark.parametrize(
    ("batch", "heads", "s"),
    [(1, 1, 197), (1, 2, 197), (2, 3, 130), (3, 3, 100), (5, 4, 65), (2, 2, 300), (1, 7, 257)],
    ids=lambda value: str(value),
)
def test_items_in_turn(emulated: BackendCase, batch: int, heads: int, s: int) -> None:
    """Heads cut into shares, blocks with several items, workers that skip one; stages filled again and again."""
    check(many_heads(batch, heads, s, 32))


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_gives_the_same(planted: Any, seed: int) -> None:
    planted.set_seed(seed)
    check(many_heads(3, 3, (100, 150, 300)[seed % 3], 32, kind="extreme"))


def test_operands_need_not_be_views_of_one_tensor(emulated: BackendCase) -> None:
    given = many_heads(2, 3, 100, 64)
    given["q"] = given["q"].contiguous()
    given["k"] = given["k"][:, :1].expand(-1, 3, -1, -1)  # one head of keys for all
    given["v"] = torch.cat((torch.zeros_like(given["v"]), given["v"]), -1)[..., 64:]
    given["multiplier"] = torch.cat((torch.ones(1), given["multiplier"].flatten()))[1:].view(3, 64)  # 4 bytes off
    check(given)


def fails_under_some_seed(planted: Any, given: dict[str, Any], seeds: int = 12) -> bool:
    for seed in range(seeds):
        planted.set_seed(seed)
        try:
            check(given)
        except (AssertionError, RuntimeError):
            return True
    return False


@pytest.mark.parametrize("line", range(5))
def test_every_wait_is_needed(planted: Any, line: int) -> None:
    """For an empty stage, keys, values, and keys of an item without a tile; the block's at the begin."""
    # Items of one tile each: a worker skips every other one, and would leave a stage twice without the fourth wait.
    given = many_heads(8, 3, 40, 32)
    planted.take_barrier_lines()
    check(given)
    lines = planted.take_barrier_lines()
    assert len(lines) == 5
    planted.plant(skipped_barrier=lines[line])
    assert fails_under_some_seed(planted, given), f"without the wait of line {lines[line]} the numbers are the same"


@pytest.mark.parametrize("fault", ["no_fence", "no_proxy_fence", "no_swizzle", "wrong_parity", "extra_pending"])
def test_a_planted_fault_is_caught(planted: Any, fault: str) -> None:
    planted.plant(**{fault: 1})
    assert fails_under_some_seed(planted, many_heads(1, 1, 100, 64))


@pytest.mark.parametrize("cc", [80, 89, 90, 100, 120])
def test_it_is_chosen_on_hopper_alone(emulated: BackendCase, cc: int) -> None:
    assert suits(Gpu(cc, 132, "any", True), 197, 64) == (cc == 90)
    assert not suits(Gpu(cc, 132, "built without sm_90a", False), 197, 64)


@pytest.mark.parametrize(("s", "d"), [(197, 64), (257, 80), (577, 64), (1025, 64), (289, 128)])
def test_it_takes_the_lengths_of_vits(emulated: BackendCase, s: int, d: int) -> None:
    assert suits(Gpu(90, 132, "H100", True), s, d)


@pytest.mark.parametrize(("s", "d"), [(64, 64), (197, 48), (197, 72), (577, 128), (4096, 64)])
def test_it_leaves_to_the_other_kernel(emulated: BackendCase, s: int, d: int) -> None:
    """What mma.sync wastes less on, other dims, and heads that no shared memory holds."""
    assert not suits(Gpu(90, 132, "H100", True), s, d)


def test_a_size_beyond_it_is_named(emulated: BackendCase) -> None:
    given = arguments(70, 48)
    with pytest.raises(ValueError, match="attention_sm90: no shape for 70 tokens of dim 48"):
        check(given)
