"""Triton's interpreter, made to multiply and add as the hardware does, and to round to bfloat16.

The interpreter computes ``fma`` with two roundings; the semantics need one (S1). It casts to bfloat16 by cutting bits
off; GPUs and torch round half to even. Imported only where TRITON_INTERPRET is set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def fma_float32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` of float32 in one rounding.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond, 2008, "Emulation of FMA and
    correctly rounded sums"): with 53 >= 2 * 24 + 2 bits the second rounding, to float32, then gives what one rounding
    of the exact sum gives.
    """
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + addend
        # What the addition lost, exactly (Knuth's two-sum).
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        even = total.view(np.int64) & 1 == 0
        toward = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        odd = np.where(even & (lost != 0) & np.isfinite(total), toward, total)
        return odd.astype(np.float32)


def round_fma_once() -> None:
    """Exchanges the interpreter's ``fma`` of float32 for this one."""
    twice = InterpreterBuilder.create_fma

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if x.data.dtype != np.float32:
            return twice(self, x, y, z)
        operands = np.broadcast_arrays(x.data, y.data, z.data)
        return TensorHandle(fma_float32(*operands), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, half to even, as uint16."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def round_to_bfloat16() -> None:
    """Exchanges the interpreter's cast from float32 to bfloat16 for this one."""
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(bfloat16_bits(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
