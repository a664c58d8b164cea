"""LayerNorm to codes on a CPU: torch's, in float32, rows that stay in the cache until they are codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.ops.cpu.primitives import slices, tile_rows
from vitq_kernels.ops.cpu.quantize import quantize_per_token
from vitq_kernels.spec import QuantFormat


def layernorm(x: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int) -> Tensor:
    """``reference.layernorm``, in float32."""
    fmt = QuantFormat(bits)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape, dtype=torch.int8)
    for rows in slices(len(flat), tile_rows(x.shape[-1])):
        y = F.layer_norm(flat[rows].float(), gain.shape, gain, offset, eps)
        out[rows] = y.round_().clamp_(fmt.qmin, fmt.qmax)
    return out.view(x.shape)


def layernorm_per_token(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``reference.layernorm_per_token``, in float32."""
    return quantize_per_token(F.layer_norm(x.float(), weight.shape, weight, bias, eps))


def add_layernorm(
    x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    """``reference.add_layernorm``."""
    y = (x.float() + residual.float()).to(x.dtype)
    return y, layernorm(y, gain, offset, eps, bits)
