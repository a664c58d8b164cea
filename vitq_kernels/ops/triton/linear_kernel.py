"""The integer linear layer (S2, and S5's product): one kernel for all widths, a second one to add split sums.

Computes    acc[t, n] = sum_k a[t, k] * w[n, k] in int32, then an epilogue of S2 (``epilogue.py``) on acc + bias_q.
Layouts     a int8 [M, K]; weight in ``bit_planes``; vectors over N; out [M, N]. All row-major.
Work split  A program owns TOKENS x ROWS outputs: ROWS weight rows are the M operand of the MMA, unpacked in registers,
            and TOKENS tokens are its N operand. Programs of one block of tokens follow each other, so that the tokens
            are read once from memory and the weights, a few MB, stay in L2. SPLITS > 1 cuts K among programs, each of
            which writes its int32 sums; ``finish_kernel`` adds them and runs the epilogue: integers, so any cut gives
            the same bits.
Requires    K a multiple of 16 (the launcher pads) below 2^17; ROWS <= 128, a window's.
Exactness   acc and codes exact; the others as the reference says.
Source      ``reference.accumulate`` and the linear ops; operands swapped as in ``wgmma`` with A from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitq_kernels.ops import bit_planes
from vitq_kernels.ops.triton.epilogue import epilogue

WINDOW_ROWS = tl.constexpr(bit_planes.WINDOW_ROWS)
# Four equal bytes, as int32.
HIGH_4 = tl.constexpr(0xF0F0F0F0 - (1 << 32))
HIGH_2 = tl.constexpr(0xC0C0C0C0 - (1 << 32))
LARGEST_EPILOGUE = tl.constexpr(128 * 128)  # outputs; 64 a thread of 8 warps


@triton.jit
def concat(x, y):
    """[R, C] and [R, C] to [R, 2C]: in registers, no exchange between threads."""
    return tl.join(x, y).permute(0, 2, 1).reshape(x.shape[0], 2 * x.shape[1])


@triton.jit
def to_bytes(words):
    """int32 [R, C] to int8 [R, 4C], little-endian. LLVM folds it away: a word already is what the MMA reads."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.join(even, odd).reshape(words.shape[0], 4 * words.shape[1])


# Words, not bytes, are shifted and masked: 1.1 instead of 2.3 instructions a 4-bit weight (sm_90, triton 3.8). What a
# shift carries into the next byte the mask of the caller removes.
@triton.jit
def nibbles(p):
    """Words of a 4-bit plane [R, C] to [R, 2C] with each part's 4 bits on top of its bytes, garbage below."""
    return concat(p << 4, p)


@triton.jit
def pairs(p):
    """Words of a 2-bit plane [R, C] to [R, 4C] with each part's 2 bits on top of its bytes, garbage below."""
    t = nibbles(p)
    return concat(t << 2, t)


@triton.jit
def singles(p):
    """Words of a 1-bit plane [R, C] to [R, 8C] with each part's bit on top of its bytes, garbage below."""
    t = pairs(p)
    return concat(t << 1, t)


