"""Models as named parts and as quantization sites; the files of the families alone know whose attributes those are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vitq_kernels.models import swin, vit
from vitq_kernels.models.parts import (
    AttentionParts,
    BlockParts,
    FloatStep,
    MergingParts,
    MlpParts,
    ModelParts,
    Step,
    UnsupportedModelError,
)
from vitq_kernels.spec import Site

__all__ = [
    "AttentionParts",
    "BlockParts",
    "FloatStep",
    "MergingParts",
    "MlpParts",
    "ModelParts",
    "Step",
    "UnsupportedModelError",
    "build_model",
    "model_config",
    "model_parts",
    "model_sites",
]

# A family is a module with CLASSES (by the name that stands in a config), cut(model) to ModelParts, describe(model) and
# build(config).
FAMILIES = (vit, swin)
FAMILY_OF = {name: family for family in FAMILIES for name in family.CLASSES}


def model_parts(model: nn.Module, *, strict: bool = False) -> ModelParts:
    """Cuts a model into its parts.

    Raises:
        UnsupportedModelError: the model is of no family that is known, or ``strict`` and a part has no integer form.
    """
    family = FAMILY_OF.get(type(model).__name__)
    if family is None or type(model) is not family.CLASSES[type(model).__name__]:
        raise UnsupportedModelError(
            f"model must be a timm {' or '.join(FAMILY_OF)}, got {type(model).__name__}; "
            "replace_linears() takes any model"
        )
    parts = family.cut(model)
    if parts.left_in_float and strict:
        name, reason = next(iter(parts.left_in_float.items()))
        raise UnsupportedModelError(f"{name}: {reason} has no integer form ({len(parts.left_in_float)} such parts)")
    if not parts.blocks:
        raise UnsupportedModelError(f"no block of the model has an integer form: {dict(parts.left_in_float)}")
    return parts


def model_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of a model in forward order; MACs are per image at the model's own image size."""
    return model_parts(model).sites


def model_config(model: nn.Module) -> dict[str, Any]:
    """What ``build_model`` needs to make the same float skeleton again: class, constructor arguments, LayerNorm eps.

    Raises:
        UnsupportedModelError: a part of the model was left in float and cannot be described.
    """
    parts = model_parts(model, strict=True)
    norms = {name: norm.eps for name, norm in model.named_modules() if isinstance(norm, nn.LayerNorm)}
    name = type(model).__name__
    return {"class": name, **FAMILY_OF[name].describe(parts), "norm_eps": norms}


def build_model(config: Mapping[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """The float skeleton that ``model_config`` described, in eval mode, weights uninitialised."""
    with torch.device(device):
        model = FAMILY_OF[config["class"]].build(config)
    for name, eps in config["norm_eps"].items():
        model.get_submodule(name).eps = eps
    return model.eval()
