"""From real numbers to codes: affine activation quantizers, q and k scales, log2 attention levels.

Pure functions of tensors; they know the vocabulary and nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.spec import MAX_BITS, MIN_BITS, QuantFormat

# Channels that never vary still need a positive scale; 1e-8 of a real unit changes no logit.
SCALE_FLOOR = 1e-8
# Largest zero point. S1 rounds exactly up to 2^22, but zero points also enter bias_q: 2^12 * 127 * K fits int32 up
# to K = 4128. The limit widens the range of channels that vary by less than a sixteenth of their size.
ZERO_POINT_LIMIT = 2**12


@dataclass(frozen=True)
class AffineQuantizer:
    """Activations as codes: real = scale * (code - zero_point), per channel."""

    scale: Tensor  # float32 [C], > 0
    zero_point: Tensor  # int32 [C]
    bits: int

    @property
    def inv_scale(self) -> Tensor:
        """Codes per real unit, float32 [C]."""
        return (1.0 / self.scale.double()).float()


def affine_quantizer(low: Tensor, high: Tensor, bits: int, exponent: float = 1.0) -> AffineQuantizer:
    """The quantizer that spans [low, high] per channel.

    Args:
        low, high: float [C], the (clipped) range of each channel; symmetric ranges give zero points 0.
        bits: 2..8.
        exponent: how much of a channel's range its scale follows: the scales are ``(span_c / reference)^exponent``
            times the common factor that still covers every channel. 1 is channel-wise (RepQ-ViT), 0 is per tensor.
    """
    fmt = QuantFormat(bits)
    middle = (low.double() + high.double()) / 2
    scale = (high.double() - low.double()) / (fmt.qmax - fmt.qmin)
    # A channel that hardly varies, far from zero, must still reach it with its zero point.
    scale = scale.clamp_min(SCALE_FLOOR).maximum(middle.abs() / (ZERO_POINT_LIMIT - 1))
    if exponent != 1.0:
        ratio = (scale / scale.median()) ** exponent
        scale = ratio * (scale / ratio).max()
    scale = scale.float()
    # The middle of the range lands on the middle of the codes, -0.5.
    zero_point = (-0.5 - middle / scale.double()).round().clamp(-ZERO_POINT_LIMIT, ZERO_POINT_LIMIT)
    return AffineQuantizer(scale, zero_point.int(), bits)


def query_key_scales(
    q_radius: Tensor, k_radius: Tensor, heads: int, bits: int, floor: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric scales of q and k, equalised: a channel's range moves between q and k until both use it equally.

    The integer score of a head has one scale, so ``q_scale[d] * k_scale[d]`` must not depend on the channel. With
    ``e[d] = sqrt(q_radius[d] * k_radius[d])`` and ``a = max_d e[d] / (2^(bits-1) - 0.5)`` the scales are
    ``a * sqrt(q_radius / k_radius)`` and its mirror image: both codes span ``e[d] / a``.

    Args:
        q_radius, k_radius: float [H * D], largest magnitude of each channel.
        heads: H.
        bits: of the codes.
        floor: smallest scale of the score that will do, [H].

    Returns:
        q_scale [H * D], k_scale [H * D] and the scale of the score [H], float32.
    """
    q = q_radius.double().clamp_min(SCALE_FLOOR).view(heads, -1)
    k = k_radius.double().clamp_min(SCALE_FLOOR).view(heads, -1)
    a = (q * k).sqrt().amax(1, keepdim=True) / (2.0 ** (bits - 1) - 0.5)
    a = a.maximum(torch.as_tensor(floor, dtype=a.dtype, device=a.device).sqrt().view(-1, 1))
    ratio = (q / k).sqrt()
    return (a * ratio).flatten().float(), (a / ratio).flatten().float(), a.square().flatten().float()


def quantization_error(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Mean squared error per channel of x [T, C] quantized over [low, high]: float [C]."""
    quantizer = affine_quantizer(low, high, bits)
    fmt = QuantFormat(bits)
    codes = (x * quantizer.inv_scale).round_().add_(quantizer.zero_point).clamp_(fmt.qmin, fmt.qmax)
    return codes.sub_(quantizer.zero_point).mul_(quantizer.scale).sub_(x).square_().mean(0)


def log2_levels(bits: int, tau: float) -> Tensor:
    """S4's table ``L[c] = round(255 * 2^(-tau*c))`` with the last code an exact zero: uint8 [2^bits]."""
    codes = torch.arange(1 << bits, dtype=torch.float64)
    levels = (255.0 * torch.exp2(-tau * codes)).round()
    levels[-1] = 0.0
    return levels.to(torch.uint8)


def log2_steps(bits: int) -> tuple[float, ...]:
    """The steps tau, in octaves a code, that are worth trying at a width.

    Four bits and fewer: the grid of methods.md 4, coarser steps for fewer codes. Above, powers of two only, so that a
    kernel can make the levels from a short table and a shift: 2^b codes times tau span 8 or 16 octaves, and a u8 level
    has 8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in {MIN_BITS}..{MAX_BITS}, got {bits}")
    if bits <= 4:
        return {2: (1.0, 1.25, 1.5, 2.0), 3: (0.625, 0.75, 1.0, 1.25, 1.5), 4: (0.375, 0.5, 0.625, 0.75, 1.0)}[bits]
    return (2.0 ** (3 - bits), 2.0 ** (4 - bits))
