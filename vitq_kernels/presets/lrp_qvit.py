"""LRP-QViT: RepQ-ViT's quantizers with clipped channels after LayerNorm; bits by relevance come as an allocation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from vitq_kernels.presets import repq_vit
from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.quantizers import Uniform
from vitq_kernels.presets.ranges import SCALE_FLOOR, affine, tails
from vitq_kernels.presets.reparameterization import calibrate_reparameterized
from vitq_kernels.presets.weights import asymmetric_rows

SEARCH_TOKENS = 1024  # of the calibration tokens, evenly spaced, on which a clipping is judged


@dataclass(frozen=True)
class Clipping:
    """How the channels' scales after a LayerNorm come from their ranges."""

    percentile: float  # range from quantile 1 - p to quantile p
    cap: float  # largest scale over the median one
    exponent: float  # how far a channel's scale follows its range: 1 is RepQ-ViT


# Percentiles below .999 have the least output error in every layer of ViT-Tiny at W4A4 (.995 in all 24), and the model
# is worse for it: KL on 32 other calibration images 2.84 for RepQ-ViT, 2.90 at .999, 3.38 at .995, 4.41 at .99.
CLIPPINGS = tuple(
    Clipping(p, cap, exponent)
    for p, cap, exponent in product((0.9999, 0.999, 1.0), (float("inf"), 16.0, 8.0), (1.0, 0.75, 0.5))
)


def clipped_channels(low: Tensor, high: Tensor, bits: int, clipping: Clipping) -> Uniform:
    """The quantizer per channel: scales capped, drawn together by the exponent, wide enough for every (capped) channel.

    Args:
        low, high: [C], quantiles at ``clipping.percentile``.
        bits: width.
        clipping: its cap and exponent are used.
    """
    top = 2**bits - 1
    scale, _ = affine(low, high, bits)
    middle = (low + high) / 2
    scale = scale.minimum(scale.median() * clipping.cap).clamp_min(SCALE_FLOOR)
    ratio = (scale / scale.median()) ** clipping.exponent
    scale = ratio * (scale / ratio).max()
    return Uniform(scale, (top / 2 - middle / scale).round(), 0, top)


def output_error(x: Tensor, weight: Tensor, row_bits: Tensor, quantizer: Uniform) -> float:
    """Squared output error of a folded linear, its activations and its weight quantized.

    Args:
        x: [T, C], before the fold.
        weight: [N, C], before the fold, float.
        row_bits: int [N].
        quantizer: per channel, before the fold.
    """
    scale, zero_point = quantizer.scale.mean(), quantizer.zero_point.mean()
    ratio, shift = quantizer.scale / scale, quantizer.scale * (quantizer.zero_point - zero_point)
    folded = Uniform(scale, zero_point, quantizer.qmin, quantizer.qmax)((x + shift) / ratio)
    output = folded @ asymmetric_rows(weight * ratio, row_bits).mT - weight @ shift
    return float((output - x @ weight.mT).square().sum(dtype=torch.float64))


def best_clipping(x: Tensor, weight: Tensor, row_bits: Tensor, bits: int) -> Uniform:
    """The clipping of least output error with both quantizers on; the first of equals."""
    tokens = x.flatten(0, -2)
    channels = tokens.mT.contiguous()
    step = max(1, len(tokens) // SEARCH_TOKENS)
    sample = tokens[::step][:SEARCH_TOKENS]
    ranges = {p: tails(channels, p) for p in {clipping.percentile for clipping in CLIPPINGS}}
    candidates = [clipped_channels(*ranges[clipping.percentile], bits, clipping) for clipping in CLIPPINGS]
    return min(candidates, key=lambda quantizer: output_error(sample, weight, row_bits, quantizer))


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """RepQ-ViT's calibration with clipped channels (methods.md 1.4)."""
    probabilities = {place: partial(repq_vit.log_sqrt2, bits=bits) for place, bits in widths.probabilities.items()}
    calibrate_reparameterized(model, batches, widths, progress, probabilities=probabilities, channels=best_clipping)


COMPLETED = (
    "the paper's text could not be read: no formula of the clipping and no code were found (methods.md 0)",
    (
        "clipping (derived, methods.md 1.4): percentile, cap of the scales and exponent of a layer by the squared "
        "error of its output with activations and weights quantized, on 1024 calibration tokens; percentiles from .999 "
        "on, since smaller ones, though better by that error, made the model worse"
    ),
    "everything else is RepQ-ViT, which the paper extends; number of calibration images taken from it",
    (
        "mixed precision: widths come as an allocation (strategy lrp-qvit of `vitq allocate`); its score and solver "
        "are completions too (methods.md 1.2, 1.3)"
    ),
)
PRESET = Preset(
    "lrp-qvit",
    "Ranjan and Savakis: LRP-QViT, 2024, arXiv:2401.11243 (abstract read; no public code)",
    apply,
    calibration_images=32,
    levels=repq_vit.LEVELS,
    why_simulated=repq_vit.WHY_SIMULATED,
    completed=COMPLETED,
)
