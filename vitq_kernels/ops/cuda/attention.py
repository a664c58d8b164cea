"""Log2-quantized softmax attention: csrc/attention_sm80.cu, and attention_sm90.cu where it suits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.ops import reference
from vitq_kernels.ops.cuda.attention_sm90 import ALIGNMENT, attention_sm90, suits
from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.ops.cuda.launch import gpu_of, launch, pointer, refuse

LARGEST_D = 128
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
    """``reference.attention``. Windows are gathered into sequences first."""
    if windows is not None:
        q, k, v = (reference.gather_windows(t, windows) for t in (q, k, v))
        if bias_q is not None and pattern is not None:
            bias_q = bias_q[pattern.long()].repeat(len(q) // len(pattern), 1, 1, 1)
        out = attention(q, k, v, kappa, levels, multiplier, zero_point, bias_q, inv_tau, bits)
        return reference.scatter_windows(out, windows)
    b, h, s, d = q.shape
    if d > LARGEST_D:
        refuse("attention", q, f"takes head dims up to {LARGEST_D}, got {d}")
    if s > LONGEST:
        refuse("attention", q, f"takes up to {LONGEST} tokens, got {s}")
    q, k, v = map(_aligned, (q, k, v))
    kappa, levels, multiplier, zero_point = (t.contiguous() for t in (kappa, levels, multiplier, zero_point))
    if bias_q is None and inv_tau is None and suits(gpu_of(q), s, d):
        return attention_sm90(q, k, v, kappa, levels, multiplier, zero_point, bits)
    inv_tau = None if inv_tau is None else inv_tau.contiguous()
    out = q.new_empty(b, s, h * d)
    # A size that bias_q broadcasts over has stride 0.
    strides = (0, 0, 0, 0) if bias_q is None else bias_q.expand(b, h, s, s).stride()
    bias = module().AttentionBias(pointer(bias_q) or 0, *strides)
    operands = (module().AttentionOperand(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v))
    tables = (kappa, levels, levels.shape[1], multiplier, zero_point, bias, inv_tau)
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
