"""What the kernels compete with: torch's own ops on the same shapes and, where it makes sense, the same codes.

They get what helps them: products alone are not charged for GELU, residual or requantization, SDPA is not charged for
the quantization of its inputs, and torchao's weight stays where it is when buffers rotate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_targets import CUDNN, EFFICIENT, FLASH

# name -> function and arguments
Baselines = dict[str, tuple[Callable[..., object], tuple[Any, ...]]]
CUBLAS_F16 = "fp16 F.linear"
UNFUSED_PER_TOKEN = "quantize per token + _int_mm + dequantize (eager torch)"
TORCHAO = "torchao int8 dynamic linear, bf16"
TORCH_ADD_LAYERNORM = "add + LayerNorm + quantize (eager torch)"
TORCH_LAYERNORM_PER_TOKEN = "LayerNorm + quantize per token (eager torch)"
TORCH_LINEAR_LAYERNORM = "bf16 F.linear + add + LayerNorm + quantize (eager torch)"
TORCH_PER_TOKEN = "quantize per token (eager torch)"
TORCH_PATCHES = "unfold + quantize (eager torch)"
SDPA = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}


def torch_quantize(x: Tensor, inv_scale: float) -> Tensor:
    """Codes of x, per tensor."""
    return (x * inv_scale).round_().clamp_(-128, 127).to(torch.int8)


def torch_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, per row."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def torch_layernorm(x: Tensor, weight: Tensor, bias: Tensor, inv_scale: float) -> Tensor:
    """LayerNorm, then codes."""
    return torch_quantize(F.layer_norm(x, weight.shape, weight, bias, 1e-6), inv_scale)


def torch_add_layernorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, inv_scale: float) -> Any:
    """A sum, and its LayerNorm's codes."""
    total = x + residual
    return total, torch_layernorm(total, weight, bias, inv_scale)


def torch_linear_layernorm(
    x: Tensor, w: Tensor, bias: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor], inv_scale: float
) -> Any:
    """A layer added to a residual, and the sum's LayerNorm's codes."""
    return torch_add_layernorm(F.linear(x, w, bias), residual, *norm, inv_scale)


def torch_layernorm_per_token(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm, then codes and scales per row."""
    return torch_per_token(F.layer_norm(x, weight.shape, weight, bias, 1e-6))


def torch_patches(image: Tensor, patch: int, inv_scale: float) -> Tensor:
    """Codes of an image's patches."""
    b, c, h, w = image.shape
    cut = image.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return torch_quantize(cut.flatten(3), inv_scale)


def int_mm(a: Tensor, weight: Tensor) -> Tensor:
    """The int32 product alone."""
    return torch._int_mm(a, weight.t())


def unfused_linear(x: Tensor, inv_scale: float, weight: Tensor, multiplier: Tensor, bias: Tensor) -> Tensor:
    """Quantize, multiply, dequantize."""
    acc = int_mm(torch_quantize(x, inv_scale), weight)
    return torch.addcmul(bias, acc, multiplier, out=x.new_empty(acc.shape))


def unfused_per_token(x: Tensor, weight: Tensor, multiplier: Tensor, bias: Tensor) -> Tensor:
    """Quantize with a scale a row, multiply, dequantize."""
    codes, scale = torch_per_token(x)
    return torch.addcmul(bias, int_mm(codes, weight) * scale, multiplier).to(x.dtype)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One fused attention of torch's."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@cache
def torchao_quantizer() -> Callable[[nn.Module], None] | None:
    """What turns the linears of a module into torchao's int8 dynamic ones, in place; None where it does not import."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    return lambda module: quantize_(module, Int8DynamicActivationInt8WeightConfig())


def torchao_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Baselines:
    """torchao's int8 dynamic linear of bfloat16 tensors where it is installed, else nothing."""
    quantizer = torchao_quantizer()
    if quantizer is None:
        return {}
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    module = nn.Sequential(linear.requires_grad_(False))
    quantizer(module)
    return {TORCHAO: (module, (x,))}
