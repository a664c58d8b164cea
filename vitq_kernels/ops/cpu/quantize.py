"""Real activations to codes on a CPU: one fused multiply-add an element."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq_kernels.ops import reference
from vitq_kernels.ops.cpu.primitives import requantise_into, slices, tile_rows


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``reference.quantize``."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape, dtype=torch.int8)
    for rows in slices(len(flat), tile_rows(x.shape[-1])):
        value = flat[rows].float()
        requantise_into(out[rows], value, inv_scale, zero_point, bits, torch.empty(value.shape))
    return out.view(x.shape)


def quantize_patches(
    image: Tensor, inv_scale: Tensor, zero_point: Tensor, patch_height: int, patch_width: int, bits: int
) -> Tensor:
    """``reference.quantize_patches``."""
    return quantize(reference.flatten_patches(image, (patch_height, patch_width)), inv_scale, zero_point, bits)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.quantize_per_token``."""
    x = x.float()
    absmax = torch.maximum(x.amax(-1), -x.amin(-1)).clamp_min_(reference.TOKEN_ABSMAX_FLOOR)
    limit = torch.full_like(absmax, 127.0)
    out = torch.empty(x.shape, dtype=torch.int8)
    zero_point = torch.zeros(x.shape[-1:], dtype=torch.int32)
    requantise_into(out, x, (limit / absmax).unsqueeze(-1), zero_point, 8, torch.empty(x.shape))
    return out.clamp_(-127, 127), absmax / limit
