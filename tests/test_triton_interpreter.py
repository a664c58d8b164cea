"""The interpreter as this package uses it: one rounding in a fused multiply-add and to bfloat16; the constants."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.numerics import words
from tests.twins import round_to
from vitq_kernels.ops import reference
from vitq_kernels.ops.triton import primitives
from vitq_kernels.ops.triton.interpreter import bfloat16_bits, fma_float32


def floats(seed: int, count: int, exponents: tuple[int, int]) -> np.ndarray:
    """float32 with random significands and signs, exponents in the given range."""
    bits = words(seed, count)
    low, high = exponents
    exponent = (bits >> np.uint64(24)).astype(np.int64) % (high - low + 1) + low
    sign = np.where(bits >> np.uint64(63), -1.0, 1.0)
    return np.ldexp(sign * (1 + (bits % np.uint64(1 << 23)).astype(np.float64) / 2**23), exponent).astype(np.float32)


@pytest.mark.parametrize("exponents", [(-30, 30), (-2, 2), (20, 24), (-60, -40)], ids=str)
def test_fma_is_rounded_once(exponents: tuple[int, int]) -> None:
    x, y, z = (floats(seed, 2000, exponents) for seed in (1, 2, 3))
    z[::4] = np.float32(12582912.0)
    # Sums that cancel: what is left is the rounding error of the product.
    z[1::4] = -(x[1::4] * y[1::4])
    got = fma_float32(x, y, z)
    for a, b, c, result in zip(*(v.tolist() for v in (x, y, z, got)), strict=True):
        assert Fraction(result) == round_to(Fraction(a) * Fraction(b) + Fraction(c))


def test_fma_where_two_roundings_differ() -> None:
    # 1 + 2^-24 + 2^-60 lies above a tie of float32, and float64 rounds it to the tie.
    x, y = np.float32([1 + 2.0**-12]), np.float32([1 - 2.0**-12])
    product = float(x[0]) * float(y[0])  # 1 - 2^-24, exactly
    z = np.float32([2.0**-60])
    assert fma_float32(x, y, z)[0] == np.float32(product)
    near = fma_float32(np.float32([2.0**-24]), np.float32([1 + 2.0**-23]), np.float32([1.0]))[0]
    assert near == np.float32(1 + 2.0**-23)
    plain = np.float32(np.float64(2.0**-24) * np.float64(1.0) + 1.0)
    assert plain == np.float32(1.0)  # the tie itself goes to even


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_fma_of_what_is_not_finite(value: float) -> None:
    got = fma_float32(np.float32([value]), np.float32([2.0]), np.float32([1.0]))[0]
    assert np.isnan(got) if np.isnan(value) else got == value
    assert fma_float32(np.float32([3e38]), np.float32([3e38]), np.float32([1.0]))[0] == np.inf


def test_the_constants_are_those_of_the_reference() -> None:
    assert primitives.TOKEN_ABSMAX_FLOOR.value == reference.TOKEN_ABSMAX_FLOOR
    # 1.5 * 2^p of float32 and of float64: their last place is 1.
    assert primitives.ROUND_TO_INTEGER.value == 1.5 * 2**23
    assert reference._ROUND_TO_INTEGER == 1.5 * 2**52
    assert torch.tensor(primitives.ROUND_TO_INTEGER.value).view(torch.int32).item() & 0xFF == 0


def test_bfloat16_is_rounded_half_to_even() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000, 0x7F7FFFFF, 0x8000], np.uint32).view(np.float32)
    x = np.concatenate([floats(4, 4000, (-60, 60)), ties, np.float32([0.0, -0.0, np.inf, -np.inf])])
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bfloat16_bits(x), expected)
    assert np.isnan(torch.from_numpy(bfloat16_bits(np.float32([np.nan])).view(np.int16)).view(torch.bfloat16).float())
