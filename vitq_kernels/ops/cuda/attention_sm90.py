"""Log2-quantized softmax attention on Hopper's wgmma: csrc/attention_sm90.cu."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.cuda.launch import launch

CAPABILITY = 90  # compute capability of Hopper, the only one with wgmma
SHORTEST = 65  # tokens: up to 64 the kernel of attention_sm80.cu wastes less
ALIGNMENT = 16  # bytes of a vector access, and what the strides of a tensor map are multiples of


def suits(gpu: Gpu, sequence: int, dim: int) -> bool:
    """Whether the kernel is the one for this GPU, so many tokens and this head dim, without bias and ``inv_tau``."""
    return gpu.cc == CAPABILITY and gpu.has_wgmma and sequence >= SHORTEST and takes(sequence, dim)


@cache
def takes(sequence: int, dim: int) -> bool:
    """Whether the kernel has a shape for so many tokens and this head dim: the heads must fit into shared memory."""
    return bool(module().attention_sm90_takes(sequence, dim))


def attention_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    levels: Tensor,
    multiplier: Tensor,
    zero_point: Tensor,
    bits: int,
) -> Tensor:
    """``reference.attention`` without bias and ``inv_tau``; q, k and v as attention.py hands them to a launcher."""
    b, h, s, d = q.shape
    q, k, v = map(_mapped, (q, k, v))
    multiplier, zero_point = map(_aligned, (multiplier, zero_point))
    out = q.new_empty(b, s, h * d)
    operands = (module().AttentionOperand(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v))
    tables = (kappa, levels, levels.shape[1], multiplier, zero_point)
    launch("attention_sm90", q, *operands, *tables, out, b, h, s, d, bits)
    return out


def _mapped(x: Tensor) -> Tensor:
    """Codes as a tensor map describes them: no stride is 0, as an expanded tensor's is."""
    return x.clone(memory_format=torch.contiguous_format) if 0 in x.stride() else x


def _aligned(x: Tensor) -> Tensor:
    """From a multiple of 16 bytes on: a view may begin anywhere."""
    return x.clone() if x.data_ptr() % ALIGNMENT else x
