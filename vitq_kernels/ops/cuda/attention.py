"""Log2-quantized softmax attention: csrc/attention_sm80.cuh, and attention_sm90.cu where it suits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.ops.cuda.attention_sm90 import ALIGNMENT, attention_sm90, suits
from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.ops.cuda.launch import gpu_of, launch, pointer, refuse

LARGEST_D = 128
LARGEST_WINDOW_D = 64  # every Swin has 32
LONGEST = 4096  # keys: o <= 4096 * 255 * 128 fits int32


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
    s = tokens if windows is None else windows.shape[1]
    largest, where = (LARGEST_D, "") if windows is None else (LARGEST_WINDOW_D, " inside windows")
    if d > largest:
        refuse("attention", q, f"takes head dims up to {largest}{where}, got {d}")
    if s > LONGEST:
        refuse("attention", q, f"takes up to {LONGEST} tokens, got {s}")
    q, k, v = map(_aligned, (q, k, v))
    kappa, levels, multiplier, zero_point = (t.contiguous() for t in (kappa, levels, multiplier, zero_point))
    if windows is None and bias_q is None and inv_tau is None and suits(gpu_of(q), s, d):
        return attention_sm90(q, k, v, kappa, levels, multiplier, zero_point, bits)
    inv_tau, windows, pattern = (None if t is None else t.contiguous() for t in (inv_tau, windows, pattern))
    out = q.new_empty(b, tokens, h * d)
    # A size that bias_q broadcasts over has stride 0.
    biases = b if windows is None else -1
    strides = (0, 0, 0, 0) if bias_q is None else bias_q.expand(biases, h, s, s).stride()
    bias = module().AttentionBias(pointer(bias_q) or 0, *strides)
    places = module().AttentionWindows(pointer(windows), pointer(pattern), 0 if windows is None else len(windows))
    operands = (module().AttentionOperand(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v))
    tables = (kappa, levels, levels.shape[1], multiplier, zero_point, bias, inv_tau, places)
    launch("attention", q, *operands, *tables, out, b, h, s, d, q.shape[-1], bits)
    return out


def _aligned(x: Tensor) -> Tensor:
    """Codes [B, H, S, D] as the kernel can read them: views of a fused qkv whose D is a multiple of 16 as they are.

    Other head dims (72, say) are padded with zeros by a copy.
    """
    if x.shape[-1] % ALIGNMENT:
        x = F.pad(x, (0, -x.shape[-1] % ALIGNMENT))
    if x.stride(-1) == 1 and not (x.data_ptr() | x.stride(0) | x.stride(1) | x.stride(2)) % ALIGNMENT:
        return x
    return x.clone(memory_format=torch.contiguous_format)
