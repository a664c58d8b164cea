"""The ops as Triton kernels, for every NVIDIA GPU since Ampere; in Triton's interpreter also on a CPU, for tests.

What the numbers are: ``ops/reference.py``. Where to read: ``primitives.py`` (the scalar semantics), ``linear.py``,
``attention.py``, ``layernorm.py`` and ``quantize.py`` (a kernel each and its launcher), ``bit_planes.py`` (the weight
layout), ``tiles.py`` (which tile a shape gets, and why).
"""

from __future__ import annotations

from functools import cache

import torch

from vitq_kernels.ops.bit_planes import WEIGHT_LAYOUT as WEIGHT_LAYOUT
from vitq_kernels.ops.bit_planes import prepare_weight as prepare_weight
from vitq_kernels.ops.triton.attention import attention as attention
from vitq_kernels.ops.triton.launch import INTERPRETED, recording
from vitq_kernels.ops.triton.layernorm import add_layernorm as add_layernorm
from vitq_kernels.ops.triton.layernorm import layernorm as layernorm
from vitq_kernels.ops.triton.layernorm import layernorm_per_token as layernorm_per_token
from vitq_kernels.ops.triton.linear import linear_codes as linear_codes
from vitq_kernels.ops.triton.linear import linear_gelu_codes as linear_gelu_codes
from vitq_kernels.ops.triton.linear import linear_gelu_levels as linear_gelu_levels
from vitq_kernels.ops.triton.linear import linear_per_token as linear_per_token
from vitq_kernels.ops.triton.linear import linear_real as linear_real
from vitq_kernels.ops.triton.linear import linear_residual as linear_residual
from vitq_kernels.ops.triton.quantize import quantize as quantize
from vitq_kernels.ops.triton.quantize import quantize_patches as quantize_patches
from vitq_kernels.ops.triton.quantize import quantize_per_token as quantize_per_token
from vitq_kernels.ops.two_passes import linear_then_layernorm

linear_residual_layernorm = linear_then_layernorm(linear_residual, layernorm)

OLDEST = (8, 0)  # integer MMA with an int32 accumulator, m16n8k32, and cp.async


def unavailable(device: str) -> str | None:
    """Why the kernels do not run on a device type of this machine, or None."""
    if recording():
        return None
    if device == "cpu":
        return None if INTERPRETED else "runs on a cpu only in Triton's interpreter, under TRITON_INTERPRET=1"
    if INTERPRETED:
        return "is interpreted in this process, on the cpu (TRITON_INTERPRET)"
    return gpu_reason()


@cache
def gpu_reason() -> str | None:
    """Why the kernels do not run on the first GPU of this machine, or None; a machine's GPUs are taken to be alike."""
    if not torch.cuda.is_available():
        return "finds no GPU"
    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or later, this GPU has {major}.{minor}"
    return None
