"""The same integers as ``reference``, fast on a CPU.

Three means: oneDNN's int8 GEMM, float matmuls where they are exact, and tokens taken a few at a time, so that the
float64 intermediates of a rescaling stay in the cache (57 ms became 9 ms for 3152 x 576 accumulators on two cores).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from vitq_kernels.ops import reference

WEIGHT_LAYOUT = reference.WEIGHT_LAYOUT
prepare_weight = reference.prepare_weight

CHUNK_ELEMENTS = 1 << 16  # 512 KB of float64: fits a core's L2 with its neighbours


@cache
def int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` is: on x86 without VNNI oneDNN adds pairs of products in saturating int16."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 127 * 127 * 64).all())


def accumulate(a: Tensor, weight: list[Tensor], bias_q: Tensor | None) -> Tensor:
    """``reference.accumulate`` of [T, K] by ``torch._int_mm``, or by float matmuls where that is not exact."""
    w = weight[0].t()
    acc = torch._int_mm(a, w) if int_mm_is_exact() else exact_matmul(a, w, 128 * 128).int()
    return acc if bias_q is None else acc.add_(bias_q)


def _by_tokens(step: Callable[..., Tensor], width: int, *tensors: Tensor) -> Tensor:
    """``step`` on [T, ...] slices of tensors [..., channels], stitched together; ``width``: the wider channel count."""
    leading = tensors[0].shape[:-1]
    flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
    rows = max(1, CHUNK_ELEMENTS // max(1, width))
    pieces = [step(*parts) for parts in zip(*(t.split(rows) for t in flat), strict=True)]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out.view(*leading, out.shape[-1])


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """``reference.quantize``."""
    return _by_tokens(lambda t: reference.quantize(t, inv_scale, zero_point, bits), x.shape[-1], x)


def quantize_patches(
    image: Tensor, inv_scale: Tensor, zero_point: Tensor, patch_height: int, patch_width: int, bits: int
) -> Tensor:
    """``reference.quantize_patches``."""
    return quantize(reference.flatten_patches(image, (patch_height, patch_width)), inv_scale, zero_point, bits)


def layernorm(x: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int) -> Tensor:
    """``reference.layernorm``."""
    return _by_tokens(lambda t: reference.layernorm(t, gain, offset, eps, bits), x.shape[-1], x)


def add_layernorm(
    x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    """``reference.add_layernorm``."""
    y = (x.float() + residual.float()).to(x.dtype)
    return y, layernorm(y, gain, offset, eps, bits)


# Per-token scales come out beside the codes; nothing to gain from slicing at their sizes.
quantize_per_token = reference.quantize_per_token
layernorm_per_token = reference.layernorm_per_token


def linear_codes(
    a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """``reference.linear_codes``."""
    rest = (weight, multiplier, bias_q, zero_point, bits, accumulate)
    return _by_tokens(lambda t: reference.linear_codes(t, *rest), multiplier.numel(), a)


def linear_gelu_codes(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    approximate: str,
) -> Tensor:
    """``reference.linear_gelu_codes``."""
    rest = (weight, multiplier, bias_q, inv_scale, zero_point, bits, approximate, accumulate)
    return _by_tokens(lambda t: reference.linear_gelu_codes(t, *rest), multiplier.numel(), a)


def linear_gelu_levels(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    thresholds: Tensor,
    levels: Tensor,
    approximate: str,
) -> Tensor:
    """``reference.linear_gelu_levels``."""
    rest = (weight, multiplier, bias_q, inv_scale, thresholds, levels, approximate, accumulate)
    return _by_tokens(lambda t: reference.linear_gelu_levels(t, *rest), multiplier.numel(), a)


def linear_real(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.linear_real``."""
    rest = (weight, multiplier, bias_q, out_dtype, accumulate)
    return _by_tokens(lambda t: reference.linear_real(t, *rest), multiplier.numel(), a)


def linear_residual(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, residual: Tensor) -> Tensor:
    """``reference.linear_residual``."""
    n = multiplier.numel()
    full = residual.expand(*a.shape[:-1], n)
    return _by_tokens(lambda t, r: reference.linear_residual(t, weight, multiplier, bias_q, r, accumulate), n, a, full)


def linear_per_token(
    a: Tensor,
    token_scale: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``reference.linear_per_token``."""

    def step(t: Tensor, scale: Tensor) -> Tensor:
        return reference.linear_per_token(t, scale[:, 0], weight, multiplier, bias, out_dtype, accumulate)

    return _by_tokens(step, multiplier.numel(), a, token_scale.unsqueeze(-1))


def exact_matmul(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """Integer-valued ``a @ b`` in float32 where every partial sum is below 2^24, else in float64: exact either way.

    Args:
        a, b: integer-valued tensors [..., I, K] and [..., K, J].
        largest: a bound on |a[i, k] * b[k, j]|.
    """
    dtype = torch.float32 if a.shape[-1] * largest < 1 << 24 else torch.float64
    return a.to(dtype) @ b.to(dtype)


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
) -> Tensor:
    """``reference.attention``, image by image; scores and outputs are integers in floats that hold them exactly."""
    steps = kappa.double()[:, None, None]
    # One flat gather: the table of head h starts at h * levels.
    table = levels.float().flatten()
    heads = torch.arange(0, levels.numel(), levels.shape[1], device=q.device)[:, None, None]
    pieces = []
    for i in range(q.shape[0]):
        acc = exact_matmul(q[i], k[i].transpose(-2, -1), 128 * 128)
        if bias_q is not None:
            acc = acc.double() + bias_q[min(i, bias_q.shape[0] - 1)]
        distance = (acc.amax(-1, keepdim=True) - acc).float()
        codes = distance.double().mul_(steps).round_().clamp_(max=levels.shape[1] - 1).long().add_(heads)
        probability = table[codes]
        total = probability.sum(-1, keepdim=True, dtype=torch.float64)
        if inv_tau is not None:
            largest = levels[:, :1, None].double()
            offset = reference.attention_offset(total, largest, inv_tau)
            codes = reference.attention_offset_codes(distance, kappa, offset, levels.shape[1]).add_(heads)
            probability, total = table[codes], largest
        out = exact_matmul(probability, v[i], 255 * 128)
        pieces.append(reference.attention_output(out[None], total[None], multiplier, zero_point, bits))
    return torch.cat(pieces) if pieces else q.new_empty(0, q.shape[2], q.shape[1] * q.shape[3])
