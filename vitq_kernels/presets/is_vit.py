"""I&S-ViT: shift-uniform-log2 codes of the attention probabilities on RepQ-ViT's calibration."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.quantizers import FakeQuantizer
from vitq_kernels.presets.reparameterization import calibrate_reparameterized

SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)  # eta
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99995, 0.99999)


class ShiftUniformLog2(FakeQuantizer):
    """I&S-ViT's SULQ: ``q = clamp(rint((log2(x + eta) - low) / step), 0, top)``, value ``2^rint(step q + low) - eta``.

    The exponent is rounded too, so neighbouring codes may stand for one value. Source: I&S-ViT (Zhong et al.,
    arXiv:2311.10126), code 9300cea; methods.md 3.4.
    """

    numbers = ("eta", "top")

    def __init__(self, low: Tensor, step: Tensor, eta: float, top: int) -> None:
        """Takes low and step, [], in octaves, and the largest code."""
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("step", step)
        self.eta, self.top = eta, top

    @property
    def levels(self) -> int:
        """Different values of the top + 1 codes."""
        codes = torch.arange(self.top + 1, device=self.low.device)
        return len((codes * self.step + self.low).round().unique())

    def forward(self, x: Tensor) -> Tensor:
        """Non-negative x."""
        codes = (((x + self.eta).log2() - self.low) / self.step).round().clamp(0, self.top)
        return torch.exp2((codes * self.step + self.low).round()) - self.eta


def shift_uniform_log2(x: Tensor, bits: int) -> ShiftUniformLog2:
    """The shift of least squared error, judged with codes 0..2^b - 1; the quantizer has codes 0..2^b, as coded."""

    def spanning(eta: float, top: int) -> ShiftUniformLog2:
        low, high = (x.min() + eta).log2(), (x.max() + eta).log2()
        return ShiftUniformLog2(low, ((high - low) / top).clamp_min(1e-8), eta, top)

    def error(eta: float) -> float:
        return float((spanning(eta, 2**bits - 1)(x) - x).square().sum(dtype=torch.float64))

    return spanning(min(SHIFTS, key=error), 2**bits)


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """The initial quantizers and the reparameterization (stage 2); no optimisation."""
    calibrate_reparameterized(
        model,
        batches,
        widths,
        progress,
        probabilities={place: partial(shift_uniform_log2, bits=bits) for place, bits in widths.probabilities.items()},
        percentiles=WEIGHT_PERCENTILES,
        float_places=("patch_embed.proj.input",),
    )


PRESET = Preset(
    "is-vit",
    "Zhong et al.: I&S-ViT, 2023, arXiv:2311.10126; official code 9300cea (no licence file; not copied)",
    apply,
    calibration_images=64,
    levels=(
        "2^b for weights, q, k, v and inputs of proj, fc2 and head; 2^b + 1 after LayerNorm (averaged zero point); "
        "2^b + 1 codes after softmax, whose exponents are rounded to octaves, so fewer different values; float pixels"
    ),
    why_simulated=(
        "2^b + 1 codes and the shift eta after softmax; zero points that are no integers after LayerNorm; a zero point "
        "for every weight row (the kernels' are symmetric); pixels in float"
    ),
    completed=(
        (
            "calibration only: stages 1 and 3 of its smooth optimisation strategy (block-wise Adam on 1024 images, "
            "first with float, then with quantized weights) are left out: do not expect its published accuracy"
        ),
        "the grid of weight percentiles between .97 and .99999 is ours; ranges of the other activations are RepQ-ViT's",
    ),
)
