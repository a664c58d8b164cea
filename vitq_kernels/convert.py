"""The one page that knows the whole line: float model, statistics and allocation in; integer modules out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitq_kernels.calibration import CalibrationStats, calibrate, image_batches
from vitq_kernels.compensation import Stream
from vitq_kernels.config import QuantConfig
from vitq_kernels.converter import Converter
from vitq_kernels.models import BlockParts, MergingParts, model_config, model_parts
from vitq_kernels.spec import BitAllocation, Site


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized: carried by it as ``model.quantization``, and what a checkpoint's manifest says."""

    model_config: dict[str, Any] | None  # models.model_config of the float model; None if a part of it stayed float
    allocation: BitAllocation
    sites: tuple[Site, ...]

    @property
    def float_bytes(self) -> int:
        """Bytes of the quantized weights in float32: what ``allocation.weight_bytes`` compares with."""
        return 4 * sum(site.rows * site.cols for site in self.sites)


@torch.no_grad()
def quantize(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | None = None,
    allocation: BitAllocation | None = None,
    *,
    stats: CalibrationStats | None = None,
    config: QuantConfig | None = None,
    batch_size: int = 16,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """The same model on integer modules; the float model is left as it is.

    Args:
        model: of a supported family of timm or transformers (README, Which models), with finite weights.
        images: float [n, C, H, W] calibration images, normalised as the model expects, or batches of them. They
            give the ranges (unless ``stats`` does), and weights and biases are fitted on them.
        allocation: widths of every site; uniform W8A8 if None.
        stats: ranges from an earlier ``calibrate``. With stats and no images, weights round to nearest.
        config: how to quantize.
        batch_size: images a forward.
        strict: refuse models of which a part stays float, instead of warning.
        progress: called with (sites done, sites in all).

    Raises:
        ValueError: no images and no stats, non-finite images or weights, an allocation or stats of another model.
        UnsupportedModelError: the model is no VisionTransformer, or ``strict`` and a part has no integer form.
    """
    config = config or QuantConfig()
    parts = model_parts(model, strict=strict)
    for name, reason in parts.left_in_float.items():
        warnings.warn(f"{name} stays in float: {reason} has no integer form", stacklevel=3)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"model: weights must be finite, got NaN or Inf in {name}")
    sites = parts.sites
    allocation = allocation or BitAllocation.uniform(sites, 8)
    allocation.check(sites)
    if images is None and stats is None:
        raise ValueError("quantize: images or stats must be given, got neither")
    batches = [] if images is None else image_batches(images, batch_size, parts.patch_proj.weight.device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        stats = stats or calibrate(model, batches)
        converted = model_parts(copy.deepcopy(model).requires_grad_(False))
    finally:
        for module in training:
            module.training = True
    if unseen := [site.name for site in sites if site.has_weight and site.name not in stats.inputs]:
        raise ValueError(f"stats do not fit the model: nothing was seen of {unseen[:3]}")
    result = converted.model
    result.quantization = Quantization(
        model_config(model) if parts.float_is_described or not parts.left_in_float else None,
        allocation,
        sites,
    )
    converter = Converter(converted, stats, allocation, config, batches)
    return _convert(result, converter, len(sites), progress).eval()


def _convert(
    model: nn.Module, converter: Converter, total: int, progress: Callable[[int, int], None] | None
) -> nn.Module:
    """Replaces the modules of ``model`` in forward order."""
    parts = converter.parts
    done = 0

    def report(sites: int) -> None:
        nonlocal done
        done += sites
        if progress:
            progress(done, total)

    converter.float_stream = [parts.tokens(x) for x in converter.images]
    model.set_submodule(parts.patch_name, converter.patch_embed())
    report(1)
    stream = [parts.tokens(x) for x in converter.images]
    for step in parts.steps:
        if isinstance(step, BlockParts):
            model.set_submodule(step.name, converter.block(step, stream))
        elif isinstance(step, MergingParts):
            model.set_submodule(step.name, converter.merging(step, stream))
        else:
            called = parts.called(step)
            stream = [called(x) for x in stream]
            converter.float_stream = [called(x) for x in converter.float_stream]
        report(len(tuple(step.sites)))
    features: dict[str, Stream] = {name: [] for name in parts.heads}
    handles = [
        head.register_forward_pre_hook(lambda _, args, kept=features[name]: kept.append(args[0]))
        for name, head in parts.heads.items()
    ]
    for x in stream:
        parts.logits(x)
    for handle in handles:
        handle.remove()
    for name, head in parts.heads.items():
        model.set_submodule(name, converter.head(name, head, features[name]))
        report(1)
    return model
