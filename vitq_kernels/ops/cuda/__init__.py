"""The ops as hand-written CUDA kernels (csrc/), for NVIDIA GPUs since Ampere; on a CPU, for tests, in their emulation.

What the numbers are: ``ops/reference.py``. Where to read: ``csrc/launchers.h`` (what Python calls), ``csrc/*.cu`` (a
kernel each), ``ops/mma_fragments.py`` (the weight layout), ``tiles.py`` (which tile a linear layer gets), and
``docs/cuda.md``.
"""

from __future__ import annotations

from functools import cache

import torch

from vitq_kernels.ops.cuda.attention import attention as attention
from vitq_kernels.ops.cuda.extension import EMULATION_VARIABLE, emulated, module
from vitq_kernels.ops.cuda.extension import state as state
from vitq_kernels.ops.cuda.layernorm import add_layernorm as add_layernorm
from vitq_kernels.ops.cuda.layernorm import layernorm as layernorm
from vitq_kernels.ops.cuda.layernorm import layernorm_per_token as layernorm_per_token
from vitq_kernels.ops.cuda.linear import linear_codes as linear_codes
from vitq_kernels.ops.cuda.linear import linear_gelu_codes as linear_gelu_codes
from vitq_kernels.ops.cuda.linear import linear_gelu_levels as linear_gelu_levels
from vitq_kernels.ops.cuda.linear import linear_per_token as linear_per_token
from vitq_kernels.ops.cuda.linear import linear_real as linear_real
from vitq_kernels.ops.cuda.linear import linear_residual as linear_residual
from vitq_kernels.ops.cuda.linear import linear_residual_layernorm as linear_residual_layernorm
from vitq_kernels.ops.cuda.quantize import quantize as quantize
from vitq_kernels.ops.cuda.quantize import quantize_patches as quantize_patches
from vitq_kernels.ops.cuda.quantize import quantize_per_token as quantize_per_token
from vitq_kernels.ops.mma_fragments import WEIGHT_LAYOUT as WEIGHT_LAYOUT
from vitq_kernels.ops.mma_fragments import prepare_weight as prepare_weight

OLDEST = (8, 0)  # integer mma with an int32 accumulator, m16n8k32, and cp.async


def unavailable(device: str) -> str | None:
    """Why the kernels do not run on a device type of this machine, or None."""
    if device == "cpu":
        return None if emulated() else f"runs on a cpu only emulated, in tests ({EMULATION_VARIABLE})"
    if emulated():
        return f"is emulated in this process, on the cpu ({EMULATION_VARIABLE})"
    return gpu_reason()


@cache
def gpu_reason() -> str | None:
    """Why the kernels do not run on the first GPU of this machine, or None; a machine's GPUs are taken to be alike."""
    try:
        module()
    except ImportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "finds no GPU"
    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or later, this GPU has {major}.{minor}"
    return None
