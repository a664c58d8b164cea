"""DopQ-ViT: codes of the attention probabilities by the tangent, reparameterization towards the median channel."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from vitq_kernels.presets.capture import inputs_of
from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.quantizers import FakeQuantizer
from vitq_kernels.presets.reparameterization import calibrate_reparameterized

STEEPNESSES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)
SEARCH_IMAGES = 8  # on which a block's steepness is chosen


class Tangent(FakeQuantizer):
    """Codes evenly spaced in ``tan(a (2 x / scale - 1))`` with ``tan(a) = steepness``: dense near 0 and near ``scale``.

    Our completion of DopQ-ViT's TanQ (Yang et al., arXiv:2408.03291), of which no formula was found: only that it maps
    by the tangent and keeps precision both near 0 and near 1 (methods.md 3.6).
    """

    numbers = ("steepness", "bits")

    def __init__(self, scale: Tensor, steepness: float, bits: int) -> None:
        """Takes the largest level, []."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.steepness, self.bits = steepness, bits

    @property
    def levels(self) -> int:
        """2^bits."""
        return 1 << self.bits

    def forward(self, x: Tensor) -> Tensor:
        """Non-negative x."""
        top, angle = self.levels - 1, math.atan(self.steepness)
        bent = torch.tan(angle * (2 * (x / self.scale).clamp(0, 1) - 1)) / self.steepness  # in [-1, 1]
        codes = ((bent + 1) * (top / 2)).round()
        return (torch.atan((2 * codes / top - 1) * self.steepness) / angle + 1) / 2 * self.scale


def tangent(x: Tensor, bits: int, steepness: float) -> Tangent:
    """Spans 0 to the largest probability: none near 1 is clipped."""
    return Tangent(x.max().clamp_min(torch.finfo(x.dtype).tiny), steepness, bits)


def best_steepness(x: Tensor, value: Tensor, bits: int) -> float:
    """By the squared error of ``x @ value``: probabilities [B, H, S, S], values [B, H, S, D]."""

    def error(steepness: float) -> float:
        return float(((tangent(x, bits, steepness)(x) - x) @ value).square().sum(dtype=torch.float64))

    return min(STEEPNESSES, key=error)


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """RepQ-ViT's calibration with both changes."""
    values = {place: place.replace(".probability", ".value") for place in widths.probabilities}
    seen = inputs_of(model, [*values, *values.values()], [torch.cat(batches)[:SEARCH_IMAGES]])
    probabilities = {
        place: partial(tangent, bits=bits, steepness=best_steepness(seen[place], seen[values[place]], bits))
        for place, bits in widths.probabilities.items()
    }
    calibrate_reparameterized(model, batches, widths, progress, probabilities=probabilities, target=torch.median)


PRESET = Preset(
    "dopq-vit",
    "Yang et al.: DopQ-ViT, 2024, arXiv:2408.03291 (abstract read; no public code)",
    apply,
    calibration_images=32,
    levels="2^b everywhere (the median of whole zero points is whole)",
    why_simulated=(
        "a codebook by the tangent with one scale a tensor after softmax (the kernels' code is a logarithm relative to "
        "the row's maximum); a zero point for every weight row (the kernels' are symmetric); asymmetric q, k and v"
    ),
    completed=(
        (
            "TanQ: no formula was found; here codes are even in tan(a (2 x / max - 1)), dense near 0 and near 1, and a "
            "is chosen per block by the squared error of attention's output on 8 calibration images of the float model"
        ),
        (
            "MOSF: the median channel's scale and zero point are the target. The scale is a gauge (methods.md 8.2): "
            "any target gives the same codes, so only the zero point can differ from RepQ-ViT's mean"
        ),
        "everything else is RepQ-ViT, on which the paper builds; number of calibration images taken from it",
    ),
)
