"""LayerNorm straight to codes, with the residual before it or a token's scale after it: csrc/layernorm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq_kernels.ops.cuda.launch import DTYPES, launch


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
    cols = gain.numel()
    x, gain, offset = x.contiguous(), gain.contiguous(), offset.contiguous()
    residual = None if residual is None else residual.contiguous()
    sizes = (x.numel() // cols, cols, eps, bits)
    launch("layernorm", x, x, DTYPES[x.dtype], residual, y, gain, offset, codes, scale, *sizes)
