"""docs/semantics.md once more, element by element in Python integers and fractions: nothing overflows, nothing is
rounded but where the law says so. The judge of ``ops/reference.py``; slow, for small inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import mpmath
import torch
from torch import Tensor

# dtype: (significant bits, exponent of the smallest subnormal)
FORMATS = {torch.float64: (53, -1074), torch.float32: (24, -149), torch.float16: (11, -24), torch.bfloat16: (8, -133)}
TWO_OVER_LN2 = 2.8853900817779268
ROUND_TO_INTEGER = 12582912  # 1.5 * 2^23, the constant of the law's GPU formula


def round_to(value: Fraction | int, dtype: torch.dtype = torch.float32) -> Fraction:
    """The nearest number of a float format, half to even, subnormals included; the caller stays in its range."""
    value = Fraction(value)
    if value == 0:
        return value
    digits, smallest = FORMATS[dtype]
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, smallest)
    return round(value / unit) * unit  # Python rounds a Fraction half to even


def fractions(tensor: Tensor) -> Any:
    """A tensor as nested lists of exact fractions."""
    items = tensor.tolist()

    def exact(item: Any) -> Any:
        return [exact(i) for i in item] if isinstance(item, list) else Fraction(item)

    return exact(items)


def tensor_of(rows: Any, dtype: torch.dtype) -> Tensor:
    """Nested lists of exact numbers as a tensor; every number must be one of the dtype."""
    exact = torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
    result = exact.to(dtype)
    assert ((result.double() == exact) | result.double().isinf()).all()  # infinite where it passes the dtype's range
    return result


def codes_of(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


def saturate(value: int, bits: int) -> int:
    return min(max(value, -(1 << (bits - 1))), (1 << (bits - 1)) - 1)


def requantise(value: int | Fraction, multiplier: Fraction, zero_point: int, bits: int) -> int:
    """S1. An int is an accumulator, rounded to float32 first; a Fraction is a float32 already."""
    if isinstance(value, int):
        value = round_to(value)
    return saturate(round(value * multiplier + zero_point), bits)


def gpu_requantise(value: int, multiplier: Fraction, zero_point: int, bits: int) -> int:
    """S1 as a GPU spells it: one fused multiply-add in float32, a clamp of floats, the low byte of the result."""
    t = round_to(round_to(value) * multiplier + round_to(ROUND_TO_INTEGER + zero_point))
    t = min(max(t, ROUND_TO_INTEGER - (1 << (bits - 1))), Fraction(ROUND_TO_INTEGER + (1 << (bits - 1)) - 1))
    assert t.denominator == 1
    assert 1 << 23 <= t < 1 << 24
    byte = (int(t) - (1 << 23)) & 255  # the 23 stored bits of the significand are t - 2^23
    return byte - 256 if byte > 127 else byte


def accumulate(a: Sequence[int], w: Sequence[int], bias: int = 0) -> int:
    """S2, one element, checked to fit the int32 that the law keeps it in."""
    acc = sum(x * y for x, y in zip(a, w, strict=True)) + bias
    assert -(1 << 31) <= acc < 1 << 31
    return acc


def real(acc: int, multiplier: Fraction) -> Fraction:
    """S2 real: ``f32(acc) * m`` in float32."""
    return round_to(round_to(acc) * multiplier)


def linear(a: Tensor, w: Tensor, bias_q: Tensor, epilogue: Callable[[int, int, int], Any]) -> list[list[Any]]:
    """S2: ``epilogue(acc, t, n)`` of every token t and output n."""
    tokens, weights, bias = a.tolist(), w.tolist(), bias_q.tolist()
    return [[epilogue(accumulate(x, y, bias[n]), t, n) for n, y in enumerate(weights)] for t, x in enumerate(tokens)]


def gelu(y: Fraction, approximate: str) -> mpmath.mpf:
    """GELU to 40 digits."""
    with mpmath.workdps(40):
        x = mpmath.mpf(y.numerator) / y.denominator
        if approximate == "none":
            return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2
        return x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2


def per_token(row: Sequence[Fraction]) -> tuple[list[int], Fraction]:
    """S5: codes and scale of one token."""
    absmax = max(round_to(Fraction(1, 10**30)), max(abs(x) for x in row))
    inverse = round_to(127 / absmax)
    return [min(max(round(x * inverse), -127), 127) for x in row], round_to(absmax / 127)


def layernorm(row: Sequence[Fraction], gain: Sequence[Fraction], offset: Sequence[Fraction], eps: float) -> list[Any]:
    """S3 before the rounding, to 40 digits: ``(x - mean) * rstd * gain + offset``."""
    with mpmath.workdps(40):

        def number(x: Fraction) -> mpmath.mpf:
            return mpmath.mpf(x.numerator) / x.denominator

        mean = sum(row) / len(row)
        variance = sum((x - mean) ** 2 for x in row) / len(row)
        rstd = 1 / mpmath.sqrt(number(variance + Fraction(eps)))
        return [number((x - mean) * g) * rstd + number(h) for x, g, h in zip(row, gain, offset, strict=True)]


def level_table(bits: int, tau: float) -> list[int]:
    """S4: ``L[c] = round(255 * 2^(-tau * c))``, the last one 0."""
    with mpmath.workdps(40):
        return [int(mpmath.nint(255 * mpmath.mpf(2) ** (-tau * c))) for c in range((1 << bits) - 1)] + [0]


def log2_ratio(a: int, b: int) -> Fraction:
    """log2(a / b) by the law's sequence of float64 roundings."""

    def rounded(x: Fraction) -> Fraction:
        return round_to(x, torch.float64)

    e_a, e_b = a.bit_length() - 1, b.bit_length() - 1
    m_a, m_b = Fraction(a, 1 << e_a), Fraction(b, 1 << e_b)
    f = rounded((m_a - m_b) / (m_a + m_b))
    square = rounded(f * f)
    constants = [rounded(Fraction(TWO_OVER_LN2) / (2 * n + 1)) for n in range(12)]
    series = constants.pop()
    while constants:
        series = rounded(rounded(series * square) + constants.pop())
    return rounded(e_a - e_b + rounded(f * series))


def attention_head(
    q: list[list[int]],
    k: list[list[int]],
    v: list[list[int]],
    bias: list[list[int]],
    kappa: Fraction,
    levels: Sequence[int],
    multiplier: Sequence[Fraction],
    zero_point: Sequence[int],
    inv_tau: Fraction | None,
    bits: int,
) -> list[list[int]]:
    """S4 of one batch and head, [S, D]; with inv_tau its normalised form."""
    result = []
    for i, query in enumerate(q):
        acc = [accumulate(query, key, bias[i][j]) for j, key in enumerate(k)]
        codes = [min(round(round_to(max(acc) - x) * kappa), len(levels) - 1) for x in acc]
        total = sum(levels[c] for c in codes)
        if inv_tau is not None:
            offset = round_to(round_to(log2_ratio(total, levels[0]) * inv_tau, torch.float64))
            products = [round_to(round_to(max(acc) - x) * kappa) for x in acc]
            codes = [min(round(round_to(x + offset)), len(levels) - 1) for x in products]
            total = levels[0]
        inverse = round_to(1 / round_to(total))
        result.append(
            [
                requantise(
                    sum(levels[c] * v[j][e] for j, c in enumerate(codes)),
                    round_to(multiplier[e] * inverse),
                    zero_point[e],
                    bits,
                )
                for e in range(len(multiplier))
            ]
        )
    return result
