"""Ranges of tensors by quantiles and squared error, as RepQ-ViT chooses them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PERCENTILES = (0.999, 0.9999, 0.99999)  # RepQ-ViT's candidates
SCALE_FLOOR = 1e-8  # of channels that never vary


def tails(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Quantiles ``1 - p`` and ``p`` of the last dimension, interpolated as ``torch.quantile`` does, of any size.

    Args:
        x: float [..., T].
        p: 0.5 to 1.

    Returns:
        low and high, each [...].
    """
    position = (x.shape[-1] - 1) * (1.0 - p)
    inner = int(position)
    part = position - inner
    ends = []
    for largest in (False, True):
        ends.append(x.topk(min(inner + 2, x.shape[-1]), largest=largest).values)
    low, high = (torch.lerp(end[..., inner], end[..., min(inner + 1, end.shape[-1] - 1)], part) for end in ends)
    return low, high


def affine(low: Tensor, high: Tensor, bits: Tensor | int) -> tuple[Tensor, Tensor]:
    """Scale ``(high - low) / (2^b - 1)`` and zero point ``rint(-low / scale)`` of codes 0..2^b - 1.

    A range of a single value, which gives no scale, is spanned together with 0.
    """
    single = high <= low
    low, high = torch.where(single, low.clamp_max(0.0), low), torch.where(single, high.clamp_min(0.0), high)
    scale = ((high - low) / (2.0**bits - 1)).clamp_min(SCALE_FLOOR)
    return scale, (-low / scale).round()


def fake_affine(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor | int) -> Tensor:
    """x [..., T] through the codes 0..2^b - 1 of its row: scale, zero point and width are [...]."""
    top = 2.0**bits - 1
    top = top[..., None] if isinstance(top, Tensor) else top
    codes = ((x / scale[..., None]).round() + zero_point[..., None]).clamp_min(0.0)
    codes = torch.minimum(codes, torch.as_tensor(top, dtype=x.dtype, device=x.device))
    return (codes - zero_point[..., None]) * scale[..., None]


def percentile_affine(
    x: Tensor, bits: Tensor | int, percentiles: Sequence[float] = PERCENTILES
) -> tuple[Tensor, Tensor]:
    """The asymmetric range of every row among a few percentiles, by least squared error (methods.md 1.4).

    Args:
        x: float [..., T]; every index of the leading dimensions has a range of its own.
        bits: one width, or int [...].
        percentiles: candidates p for the range from quantile 1 - p to quantile p; the first of equals wins.

    Returns:
        scale and zero point (an integer), each float [...].
    """
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for p in percentiles:
        scale, zero = affine(*tails(x, p), bits)
        error = (fake_affine(x, scale, zero, bits) - x).square().sum(-1)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True))
    assert best is not None
    return best[1], best[2]
