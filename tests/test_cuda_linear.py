"""The CUDA linear kernels beyond every backend's cases: each tile, parts of K, row orders, 4-bit products, faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import Case, assert_outputs, reference_call
from tests.conftest import BackendCase
from tests.numerics import assert_bitwise_equal, codes, integers, uniform
from tests.op_cases import CASES, weight_codes
from vitq_kernels.ops.cuda import linear
from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.cuda.tiles import TILES, Plan, Problem, asked, candidates, forced, rank
from vitq_kernels.ops.mma_fragments import prepare_weight
from vitq_kernels.packing import PackedWeight, pack_weight
from vitq_kernels.spec import RowGroups

LINEAR_OPS = [op for op in CASES if op.startswith("linear")]
# Rows: the last group is ragged; uniform rows are stored in order, mixed ones are not. Widths that are shuffled in 256
# rows fill no quarter exactly. Those of QUARTERS do, beside a group of one width, one of nearly all bits, and one of 21
# rows, whose step is no multiple of the 512 bytes that a warp copies; and outputs are stored one by one.
SHUFFLED = [torch.randperm(n, generator=torch.manual_seed(n)).tolist() for n in (256, 200)]
MIXED = RowGroups(328, (8, 2, 5, 3, 7, 4), 64, (*SHUFFLED[0], *range(256, 328)))
NARROW = RowGroups(200, (4, 2, 3, 4), 64, tuple(SHUFFLED[1]))
QUARTERS = RowGroups(
    277,
    (6, 2, 8, 3, *(5,) * 4, 2, 4, 4, 4, 8, 8, 7, 8, 3, 5),
    16,
    tuple(start + i for start in range(0, 277, 64) for i in reversed(range(min(64, 277 - start)))),
)
MMA_TILES = [number for number, tile in enumerate(TILES) if not tile.wgmma]


def tile_id(number: int) -> str:
    """Of a tile in a test's name."""
    tile = TILES[number]
    return f"{'wgmma-' if tile.wgmma else ''}{tile.rows}x{tile.tokens}"


def in_parts(most: int) -> list[Any]:
    """Parameters: each tile with one part of K, and with the largest number of them up to ``most``."""
    plans = [
        Plan(number, parts)
        for number, tile in enumerate(TILES)
        for parts in {1, max(p for p in tile.parts() if p <= most)}
    ]
    return [pytest.param(plan, id=f"{tile_id(plan.tile)}-{plan.parts}") for plan in plans]


def linear_case(groups: RowGroups, m: int, k: int, a_bits: int = 8, kind: str = "random") -> Case:
    """linear_codes on codes of ``a_bits``; the multipliers spread the sums over the codes."""
    n = groups.rows
    a, w = codes(kind, (m, k), a_bits, seed=m), weight_codes(kind, groups, k, seed=n)
    largest = (a.double() @ w.double().t()).abs().amax(0).clamp_min(1)
    arguments = {
        "a": a,
        "weight": pack_weight(w, groups),
        "multiplier": (160 * uniform(0.5, 1.5, (n,), seed=3) / largest).float(),
        "bias_q": integers(-60, 60, (n,), seed=k),
        "zero_point": integers(-20, 20, (n,), seed=5),
        "bits": 8,
    }
    return Case("linear_codes", f"{m}x{k}x{n}-{kind}", arguments)


