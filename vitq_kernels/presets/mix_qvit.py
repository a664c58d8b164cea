"""Mix-QViT: LRP-QViT's quantizers; bits by relevance and sensitivity come as an allocation."""

from __future__ import annotations

from vitq_kernels.presets import lrp_qvit, repq_vit
from vitq_kernels.presets.preset import Preset

PRESET = Preset(
    "mix-qvit",
    "Ranjan and Savakis: Mix-QViT, 2025, arXiv:2501.06357 (abstract read; no public code)",
    lrp_qvit.apply,
    calibration_images=32,
    levels=repq_vit.LEVELS,
    why_simulated=repq_vit.WHY_SIMULATED,
    completed=(
        *lrp_qvit.COMPLETED[:3],
        (
            "mixed precision: widths come as an allocation (strategy mix-qvit of `vitq allocate`); sensitivity, pair "
            "terms and weighting are completions (methods.md 2.1 to 2.3); quantization-aware training is not part of it"
        ),
    ),
)
