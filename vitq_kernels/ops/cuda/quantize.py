"""Codes of activations and of images: csrc/quantize.cu, and csrc/layernorm.cu for a scale a token."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq_kernels.ops.cuda.launch import DTYPES, launch


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``reference.quantize``."""
    x, inv_scale, zero_point = x.contiguous(), inv_scale.contiguous(), zero_point.contiguous()
    codes, cols = x.new_empty(x.shape, dtype=torch.int8), x.shape[-1]
    launch("quantize", x, x, DTYPES[x.dtype], inv_scale, zero_point, codes, x.numel() // cols, cols, bits)
    return codes


def quantize_patches(
    image: Tensor, inv_scale: Tensor, zero_point: Tensor, patch_height: int, patch_width: int, bits: int
) -> Tensor:
    """``reference.quantize_patches``."""
    image, inv_scale, zero_point = image.contiguous(), inv_scale.contiguous(), zero_point.contiguous()
    b, _, height, width = image.shape
    shape = (b, height // patch_height, width // patch_width, inv_scale.numel())
    codes = image.new_empty(shape, dtype=torch.int8)
    sizes = (*image.shape, patch_height, patch_width, bits)
    launch("quantize_patches", image, image, DTYPES[image.dtype], inv_scale, zero_point, codes, *sizes)
    return codes


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.quantize_per_token``."""
    x = x.contiguous()
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    launch("quantize_per_token", x, x, DTYPES[x.dtype], codes, scale, scale.numel(), x.shape[-1])
    return codes, scale
