"""LayerNorm straight to codes (S3), with the residual before it or a token's scale after it: one kernel.

Computes    y = x (+ residual, rounded to x's dtype);  n = (y - mean) * rstd * gain[k] + offset[k];
            code = clamp(rint(n)), or S5 of n with a scale a token.
Layouts     x, residual, y [rows, K] row-major; gain, offset float32 [K]; codes int8 [rows, K]; scale float32 [rows].
Work split  A program of 4 warps holds ROWS whole rows in registers, in CHUNKS steps of CHUNK channels: a warp a row up
            to K = 1280, with sums by shuffles alone (``quantize.row_tile``). One pass over memory.
Requires    Nothing: any K and any number of rows. 16-byte accesses where K is a multiple of 64.
Exactness   y exact; codes bounded: float32, the mean subtracted twice. Scales within 2 ulp.
Source      ``reference.layernorm``, ``reference.add_layernorm``, ``reference.layernorm_per_token``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitq_kernels.ops.triton.launch import launch
from vitq_kernels.ops.triton.primitives import ROUND_TO_INTEGER, low_byte
from vitq_kernels.ops.triton.quantize import chunk_mask, row_tile, store_token_codes
from vitq_kernels.spec import QuantFormat


@triton.jit
def _layernorm_kernel(
    x,  # [rows, K]
    residual,  # [rows, K], or None
    y,  # [rows, K], written where there is a residual
    gain, offset,  # float32 [K]
    codes,  # int8 [rows, K]
    scale,  # float32 [rows], or None: codes of a static scale
    rows, eps,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
    K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See the head of the file. A row is CHUNKS tensors [ROWS, CHUNK], zero beyond K."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHUNK)[None, :]
    at = (row * K)[:, None] + k
    values = ()
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for i in tl.static_range(CHUNKS):
        mask = chunk_mask(row, rows, i, K, CHUNK)
        value = tl.load(x + at + i * CHUNK, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + at + i * CHUNK, mask=mask, other=0.0).to(tl.float32)
            rounded = value.to(y.dtype.element_ty)
            tl.store(y + at + i * CHUNK, rounded, mask=mask)
            value = rounded.to(tl.float32)
        total += value
        values = values + (value,)  # noqa: RUF005  # Triton has no unpacking

    # The first mean is off by its rounding, up to half an ulp of x: as large as the deviations in a row that is nearly
    # constant. ``rest``, the mean of what it leaves, takes that away.
    mean = (tl.sum(total, 1) * (1.0 / K))[:, None]
    centred = ()
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    squares = tl.zeros((ROWS, CHUNK), tl.float32)
    for i in tl.static_range(CHUNKS):
        value = values[i] - mean
        if K % CHUNK != 0:
            value = tl.where(i * CHUNK + k < K, value, 0.0)
        total += value
        squares = tl.fma(value, value, squares)
        centred = centred + (value,)  # noqa: RUF005
    rest = tl.sum(total, 1) * (1.0 / K)
    variance = tl.maximum(tl.div_rn(tl.sum(squares, 1), K * 1.0) - rest * rest, 0.0) + eps
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance))
    # One step of Newton takes back what the root and the division rounded: a scale per token shows the last bit.
    ratio = variance * rstd
    excess = tl.fma(ratio, rstd, -1.0) + tl.fma(variance, rstd, -ratio) * rstd
    rstd = tl.fma(rstd, -0.5 * excess, rstd)
    shift = (-rest * rstd)[:, None]

    channel = tl.broadcast_to(k, (ROWS, CHUNK))
    normalised = ()
    for i in tl.static_range(CHUNKS):
        # Each row loads them for itself: a thread then holds what it needs, without an exchange through shared memory.
        inside = i * CHUNK + channel < K
        g = tl.load(gain + i * CHUNK + channel, mask=inside, other=0.0)
        h = tl.load(offset + i * CHUNK + channel, mask=inside, other=0.0)
        value = tl.fma(tl.fma(centred[i], rstd[:, None], shift), g, h)
        if scale is None:
            # Clamped first: an offset beyond 2^22 would not round to an integer in the sum.
            value = tl.minimum(tl.maximum(value, QMIN * 1.0), QMAX * 1.0)
            mask = chunk_mask(row, rows, i, K, CHUNK)
            tl.store(codes + at + i * CHUNK, low_byte(value + ROUND_TO_INTEGER), mask=mask)
        else:
            normalised = normalised + (value,)  # noqa: RUF005
    if scale is not None:
        store_token_codes(normalised, codes, scale, row, rows, K, CHUNK, CHUNKS)


def layernorm(x: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int) -> Tensor:
    """``reference.layernorm``."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    _launch(x, None, None, gain, offset, codes, None, eps, bits)
    return codes


def add_layernorm(
    x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    """``reference.add_layernorm``."""
    y, codes = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int8)
    _launch(x, residual, y, gain, offset, codes, None, eps, bits)
    return y, codes


def layernorm_per_token(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``reference.layernorm_per_token``."""
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _launch(x, None, None, weight, bias, codes, scale, eps, 8)
    return codes, scale


def _launch(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    eps: float,
    bits: int,
) -> None:
    fmt, k = QuantFormat(bits), gain.numel()
    rows = x.numel() // k
    grid, tile = row_tile(rows, k)
    added = None if residual is None else residual.contiguous()
    arguments = (x.contiguous(), added, y, gain.contiguous(), offset.contiguous(), codes, scale)
    launch(_layernorm_kernel, grid, x, *arguments, rows, eps, QMIN=fmt.qmin, QMAX=fmt.qmax, **tile)
