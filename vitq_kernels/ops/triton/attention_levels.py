"""What attention does to a score (S4): distance, log2 code, level, and the offset of the normalised form.

Levels enter the second product as they lie in the table: a byte L, zero-extended and read as a float16, is the
subnormal ``L * 2^-24``, which tensor cores multiply exactly at full rate; 2^24 times the float32 sum is the integer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitq_kernels.ops import reference
from vitq_kernels.ops.triton.launch import INTERPRETED as _INTERPRETED
from vitq_kernels.ops.triton.primitives import ROUND_TO_INTEGER

INTERPRETED = tl.constexpr(_INTERPRETED)
ROUND_BITS = tl.constexpr(0x4B400000)  # of ROUND_TO_INTEGER
LEVEL_UNIT = tl.constexpr(16777216.0)  # 2^24: a level over its value as a float16
TWO_OVER_LN2 = tl.constexpr(reference.TWO_OVER_LN2)
LOG2_TERMS = tl.constexpr(reference.LOG2_TERMS)


@triton.jit
def float16_of(v):
    """int8 to float16: 0x6400 is 1024, its ulp 1. A pure one would be moved behind shared memory, read by bytes."""
    if INTERPRETED:
        return v.to(tl.float16)
    return tl.inline_asm_elementwise(
        "{.reg .b32 u, c; mov.b32 c, 0x64806480; xor.b32 u, $2, 0x80808080; prmt.b32 $0, u, 0x64646464, 0x4140;"
        "prmt.b32 $1, u, 0x64646464, 0x4342; sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c;}",
        "=&r,=&r,r", [v], dtype=tl.float16, is_pure=False, pack=4,
    )  # fmt: skip


@triton.jit
def levels_of(acc, row_max, head, offset, valid, BELOW_2_22: tl.constexpr, OFFSET: tl.constexpr):
    """L[c] of S4 as int32 and as float16 (times 2^-24); 0 where there is no key. With OFFSET, L[c'].

    The table is 2^b bytes, one or a few sectors of the L1 cache: one load serves a warp. Inline, because tl.load would
    first take the addresses of all scores through shared memory to a layout of its own.
    """
    table, last, kappa = head
    if BELOW_2_22:  # plus the bits of 1.5 * 2^23 it is that much more as a float: no conversion
        distance = ((row_max + ROUND_BITS)[:, None] - acc).to(tl.float32, bitcast=True) - ROUND_TO_INTEGER
    else:
        # Not below 0 whatever the bias holds: no address outside the table.
        distance = tl.maximum(row_max[:, None] - acc, 0).to(tl.float32)
    if OFFSET:
        shifted = distance * kappa + offset[:, None] + ROUND_TO_INTEGER
    else:
        shifted = tl.fma(distance, kappa, ROUND_TO_INTEGER)
    index = tl.minimum(shifted, last + ROUND_TO_INTEGER).to(tl.uint32, bitcast=True)
    if INTERPRETED:
        level = tl.load(table + index, mask=valid[None, :], other=0).to(tl.int32)
        return level, level.to(tl.int16).to(tl.float16, bitcast=True)
    level, p = tl.inline_asm_elementwise(
        "{.reg .u64 a, b; cvt.u64.u32 a, $3; cvt.u64.u32 b, $4; add.u64 a, a, $5; add.u64 b, b, $6;"
        "ld.global.nc.u8 $0, [a]; ld.global.nc.u8 $1, [b]; prmt.b32 $2, $0, $1, 0x5410;}",
        "=&r,=&r,=r,r,r,l,l",
        [tl.where(valid[None, :], index, ROUND_BITS), table.to(tl.uint64)],
        dtype=(tl.int32, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip
    return tl.where(valid[None, :], level, 0), tl.where(valid[None, :], p, 0.0)


@triton.jit
def _split(x):
    """Twin of reference._split."""
    word = x.to(tl.float64).to(tl.int64, bitcast=True)
    return ((word & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True), (word >> 52) - 1023


@triton.jit
def offset_of(total, largest, inv_tau):
    """Twin of reference.attention_offset and log2_ratio."""
    m_a, e_a = _split(total)
    m_b, e_b = _split(largest)
    f = (m_a - m_b) / (m_a + m_b)
    square = f * f
    series = tl.full(square.shape, TWO_OVER_LN2 / (2 * LOG2_TERMS - 1), tl.float64)
    for n in tl.static_range(LOG2_TERMS - 2, -1, -1):
        series = series * square + TWO_OVER_LN2 / (2 * n + 1)
    return (((e_a - e_b).to(tl.float64) + f * series) * inv_tau.to(tl.float64)).to(tl.float32)