def run(case: Case, device: str, input_bits: int = 8) -> tuple[Tensor, ...]:
    """The op on the kernel, in the layout that a weight multiplied with codes of ``input_bits`` gets."""
    arguments: dict[str, Any] = {}
    for name, value in case.arguments.items():
        if isinstance(value, PackedWeight):
            moved = replace(value, data=value.data.to(device), row_order=value.row_order.to(device))
            arguments[name] = prepare_weight(moved, input_bits)
        else:
            arguments[name] = value.to(device) if isinstance(value, Tensor) else value
    outputs = getattr(linear, case.op)(**arguments)
    return tuple(t.cpu() for t in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def check(case: Case, device: str, input_bits: int = 8) -> None:
    assert_outputs(case, run(case, device, input_bits), reference_call(case))


@pytest.mark.parametrize("plan", in_parts(4))
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_tile_and_width(cuda: BackendCase, bits: int, plan: Plan) -> None:
    kind = "extreme" if plan.tile % 2 else "random"
    with forced(plan):
        check(linear_case(RowGroups.uniform(72, bits), 35, 392, kind=kind), cuda.device)


@pytest.mark.parametrize("plan", in_parts(2))
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_rows_of_mixed_widths_come_out_in_order(cuda: BackendCase, op: str, plan: Plan) -> None:
    with forced(plan):
        check(next(case for case in CASES[op] if case.arguments["weight"].groups.order is not None), cuda.device)
        if op == "linear_codes":
            for groups in (MIXED, QUARTERS):
                check(linear_case(groups, 37, 130), cuda.device)
            known = {
                n: v for n, v in linear_case(QUARTERS, 37, 130).arguments.items() if n not in ("zero_point", "bits")
            }
            check(Case("linear_real", "words", known | {"out_dtype": torch.float32}), cuda.device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", range(len(TILES)), ids=tile_id)
def test_whole_tiles_of_mixed_rows(cuda: BackendCase, tile: int, dtype: torch.dtype) -> None:
    """No row or token of the first tile is beyond the matrix; and a residual that begins again after 5 tokens."""
    case = linear_case(RowGroups(256, (8, 2, 5, 3), 64, tuple(SHUFFLED[0])), 130, 64)
    if dtype != torch.int8:
        known = {name: case.arguments[name] for name in ("a", "weight", "multiplier", "bias_q")}
        residual = torch.randn(5, 256, generator=torch.manual_seed(0)).to(dtype)
        case = Case("linear_residual", f"{dtype}", known | {"a": known["a"].view(26, 5, 64), "residual": residual})
    with forced(Plan(tile)):
        check(case, cuda.device)


WGMMA_TILES = [number for number, tile in enumerate(TILES) if tile.wgmma]


@pytest.mark.parametrize("tile", WGMMA_TILES, ids=tile_id)
def test_biases_that_cannot_take_the_alignment(cuda: BackendCase, tile: int) -> None:
    """On either side of what fits int32 left-aligned by 0 to 6 bits."""
    case = linear_case(RowGroups(256, (8, 2, 5, 3), 64, tuple(SHUFFLED[0])), 9, 200)
    edges = [edge + off for shift in range(7) for edge in (2**30 >> shift, -(2**30) >> shift) for off in (-1, 0)]
    bias = torch.tensor([*edges, 2**31 - 2**23, -(2**31) + 2**23] * 9, dtype=torch.int32)
    bias = bias[torch.randperm(bias.numel(), generator=torch.manual_seed(1))[:256]]
    multiplier = 100 / bias.double().abs().clamp_min(1)
    multiplier[::7] *= -1
    case.arguments.update(bias_q=bias, multiplier=multiplier.float())
    with forced(Plan(tile)):
        check(case, cuda.device)


@pytest.mark.parametrize(("k", "bias"), [(2**16, 2**24 - 1), (2**16, 2**24), (2**16 + 16, 2**24 - 1)])
def test_the_longest_sums_that_stay_aligned(emulated: BackendCase, k: int, bias: int) -> None:
    """Of 2^16 columns the largest sum is 2^30 left-aligned by 6 bits: with 2^24 more, or 16 columns, it is 2^31."""
    n = 64
    case = linear_case(RowGroups.uniform(n, 2), 1, 16)
    case.arguments.update(
        a=torch.full((1, k), -128, dtype=torch.int8),
        weight=pack_weight(torch.full((n, k), -2, dtype=torch.int8), RowGroups.uniform(n, 2)),
        bias_q=torch.full((n,), bias, dtype=torch.int32),
        multiplier=torch.full((n,), 100 / (256 * k + 2**24)),
    )
    with forced(Plan(WGMMA_TILES[-1])):
        check(case, emulated.device)


@pytest.mark.parametrize("tile", WGMMA_TILES, ids=tile_id)
@pytest.mark.parametrize("per_token", [False, True], ids=["real", "per-token"])
def test_multipliers_below_the_normal_numbers(emulated: BackendCase, tile: int, per_token: bool) -> None:
    """Left-aligned sums would meet a multiplier, or its product with a token's scale, that has lost bits."""
    case = linear_case(RowGroups.uniform(64, 2), 5, 200)
    a, weight = case.arguments["a"], case.arguments["weight"]
    scale, multiplier = (1.21 * 2.0**-30, 1.37 * 2.0**-99) if per_token else (1.0, 1.37 * 2.0**-140)
    reals = {"a": a, "weight": weight, "multiplier": torch.full((64,), multiplier)}
    if per_token:
        reals |= {"token_scale": torch.full((5,), scale), "bias": None, "out_dtype": torch.float32}
    else:
        reals |= {"bias_q": case.arguments["bias_q"], "out_dtype": torch.float32}
    small = Case("linear_per_token" if per_token else "linear_real", "small", reals)
    with forced(Plan(tile)):
        (got,) = run(small, emulated.device)
    with forced(Plan(MMA_TILES[0])):
        assert_bitwise_equal(got, *run(small, emulated.device))
    assert got.abs().max() > 0


@pytest.mark.parametrize("plan", in_parts(2))
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_every_epilogue_of_every_tile(cuda: BackendCase, op: str, plan: Plan) -> None:
    case = next(c for c in CASES[op] if c.arguments["weight"].groups.order is None and c.label.endswith("random"))
    most = -(-case.arguments["a"].shape[-1] // 128)
    with forced(replace(plan, parts=min(plan.parts, most))):
        check(case, cuda.device)


@pytest.mark.parametrize("kind", ["random", "extreme", "one_sided"])
@pytest.mark.parametrize(
    "groups",
    [RowGroups.uniform(72, 4), RowGroups.uniform(64, 3), RowGroups.uniform(130, 2), NARROW],
    ids=["w4", "w3", "w2", "mixed"],
)
def test_four_bit_products(emulated: BackendCase, groups: RowGroups, kind: str) -> None:
    """On the emulated A100 codes of 4 bits take the 4-bit mma; its sums are those of the 8-bit one."""
    case = linear_case(groups, 19, 150, a_bits=4, kind=kind)
    with asked() as problems:
        check(case, "cpu", input_bits=4)
        check(case, "cpu", input_bits=5)
    assert [problem.native4 for problem in problems] == [True, False]


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_the_choice_knows_what_is_staged(emulated: BackendCase, op: str) -> None:
    """Words, where outputs are real."""
    with asked() as problems:
        check(CASES[op][0], "cpu")
    assert [problem.words for problem in problems] == ["gelu" not in op and op != "linear_codes"]


@pytest.mark.parametrize("tile", MMA_TILES, ids=tile_id)
def test_four_bit_products_of_every_tile(emulated: BackendCase, tile: int) -> None:
    for parts in (1, 2):
        with forced(Plan(tile, parts)):
            for groups in (RowGroups.uniform(96, 4), NARROW):
                check(linear_case(groups, 33, 192, a_bits=4), "cpu", input_bits=4)


def test_operands_may_begin_anywhere(cuda: BackendCase) -> None:
    """16-byte accesses fault on a GPU where memory is not aligned; under UBSan here too."""
    case = linear_case(RowGroups.uniform(64, 8), 20, 64)
    known = {name: case.arguments[name] for name in ("a", "weight", "multiplier", "bias_q")}

    def shifted(x: Tensor) -> Tensor:
        moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        assert moved.data_ptr() % 16
        return moved

    residual = torch.randn(20, 64, generator=torch.manual_seed(0)).half()
    check(
        Case("linear_residual", "shifted", known | {"a": shifted(known["a"]), "residual": shifted(residual)}),
        cuda.device,
    )


@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("reordered", [False, True], ids=["in-order", "reordered"])
def test_every_layer_has_a_plan(cc: int, reordered: bool) -> None:
    for tokens, rows, cols in ((1, 1, 1), (197, 768, 3072), (12608, 3072, 768), (64 * 1025, 5120, 1280)):
        problem = Problem(tokens, rows, cols, 8, reordered, False)
        plans = [plan for plan, _ in rank(problem, Gpu(cc, 100))]
        assert sorted(map(str, plans)) == sorted(map(str, candidates(problem, Gpu(cc, 100))))
        assert all(plan.parts <= problem.steps for plan in plans)
        assert plans


def test_the_python_table_is_the_kernels(cuda: BackendCase) -> None:
    rows = [(t.rows, t.tokens, t.threads, t.stages, t.blocks, t.wgmma, t.cluster) for t in TILES]
    assert module().gemm_tiles() == rows
    for number, tile in enumerate(TILES):
        for widest in range(2, 9):
            for reordered in (False, True):
                for kind in range(3):
                    needed = module().gemm_shared_bytes(number, widest, reordered, kind)
                    assert needed <= (227 if tile.wgmma else 99) << 10
                    assert needed == tile.shared_bytes(widest) or (reordered and not tile.wgmma)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": 10}, "no tile 10"),
        ({"parts": 5}, r"parts must be in 1..4, got 5"),
        ({"tile": 6, "parts": 3}, "parts must be 1, 2 or 4 and at most 2 on wgmma, got 3"),
        ({"tile": 9, "parts": 4}, "parts must be 1, 2 or 4 and at most 2 on wgmma, got 4"),
    ],
    ids=["tile", "parts", "wgmma-parts", "wgmma-stages"],
)
def test_a_wrong_call_is_refused(emulated: BackendCase, changes: dict[str, Any], message: str) -> None:
    plan = Plan(changes.get("tile", 0), changes.get("parts", 1))
    case = linear_case(RowGroups.uniform(72, 4), 3, 200)
    with forced(plan), pytest.raises(ValueError, match=rf"^vitq_kernels._cuda: linear: {message}"):
        run(case, "cpu")


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_is_as_exact_as_float32(emulated: BackendCase, form: str) -> None:
    """Of both forms: closer to the exact value than four times float32's precision; and at both ends."""
    y = torch.cat([torch.linspace(-9, 9, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60, -60, 3e38, -3e38])])
    wanted = torch.nn.functional.gelu(y.double(), approximate=form)
    got = torch.tensor([module().gelu(value, form == "tanh") for value in y.tolist()], dtype=torch.float64)
    assert ((got - wanted).abs() / wanted.abs().clamp_min(1)).max() < 4 * 2**-24


