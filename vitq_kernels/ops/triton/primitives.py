"""The scalar semantics in Triton. Each function is the twin of the one of its name in ``ops/reference.py``.

Every rounding to an integer is one fused multiply-add with 1.5 * 2^23, whose unit in the last place is 1: the product
is exact inside it, and the sum is rounded once, half to even. The low byte of the result is the code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitq_kernels.ops.triton.launch import INTERPRETED

if INTERPRETED:
    from vitq_kernels.ops.triton import interpreter

    interpreter.round_fma_once()
    interpreter.round_to_bfloat16()

ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23, 0x4B400000
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
TOKEN_ABSMAX_FLOOR = tl.constexpr(1e-30)  # reference.TOKEN_ABSMAX_FLOOR; a test compares them


@triton.jit
def low_byte(shifted):
    """The integer in a float32 near 1.5 * 2^23, as int8."""
    return shifted.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def requantise(value, multiplier, zero_point, qmin, qmax):
    """S1: ``clamp(rint(value * multiplier + zero_point), qmin, qmax)`` of float32 value and multiplier, as int8.

    ``zero_point``, ``qmin`` and ``qmax`` are integers of magnitude up to 2^22. Monotone: saturates however large the
    product is.
    """
    shifted = tl.fma(value, multiplier, zero_point.to(tl.float32) + ROUND_TO_INTEGER)
    return low_byte(tl.minimum(tl.maximum(shifted, ROUND_TO_INTEGER + qmin), ROUND_TO_INTEGER + qmax))


@triton.jit
def gelu(y, TANH: tl.constexpr):
    """GELU of float32, erf or tanh form: ``y * sigmoid(2u)`` is ``y/2 * (1 + tanh(u))``."""
    if TANH:
        u = SQRT_2_OVER_PI * tl.fma(0.044715 * y * y, y, y)
        return y / (1.0 + tl.exp(-2.0 * u))
    return 0.5 * y * (1.0 + tl.erf(y * SQRT_HALF))
