"""Rounding of weights: to the numbers that codes stand for, a scale for every output row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitq_kernels.presets.ranges import PERCENTILES, SCALE_FLOOR, fake_affine, percentile_affine


def asymmetric_rows(weight: Tensor, row_bits: Tensor, percentiles: Sequence[float] = PERCENTILES) -> Tensor:
    """Affine codes 0..2^b - 1 a row, range by percentile and least squared error: RepQ-ViT's weights (methods.md 1.5).

    Args:
        weight: float [N, ...]; a convolution's kernel counts as one row.
        row_bits: int [N].
        percentiles: candidate ranges.

    Returns:
        The dequantized weight, of the same shape.
    """
    rows, bits = weight.flatten(1), row_bits.to(weight.device)
    scale, zero_point = percentile_affine(rows, bits, percentiles)
    return fake_affine(rows, scale, zero_point, bits).view_as(weight)


def symmetric_rows(weight: Tensor, row_bits: Tensor) -> Tensor:
    """Codes -2^(b-1)..2^(b-1) - 1 a row with the scale ``absmax / (2^(b-1) - 1)``: nothing is clipped.

    Args:
        weight: float [N, ...].
        row_bits: int [N].

    Returns:
        The dequantized weight, of the same shape.
    """
    rows, bits = weight.flatten(1), row_bits.to(weight.device)[:, None]
    scale = (rows.abs().amax(1, keepdim=True) / (2.0 ** (bits - 1) - 1)).clamp_min(SCALE_FLOOR)
    return ((rows / scale).round() * scale).view_as(weight)
