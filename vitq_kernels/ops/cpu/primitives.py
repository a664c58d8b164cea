"""What the ``cpu`` backend's ops share: exact integer GEMMs, one rounding in float32, tiles that stay in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache, reduce

import torch
from torch import Tensor

from vitq_kernels.ops import reference
from vitq_kernels.spec import QuantFormat

# 1.5 * 2^23: a float32 from 2^23 to 2^24 is an integer, and the low bits of its word are that integer's.
ROUND_TO_INTEGER = 12582912
ROUND_TO_INTEGER_BITS = 0x4B400000
# Measured at ViT-Tiny to -Base on one and two threads: less repeats the packing of operands, more leaves the cache.
TILE_ELEMENTS = 1 << 18  # a thread


# Longest sum of int8 products, each at most 2^14, of which every part is an integer of float32.
FLOAT_SUM = 1024


@cache
def int_mm_pays() -> bool:
    """Whether ``torch._int_mm`` is exact, and faster than float32. On x86 that takes VNNI.

    Without it oneDNN adds pairs of products in saturating int16 (AVX-512), or goes through a loop without vectors
    (AVX2: 22 to 30 times the time of float32 at the sizes of ViT-Tiny). Timed once a process; the numbers are the same.
    """
    largest = torch.full((128, 256), 127, dtype=torch.int8)
    if bool((torch._int_mm(largest, largest.t()) != 127 * 127 * 256).any()):
        return False
    return _seconds(torch._int_mm, largest) < _seconds(float_matmul, largest)


def _seconds(matmul: Callable[[Tensor, Tensor], Tensor], a: Tensor) -> float:
    """The best of three ``a @ a^T``."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        matmul(a, a.t())
        found.append(time.perf_counter() - start)
    return min(found)


@cache
def addcmul_rounds_once() -> bool:
    """Whether ``torch.addcmul`` in float32 is a fused multiply-add: compilers make it one where the CPU has it."""
    # The product is 0.5 + 2^-47: one rounding of the sum goes up, but the product alone rounds to 0.5, and that tie
    # goes down. 67 columns are whole vectors and a rest; the factor is a vector, or one number a row.
    shift, product = torch.full((67,), float(ROUND_TO_INTEGER)), torch.full((3, 67), 8392705.0)
    factor = torch.full((67,), 8384513 * 2.0**-47)
    sums = (torch.addcmul(shift, product, f) for f in (factor, factor[:3, None], factor.expand(3, 67)))
    return all(bool((t == ROUND_TO_INTEGER + 1).all()) for t in sums)


def float_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 ``a @ b`` in float32, exact: int32, or float32 where K is at most FLOAT_SUM."""
    parts = (a[..., k].float() @ b[..., k, :].float() for k in slices(a.shape[-1], FLOAT_SUM))
    return reduce(lambda total, part: total.int() + part.int(), parts)


def matmul_into(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """int8 [I, K] by [K, J] to int32 ``acc`` [I, J], or [G, ...] a matrix each; exact."""
    if not int_mm_pays():
        acc.copy_(float_matmul(a, b))
    elif a.dim() == 2:
        torch._int_mm(a, b, out=acc)
    else:  # faster than one float matmul of all pairs even at 49 x 32 x 49
        for into, left, right in zip(acc, a, b, strict=True):
            torch._int_mm(left, right, out=into)


def requantise_into(
    out: Tensor, value: Tensor, multiplier: Tensor, zero_point: Tensor, bits: int, scratch: Tensor
) -> None:
    """``reference.requantise`` of float32 ``value`` [..., C] into int8 ``out``.

    As a GPU does it: ``t = fma(value, m, 1.5 * 2^23 + z)`` clamped, and the low byte of its word.

    Args:
        out: any strides.
        value: float32.
        multiplier: float32, broadcasts.
        zero_point: int32, broadcasts; best with C its last dim: torch is slow where both factors are one number a row.
        bits: 2..8.
        scratch: float32, contiguous in its last dim, of the value's shape; the value itself will do.
    """
    if not addcmul_rounds_once():
        out.copy_(reference.requantise(value, multiplier, zero_point, bits))
        return
    fmt = QuantFormat(bits)
    shift = (zero_point + ROUND_TO_INTEGER).float()  # exact: at most 2^24
    torch.addcmul(shift, value, multiplier, out=scratch)
    scratch.clamp_(ROUND_TO_INTEGER + fmt.qmin, ROUND_TO_INTEGER + fmt.qmax)
    out.copy_(scratch.view(torch.int32))


def tile_rows(columns: int) -> int:
    """Rows of so many columns that the threads work on at a time."""
    return max(1, TILE_ELEMENTS * torch.get_num_threads() // max(1, columns))


def slices(count: int, size: int) -> Iterator[slice]:
    """``range(count)`` in pieces of ``size`` and a rest."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