@triton.jit
def plane_tile(plane, place, step, PADDED_K, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """One step of a plane in its own elements, bytes or words; zeros for rows that it does not hold."""
    PER_ELEMENT: tl.constexpr = plane.dtype.element_ty.primitive_bitwidth // BITS  # columns
    SIZE: tl.constexpr = BLOCK_K // PER_ELEMENT
    offsets = place[:, None] * (PADDED_K // PER_ELEMENT) + (step * SIZE + tl.arange(0, SIZE))[None, :]
    return tl.load(plane + offsets, mask=place[:, None] >= 0, other=0)


@triton.jit
def places_of(places, plane, rows, N):
    """Place of each row in a plane (0 for 8 bits, 1 for 4, 2 for 2, 3 for 1), or -1."""
    return tl.load(places + plane * N + rows, mask=rows < N, other=-1)


@triton.jit
def accumulate(
    a, places, plane8, plane4, plane2, plane1, tokens, rows, first, last, M, N, K, PADDED_K,
    BITS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Sums over the steps [first, last), int32 [ROWS, TOKENS], of left-aligned weights of BITS bits."""
    acc = tl.zeros((ROWS, TOKENS), tl.int32)
    if BITS == 8:
        place8 = places_of(places, 0, rows, N)
    if BITS < 8 and BITS >= 4:
        place4 = places_of(places, 1, rows, N)
    if BITS == 2 or BITS == 3 or BITS == 6 or BITS == 7:
        place2 = places_of(places, 2, rows, N)
    if BITS % 2 == 1:
        place1 = places_of(places, 3, rows, N)
    base = a + tokens.to(tl.int64)[None, :] * K
    for step in range(first, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = tokens[None, :] < M
        if not EVEN_K:
            mask = mask & (k[:, None] < K)
        x = tl.load(base + k[:, None], mask=mask, other=0)
        if BITS == 8:
            w = plane_tile(plane8, place8, step, PADDED_K, 8, BLOCK_K)
        else:
            if BITS >= 4:
                words = nibbles(plane_tile(plane4, place4, step, PADDED_K, 4, BLOCK_K)) & HIGH_4
            else:
                words = pairs(plane_tile(plane2, place2, step, PADDED_K, 2, BLOCK_K)) & HIGH_2
            if BITS >= 6:
                words |= (pairs(plane_tile(plane2, place2, step, PADDED_K, 2, BLOCK_K)) >> 4) & 0x0C0C0C0C
            if BITS % 2 == 1:  # the last bit, below those of the other planes
                bit = singles(plane_tile(plane1, place1, step, PADDED_K, 1, BLOCK_K)) >> (BITS - 1)
                words |= bit & (0x01010101 << (8 - BITS))
            w = to_bytes(words)
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def linear_kernel(
    a,  # int8 [M, K]
    out,  # [M, N]; with SPLITS > 1 the partial sums, int32 [SPLITS, M, N]
    window_bits, shifts, places, plane8, plane4, plane2, plane1,  # bit_planes.BitPlanes
    multiplier, bias, zero_point, inv_scale, thresholds, levels, residual, token_scale,  # see epilogue.py
    M, N, K, PADDED_K, residual_rows, level_count,
    WIDTHS: tl.constexpr,  # set of the windows' widths as a bit mask
    EPILOGUE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """See the head of the file."""
    row_tiles = tl.cdiv(N, ROWS)
    row_tile = tl.program_id(0) % row_tiles
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) // row_tiles * TOKENS
    steps = PADDED_K // BLOCK_K
    first, last = 0, steps
    if SPLITS > 1:
        split = tl.program_id(1)
        first = split * steps // SPLITS
        last = (split + 1) * steps // SPLITS
        out += split.to(tl.int64) * M * N
    ONE_WIDTH: tl.constexpr = (WIDTHS & (WIDTHS - 1)) == 0
    bits = tl.load(window_bits + row_tile * ROWS // WINDOW_ROWS)
    acc = tl.zeros((ROWS, TOKENS), tl.int32)
    for BITS in tl.static_range(2, 9):
        # Decided when the kernel is compiled; the next one only where all windows have one width.
        if (WIDTHS >> BITS) & 1:  # noqa: SIM102
            if ONE_WIDTH or bits == BITS:
                acc = accumulate(
                    a, places, plane8, plane4, plane2, plane1, token + tl.arange(0, TOKENS), rows, first, last,
                    M, N, K, PADDED_K, BITS, TOKENS, ROWS, BLOCK_K, EVEN_K,
                )  # fmt: skip
    if TOKENS * ROWS > LARGEST_EPILOGUE:
        # The two halves of the tokens one after the other: with half the registers beside the sums nothing spills.
        early, sums = tl.split(acc.reshape(ROWS, 2, TOKENS // 2).permute(0, 2, 1))
        tokens = token + tl.arange(0, TOKENS // 2)
        epilogue(
            tl.trans(early), out, shifts, multiplier, bias, zero_point, inv_scale, thresholds, levels, residual,
            token_scale, tokens, rows, M, N, residual_rows, level_count, EPILOGUE, QMIN, QMAX,
        )  # fmt: skip
        tokens += TOKENS // 2
    else:
        sums = acc
        tokens = token + tl.arange(0, TOKENS)
    epilogue(
        tl.trans(sums), out, shifts, multiplier, bias, zero_point, inv_scale, thresholds, levels, residual, token_scale,
        tokens, rows, M, N, residual_rows, level_count, EPILOGUE, QMIN, QMAX,
    )  # fmt: skip


@triton.jit
def finish_kernel(
    partial,  # int32 [SPLITS, M, N]
    out,  # [M, N]
    shifts, multiplier, bias, zero_point, inv_scale, thresholds, levels, residual, token_scale,
    M, N, residual_rows, level_count,
    EPILOGUE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of a split linear and runs its epilogue; a program owns TOKENS x ROWS outputs."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask = (tokens[:, None] < M) & (rows[None, :] < N)
    sums = tl.zeros((TOKENS, ROWS), tl.int32)
    for split in tl.static_range(SPLITS):
        offsets = (split * M + tokens).to(tl.int64)[:, None] * N + rows[None, :]
        sums += tl.load(partial + offsets, mask=mask, other=0)
    epilogue(
        sums, out, shifts, multiplier, bias, zero_point, inv_scale, thresholds, levels, residual, token_scale,
        tokens, rows, M, N, residual_rows, level_count, EPILOGUE, QMIN, QMAX,
    )  # fmt: skip