# What the emulation must not let pass. Each fault makes the correct source behave as one with that mistake.


def fails_under_some_seed(case: Case, seeds: int = 6) -> bool:
    for seed in range(seeds):
        module().set_seed(seed)
        try:
            check(case, "cpu")
        except (AssertionError, RuntimeError):
            return True
    return False


def barrier_lines(case: Case) -> set[int]:
    """Where a launch stands at barriers."""
    module().take_barrier_lines()
    check(case, "cpu")
    return set(module().take_barrier_lines())


def test_every_barrier_is_needed(planted: Any) -> None:
    direct, reordered = linear_case(RowGroups.uniform(256, 8), 100, 400), linear_case(MIXED, 100, 400)
    with forced(Plan(0)):
        of_pipeline = barrier_lines(direct)
        of_store = barrier_lines(reordered) - of_pipeline
        assert (len(of_pipeline), len(of_store)) == (1, 2)
        # Without the pipeline's barrier reordered outputs would be staged where no memory is.
        for case, lines in ((direct, of_pipeline), (reordered, of_store)):
            for line in lines:
                planted.plant(skipped_barrier=line)
                assert fails_under_some_seed(case), f"without the barrier of line {line} the numbers are the same"


def test_a_wait_for_too_few_copies_is_caught(planted: Any) -> None:
    planted.plant(extra_pending=1)
    assert fails_under_some_seed(linear_case(RowGroups.uniform(64, 8), 20, 300), seeds=1)


def test_a_swapped_fragment_is_caught(planted: Any) -> None:
    planted.plant(swapped_fragment=True)
    assert fails_under_some_seed(linear_case(RowGroups.uniform(64, 8), 20, 100), seeds=1)


@pytest.mark.parametrize("seed", range(5))
def test_any_schedule_gives_the_same(planted: Any, seed: int) -> None:
    planted.set_seed(seed)
    with forced(Plan(0, 2)):
        check(linear_case(MIXED, 100, 400, kind="extreme"), "cpu")
