"""Integer linear layers on a CPU: oneDNN's int8 GEMM, and what comes after it tile by tile.

The GEMM is so fast that passes over its results cost more than it does. So within a tile every step is in place, in
int32 or float32, and only the last one leaves the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vitq_kernels.ops.cpu.primitives import matmul_into, requantise_into, slices, tile_rows

TILE_COLUMNS = 384  # of a weight's rows, which the GEMM packs anew for every tile

Finish = Callable[[Tensor, slice, slice], None]  # of float32 scratch [rows, columns], and where in [T, N] it is


def _linear(a: Tensor, weight: list[Tensor], bias_q: Tensor | None, finish: Finish) -> None:
    """Hands ``f32(acc)`` to ``finish`` tile by tile, as scratch that it may overwrite."""
    flat, (w,) = a.reshape(-1, a.shape[-1]).contiguous(), weight
    (t, n), size = (len(flat), len(w)), tile_rows(min(len(w), TILE_COLUMNS))
    room = min(t, size) * min(n, TILE_COLUMNS)
    sums, values = torch.empty(room, dtype=torch.int32), torch.empty(room)
    for columns in slices(n, TILE_COLUMNS):
        for rows in slices(t, size):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            acc, value = (scratch[: shape[0] * shape[1]].view(shape) for scratch in (sums, values))
            matmul_into(acc, flat[rows], w[columns].t())
            if bias_q is not None:
                acc.add_(bias_q[columns])
            finish(value.copy_(acc), rows, columns)


def linear_codes(
    a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """``reference.linear_codes``."""
    out, tile = _empty(a, multiplier, torch.int8)

    def finish(value: Tensor, rows: slice, columns: slice) -> None:
        requantise_into(tile[rows, columns], value, multiplier[columns], zero_point[columns], bits, value)

    _linear(a, weight, bias_q, finish)
    return out


def linear_gelu_codes(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    approximate: str,
) -> Tensor:
    """``reference.linear_gelu_codes``, GELU in float32."""
    out, tile = _empty(a, multiplier, torch.int8)

    def finish(value: Tensor, rows: slice, columns: slice) -> None:
        torch.ops.aten.gelu_(value.mul_(multiplier[columns]), approximate=approximate)
        requantise_into(tile[rows, columns], value, inv_scale[columns], zero_point[columns], bits, value)

    _linear(a, weight, bias_q, finish)
    return out


def linear_gelu_levels(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    thresholds: Tensor,
    levels: Tensor,
    approximate: str,
) -> Tensor:
    """``reference.linear_gelu_levels``, GELU in float32."""
    out, tile = _empty(a, multiplier, torch.int8)
    limits = thresholds.contiguous()

    def finish(value: Tensor, rows: slice, columns: slice) -> None:
        torch.ops.aten.gelu_(value.mul_(multiplier[columns]), approximate=approximate)
        codes = torch.searchsorted(limits, value.mul_(inv_scale[columns]), right=True, out_int32=True)
        # Several times as fast as levels[codes].
        tile[rows, columns] = levels.index_select(0, codes.view(-1)).view(codes.shape)

    _linear(a, weight, bias_q, finish)
    return out


def linear_real(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.linear_real``."""
    out, tile = _empty(a, multiplier, out_dtype)

    def finish(value: Tensor, rows: slice, columns: slice) -> None:
        tile[rows, columns] = value.mul_(multiplier[columns])

    _linear(a, weight, bias_q, finish)
    return out


def linear_residual(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, residual: Tensor) -> Tensor:
    """``reference.linear_residual``."""
    out, tile = _empty(a, multiplier, residual.dtype)
    added = residual.expand(out.shape).reshape(tile.shape)

    def finish(value: Tensor, rows: slice, columns: slice) -> None:
        tile[rows, columns] = value.mul_(multiplier[columns]).add_(added[rows, columns])

    _linear(a, weight, bias_q, finish)
    return out


def linear_per_token(
    a: Tensor,
    token_scale: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``reference.linear_per_token``."""
    out, tile = _empty(a, multiplier, out_dtype)
    scale = token_scale.reshape(-1, 1)

    def finish(value: Tensor, rows: slice, columns: slice) -> None:
        value.mul_(scale[rows] * multiplier[columns])
        tile[rows, columns] = value if bias is None else value.add_(bias[columns])

    _linear(a, weight, None, finish)
    return out


def _empty(a: Tensor, multiplier: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output [..., N] and the same as [T, N]."""
    out = torch.empty(*a.shape[:-1], multiplier.numel(), dtype=dtype)
    return out, out.view(math.prod(a.shape[:-1]), multiplier.numel())
