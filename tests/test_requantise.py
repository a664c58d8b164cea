"""S1 and S5 of the reference judged by twins in Python integers and fractions, and the law's GPU spelling by S1."""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest
import torch

from tests import twins
from tests.numerics import REAL_KINDS, assert_bitwise_equal, integers, reals, uniform, words
from tests.op_cases import zero_points
from tests.twins import codes_of, tensor_of
from vitq_kernels.ops import reference

LARGE = [
    0,
    1,
    -1,
    (1 << 24) - 1,
    (1 << 24) + 1,
    (1 << 24) + 3,
    -(1 << 24) - 1,
    (1 << 30) + 1,
    (1 << 31) - 1,
    -(1 << 31),
]


def f32(value: float) -> float:
    """A Python float rounded to float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def requantise_problems() -> tuple[list[int], list[float], list[int]]:
    """Accumulators, multipliers and zero points on, beside and far from ties, and at every extreme."""
    triples = [
        # acc * m = 0.5 + 2^-47 and 0.5 - 2^-47: with z = 100 the sum does not fit a double.
        *((8384513, 8392705 * 2.0**-47, z) for z in (0, 1, 100, -100, 127, -128)),
        *((8388607, 8388609 * 2.0**-47, z) for z in (0, 1, 100, -100, 127, -128)),
        *((acc, 2.0**-25, z) for acc in LARGE for z in (0, 3)),
        *((acc, 2.0**-149, z) for acc in LARGE for z in (-7, 100)),  # subnormal
        *((acc, f32(1e-39), 5) for acc in LARGE),
        *((acc, f32(3.4e38), -5) for acc in LARGE),
        *((acc, 0.0, 9) for acc in LARGE),
        *((acc, -0.5, z) for acc in range(-9, 10) for z in (0, 1)),
        *((acc, 0.5, z) for acc in range(-300, 300) for z in (0, 1, -128, 127)),
    ]
    random = words(11, 4 * 400).tolist()
    for a, b, c, d in zip(*[iter(random)] * 4, strict=True):
        acc = (a % (1 << 31) >> b % 24) + 1
        tie = f32((c % 255 - 127 + 0.5) / acc)  # the float32 nearest to a tie, and its neighbours
        for m in torch.tensor(tie).nextafter(torch.tensor([-1.0, tie, 1.0])).tolist():
            triples.append((acc if d & 1 else -acc, m, d % 257 - 128))
    accs, multipliers, zeros = (list(column) for column in zip(*triples, strict=True))
    return accs, multipliers, zeros


@pytest.mark.parametrize("bits", range(2, 9))
def test_requantise_is_one_rounding_of_the_exact_number(bits: int) -> None:
    accs, multipliers, zeros = requantise_problems()
    actual = reference.requantise(
        torch.tensor(accs, dtype=torch.int32),
        torch.tensor(multipliers),
        torch.tensor(zeros, dtype=torch.int32),
        bits,
    )
    expected = [twins.requantise(a, Fraction(m), z, bits) for a, m, z in zip(accs, multipliers, zeros, strict=True)]
    assert_bitwise_equal(actual, torch.tensor(expected, dtype=torch.int8))


@pytest.mark.parametrize(
    ("acc", "multiplier", "zero_point", "expected"),
    [
        (8384513, 8392705 * 2.0**-47, 100, 101),  # 100.5 + 2^-47: as doubles a tie, which would go to 100
        (8388607, 8388609 * 2.0**-47, 101, 101),  # 101.5 - 2^-47: as doubles a tie, which would go to 102
        (1, 0.5, 0, 0),
        (3, 0.5, 0, 2),
        (-1, 0.5, 0, 0),
        (-3, 0.5, 0, -2),
        (1, 0.5, 1, 2),  # the tie is judged with the zero point: 1.5
        ((1 << 24) + 1, 2.0**-25, 0, 0),  # f32(acc) = 2^24, so 0.5
        ((1 << 24) + 3, ((1 << 24) - 3) * 2.0**-49, 0, 1),  # f32(acc) = 2^24 + 4, so just above 0.5
        ((1 << 31) - 1, 1.0, 0, 127),
        (-(1 << 31), 1.0, 0, -128),
        ((1 << 31) - 1, 2.0**-149, -7, -7),
    ],
)
def test_requantise_by_hand(acc: int, multiplier: float, zero_point: int, expected: int) -> None:
    arguments = (torch.tensor(acc, dtype=torch.int32), torch.tensor(multiplier), torch.tensor(zero_point))
    assert int(reference.requantise(*arguments, 8)) == expected
    assert twins.requantise(acc, Fraction(multiplier), zero_point, 8) == expected


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_gpu_formula_is_the_law(bits: int) -> None:
    problems = [p for p in zip(*requantise_problems(), strict=True) if abs(p[2]) <= 128]
    for acc, multiplier, zero_point in problems:
        m = Fraction(multiplier)
        if abs(acc * m) < 1 << 100:  # the twin's float32 has no infinity
            assert twins.gpu_requantise(acc, m, zero_point, bits) == twins.requantise(acc, m, zero_point, bits)


def test_the_twin_rounds_to_float32_as_the_hardware_does() -> None:
    doubles = uniform(-4, 4, (500,), 1).double() * torch.exp2(integers(-150, 120, (500,), 2).double()) * (1 + 2**-30)
    doubles = torch.cat([doubles, torch.tensor([2.0**24 + 1, 2.0**24 + 3, 2.0**-149 * 1.5, 2.0**-150, -(2.0**-151)])])
    expected = [Fraction(f32(x)) for x in doubles.tolist()]
    assert [twins.round_to(Fraction(x)) for x in doubles.tolist()] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_the_twin_rounds_to_half_precisions_as_torch_does(dtype: torch.dtype) -> None:
    values = uniform(-4, 4, (500,), 3) * torch.exp2(integers(-26, 12, (500,), 4).float())
    assert [twins.round_to(Fraction(x), dtype) for x in values.tolist()] == twins.fractions(values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", REAL_KINDS)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_quantize(kind: str, dtype: torch.dtype, bits: int) -> None:
    x = reals(kind, (5, 7), dtype, seed=1)
    inv_scale, zero_point = uniform(0.3, 9, (7,), 2), zero_points((7,), bits, 3)
    inv_scale[::2] = 1.0
    m, z = twins.fractions(inv_scale), zero_point.tolist()
    expected = [[twins.requantise(v, m[i], z[i], bits) for i, v in enumerate(row)] for row in twins.fractions(x)]
    assert_bitwise_equal(reference.quantize(x, inv_scale, zero_point, bits), codes_of(expected))


def test_quantize_keeps_subnormal_multipliers_and_huge_values() -> None:
    x = torch.tensor([3e38, -3e38, 3e38, 1e-40, -3e38, 3e38])
    inv_scale = torch.tensor([1e-38, 1e-38, 3e38, 3e38, 3e38, 2.0**-149])
    zeros = torch.tensor([1, 0, 0, 0, 0, 4], dtype=torch.int32)
    assert reference.quantize(x, inv_scale, zeros, 8).tolist() == [4, -3, 127, 0, -128, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", REAL_KINDS)
def test_quantize_per_token(kind: str, dtype: torch.dtype) -> None:
    x = reals(kind, (6, 9), dtype, seed=5)
    rows, scales = zip(*(twins.per_token(row) for row in twins.fractions(x)), strict=True)
    actual = reference.quantize_per_token(x)
    assert_bitwise_equal(actual[0], codes_of(list(rows)))
    assert_bitwise_equal(actual[1], tensor_of([scales], torch.float32)[0])


def test_quantize_per_token_at_the_ends_of_float32() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1e-45, -1e-40, 0.0], [3.4e38, -3.4e38, 1e38], [1e-30, -2e-30, 5e-31]])
    rows, scales = zip(*(twins.per_token(row) for row in twins.fractions(x)), strict=True)
    actual = reference.quantize_per_token(x)
    assert actual[0][0].tolist() == [0, 0, 0]
    assert_bitwise_equal(actual[0], codes_of(list(rows)))
    assert_bitwise_equal(actual[1], tensor_of([scales], torch.float32)[0])
