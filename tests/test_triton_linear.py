"""The Triton linear kernel in every shipped tile, on widths that mix, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.conformance import Case, check_values
from tests.conftest import BackendCase
from tests.numerics import codes as make_codes
from tests.numerics import integers, uniform
from tests.op_cases import weight_codes, zero_points
from tests.test_bit_planes import GROUPS, mixed
from vitq_kernels.ops import reference
from vitq_kernels.packing import pack_weight
from vitq_kernels.spec import RowGroups


def tiles() -> list[object]:
    """Every tile of every architecture class, each in one part and in three."""
    from vitq_kernels.ops.triton.tiles import ARCHITECTURES, Tile

    shapes = dict.fromkeys((t.rows, t.tokens, t.warps, t.stages) for arch in ARCHITECTURES for t in arch.tiles)
    return [Tile(*shape, splits) for shape in shapes for splits in (1, 3)]


def linear_case(m: int, k: int, groups: RowGroups, kind: str = "random") -> Case:
    """A case of linear_codes whose codes fill their range."""
    n = groups.rows
    a, w = make_codes(kind, (m, k), seed=m), weight_codes(kind, groups, k, seed=n)
    acc = reference.accumulate(a, [w], None)
    bias_q = integers(-60, 60, (n,), seed=k) - acc.double().mean(0).int()
    multiplier = 160 * uniform(0.5, 1.5, (n,), seed=3) / (acc + bias_q).abs().amax(0).clamp_min(1)
    arguments = {"a": a, "weight": pack_weight(w, groups), "multiplier": multiplier, "bias_q": bias_q}
    return Case("linear_codes", f"{m}x{k}x{n}", arguments | {"zero_point": zero_points((n,), 8, 30), "bits": 8})


def real_case(case: Case) -> Case:
    """The same product in another epilogue."""
    kept = {name: case.arguments[name] for name in ("a", "weight", "multiplier", "bias_q")}
    return Case("linear_real", case.label, kept | {"out_dtype": torch.float32})


@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_every_shipped_tile(tile: object, triton: BackendCase) -> None:
    from vitq_kernels.ops.triton.tuned import forced

    # 3 steps of 128 columns, the last of 48; tails of tokens and rows; three windows of 6, 4 and 8 bits.
    groups = RowGroups(300, (3, 6, 2, 4, 8), 64)
    case = linear_case(70, 304, groups)
    with forced(tile):
        check_values(case, triton.name, triton.device)
        check_values(real_case(case), triton.name, triton.device)


@pytest.mark.parametrize("m", [1, 3, 17, 197])
def test_any_number_of_tokens(m: int, triton: BackendCase) -> None:
    check_values(linear_case(m, 192, mixed(96, (2, 3, 4))), triton.name, triton.device)


@pytest.mark.parametrize("kind", ["extreme", "one_sided", "largest", "counting", "zero_rows"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_every_mixture_of_widths(groups: RowGroups, kind: str, triton: BackendCase) -> None:
    check_values(linear_case(5, 192, groups, kind), triton.name, triton.device)


@pytest.mark.parametrize("k", [1, 5, 16, 48, 64, 80, 127, 128, 144, 588])
def test_any_number_of_columns(k: int, triton: BackendCase) -> None:
    check_values(linear_case(5, k, mixed(40, (4, 7))), triton.name, triton.device)


def test_sums_past_2_to_24_and_a_whole_bias(triton: BackendCase) -> None:
    # 127 * 127 * 3072 = 4.95e7; the bias fills int32 although the weight is of 2 bits and left-aligned.
    case = linear_case(2, 3072, RowGroups.uniform(8, 8), "largest")
    check_values(case, triton.name, triton.device)
    case = linear_case(3, 64, RowGroups.uniform(8, 2), "random")
    limit = 2**31 - 1 - 64 * 128 * 2
    case.arguments["bias_q"] = torch.tensor([limit, -limit] * 4, dtype=torch.int32)
    case.arguments["multiplier"] = torch.full((8,), 100 / limit)
    check_values(case, triton.name, triton.device)
