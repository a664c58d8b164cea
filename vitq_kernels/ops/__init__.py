"""The ``vitq::`` ops: schema, argument checks and fake of each, written once; backends only compute.

Every op has a *plan*: a function of its arguments that checks them and says what comes out (shape and dtype). The fake
allocates the plan's outputs; the real op runs the plan and then the chosen backend's function of the same name.
What the numbers are: ``ops/reference.py``. An op that the chosen backend lacks raises BackendUnavailableError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitq_kernels.ops.backends import (
    BackendUnavailableError,
    chosen_backend,
    implementation,
    use_backend,
    weight_layout,
)
from vitq_kernels.ops.checks import (
    FLOAT_DTYPES,
    check_affine,
    check_approximate,
    check_attention,
    check_devices,
    check_layernorm,
    check_linear,
    check_norm_vectors,
    check_out_dtype,
    check_patches,
    check_residual,
    check_tensor,
    check_width,
)
from vitq_kernels.ops.reference import SEMANTICS_VERSION
from vitq_kernels.ops.reference import flatten_patches as flatten_patches
from vitq_kernels.packing import PackedWeight
from vitq_kernels.spec import MAX_BITS

__all__ = ["SEMANTICS_VERSION", "BackendUnavailableError", "prepare_weight", "use_backend", "weight_layout"]

Plan = list[tuple[Sequence[int], torch.dtype]]
OPS: list[str] = []


def prepare_weight(weight: PackedWeight, input_bits: int = MAX_BITS) -> tuple[str, list[Tensor]]:
    """The canonical packed weight in the layout that the chosen backend reads: (layout name, tensors).

    ``input_bits``, 2..8: no code that it is multiplied with has more; a backend may have a faster way for few.
    """
    check_width("prepare_weight", input_bits)
    module = chosen_backend("linear_codes", weight.data.device.type).load()
    return module.WEIGHT_LAYOUT, module.prepare_weight(weight, input_bits)


def _op(schema: str) -> Callable[[Callable[..., Plan]], Callable[..., Any]]:
    """Registers ``vitq::<name of the plan>``; ``layout`` is not handed to the backend, which must read it."""

    def register(plan: Callable[..., Plan]) -> Callable[..., Any]:
        name = plan.__name__
        qualified = f"vitq::{name}"
        torch.library.define(qualified, schema)
        OPS.append(name)
        arguments = [word.split("=")[0].split()[-1] for word in schema.split(") ->")[0].strip("(").split(",")]
        kept = [i for i, argument in enumerate(arguments) if argument != "layout"]
        layout = [i for i, argument in enumerate(arguments) if argument == "layout"]  # one or none

        def fake(*args: Any) -> Any:
            outputs = tuple(args[0].new_empty(shape, dtype=dtype) for shape, dtype in plan(*args))
            return outputs[0] if len(outputs) == 1 else outputs

        @torch.no_grad()  # integers have none, and torch refuses parameters where it writes in place
        def real(*args: Any) -> Any:  # contiguous, as the fake says
            plan(*args)
            given = (args[i] for i in kept if i < len(args))  # torch leaves out last arguments that are the default
            outputs = implementation(name, args[0].device.type, *(args[i] for i in layout))(*given)
            return outputs.contiguous() if isinstance(outputs, Tensor) else tuple(t.contiguous() for t in outputs)

        torch.library.register_fake(qualified, fake)
        torch.library.impl(qualified, "default", real)
        return getattr(torch.ops.vitq, name)

    return register


@_op("(Tensor x, Tensor inv_scale, Tensor zero_point, int bits) -> Tensor")
def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> Plan:
    """Real activations [..., K] to int8 codes, per channel."""
    check_tensor("quantize", "x", x, FLOAT_DTYPES, (..., "K"))
    check_affine("quantize", x, inv_scale, zero_point, bits, x.shape[-1])
    return [(x.shape, torch.int8)]


@_op("(Tensor image, Tensor inv_scale, Tensor zero_point, int patch_height, int patch_width, int bits) -> Tensor")
def quantize_patches(
    image: Tensor, inv_scale: Tensor, zero_point: Tensor, patch_height: int, patch_width: int, bits: int
) -> Plan:
    """Images [B, C, H, W] to int8 codes of their patches [B, H // ph, W // pw, C * ph * pw], per place in a patch."""
    shape = check_patches("quantize_patches", image, patch_height, patch_width)
    check_affine("quantize_patches", image, inv_scale, zero_point, bits, shape[-1])
    return [(shape, torch.int8)]


@_op("(Tensor x) -> (Tensor, Tensor)")
def quantize_per_token(x: Tensor) -> Plan:
    """Real activations [..., K] to symmetric 8-bit codes and float32 scales [...]."""
    check_tensor("quantize_per_token", "x", x, FLOAT_DTYPES, (..., "K"))
    return [(x.shape, torch.int8), (x.shape[:-1], torch.float32)]


@_op("(Tensor x, Tensor gain, Tensor offset, float eps, int bits) -> Tensor")
def layernorm(x: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int) -> Plan:
    """LayerNorm of [..., K] straight to int8 codes."""
    check_layernorm("layernorm", x, gain=gain, offset=offset)
    check_width("layernorm", bits)
    return [(x.shape, torch.int8)]


@_op("(Tensor x, Tensor residual, Tensor gain, Tensor offset, float eps, int bits) -> (Tensor, Tensor)")
def add_layernorm(x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int) -> Plan:
    """``x + residual`` and its LayerNorm as int8 codes."""
    check_layernorm("add_layernorm", x, gain=gain, offset=offset)
    check_tensor("add_layernorm", "residual", residual, x.dtype, tuple(x.shape))
    check_devices("add_layernorm", x, residual=residual)
    check_width("add_layernorm", bits)
    return [(x.shape, x.dtype), (x.shape, torch.int8)]


@_op("(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)")
def layernorm_per_token(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Plan:
    """LayerNorm of [..., K] to symmetric 8-bit codes and float32 scales [...]."""
    check_layernorm("layernorm_per_token", x, weight=weight, bias=bias)
    return [(x.shape, torch.int8), (x.shape[:-1], torch.float32)]


_LINEAR = "(Tensor a, Tensor[] weight, str layout, Tensor multiplier, Tensor bias_q"


@_op(f"{_LINEAR}, Tensor zero_point, int bits) -> Tensor")
def linear_codes(
    a: Tensor, weight: list[Tensor], layout: str, multiplier: Tensor, bias_q: Tensor, zero_point: Tensor, bits: int
) -> Plan:
    """Integer linear [..., K] x [N, K] to int8 codes [..., N]."""
    shape = check_linear("linear_codes", a, weight, layout, multiplier, bias_q=bias_q, zero_point=zero_point)
    check_width("linear_codes", bits)
    return [(shape, torch.int8)]


@_op(f"{_LINEAR}, Tensor inv_scale, Tensor zero_point, int bits, str approximate) -> Tensor")
def linear_gelu_codes(
    a: Tensor,
    weight: list[Tensor],
    layout: str,
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    approximate: str,
) -> Plan:
    """Integer linear, GELU, int8 codes [..., N]."""
    op = "linear_gelu_codes"
    shape = check_linear(op, a, weight, layout, multiplier, bias_q=bias_q, zero_point=zero_point)
    check_tensor(op, "inv_scale", inv_scale, torch.float32, (shape[-1],))
    check_devices(op, a, inv_scale=inv_scale)
    check_width(op, bits)
    check_approximate(op, approximate)
    return [(shape, torch.int8)]


@_op(f"{_LINEAR}, Tensor inv_scale, Tensor thresholds, Tensor levels, str approximate) -> Tensor")
def linear_gelu_levels(
    a: Tensor,
    weight: list[Tensor],
    layout: str,
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    thresholds: Tensor,
    levels: Tensor,
    approximate: str,
) -> Plan:
    """Integer linear, GELU, int8 levels [..., N] of a non-uniform quantizer."""
    op = "linear_gelu_levels"
    shape = check_linear(op, a, weight, layout, multiplier, bias_q=bias_q)
    check_tensor(op, "inv_scale", inv_scale, torch.float32, (shape[-1],))
    check_tensor(op, "levels", levels, torch.int8, ("L",))
    check_tensor(op, "thresholds", thresholds, torch.float32, (levels.shape[0] - 1,))
    check_devices(op, a, inv_scale=inv_scale, thresholds=thresholds, levels=levels)
    check_approximate(op, approximate)
    return [(shape, torch.int8)]


@_op(f"{_LINEAR}, ScalarType out_dtype) -> Tensor")
def linear_real(
    a: Tensor, weight: list[Tensor], layout: str, multiplier: Tensor, bias_q: Tensor, out_dtype: torch.dtype
) -> Plan:
    """Integer linear to real units [..., N]."""
    check_out_dtype("linear_real", out_dtype)
    return [(check_linear("linear_real", a, weight, layout, multiplier, bias_q=bias_q), out_dtype)]


@_op(f"{_LINEAR}, Tensor residual) -> Tensor")
def linear_residual(
    a: Tensor, weight: list[Tensor], layout: str, multiplier: Tensor, bias_q: Tensor, residual: Tensor
) -> Plan:
    """Integer linear added to a residual [..., N] (or one that broadcasts, such as a position embedding)."""
    op = "linear_residual"
    shape = check_linear(op, a, weight, layout, multiplier, bias_q=bias_q)
    check_residual(op, a, residual, shape)
    return [(shape, residual.dtype)]


@_op(f"{_LINEAR}, Tensor residual, Tensor gain, Tensor offset, float eps, int bits) -> (Tensor, Tensor)")
def linear_residual_layernorm(
    a: Tensor,
    weight: list[Tensor],
    layout: str,
    multiplier: Tensor,
    bias_q: Tensor,
    residual: Tensor,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    bits: int,
) -> Plan:
    """Integer linear added to a residual as of ``linear_residual``, and the sum's LayerNorm as int8 codes [..., N]."""
    op = "linear_residual_layernorm"
    shape = check_linear(op, a, weight, layout, multiplier, bias_q=bias_q)
    check_residual(op, a, residual, shape)
    check_norm_vectors(op, a, shape[-1], gain=gain, offset=offset)
    check_width(op, bits)
    return [(shape, residual.dtype), (shape, torch.int8)]


@_op(
    "(Tensor a, Tensor token_scale, Tensor[] weight, str layout, Tensor multiplier, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor"
)
def linear_per_token(
    a: Tensor,
    token_scale: Tensor,
    weight: list[Tensor],
    layout: str,
    multiplier: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Plan:
    """Integer linear of dynamically quantized tokens to real units [..., N]."""
    op = "linear_per_token"
    shape = check_linear(op, a, weight, layout, multiplier)
    check_tensor(op, "token_scale", token_scale, torch.float32, tuple(a.shape[:-1]))
    if bias is not None:
        check_tensor(op, "bias", bias, torch.float32, (shape[-1],))
    check_devices(op, a, token_scale=token_scale, bias=bias)
    check_out_dtype(op, out_dtype)
    return [(shape, out_dtype)]


@_op(
    "(Tensor q, Tensor k, Tensor v, Tensor kappa, Tensor levels, Tensor multiplier, Tensor zero_point, "
    "Tensor? bias_q, Tensor? inv_tau, int bits, Tensor? windows=None, Tensor? pattern=None) -> Tensor"
)
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
) -> Plan:
    """Log2-quantized softmax attention, of all tokens or inside windows: codes [B, H, L, D] to [B, L, H * D]."""
    tables = (kappa, levels, multiplier, zero_point)
    return [(check_attention(q, k, v, *tables, bias_q, inv_tau, bits, windows, pattern), torch.int8)]
