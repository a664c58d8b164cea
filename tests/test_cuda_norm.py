"""LayerNorm behind a linear layer in one launch (csrc/gemm_sm90_norm.cuh): a cluster holds all rows of its tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import Case
from tests.conftest import BackendCase
from tests.numerics import REAL_KINDS, assert_bitwise_equal, integers, reals, uniform
from tests.test_cuda_linear import (
    MIXED,
    SHUFFLED,
    barrier_lines,
    check,
    fails_under_some_seed,
    linear_case,
    run,
    tile_id,
)
from vitq_kernels.ops.cuda import launch
from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.cuda.linear import NORM
from vitq_kernels.ops.cuda.tiles import (
    MOST_NORM_ROWS,
    MOST_NORM_TILES,
    MOST_NORM_TOKENS,
    TILES,
    Plan,
    Problem,
    asked,
    candidates,
    choose,
    estimate_us,
    forced,
    rank,
)
from vitq_kernels.spec import RowGroups

NORM_TILES = [n for n, tile in enumerate(TILES) if tile.wgmma and tile.tokens <= MOST_NORM_TOKENS]
PAIRS, SINGLE = NORM_TILES[-2:]  # blocks that share tokens by twos; of 64 tokens, each alone
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
H100 = Gpu(90, 132)


def norm_case(groups: RowGroups, m: int, k: int, residual: Tensor, kind: str = "random", bits: int = 8) -> Case:
    """A layer whose outputs reach about 1, added to a residual stream, and its LayerNorm; gains of both signs."""
    n, given = groups.rows, linear_case(groups, m, k, kind=kind).arguments
    known = {name: given[name] for name in ("a", "weight", "multiplier", "bias_q")}
    known["multiplier"] = known["multiplier"] / 160
    spread = 30.0 * 2.0 ** (bits - 8)
    norm = {"gain": uniform(-spread, spread, (n,), 6), "offset": uniform(-spread, spread, (n,), 7)}
    tail = {"residual": residual} | norm | {"eps": 1e-6, "bits": bits}
    return Case("linear_residual_layernorm", f"{m}x{k}x{n}-{kind}", known | tail)


def stream(m: int, n: int, dtype: torch.dtype = torch.float32, kind: str = "normal") -> Tensor:
    """A residual stream [M, N]."""
    return reals(kind, (m, n), dtype, seed=m + n)


@pytest.fixture(params=NORM_TILES, ids=tile_id)
def tile(request: pytest.FixtureRequest) -> Iterator[int]:
    """In which LayerNorm is forced into the launch of the layer."""
    with forced(Plan(request.param, norm=True)):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [8, 72, 192, 384, 640, 1024])
def test_clusters_of_every_size(cuda: BackendCase, tile: int, n: int, dtype: torch.dtype) -> None:
    """1 to 8 blocks: with blocks that have a part of their rows, or none; tokens of two tiles."""
    m = TILES[tile].tokens + 5
    check(norm_case(RowGroups.uniform(n, 4), m, 80, stream(m, n, dtype)), cuda.device)


@pytest.mark.parametrize("m", [1, 7, 8, 64, 65, 130])
def test_every_remainder_of_tokens(cuda: BackendCase, tile: int, m: int) -> None:
    check(norm_case(RowGroups.uniform(264, 8), m, 144, stream(m, 264)), cuda.device)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(cuda: BackendCase, tile: int, bits: int) -> None:
    """Of weights and of codes, which saturate; more slices of K than stages, whose memory the sums then take."""
    case = norm_case(RowGroups.uniform(136, bits), 37, 1200, stream(37, 136), "extreme", bits)
    case.arguments["gain"] *= 8
    check(case, cuda.device)


@pytest.mark.parametrize("groups", [MIXED, RowGroups(256, (8, 2, 5, 3), 64, tuple(SHUFFLED[0]))], ids=["tail", "whole"])
def test_rows_of_mixed_widths(cuda: BackendCase, tile: int, groups: RowGroups) -> None:
    check(norm_case(groups, 37, 130, stream(37, groups.rows)), cuda.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_that_begins_again(cuda: BackendCase, tile: int, dtype: torch.dtype) -> None:
    """A position embedding of 5 tokens serves every image."""
    case = norm_case(RowGroups.uniform(256, 8), 130, 64, stream(5, 256, dtype))
    case.arguments["a"] = case.arguments["a"].view(26, 5, 64)
    check(case, cuda.device)


def far_away(m: int, n: int) -> Tensor:
    """Rows beside a large number, whose mean rounds to as much as what they differ by."""
    return 4096 + integers(-3, 3, (m, n), seed=2) * 2.0**-10


def one_mean_a_block(m: int, n: int) -> Tensor:
    """Of each 128 channels another mean, far apart, so that blocks know little of the row's."""
    return stream(m, n) + 100.0 * integers(-9, 9, (m, -(-n // 128)), seed=3).repeat_interleave(128, 1)[:, :n]


DATA = {
    **{kind: lambda m, n, kind=kind: stream(m, n, kind=kind) for kind in REAL_KINDS},
    "far_away": far_away,
    "one_mean_a_block": one_mean_a_block,
}


@pytest.mark.parametrize("outputs", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize("kind", DATA)
def test_any_residual_stream(cuda: BackendCase, tile: int, kind: str, outputs: bool) -> None:
    """With the layer's outputs, and with outputs of nothing, so that the stream's rows stay what they are."""
    case = norm_case(RowGroups.uniform(328, 8), 70, 64, DATA[kind](70, 328))
    if not outputs:
        case.arguments["multiplier"].zero_()
    check(case, cuda.device)


def test_the_residual_stream_is_that_of_two_launches(cuda: BackendCase, tile: int) -> None:
    """Bit by bit; and the codes but for a few, whose sums were taken in another order."""
    case = norm_case(MIXED, 70, 200, stream(70, 328, torch.float16))
    together = run(case, cuda.device)
    with forced(Plan(tile)):
        apart = run(case, cuda.device)
    assert_bitwise_equal(together[0], apart[0])
    assert (together[1] != apart[1]).float().mean() < 1e-3


def test_tensors_that_begin_anywhere(cuda: BackendCase) -> None:
    """Views that no vector access may read."""

    def shifted(x: Tensor) -> Tensor:
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        return room[1:].view(x.shape).copy_(x)

    case = norm_case(RowGroups.uniform(136, 8), 20, 64, stream(20, 136, torch.float16))
    moved = {name: shifted(case.arguments[name]) for name in ("residual", "gain", "offset")}
    with forced(Plan(SINGLE, norm=True)):
        check(Case(case.op, "shifted", case.arguments | moved), cuda.device)


@pytest.mark.parametrize(
    ("plan", "n", "message"),
    [
        (Plan(0, norm=True), 72, "a tile with LayerNorm must be one of wgmma, got 0"),
        (Plan(6, norm=True), 72, "a tile with LayerNorm must have at most 192 tokens, got 256"),
        (Plan(SINGLE, 2, norm=True), 72, "parts with LayerNorm must be 1, got 2"),
        (Plan(SINGLE, norm=True), 12, "rows with LayerNorm must be a multiple of 8 up to 1024, got 12"),
        (Plan(SINGLE, norm=True), 1032, "rows with LayerNorm must be a multiple of 8 up to 1024, got 1032"),
    ],
    ids=["mma", "tokens", "parts", "odd-rows", "rows"],
)
def test_a_wrong_plan_is_refused(emulated: BackendCase, plan: Plan, n: int, message: str) -> None:
    case = norm_case(RowGroups.uniform(n, 4), 3, 128, stream(3, n))
    with forced(plan), pytest.raises(ValueError, match=rf"^vitq_kernels._cuda: linear: {message}$"):
        run(case, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gain": 0}, "out, multiplier, bias_q, residual, gain, offset and codes .* must be given"),
        ({"bias_q": 8}, "out, multiplier, .* must be given and begin at multiples of 16 bytes"),
        ({"bits": 9}, "bits must be in 2..8, got 9"),
        ({"real_dtype": 3}, "real_dtype must be in 0..2, got 3"),
    ],
    ids=["null", "unaligned", "bits", "dtype"],
)
def test_a_wrong_launch_is_refused(emulated: BackendCase, changes: dict[str, int], message: str) -> None:
    """Before anything is read: the addresses are of nothing."""
    names = ("multiplier", "bias_q", "zero_point", "inv_scale", "thresholds", "levels", "residual", "token_scale")
    given = {name: 16 * place for place, name in enumerate((*names, "gain", "offset", "codes"), 1)} | {"bits": 8}
    given |= {"real_dtype": 0} | changes
    addresses = [given[name] for name in names]
    tail = (0, 1, given["bits"], False, given["real_dtype"], given["gain"], given["offset"], 1e-6, given["codes"])
    epilogue = module().EpilogueArguments(*addresses, *tail)
    weight = module().LinearWeight(16, 16, None, 1, 1, 8, False)
    with pytest.raises(ValueError, match=rf"^vitq_kernels._cuda: linear: {message}"):
        module().linear(16, 64, weight, 1, 64, 64, epilogue, NORM, SINGLE, False, 1, None, 16, None)


def test_the_limits_of_the_choice_are_the_launchers(emulated: BackendCase) -> None:
    assert module().most_with_norm == (MOST_NORM_TOKENS, MOST_NORM_ROWS, MOST_NORM_TILES)


# --- the choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cc", [80, 89, 90, 100, 120])
def test_it_is_for_hopper_alone(cc: int) -> None:
    plans = candidates(Problem(1576, 768, 768, 8, False, False, True, norm=True), Gpu(cc, 132))
    assert {plan.tile for plan in plans if plan.norm} == (set(NORM_TILES) if cc == 90 else set())
    assert {plan.tile for plan in plans if not plan.norm} >= set(range(4))


@pytest.mark.parametrize(("rows", "norm"), [(1032, True), (764, True), (768, False)], ids=["rows", "odd", "no-norm"])
def test_it_is_for_layers_that_a_cluster_holds(rows: int, norm: bool) -> None:
    assert not any(plan.norm for plan in candidates(Problem(197, rows, 768, 8, False, False, True, norm), H100))


@pytest.mark.parametrize("clusters", [(7, 3, 2, 1, 1, 0, 0, 0), (0,) * 8, ()], ids=["few", "unknown", "not-asked"])
def test_it_is_for_gpus_that_hold_the_cluster(clusters: tuple[int, ...]) -> None:
    """A part of a GPU: of 768 rows a cluster has 6 blocks, of 384 by twos 4."""
    gpu = Gpu(90, 14, clusters=clusters)
    for rows, blocks in ((768, 6), (384, 4)):
        ranked = rank(Problem(197, rows, 768, 8, False, False, True, norm=True), gpu)
        assert any(plan.norm for plan, _ in ranked) == (gpu.clusters_at_once(blocks) > 0)
        assert all(plan.parts == 1 for plan, _ in ranked if TILES[plan.tile].wgmma) == (not any(clusters))


def test_more_turns_take_longer() -> None:
    """What the driver says counts, not the formula: 16 tiles of tokens on 15 clusters are two turns."""
    problem, plan = Problem(1024, 1024, 1024, 8, False, False, True, norm=True), Plan(SINGLE, norm=True)
    enough, short = (estimate_us(plan, problem, Gpu(90, 132, clusters=(n,) * 8)) for n in (16, 15))
    assert short > 1.5 * enough
    assert estimate_us(plan, problem, H100) == enough


def test_too_many_tokens_for_a_grid_are_two_launches() -> None:
    assert not any(plan.norm for plan in candidates(Problem(65536 * 192, 768, 64, 8, False, False, True, True), H100))


def test_the_driver_is_asked(emulated: BackendCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the emulation answers for it; not where there is no wgmma."""
    for major, clusters in ((9, (1,) * 8), (8, ())):
        properties = SimpleNamespace(major=major, minor=0, multi_processor_count=132, name="some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, found=properties: found)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        assert launch._gpu.__wrapped__(0) == Gpu(10 * major, 132, "some GPU", True, clusters)


def test_it_is_chosen_where_a_launch_costs_more_than_a_cluster() -> None:
    """By the model: for a few images of ViT-L and DeiT-B, never where clusters leave SMs idle for long."""
    assert choose(Problem(4 * 197, 1024, 1024, 8, False, False, True, norm=True), H100).norm
    for rows, cols in itertools.product((192, 384, 768, 1024), (1, 4)):
        assert not rank(Problem(256 * 197, rows, cols * rows, 8, False, False, True, norm=True), H100)[0][0].norm


def test_an_op_that_is_better_off_in_two_launches_asks_for_one_plan(emulated: BackendCase) -> None:
    """As on every GPU but Hopper."""
    with asked() as problems:
        check(norm_case(RowGroups.uniform(72, 4), 9, 64, stream(9, 72)), "cpu")
    assert problems == [Problem(9, 72, 64, 4, False, False, words=True, norm=True)]


# --- what the emulation must not let pass -----------------------------------------------------------------------


@pytest.mark.parametrize("tile", [PAIRS, SINGLE], ids=tile_id)
def test_every_wait_is_needed(planted: Any, tile: int) -> None:
    """Begin, full and empty stages, products complete, sums staged, moments staged, end."""
    case = norm_case(RowGroups.uniform(328, 4), 20, 1200, stream(20, 328))
    with forced(Plan(tile, norm=True)):
        lines = barrier_lines(case)
        assert len(lines) == 7
        for line in lines:
            planted.plant(skipped_barrier=line)
            assert fails_under_some_seed(case), f"without the wait of line {line} the numbers are the same"


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_same(planted: Any, tile: int, seed: int) -> None:
    module().set_seed(seed)
    check(norm_case(MIXED, 100, 400, stream(100, 328), "extreme"), "cpu")
