"""The linear ops on the Triton kernel: each names its epilogue; the launch is one function.

The kernel is in ``linear_kernel.py``, what happens to its sums in ``epilogue.py``, the choice of the tile in
``tiles.py``. Signatures and numbers are those of ``ops/reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.ops.bit_planes import BitPlanes, block_k
from vitq_kernels.ops.triton.launch import device_of, launch
from vitq_kernels.ops.triton.linear_kernel import finish_kernel, linear_kernel
from vitq_kernels.ops.triton.tiles import Problem
from vitq_kernels.ops.triton.tuned import choose
from vitq_kernels.spec import QuantFormat

ALIGNMENT = 16  # bytes of a vector access: rows of ``a`` start at multiples of it
VECTORS = ("zero_point", "inv_scale", "thresholds", "levels", "residual", "token_scale")  # of the epilogues
FINISH_TOKENS, FINISH_ROWS = 8, 128  # 8 int32 a thread of the four warps, of each part at a time


def linear_codes(
    a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """``reference.linear_codes``."""
    return _linear(a, weight, multiplier, bias_q, "codes", torch.int8, bits=bits, zero_point=zero_point)


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
    """``reference.linear_gelu_codes``."""
    epilogue = "tanh_codes" if approximate == "tanh" else "gelu_codes"
    return _linear(
        a, weight, multiplier, bias_q, epilogue, torch.int8, bits=bits, inv_scale=inv_scale, zero_point=zero_point
    )


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
    """``reference.linear_gelu_levels``."""
    epilogue = "tanh_levels" if approximate == "tanh" else "gelu_levels"
    return _linear(
        *(a, weight, multiplier, bias_q, epilogue, torch.int8),
        inv_scale=inv_scale,
        thresholds=thresholds,
        levels=levels,
    )


def linear_real(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.linear_real``."""
    return _linear(a, weight, multiplier, bias_q, "real", out_dtype)


def linear_residual(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, residual: Tensor) -> Tensor:
    """``reference.linear_residual``."""
    return _linear(a, weight, multiplier, bias_q, "residual", residual.dtype, residual=residual)


def linear_per_token(
    a: Tensor,
    token_scale: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``reference.linear_per_token``."""
    return _linear(a, weight, multiplier, bias, "per_token", out_dtype, token_scale=token_scale)


def _linear(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias: Tensor | None,
    epilogue: str,
    out_dtype: torch.dtype,
    *,
    bits: int = 8,
    **vectors: Tensor,
) -> Tensor:
    """Chooses the tile and launches. ``vectors`` are what the epilogue of that name reads (epilogue.py)."""
    w, n, device = BitPlanes.of(weight), multiplier.shape[0], device_of(a)
    a2d, out = _rows(a), a.new_empty((*a.shape[:-1], n), dtype=out_dtype)
    m, k = a2d.shape
    step = block_k(a.shape[-1])
    padded_k = -(-a.shape[-1] // step) * step
    tile = choose(Problem(m, n, a.shape[-1], w.present(), epilogue), device)

    given = {name: tensor.contiguous() for name, tensor in vectors.items()}
    residual, levels, fmt = given.get("residual"), given.get("levels"), QuantFormat(bits)
    arguments: dict[str, Any] = {
        "shifts": w.shifts,
        "multiplier": multiplier.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        **{name: given.get(name) for name in VECTORS},
        "M": m,
        "N": n,
        "residual_rows": 1 if residual is None else max(1, residual.numel() // n),
        "level_count": 0 if levels is None else levels.numel(),
        "QMIN": fmt.qmin,
        "QMAX": fmt.qmax,
        "SPLITS": tile.splits,
    }
    split = tile.splits > 1
    sums = a.new_empty((tile.splits, m, n), dtype=torch.int32) if split else out
    launch(
        linear_kernel,
        (-(-n // tile.rows) * -(-m // tile.tokens), tile.splits),
        a,
        **arguments,
        a=a2d,
        out=sums,
        window_bits=w.window_bits,
        places=w.places,
        **dict(zip(("plane8", "plane4", "plane2", "plane1"), w.planes, strict=True)),
        K=k,
        PADDED_K=padded_k,
        WIDTHS=w.widths.shape[0],
        EPILOGUE="partial" if split else epilogue,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        BLOCK_K=step,
        EVEN_K=k == padded_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split:
        launch(
            finish_kernel,
            (-(-m // FINISH_TOKENS), -(-n // FINISH_ROWS)),
            a,
            **arguments,
            partial=sums,
            out=out,
            EPILOGUE=epilogue,
            TOKENS=FINISH_TOKENS,
            ROWS=FINISH_ROWS,
            num_warps=4,
            num_stages=1,
        )
    return out


def _rows(a: Tensor) -> Tensor:
    """Codes [..., K] as rows that the kernel can read: contiguous, and padded with zeros where K is no multiple of 16.

    ViT's own widths are multiples; the patches of a 14-pixel patch embedding (588) are not.
    """
    k = a.shape[-1]
    flat = a.reshape(-1, k)
    if k % ALIGNMENT:
        return F.pad(flat, (0, -k % block_k(k)))
    flat = flat.contiguous()
    return flat if a.device.type != "cuda" or flat.data_ptr() % ALIGNMENT == 0 else flat.clone()
