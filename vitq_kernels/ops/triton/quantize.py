"""Real activations to codes (S1, S5): of tokens, of whole tokens with a scale each, of an image's patches.

Computes    code = requantise(x, inv_scale[k], zero_point[k]);  per token: a = max(absmax, 1e-30), scale = a / 127,
            code = clamp(rint(x * (127 / a)), -127, 127).
Layouts     x [rows, K] row-major, or image [B, C, H, W] of any strides, whose patches are the rows; inv_scale float32
            and zero_point int32 [K]; codes int8 [rows, K]; scale float32 [rows].
Work split  Static scales: a program owns ROWS x BLOCK_K codes, at most 256 of a row. Per token: a program of 4 warps
            holds ROWS whole rows in registers, in CHUNKS steps of CHUNK channels (``row_tile``).
Requires    Fewer than 2^31 patches. 16-byte accesses where K is a multiple of 64 (and a patch's width one of 8).
Exactness   exact: one fused multiply-add a code, IEEE divisions.
Source      ``reference.quantize``, ``reference.quantize_per_token``, ``reference.quantize_patches``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitq_kernels.ops.triton.launch import launch
from vitq_kernels.ops.triton.primitives import TOKEN_ABSMAX_FLOOR, requantise
from vitq_kernels.spec import QuantFormat

WARP_STEP = 256  # elements of a warp in one step: 8 a thread, which are 16 bytes of float16
WARP_ROW = 1280  # longest row of one warp
MOST_CHUNKS = 8  # steps of a row: 64 values a thread
STATIC_TILE = 4096  # codes of a program with static scales: 32 a thread of 4 warps


def chunk_of(channels: int, most: int) -> int:
    """Channels of one step, a power of two up to ``most``: one that divides K where that is 64 or more.

    768 is 3 steps of 256, with nothing masked; a block of 1024 would leave a quarter of every instruction idle.
    """
    largest = channels & -channels
    return min(most, largest if largest >= 64 else triton.next_power_of_2(channels))


def row_tile(rows: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid, and K, CHUNK, CHUNKS, ROWS and num_warps of a program that holds whole rows in registers.

    A step takes 256 elements a warp. Up to 1280 channels these are of one row, or of several where K has no power of
    two that large (4 rows of 192 channels, 2 of 384, 1 of 768): sums are shuffles. Longer rows are spread over warps.
    A thread holds up to 64 values, more only beyond 32768 channels.
    """
    warps = 4 if channels <= 4 * WARP_ROW else 16
    most = WARP_STEP if channels <= WARP_ROW else WARP_STEP * warps
    chunk = chunk_of(channels, most)
    while chunk < most and triton.cdiv(channels, chunk) > MOST_CHUNKS:
        chunk *= 2  # 2880 is 45 steps of 64, whose values would spill: 6 of 512, the last one masked
    count = WARP_STEP * warps // chunk
    sizes = {"K": channels, "CHUNK": chunk, "CHUNKS": triton.cdiv(channels, chunk), "ROWS": count}
    return (triton.cdiv(rows, count),), sizes | {"num_warps": warps, "num_stages": 1}


