"""RepQ-ViT: scale reparameterization after LayerNorm, log-sqrt2 codes of the attention probabilities."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.quantizers import LogSqrt2
from vitq_kernels.presets.ranges import PERCENTILES, tails
from vitq_kernels.presets.reparameterization import calibrate_reparameterized

LEVELS = (
    "2^b for weights, q, k, v and inputs of proj, fc2 and head; 2^b + 1 after softmax (codes and a masked zero) and "
    "after LayerNorm (the averaged zero point is no integer, so the clamp's ends lie off the grid)"
)
WHY_SIMULATED = (
    "2^b + 1 levels after softmax with one scale a tensor (the kernels' code is relative to the row's maximum); "
    "zero points that are no integers after LayerNorm; a zero point for every weight row (the kernels' are symmetric); "
    "asymmetric q, k and v"
)


def log_sqrt2(x: Tensor, bits: int) -> LogSqrt2:
    """The scale, among RepQ-ViT's percentiles of x, of least squared error; one for the tensor."""
    candidates = [LogSqrt2(tails(x.flatten(), p)[1], bits) for p in PERCENTILES]
    errors = [float((quantizer(x) - x).square().sum(dtype=torch.float64)) for quantizer in candidates]
    return candidates[errors.index(min(errors))]


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """As the official code does it (commit a160561; methods.md 1.4 and 1.5)."""
    probabilities = {place: partial(log_sqrt2, bits=bits) for place, bits in widths.probabilities.items()}
    calibrate_reparameterized(model, batches, widths, progress, probabilities=probabilities)


PRESET = Preset(
    "repq-vit",
    "Li et al.: RepQ-ViT, ICCV 2023, arXiv:2212.08254; official code a160561 (Apache-2.0)",
    apply,
    calibration_images=32,
    levels=LEVELS,
    why_simulated=WHY_SIMULATED,
    completed=(
        "a channel that never varies on the calibration images has no scale in the paper; it is spanned with 0",
    ),
)
