"""What happens to an int32 sum of a linear layer: the only place of this backend where it is rescaled (S2, S5)."""

from __future__ import annotations

import triton
import triton.language as tl

from vitq_kernels.ops.triton.primitives import gelu, requantise

EPILOGUES = (
    "codes",
    *("gelu_codes", "tanh_codes"),  # by the form of GELU
    *("gelu_levels", "tanh_levels"),
    *("real", "residual", "per_token"),
    "partial",  # the sums themselves, where they are one part of several
)


@triton.jit
def epilogue(
    sums,  # int32 [TOKENS, ROWS] of left-aligned weights
    out,  # [M, N]: int8, or the real dtype that comes out; "partial": int32
    shifts,  # int32 [N], 8 - bits of each row
    multiplier,  # float32 [N]
    bias,  # int32 [N]; "per_token": float32 [N] or None
    zero_point,  # int32 [N]; codes
    inv_scale,  # float32 [N]; gelu
    thresholds, levels,  # float32 [level_count - 1] ascending, int8 [level_count]; gelu levels
    residual,  # [residual_rows, N], token t takes row t % residual_rows
    token_scale,  # float32 [M]
    tokens, rows, M, N, residual_rows, level_count,
    EPILOGUE: tl.constexpr,  # a name of EPILOGUES
    QMIN: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    """Rescales the sums and stores them."""
    mask = (tokens[:, None] < M) & (rows[None, :] < N)
    if EPILOGUE == "partial":
        y = sums
    else:
        y = rescaled(
            sums, shifts, multiplier, bias, zero_point, inv_scale, thresholds, levels, token_scale,
            tokens, rows, M, N, level_count, EPILOGUE, QMIN, QMAX,
        )  # fmt: skip
    if EPILOGUE == "residual":
        before = (tokens % residual_rows).to(tl.int64)[:, None] * N + rows[None, :]
        y += tl.load(residual + before, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + tokens.to(tl.int64)[:, None] * N + rows[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rescaled(
    sums, shifts, multiplier, bias, zero_point, inv_scale, thresholds, levels, token_scale,
    tokens, rows, M, N, level_count,
    EPILOGUE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    """Codes int8 or levels int32 or real units float32 [TOKENS, ROWS]; the arguments are those of ``epilogue``."""
    row_mask = rows < N
    # Exact: a left-aligned sum is a multiple of 2^shift.
    acc = sums >> tl.load(shifts + rows, mask=row_mask, other=0)[None, :]
    scale = tl.load(multiplier + rows, mask=row_mask, other=0.0)[None, :]
    if EPILOGUE == "per_token":
        y = acc.to(tl.float32) * (tl.load(token_scale + tokens, mask=tokens < M, other=0.0)[:, None] * scale)
        if bias is not None:
            y += tl.load(bias + rows, mask=row_mask, other=0.0)[None, :]
    else:
        acc += tl.load(bias + rows, mask=row_mask, other=0)[None, :]
        if EPILOGUE == "codes":
            zero = tl.load(zero_point + rows, mask=row_mask, other=0)[None, :]
            y = requantise(acc.to(tl.float32), scale, zero, QMIN, QMAX)
        else:
            y = acc.to(tl.float32) * scale
    if EPILOGUE == "gelu_codes" or EPILOGUE == "tanh_codes":
        inverse = tl.load(inv_scale + rows, mask=row_mask, other=0.0)[None, :]
        zero = tl.load(zero_point + rows, mask=row_mask, other=0)[None, :]
        y = requantise(gelu(y, EPILOGUE == "tanh_codes"), inverse, zero, QMIN, QMAX)
    elif EPILOGUE == "gelu_levels" or EPILOGUE == "tanh_levels":
        inverse = tl.load(inv_scale + rows, mask=row_mask, other=0.0)[None, :]
        t = gelu(y, EPILOGUE == "tanh_levels") * inverse
        # A level is the first one and the steps up to it: sums in registers, where a gather would need an address each.
        level = tl.load(levels).to(tl.int32)
        y = tl.zeros(t.shape, tl.int32) + level
        for i in range(level_count - 1):
            following = tl.load(levels + i + 1).to(tl.int32)
            y += tl.where(t >= tl.load(thresholds + i), following - level, 0)
            level = following
    return y
