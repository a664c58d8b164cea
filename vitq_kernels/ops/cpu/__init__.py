"""The same integers as ``reference``, fast on a CPU.

Where to read: ``primitives.py`` (GEMM and rounding, and why they are exact), ``linear.py``, ``attention.py``,
``layernorm.py`` and ``quantize.py``. GELU and LayerNorm, which are bounded, are torch's in float32.
"""

from __future__ import annotations

from vitq_kernels.ops import reference
from vitq_kernels.ops.cpu.attention import attention as attention
from vitq_kernels.ops.cpu.layernorm import add_layernorm as add_layernorm
from vitq_kernels.ops.cpu.layernorm import layernorm as layernorm
from vitq_kernels.ops.cpu.layernorm import layernorm_per_token as layernorm_per_token
from vitq_kernels.ops.cpu.linear import linear_codes as linear_codes
from vitq_kernels.ops.cpu.linear import linear_gelu_codes as linear_gelu_codes
from vitq_kernels.ops.cpu.linear import linear_gelu_levels as linear_gelu_levels
from vitq_kernels.ops.cpu.linear import linear_per_token as linear_per_token
from vitq_kernels.ops.cpu.linear import linear_real as linear_real
from vitq_kernels.ops.cpu.linear import linear_residual as linear_residual
from vitq_kernels.ops.cpu.quantize import quantize as quantize
from vitq_kernels.ops.cpu.quantize import quantize_patches as quantize_patches
from vitq_kernels.ops.cpu.quantize import quantize_per_token as quantize_per_token
from vitq_kernels.ops.two_passes import linear_then_layernorm

WEIGHT_LAYOUT = reference.WEIGHT_LAYOUT
prepare_weight = reference.prepare_weight
linear_residual_layernorm = linear_then_layernorm(linear_residual, layernorm)
