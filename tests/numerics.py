"""Data that finds faults, comparators that say where, and the one table of tolerances.

Data comes from a counter-based generator in plain integers, so it is the same under every version of torch and numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

CODE_KINDS = ("random", "extreme", "one_sided", "largest", "counting", "zero_rows")
REAL_KINDS = ("normal", "ties", "one_sided", "outlier", "zero_rows", "constant_rows")


def words(seed: int, count: int) -> np.ndarray:
    """``count`` pseudo-random uint64 (splitmix64 of seed and index)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 0x632BE59B)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def integers(low: int, high: int, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Integers in [low, high], both ends included."""
    span = np.uint64(high - low + 1)
    values = (words(seed, math.prod(shape)) % span).astype(np.int64) + low
    return torch.from_numpy(values).reshape(tuple(shape)).to(dtype)


def uniform(low: float, high: float, shape: Sequence[int], seed: int) -> Tensor:
    """float32 in [low, high)."""
    unit = (words(seed, math.prod(shape)) >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.from_numpy((low + (high - low) * unit).astype(np.float32)).reshape(tuple(shape))


def codes(kind: str, shape: Sequence[int], bits: int = 8, seed: int = 0) -> Tensor:
    """int8 codes of ``bits`` bits that provoke one kind of fault.

    ``random``: the whole range. ``extreme``: only qmin, qmin + 1 and qmax. ``one_sided``: the upper half of the
    positive range, 64..127, where sums grow past 2^24. ``largest``: all qmax. ``counting``: 0, 1, 2, ... wrapped, which
    shows permuted layouts. ``zero_rows``: random, every second row zero.
    """
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    count = math.prod(shape)
    if kind in ("random", "zero_rows"):
        result = integers(qmin, qmax, shape, seed)
        if kind == "zero_rows":
            result[..., ::2, :] = 0
    elif kind == "extreme":
        result = torch.tensor([qmin, qmin + 1, qmax])[integers(0, 2, shape, seed).long()]
    elif kind == "one_sided":
        result = integers((qmax + 1) // 2, qmax, shape, seed)
    elif kind == "largest":
        result = torch.full(tuple(shape), qmax)
    elif kind == "counting":
        result = (torch.arange(count) % (1 << bits) + qmin).reshape(tuple(shape))
    else:
        raise ValueError(f"codes: kind must be one of {CODE_KINDS}, got {kind!r}")
    return result.to(torch.int8)


def reals(kind: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Real activations that provoke one kind of fault.

    ``normal``: bell-shaped. ``ties``: odd multiples of 1/2 up to 40, halfway between codes at scale 1. ``one_sided``:
    positive. ``outlier``: normal, one channel times 1000. ``zero_rows``: every second row zero. ``constant_rows``: one
    value a row, variance zero.
    """
    if kind == "ties":
        return (integers(-40, 40, shape, seed) + 0.5).to(dtype)
    if kind == "constant_rows":
        return uniform(-3, 3, (*shape[:-1], 1), seed).expand(*shape).contiguous().to(dtype)
    result = sum(uniform(-1, 1, shape, seed * 4 + i + 1000) for i in range(4))
    if kind == "one_sided":
        result = result.abs() + 1
    elif kind == "outlier":
        result[..., shape[-1] // 2] *= 1000
    elif kind == "zero_rows":
        result[..., ::2, :] = 0
    elif kind != "normal":
        raise ValueError(f"reals: kind must be one of {REAL_KINDS}, got {kind!r}")
    return result.to(dtype)


@dataclass(frozen=True)
class CodeTolerance:
    """How far integer outputs of a *bounded* op may lie from the reference."""

    max_difference: int
    max_fraction: float  # of the elements, rounded down: none of fewer than 1000
    reason: str


@dataclass(frozen=True)
class RealTolerance:
    """How far real outputs may lie from the float64 value, measured by what torch reaches in the same precision."""

    factor: float  # times the largest error of the same-precision torch expression
    floor: float  # plus this many machine epsilons of the largest magnitude
    reason: str


BOUNDED_CODES = CodeTolerance(
    1, 1e-3, "float32 before the rounding may differ by some ulp, which moves a code only where it crosses a tie"
)
REAL = RealTolerance(
    2.0,
    1.0,
    "docs/semantics.md: good as torch within a factor of 2; the floor serves data on which torch happens to be exact",
)


def _same_form(actual: Tensor, expected: Tensor) -> None:
    got, wanted = ((t.dtype, tuple(t.shape), t.device.type) for t in (actual, expected))
    assert got == wanted, f"dtype, shape, device differ: got {got}, expected {wanted}"


def _where(differs: Tensor, actual: Tensor, expected: Tensor) -> str:
    index = tuple(differs.nonzero()[0].tolist())
    return (
        f"{int(differs.sum())} of {differs.numel()} elements differ; first at {index}: "
        f"got {actual[index].item()!r}, expected {expected[index].item()!r}"
    )


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape, device type and bits (so NaN equals itself and -0.0 is not 0.0)."""
    _same_form(actual, expected)
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differs = actual.contiguous().view(as_bits) != expected.contiguous().view(as_bits)
    assert not differs.any(), _where(differs, actual, expected)


def assert_codes_close(actual: Tensor, expected: Tensor, tolerance: CodeTolerance = BOUNDED_CODES) -> None:
    """Integers within the tolerance of a *bounded* op."""
    _same_form(actual, expected)
    distance = (actual.int() - expected.int()).abs()
    far = distance > tolerance.max_difference
    assert not far.any(), f"more than {tolerance.max_difference} apart: {_where(far, actual, expected)}"
    allowed = math.floor(tolerance.max_fraction * distance.numel())
    assert int((distance > 0).sum()) <= allowed, f"{_where(distance > 0, actual, expected)}; {allowed} may"


def assert_reals_close(actual: Tensor, exact: Tensor, same_precision: Tensor, tolerance: RealTolerance = REAL) -> None:
    """Reals as near to the float64 value as the same-precision torch expression, within the tolerance."""
    _same_form(actual, same_precision)
    assert exact.dtype == torch.float64, f"exact must be float64, got {exact.dtype}"
    if not exact.numel():
        return
    bound = tolerance.factor * (same_precision.double() - exact).abs().max()
    bound = bound + tolerance.floor * torch.finfo(actual.dtype).eps * exact.abs().max()
    within = (actual.double() - exact).abs() <= bound  # false for NaN
    assert within.all(), f"bound {float(bound):.3e}: {_where(~within, actual, exact)}"


def fails(check: Callable[..., None], *arguments: Any) -> bool:
    """Whether a comparison rejects; for the tests of the comparisons."""
    try:
        check(*arguments)
    except AssertionError:
        return True
    return False
