"""Published methods as presets, in float simulation: each with its own quantizers at their true number of levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitq_kernels.models import UnsupportedModelError, model_config, model_parts, model_sites
from vitq_kernels.presets import (
    adalog,
    dopq_vit,
    fq_vit,
    is_vit,
    lrp_qvit,
    mix_qvit,
    mptq_vit,
    noisyquant,
    ptq4vit,
    repq_vit,
)
from vitq_kernels.presets.preset import Preset, Progress, Simulation, Widths
from vitq_kernels.simulation import simulated
from vitq_kernels.spec import BitAllocation, RowGroups, Site, SiteBits, check_bits

__all__ = ["PRESETS", "Preset", "Simulation", "Widths", "simulate"]

_METHODS = (adalog, fq_vit, mptq_vit, noisyquant, ptq4vit, repq_vit, lrp_qvit, mix_qvit, is_vit, dopq_vit)
PRESETS: dict[str, Preset] = {method.PRESET.name: method.PRESET for method in _METHODS}


def published_widths(sites: tuple[Site, ...], weight_bits: int, activation_bits: int) -> BitAllocation:
    """One width everywhere, patch embedding and head included; pixels at 8 bits, as the papers' codes do."""
    check_bits(weight_bits, "weight_bits")
    check_bits(activation_bits, "activation_bits")
    return BitAllocation(
        {
            site.name: SiteBits(
                8 if site.kind == "patch_embed" else activation_bits,
                RowGroups.uniform(site.rows, weight_bits) if site.has_weight else None,
            )
            for site in sites
        }
    )


@torch.no_grad()
def simulate(
    model: nn.Module,
    images: Tensor,
    method: str,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress | None = None,
    allocation: BitAllocation | None = None,
) -> nn.Module:
    """A copy of a float model that computes, in float, what a published method's quantized model computes.

    Args:
        model: a timm VisionTransformer, all of whose parts have sites; left as it is.
        images: float [n, C, H, W] for calibration; the first ``PRESETS[method].calibration_images`` are used.
        method: a key of ``PRESETS``.
        weight_bits: 2..8, of all weights; None with an allocation.
        activation_bits: 2..8, of all activations but the pixels; None with an allocation.
        seed: of the method's random numbers, if it has any.
        batch_size: images a forward, where the method does not need them all at once.
        progress: called with (steps done, steps in all).
        allocation: widths of every site, instead of the two above.

    Returns:
        The model in eval mode; ``model.simulation`` is its record, a ``Simulation``.

    Raises:
        ValueError: an unknown method, no images, NaN or Inf in images or weights, widths that are missing, twice given
            or out of range.
        UnsupportedModelError: a part of the model has no sites.
    """
    if method not in PRESETS:
        raise ValueError(f"method must be one of {', '.join(sorted(PRESETS))}, got {method!r}")
    if (allocation is None) == (weight_bits is None and activation_bits is None):
        raise ValueError("simulate: give either weight_bits and activation_bits, or an allocation")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images must be [n, C, H, W] with n at least 1, got {list(images.shape)}")
    for what, tensors in (("images", [images]), ("model: weights", model.parameters())):
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise ValueError(f"{what} must be finite, got NaN or Inf")
    parts = model_parts(model, strict=True)
    if parts.token_map:
        raise UnsupportedModelError(f"simulate: methods are for a VisionTransformer, got {type(model).__name__}")
    if odd := [block.name for block in parts.blocks if not block.plain]:
        raise UnsupportedModelError(f"simulate: methods are for blocks as of ViT, and {odd[0]} is none")
    preset, sites, config = PRESETS[method], model_sites(model), model_config(model)  # type: ignore[arg-type]
    if allocation is None:
        allocation = published_widths(sites, weight_bits, activation_bits)  # type: ignore[arg-type]
    allocation.check(sites)
    if not all(block.name.startswith("blocks.") for block in model_parts(model).blocks):
        name = type(model).__name__
        raise UnsupportedModelError(f"simulate: model must be a timm VisionTransformer, as the papers' are, got {name}")
    result = simulated(model)
    device = next(result.parameters()).device
    used = images[: preset.calibration_images].to(device)
    generator = torch.Generator().manual_seed(seed)
    report = progress or (lambda done, total: None)
    preset.apply(result, list(used.split(batch_size)), Widths(allocation), generator, report)
    result.simulation = Simulation(  # type: ignore[assignment]
        preset.name,
        preset.paper,
        weight_bits,
        activation_bits,
        preset.levels,
        preset.why_simulated,
        preset.completed,
        len(used),
        seed,
        config,
        allocation,
        sites,
        preset.executes,
    )
    return result.eval()