@triton.jit
def chunk_mask(row, rows, i: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Which elements of step i exist, broadcasting to [ROWS, CHUNK]."""
    mask = (row < rows)[:, None]
    if K % CHUNK != 0:
        mask = mask & (i * CHUNK + tl.arange(0, CHUNK) < K)[None, :]
    return mask


@triton.jit
def _quantize_kernel(
    x,  # [rows, K]
    inv_scale,  # float32 [K]
    zero_point,  # int32 [K]
    codes,  # int8 [rows, K]
    rows,
    QMIN: tl.constexpr, QMAX: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """S1 of a tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (k < K)[None, :]
    value = tl.load(x + (row * K)[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(inv_scale + k, mask=k < K, other=0.0)
    zero = tl.load(zero_point + k, mask=k < K, other=0)
    code = requantise(value, scale[None, :], zero[None, :], QMIN, QMAX)
    tl.store(codes + (row * K)[:, None] + k[None, :], code, mask=mask)


@triton.jit
def _quantize_patches_kernel(
    image,  # [B, C, H, W]
    inv_scale,  # float32 [K], K = C * PATCH_H * PATCH_W
    zero_point,  # int32 [K]
    codes,  # int8 [B, down, across, K]
    rows, down, across, stride_b, stride_c, stride_h, stride_w,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """S1 of a tile whose rows are patches."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # in 64 bits the divisions were 270 of 680 instructions
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (k < K)[None, :]
    down_row = row // across  # of patches, over all images
    batch, top, left = down_row // down, down_row % down * PATCH_H, row % across * PATCH_W
    start = batch.to(tl.int64) * stride_b + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    row = row.to(tl.int64)
    channel, y, x = k // (PATCH_H * PATCH_W), k // PATCH_W % PATCH_H, k % PATCH_W
    inside = channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    value = tl.load(image + start[:, None] + inside[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(inv_scale + k, mask=k < K, other=0.0)
    zero = tl.load(zero_point + k, mask=k < K, other=0)
    code = requantise(value, scale[None, :], zero[None, :], QMIN, QMAX)
    tl.store(codes + (row * K)[:, None] + k[None, :], code, mask=mask)


@triton.jit
def store_token_codes(values, codes, scale, row, rows, K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """S5 of whole rows: ``values`` are CHUNKS tensors float32 [ROWS, CHUNK], zero beyond K."""
    largest = tl.abs(values[0])
    for i in tl.static_range(1, CHUNKS):
        largest = tl.maximum(largest, tl.abs(values[i]))
    absmax = tl.maximum(tl.max(largest, 1), TOKEN_ABSMAX_FLOOR)
    inverse, zero = tl.div_rn(127.0, absmax)[:, None], tl.zeros((1, 1), tl.int32)
    tl.store(scale + row, tl.div_rn(absmax, 127.0), mask=row < rows)
    at = (row * K)[:, None] + tl.arange(0, CHUNK)[None, :]
    for i in tl.static_range(CHUNKS):
        code = requantise(values[i], inverse, zero, -127, 127)
        tl.store(codes + at + i * CHUNK, code, mask=chunk_mask(row, rows, i, K, CHUNK))


@triton.jit
def _quantize_per_token_kernel(
    x,  # [rows, K]
    codes,  # int8 [rows, K]
    scale,  # float32 [rows]
    rows,
    K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """S5 of whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (row * K)[:, None] + tl.arange(0, CHUNK)[None, :]
    values = ()
    for i in tl.static_range(CHUNKS):
        value = tl.load(x + at + i * CHUNK, mask=chunk_mask(row, rows, i, K, CHUNK), other=0.0)
        values = values + (value.to(tl.float32),)  # noqa: RUF005  # Triton has no unpacking
    store_token_codes(values, codes, scale, row, rows, K, CHUNK, CHUNKS)


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``reference.quantize``."""
    codes, fmt, k = x.new_empty(x.shape, dtype=torch.int8), QuantFormat(bits), inv_scale.numel()
    rows = x.numel() // max(1, k)
    grid, tile = _static_tile(rows, k)
    arguments = (x.contiguous(), inv_scale.contiguous(), zero_point.contiguous(), codes)
    launch(_quantize_kernel, grid, x, *arguments, rows, QMIN=fmt.qmin, QMAX=fmt.qmax, **tile)
    return codes


def quantize_patches(
    image: Tensor, inv_scale: Tensor, zero_point: Tensor, patch_height: int, patch_width: int, bits: int
) -> Tensor:
    """``reference.quantize_patches``."""
    b, _, height, width = image.shape
    down, across, k, fmt = height // patch_height, width // patch_width, inv_scale.numel(), QuantFormat(bits)
    codes = image.new_empty((b, down, across, k), dtype=torch.int8)
    rows = b * down * across
    grid, tile = _static_tile(rows, k)
    arguments = (image, inv_scale.contiguous(), zero_point.contiguous(), codes)
    sizes = (rows, down, across, *image.stride())
    patch = {"PATCH_H": patch_height, "PATCH_W": patch_width, "QMIN": fmt.qmin, "QMAX": fmt.qmax}
    launch(_quantize_patches_kernel, grid, image, *arguments, *sizes, **patch, **tile)
    return codes


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.quantize_per_token``."""
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows, k = scale.numel(), x.shape[-1]
    grid, tile = row_tile(rows, k)
    launch(_quantize_per_token_kernel, grid, x, x.contiguous(), codes, scale, rows, **tile)
    return codes, scale


def _static_tile(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, and K, BLOCK_K, ROWS and num_warps of a program, where no sum over a row is needed."""
    block = chunk_of(channels, WARP_STEP)
    tile = {"K": channels, "BLOCK_K": block, "ROWS": STATIC_TILE // block, "num_warps": 4, "num_stages": 1}
    return (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, block)), tile
