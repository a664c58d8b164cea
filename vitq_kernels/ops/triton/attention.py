"""S4, log2-quantized softmax attention: the whole key row in registers up to 256 tokens, two passes beyond.

Codes and levels: ``attention_levels.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitq_kernels.ops.backends import BackendUnavailableError
from vitq_kernels.ops.triton.attention_levels import LEVEL_UNIT, ROUND_BITS, float16_of, levels_of, offset_of
from vitq_kernels.ops.triton.launch import device_of, launch
from vitq_kernels.ops.triton.primitives import ROUND_TO_INTEGER, requantise
from vitq_kernels.spec import QuantFormat

LARGEST_D = 256  # beyond, a block of k or v would not fit shared memory
WHOLE_ROW = 256  # keys that a program can hold: 16 rows a warp are 128 registers a thread
SLICE = 16  # key columns of which the compiler knows whether all, some or none are keys


@triton.jit
def _tile(ptr, rows, stride, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, KEPT: tl.constexpr = 0):
    """Channels [FIRST, FIRST + WIDTH) of int8 rows [rows, D]; 0 where a row is not valid, beyond D and before KEPT."""
    channels = FIRST + tl.arange(0, WIDTH)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(pointers, mask=valid[:, None] & ((channels >= KEPT) & (channels < D))[None, :], other=0)


@triton.jit
def _tokens(windows, places, valid, WINDOWS: tl.constexpr):
    """The tokens at places of a sequence; 0 where there is none."""
    if WINDOWS:
        return tl.load(windows + places, mask=valid, other=0)
    return places


@triton.jit
def _scores(
    query, key, keys, valid,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, HAS_BIAS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """acc of S4 for a block of keys, int32 [rows, keys], and the maximum of each row."""
    q, q_tail, bias, row_valid = query
    k, k_row, bias_key, windows = key
    tokens = _tokens(windows, keys, valid, WINDOWS)
    k_main = tl.trans(_tile(k, tokens, k_row, valid, 0, MAIN, D))
    acc = tl.dot(q, k_main, out_dtype=tl.int32)
    if TAIL > 0:
        acc = tl.dot(q_tail, tl.trans(_tile(k, tokens, k_row, valid, D - TAIL, TAIL, D)), acc, out_dtype=tl.int32)
    if HAS_BIAS:
        pointers = bias[:, None] + keys.to(tl.int64)[None, :] * bias_key
        acc += tl.load(pointers, mask=row_valid[:, None] & valid[None, :], other=0)
    return acc, tl.max(tl.where(valid[None, :], acc, -2147483648), 1)


@triton.jit
def _product(p, value, keys, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, WINDOWS: tl.constexpr):
    """2^-24 * sum over the keys of level * v, float32 [rows, WIDTH], exact below 514 keys."""
    v, v_row, windows = value
    return tl.dot(p, float16_of(_tile(v, _tokens(windows, keys, valid, WINDOWS), v_row, valid, FIRST, WIDTH, D)))


@triton.jit
def _add_block(
    total, o, o_tail, p, level, value, keys, valid,
    D: tl.constexpr, V_TAIL: tl.constexpr, CODING: tl.constexpr, NORMALISED: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """A block of keys added to Z in the first coding, to o in the last one."""
    if CODING == 0:
        total += tl.sum(level, 1)
    if CODING == NORMALISED:  # of magnitude up to 2^22, so that the rounding constant makes an integer of the float
        block = tl.fma(_product(p, value, keys, valid, 0, o.shape[1], D, WINDOWS), LEVEL_UNIT, ROUND_TO_INTEGER)
        o += block.to(tl.int32, bitcast=True) - ROUND_BITS
        if V_TAIL > 0:
            block = tl.fma(
                _product(p, value, keys, valid, D - V_TAIL, V_TAIL, D, WINDOWS), LEVEL_UNIT, ROUND_TO_INTEGER
            )
            o_tail += block.to(tl.int32, bitcast=True) - ROUND_BITS
    return total, o, o_tail


@triton.jit
def _store(
    out, o, inverse, multiplier, zero_point, row_valid,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    """The last line of S4 for channels [FIRST, FIRST + WIDTH); ``inverse`` is f32(1 / f32(Z)) of each row."""
    channels = FIRST + tl.arange(0, WIDTH)
    inside = channels < D
    m = tl.load(multiplier + channels, mask=inside, other=0.0)
    z = tl.load(zero_point + channels, mask=inside, other=0)
    codes = requantise(o.to(tl.float32), m[None, :] * inverse[:, None], z[None, :], QMIN, QMAX)
    tl.store(out + channels[None, :], codes, mask=row_valid[:, None] & inside[None, :])


@triton.jit
def attention_kernel(
    q, k, v, kappa, levels, multiplier, zero_point, bias, inv_tau, windows, pattern, out,
    S, H, W, LEVELS, round_bits,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    bias_image, bias_head, bias_row, bias_key,
    D: tl.constexpr, K_MAIN: tl.constexpr, K_TAIL: tl.constexpr, V_MAIN: tl.constexpr, V_TAIL: tl.constexpr,
    ONE_PASS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALISED: tl.constexpr, WINDOWS: tl.constexpr, PATTERN: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    """S4 and its normalised form, one block of query rows of a head, of an image or (WINDOWS) of a window of it.

    Computes: reference.attention.
    Layouts: q, k, v int8 [B, H, W * S, D], channels contiguous, other strides free; levels uint8 [H, LEVELS];
        multiplier, zero_point [H, D]; bias int32 [B, H, S, S] by strides, 0 where it broadcasts; out int8
        [B, W * S, H * D]. WINDOWS: windows int32 [W, S], bias [P, H, S, S] and, if PATTERN, pattern int32 [W]; else W
        is 1.
    Work split: program ((image * W + window) * H + head) * row blocks + row block, so that neighbours share k and v in
        L2, and with them the lines that a token's heads lie in. ONE_PASS
        keeps the scores of all keys, BLOCK_N + REST_N of them; else the keys are taken twice (three times if
        NORMALISED), BLOCK_N at a time and REST_N last.
    Requires: WHOLE = S rounded down, to 16 in ONE_PASS with S <= BLOCK_N + REST_N <= 256, else to BLOCK_N <= 128 with
        S - WHOLE <= REST_N. round_bits is ROUND_BITS (ptxas would split a constant off every address).
    Exactness: exact. Partial sums of level * v stay below 2^23 in float32 (256 keys), one bit below its 2^24.
    Source: docs/semantics.md S4.
    """
    blocks = tl.cdiv(S, BLOCK_M)
    program = tl.program_id(0)
    block, h, image = program % blocks, (program // blocks % H).to(tl.int64), (program // blocks // H).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < S
    which_bias = image
    if WINDOWS:
        windows += image % W * S
        which_bias = tl.load(pattern + image % W).to(tl.int64) if PATTERN else image * 0
        image = image // W
    tokens = _tokens(windows, rows, row_valid, WINDOWS)
    q += image * q_image + h * q_head
    bias_rows = bias + which_bias * bias_image + h * bias_head + rows.to(tl.int64) * bias_row
    q_main = _tile(q, tokens, q_row, row_valid, 0, K_MAIN, D)
    q_tail = _tile(q, tokens, q_row, row_valid, D - K_TAIL, K_TAIL, D, K_MAIN) if K_TAIL > 0 else q_main
    query = (q_main, q_tail, bias_rows, row_valid)
    key = (k + image * k_image + h * k_head, k_row, bias_key, windows)
    value = (v + image * v_image + h * v_head, v_row, windows)
    head = (levels + h * LEVELS - round_bits, LEVELS - 1, tl.load(kappa + h))
    largest = tl.load(levels + h * LEVELS).to(tl.int32)
    BELOW_2_22: tl.constexpr = D <= 128 and not HAS_BIAS  # |acc| <= D * 2^14: distances below 2^22
    total, offset = tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.float32)
    keys = tl.arange(0, BLOCK_N)
    # In one pass the compiler sees which slices are keys, which are not, and of which one to ask S.
    valid = ((keys < WHOLE) | (keys < S)) & (keys < WHOLE + 16) if ONE_PASS else keys < BLOCK_N
    if REST_N > 0:
        rest = (BLOCK_N if ONE_PASS else WHOLE) + tl.arange(0, REST_N)
        rest_valid = ((rest < WHOLE) | (rest < S)) & (rest < WHOLE + 16) if ONE_PASS else rest < S
    acc, row_max = _scores(query, key, keys, valid, D, K_MAIN, K_TAIL, HAS_BIAS, WINDOWS)
    if not ONE_PASS:
        for start in range(BLOCK_N, WHOLE, BLOCK_N):
            _, block_max = _scores(query, key, start + keys, valid, D, K_MAIN, K_TAIL, HAS_BIAS, WINDOWS)
            row_max = tl.maximum(row_max, block_max)
    if REST_N > 0:
        rest_acc, rest_max = _scores(query, key, rest, rest_valid, D, K_MAIN, K_TAIL, HAS_BIAS, WINDOWS)
        row_max = tl.maximum(row_max, rest_max)
    if ONE_PASS:
        for coding in tl.static_range(2 if NORMALISED else 1):
            if coding == 1:
                offset = offset_of(total, largest, tl.load(inv_tau + h))
            level, p = levels_of(acc, row_max, head, offset, valid, BELOW_2_22, coding == 1)
            total += tl.sum(level, 1)
            if REST_N > 0:
                level, rest_p = levels_of(rest_acc, row_max, head, offset, rest_valid, BELOW_2_22, coding == 1)
                total += tl.sum(level, 1)
        o = _product(p, value, keys, valid, 0, V_MAIN, D, WINDOWS)
        o_tail = _product(p, value, keys, valid, D - V_TAIL, V_TAIL, D, WINDOWS) if V_TAIL > 0 else o
        if REST_N > 0:
            o += _product(rest_p, value, rest, rest_valid, 0, V_MAIN, D, WINDOWS)
            if V_TAIL > 0:
                o_tail += _product(rest_p, value, rest, rest_valid, D - V_TAIL, V_TAIL, D, WINDOWS)
        o, o_tail = o * LEVEL_UNIT, o_tail * LEVEL_UNIT
    else:
        o = tl.zeros([BLOCK_M, V_MAIN], tl.int32)
        o_tail = tl.zeros([BLOCK_M, V_TAIL if V_TAIL > 0 else 16], tl.int32)
        for coding in tl.static_range(2 if NORMALISED else 1):
            if coding == 1:
                offset = offset_of(total, largest, tl.load(inv_tau + h))
            for start in range(0, WHOLE, BLOCK_N):
                block_acc, _ = _scores(query, key, start + keys, valid, D, K_MAIN, K_TAIL, HAS_BIAS, WINDOWS)
                level, p = levels_of(block_acc, row_max, head, offset, valid, BELOW_2_22, coding == 1)
                total, o, o_tail = _add_block(
                    total, o, o_tail, p, level, value, start + keys, valid, D, V_TAIL, coding, NORMALISED, WINDOWS
                )
            if REST_N > 0:
                rest_level, rest_p = levels_of(rest_acc, row_max, head, offset, rest_valid, BELOW_2_22, coding == 1)
                total, o, o_tail = _add_block(
                    total, o, o_tail, rest_p, rest_level, value, rest, rest_valid,
                    D, V_TAIL, coding, NORMALISED, WINDOWS,
                )  # fmt: skip
    if NORMALISED:
        total = tl.zeros([BLOCK_M], tl.int32) + largest
    inverse = tl.div_rn(1.0, total.to(tl.float32))
    multiplier, zero_point = multiplier + h * D, zero_point + h * D
    out += image * W * S * H * D + tokens.to(tl.int64)[:, None] * (H * D) + h * D
    _store(out, o, inverse, multiplier, zero_point, row_valid, 0, V_MAIN, D, QMIN, QMAX)
    if V_TAIL > 0:
        _store(out, o_tail, inverse, multiplier, zero_point, row_valid, D - V_TAIL, V_TAIL, D, QMIN, QMAX)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    levels: Tensor,
    multiplier: Tensor,
    zero_point: Tensor,
    bias_q: Tensor | None,
    inv_tau: Tensor | None,
    bits: int,
    windows: Tensor | None = None,
    pattern: Tensor | None = None,
) -> Tensor:
    """``reference.attention``."""
    b, h, tokens, d = q.shape
    count, s = (1, tokens) if windows is None else windows.shape
    if d > LARGEST_D:
        why = f"takes head dims up to {LARGEST_D}, got {d}; can: reference"
        raise BackendUnavailableError(f"vitq::attention on {q.device.type}: backend triton {why}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    vectors = (t.contiguous() for t in (kappa, levels, multiplier, zero_point))
    out = q.new_empty(b, tokens, h * d)
    biases = b if windows is None else -1
    bias_strides = (0, 0, 0, 0) if bias_q is None else bias_q.expand(biases, h, s, s).stride()
    tables = (out if t is None else t.contiguous() for t in (inv_tau, windows, pattern))
    tiles = configuration(s, d, bias_q is not None, inv_tau is not None, windows is not None, device_of(q).cc)
    tiles |= {"PATTERN": pattern is not None, "QMIN": QuantFormat(bits).qmin, "QMAX": QuantFormat(bits).qmax}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides)
    numbers = (s, h, count, levels.shape[1], ROUND_BITS.value, *strides)
    grid = (triton.cdiv(s, tiles["BLOCK_M"]) * h * count * b,)
    bias = out if bias_q is None else bias_q
    launch(attention_kernel, grid, q, q, k, v, *vectors, bias, *tables, out, *numbers, D=d, **tiles)
    return out


def configuration(s: int, d: int, bias: bool, normalised: bool, windows: bool, cc: int) -> dict[str, int]:
    """How channels, keys and rows are cut, and the warps: the lengths and head dims of the table do not spill."""
    # An int8 dot takes 32 channels at least, a float16 dot gives 16: 80 = 64 + 32 of q and k, 64 + 16 of v.
    main = max(32, 1 << (d.bit_length() - 1))
    result = {"HAS_BIAS": bias, "NORMALISED": normalised, "WINDOWS": windows, "K_MAIN": main}
    result["K_TAIL"] = 0 if d <= main else max(32, triton.next_power_of_2(d - main))
    # v by 64 channels up to D = 128: 32 registers of sums at a time.
    main = max(16, min(64 if d <= 128 else 128, triton.next_power_of_2(d)))
    result |= {"V_MAIN": main, "V_TAIL": 0 if d <= main else max(16, triton.next_power_of_2(d - main))}
    # A bias costs as many registers as the scores, and so do more than 64 channels of o in two passes.
    one_pass = s <= (WHOLE_ROW // 2 if bias else WHOLE_ROW)
    block_n = min(128, max(32, triton.next_power_of_2(s))) if one_pass else 64 >> ((d > 64) + bias)
    rest = max(0, s - block_n) if one_pass else s % block_n
    result |= {"ONE_PASS": one_pass, "WHOLE": s // SLICE * SLICE if one_pass else s - rest}
    result |= {"BLOCK_N": block_n, "REST_N": max(32, triton.next_power_of_2(rest)) if rest else 0}
    # 128 rows load and convert k and v half as often as 64, unless they are more padding (S = 49, 257, 1025). With many
    # channels two passes need what that saves in registers.
    full = triton.cdiv(s, 128) * 2 == triton.cdiv(s, 64)
    block_m = 128 if full or (d > (64 if bias else 80) and not one_pass) else 64
    # 16 rows a warp; half as many of 64 where ptxas would aim at fewer registers and spill a few: on sm_100, and in
    # windows, whose tokens need addresses of their own.
    few = bias and ((cc == 100 and (normalised or s <= 64)) or (windows and normalised))
    warps = 8 if few else block_m // 16
    return result | {"BLOCK_M": block_m, "num_warps": warps, "num_stages": 1 if bias or windows else 2}
