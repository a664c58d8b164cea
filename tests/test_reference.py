"""The reference judged by twins in Python integers and fractions (``tests/twins.py``)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from tests import twins
from tests.conformance import Case
from tests.numerics import (
    CODE_KINDS,
    REAL_KINDS,
    assert_bitwise_equal,
    codes,
    integers,
    reals,
    uniform,
)
from tests.op_cases import (
    attention_case,
    near_tie_attention,
    near_tie_normalised_attention,
    window_case,
    zero_points,
)
from tests.twins import codes_of, tensor_of
from vitq_kernels.ops import reference


class LinearProblem:
    """A small integer linear with huge, tiny and tie-rich channels."""

    def __init__(self, kind: str, m: int = 4, k: int = 33, n: int = 6) -> None:
        self.a, self.w = codes(kind, (m, k), seed=1), codes(kind, (n, k), seed=2)
        acc = (self.a.int() @ self.w.int().t()).long()
        self.bias_q = integers(-99, 99, (n,), 3)
        # Accumulators up to 2^31 - 1 and down to -2^31, where the bias itself fits int32.
        self.bias_q[0] = (1 << 31) - 1 - max(0, int(acc[:, 0].max()))
        self.bias_q[1] = -(1 << 31) - min(0, int(acc[:, 1].min()))
        self.bias_q[2] = (1 << 24) + 1 - int(acc[0, 2])
        self.multiplier = uniform(0.2, 1.5, (n,), 4) * 100 / (acc + self.bias_q).abs().amax(0)
        self.multiplier[3] = 0.5
        self.m = twins.fractions(self.multiplier)

    def check(self, actual: Tensor, epilogue: Any, dtype: torch.dtype) -> None:
        rows = twins.linear(self.a, self.w, self.bias_q, epilogue)
        assert_bitwise_equal(actual, tensor_of(rows, dtype))


@pytest.mark.parametrize("kind", CODE_KINDS)
def test_accumulate(kind: str) -> None:
    p = LinearProblem(kind)
    p.check(reference.accumulate(p.a, [p.w], p.bias_q), lambda acc, t, n: acc, torch.int32)


@pytest.mark.parametrize("kind", CODE_KINDS)
@pytest.mark.parametrize("bits", [3, 8])
def test_linear_codes(kind: str, bits: int) -> None:
    p, zero_point = LinearProblem(kind), zero_points((6,), bits, 5)
    z = zero_point.tolist()
    actual = reference.linear_codes(p.a, [p.w], p.multiplier, p.bias_q, zero_point, bits)
    p.check(actual, lambda acc, t, n: twins.requantise(acc, p.m[n], z[n], bits), torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", CODE_KINDS)
def test_linear_real_and_residual(kind: str, dtype: torch.dtype) -> None:
    p, residual = LinearProblem(kind), reals("outlier", (4, 6), dtype, seed=6)
    r = twins.fractions(residual)
    actual = reference.linear_real(p.a, [p.w], p.multiplier, p.bias_q, dtype)
    p.check(actual, lambda acc, t, n: twins.round_to(twins.real(acc, p.m[n]), dtype), dtype)
    actual = reference.linear_residual(p.a, [p.w], p.multiplier, p.bias_q, residual)
    p.check(actual, lambda acc, t, n: twins.round_to(twins.round_to(r[t][n] + twins.real(acc, p.m[n])), dtype), dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_linear_per_token(dtype: torch.dtype, bias: bool) -> None:
    p = LinearProblem("random")
    p.bias_q.zero_()
    token_scale, shift = uniform(0.01, 0.1, (4,), 7), uniform(-1, 1, (6,), 8) * bias
    s, b = twins.fractions(token_scale), twins.fractions(shift)

    def epilogue(acc: int, t: int, n: int) -> Fraction:
        y = twins.round_to(twins.round_to(acc) * twins.round_to(s[t] * p.m[n]))
        return twins.round_to(twins.round_to(y + b[n]), dtype)

    actual = reference.linear_per_token(p.a, token_scale, [p.w], p.multiplier, shift if bias else None, dtype)
    p.check(actual, epilogue, dtype)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_within_half_an_ulp_and_a_hair(approximate: str) -> None:
    y = torch.cat([uniform(-9, 9, (400,), 9), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 40.0, -40.0])])
    actual = reference.gelu(y, approximate)
    for x, got in zip(twins.fractions(y), actual.tolist(), strict=True):
        exact = twins.gelu(x, approximate)
        # Half an ulp of float32 for the last rounding; the float64 inside loses up to 2^-52 |y| where 1 + erf cancels.
        assert abs(exact - got) <= abs(exact) * 2.0**-24 + 2.0**-150 + abs(float(x)) * 2.0**-52


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("kind", CODE_KINDS)
def test_linear_gelu_codes_and_levels(kind: str, approximate: str) -> None:
    p = LinearProblem(kind)
    p.multiplier /= 32
    p.m = twins.fractions(p.multiplier)
    inv_scale, zero_point = uniform(5, 40, (6,), 10), zero_points((6,), 8, 11)
    z, s = zero_point.tolist(), twins.fractions(inv_scale)

    def g(acc: int, n: int) -> Fraction:
        exact = twins.gelu(twins.real(acc, p.m[n]), approximate)
        sign, man, exp, _ = mpmath.mpf(exact)._mpf_
        return twins.round_to((-1) ** sign * int(man) * Fraction(2) ** exp)

    actual = reference.linear_gelu_codes(p.a, [p.w], p.multiplier, p.bias_q, inv_scale, zero_point, 8, approximate)
    p.check(actual, lambda acc, t, n: twins.requantise(g(acc, n), s[n], z[n], 8), torch.int8)
    # Thresholds on values that occur: equality counts as reached.
    met = twins.linear(p.a, p.w, p.bias_q, lambda acc, t, n: twins.round_to(g(acc, n) * s[n]))
    thresholds = sorted({met[1][4], met[2][5], Fraction(0), met[0][3] + 1, met[3][4] - 2, Fraction(10), Fraction(50)})
    levels = integers(-128, 127, (len(thresholds) + 1,), 12, dtype=torch.int8)
    actual = reference.linear_gelu_levels(
        p.a,
        [p.w],
        p.multiplier,
        p.bias_q,
        inv_scale,
        tensor_of([[twins.round_to(t) for t in thresholds]], torch.float32)[0],
        levels,
        approximate,
    )
    table = levels.tolist()

    def level(acc: int, t: int, n: int) -> int:
        return table[sum(met[t][n] >= twins.round_to(threshold) for threshold in thresholds)]

    p.check(actual, level, torch.int8)


ATTENTION = [
    attention_case(2, 2, tokens, 8, log2_bits, tau, kind, number + log2_bits)
    for tokens in (1, 7)
    for log2_bits, tau in ((2, 1.0), (3, 0.5), (4, 1.0), (8, 0.25))
    for number, kind in enumerate(CODE_KINDS)
]
NORMALISED = [
    attention_case(2, 2, 7, 8, log2_bits, tau, kind, number + log2_bits, normalised=True)
    for log2_bits, tau in ((2, 1.0), (4, 0.5))
    for number, kind in enumerate(CODE_KINDS)
]
WINDOWED = [
    window_case(2, 2, (4, 6, 2, shift), 4, bias, kind, 3, normalised=normalised)
    for shift, bias, kind, normalised in (
        (0, "none", "random", False),
        (1, "patterns", "extreme", False),
        (1, "heads", "random", True),
        (0, "one", "one_sided", True),
    )
] + [window_case(2, 2, (5, 3, 0, 0), 4, "patterns")]
NEAR_TIES = [near_tie_attention(), near_tie_normalised_attention()]


@pytest.mark.parametrize("case", ATTENTION + NORMALISED + NEAR_TIES, ids=lambda case: case.label)
def test_attention(case: Case) -> None:
    x = case.arguments
    b, h, s, d = x["q"].shape
    bias = torch.zeros(b, h, s, s, dtype=torch.int32) if x["bias_q"] is None else x["bias_q"].expand(b, h, s, s)
    kappa, multiplier = twins.fractions(x["kappa"]), twins.fractions(x["multiplier"])
    expected = torch.empty(b, s, h * d, dtype=torch.int8)
    for i in range(b):
        for j in range(h):
            per_head = (kappa[j], x["levels"][j].tolist(), multiplier[j], x["zero_point"][j].tolist())
            per_head += (None if x["inv_tau"] is None else twins.fractions(x["inv_tau"])[j], x["bits"])
            head = twins.attention_head(*(t[i, j].tolist() for t in (x["q"], x["k"], x["v"], bias)), *per_head)
            expected[i, :, j * d : (j + 1) * d] = codes_of(head)
    assert_bitwise_equal(reference.attention(**x), expected)


@pytest.mark.parametrize("case", WINDOWED, ids=lambda case: case.label)
def test_attention_inside_windows(case: Case) -> None:
    x = case.arguments
    b, h, tokens, d = x["q"].shape
    windows, kappa, multiplier = x["windows"].tolist(), twins.fractions(x["kappa"]), twins.fractions(x["multiplier"])
    s = len(windows[0])
    expected = torch.empty(b, tokens, h * d, dtype=torch.int8)
    for image in range(b):
        for head in range(h):
            per_head = (kappa[head], x["levels"][head].tolist(), multiplier[head], x["zero_point"][head].tolist())
            per_head += (None if x["inv_tau"] is None else twins.fractions(x["inv_tau"])[head], x["bits"])
            for number, members in enumerate(windows):
                bias = [[0] * s] * s
                if x["bias_q"] is not None:
                    which = 0 if x["pattern"] is None else int(x["pattern"][number])
                    bias = x["bias_q"][which, head % x["bias_q"].shape[1]].tolist()
                q, k, v = ([x[name][image, head, token].tolist() for token in members] for name in "qkv")
                rows = codes_of(twins.attention_head(q, k, v, bias, *per_head))
                for token, row in zip(members, rows, strict=True):
                    expected[image, token, head * d : (head + 1) * d] = row
    assert_bitwise_equal(reference.attention(**x), expected)


@pytest.mark.parametrize("shift", [0, 3], ids=["as-they-lie", "shifted"])
def test_windows_are_a_partition_of_the_shifted_image(shift: int) -> None:
    """As Swin has it: roll, cut into windows, attend, put together, roll back."""
    x = window_case(2, 3, (14, 21, 7, shift), 8, "patterns").arguments
    b, h, _, d = x["q"].shape

    def partition(codes: Tensor) -> Tensor:
        rolled = codes.view(b, h, 14, 21, d).roll((-shift, -shift), (2, 3))
        return rolled.view(b, h, 2, 7, 3, 7, d).permute(0, 2, 4, 1, 3, 5, 6).reshape(b * 6, h, 49, d)

    kinds = [(row // 7 == 1) * 2 + (column // 7 == 2) if shift else 0 for row in (0, 7) for column in (0, 7, 14)]
    parts = {name: partition(x[name]) for name in "qkv"}
    plain = x | parts | {"bias_q": x["bias_q"][kinds].repeat(b, 1, 1, 1), "windows": None, "pattern": None}
    places = reference.attention(**plain).view(b, 2, 3, 7, 7, h * d).transpose(2, 3).reshape(b, 14, 21, h * d)
    assert_bitwise_equal(reference.attention(**x), places.roll((shift, shift), (1, 2)).flatten(1, 2))


def test_log2_of_a_ratio_has_one_value_and_is_a_logarithm() -> None:
    totals = [1, 2, 3, 127, 255, 256, 49 * 255, 197 * 201, (1 << 24) + 1, (1 << 31) - 1]
    pairs = [(a, b) for a in totals for b in (1, 3, 200, 255)]
    actual = reference.log2_ratio(*torch.tensor(pairs, dtype=torch.int32).unbind(1))
    assert_bitwise_equal(actual, tensor_of([[twins.log2_ratio(a, b) for a, b in pairs]], torch.float64)[0])
    for (a, b), got in zip(pairs, actual.tolist(), strict=True):
        assert got == pytest.approx(math.log2(a / b), rel=0, abs=2.0**-42)


@pytest.mark.parametrize("kind", REAL_KINDS)
@pytest.mark.parametrize("bits", [3, 8])
def test_layernorm_is_the_nearest_code(kind: str, bits: int) -> None:
    x = reals(kind, (4, 37), seed=13)
    gain, offset = uniform(-30, 30, (37,), 14), uniform(-30, 30, (37,), 15)
    actual = reference.layernorm(x, gain, offset, 1e-6, bits).tolist()
    g, h, low, high = twins.fractions(gain), twins.fractions(offset), -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for row, got in zip(twins.fractions(x), actual, strict=True):
        for exact, code in zip(twins.layernorm(row, g, h, 1e-6), got, strict=True):
            clamped = min(max(exact, low), high)
            # A code is nearest but for float64's own error, which matters only within 1e-9 of a tie.
            assert abs(code - clamped) <= 0.5 + 1e-9 * (1 + abs(exact))


def test_layernorm_rounds_ties_to_even() -> None:
    # A constant row normalises to exact zeros, so that the offset alone is rounded.
    offset = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5, -128.5])
    codes = reference.layernorm(torch.full((2, 8), 3.0), torch.ones(8), offset, 1e-6, 8)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 127, -128]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_add_layernorm_norms_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual = (reals("normal", (16, 37), dtype, seed=i) for i in (16, 17))
    gain, offset = uniform(-30, 30, (37,), 18), uniform(-30, 30, (37,), 19)
    pairs = [list(zip(*rows, strict=True)) for rows in zip(*map(twins.fractions, (x, residual)), strict=True)]
    summed = tensor_of([[twins.round_to(twins.round_to(a + b), dtype) for a, b in row] for row in pairs], dtype)
    y, norm = reference.add_layernorm(x, residual, gain, offset, 1e-6, 8)
    assert_bitwise_equal(y, summed)
    assert_bitwise_equal(norm, reference.layernorm(summed, gain, offset, 1e-6, 8))


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_layernorm_per_token_quantizes_the_rounded_norm(kind: str) -> None:
    x, weight, bias = reals(kind, (4, 37), seed=20), uniform(-1, 1, (37,), 21), uniform(-1, 1, (37,), 22)
    actual, scale = reference.layernorm_per_token(x, weight, bias, 1e-6)
    g, h = twins.fractions(weight), twins.fractions(bias)
    for row, got, unit in zip(twins.fractions(x), actual.tolist(), scale.tolist(), strict=True):
        exact = twins.layernorm(row, g, h, 1e-6)
        assert abs(unit - max(map(abs, exact)) / 127) <= 2.0**-22 * unit  # three float32 roundings
        for value, code in zip(exact, got, strict=True):
            assert abs(value / unit - code) <= 0.5 + 1e-4  # 127 * 2^-22 and the rounding of the norm itself
