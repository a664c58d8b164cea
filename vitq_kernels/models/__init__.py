"""Models as named parts and as quantization sites; the files of the families alone know whose attributes those are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vitq_kernels.models import beit, eva, swin, swin_v2, vit
from vitq_kernels.models.answers import answer
from vitq_kernels.models.block_parts import AttentionParts, BlockParts, MlpParts, RopeParts
from vitq_kernels.models.parts import (
    FloatStep,
    MergingParts,
    ModelParts,
    Step,
    UnsupportedModelError,
)
from vitq_kernels.models.timm_layers import NORMS
from vitq_kernels.spec import Site

__all__ = [
    "NORMS",
    "AttentionParts",
    "BlockParts",
    "FloatStep",
    "MergingParts",
    "MlpParts",
    "ModelParts",
    "RopeParts",
    "Step",
    "UnsupportedModelError",
    "answer",
    "build_model",
    "model_config",
    "model_parts",
    "model_sites",
]

# A family is a module with CLASSES (by the name that stands in a config), cut(model) to ModelParts, describe(model) and
# build(config).
FAMILIES = (vit, eva, beit, swin, swin_v2)
FAMILY_OF = {name: family for family in FAMILIES for name in family.CLASSES}
# The families of Hugging Face transformers, an optional package that takes seconds to import: imported when met.
HF_FAMILY_OF = {
    "ViTForImageClassification": "hf_vit",
    "ViTModel": "hf_vit",
    "DeiTForImageClassification": "hf_vit",
    "DeiTForImageClassificationWithTeacher": "hf_vit",
    "DeiTModel": "hf_vit",
    "Dinov2ForImageClassification": "hf_dinov2",
    "Dinov2Model": "hf_dinov2",
    "CLIPVisionModel": "hf_clip",
    "CLIPForImageClassification": "hf_clip",
    "SiglipVisionModel": "hf_clip",
    "SiglipForImageClassification": "hf_clip",
    "SwinForImageClassification": "hf_swin",
    "SwinModel": "hf_swin",
}


def model_parts(model: nn.Module, *, strict: bool = False) -> ModelParts:
    """Cuts a model into its parts.

    Those of a model of Hugging Face transformers are of a twin of it, ``parts.model``: on the same parameters, but with
    q, k and v in one linear. Whoever hooks, runs or replaces parts does so in ``parts.model``.

    Raises:
        UnsupportedModelError: the model is of no family that is known, or ``strict`` and a part has no integer form.
    """
    name, of_hf = type(model).__name__, type(model).__module__.startswith("transformers.")
    family = _family(name) if name in (HF_FAMILY_OF if of_hf else FAMILY_OF) else None
    if family is None or type(model) is not family.CLASSES[name]:
        known = ", ".join(HF_FAMILY_OF) + " of transformers" if of_hf else f"timm {' or '.join(FAMILY_OF)}"
        raise UnsupportedModelError(f"model must be a {known}, got {name}; replace_linears() takes any model")
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
    """What ``build_model`` needs to make the same float skeleton again: class, constructor arguments, eps of the norms.

    Raises:
        UnsupportedModelError: a part of the model was left in float and cannot be described.
    """
    parts = model_parts(model)
    if not parts.float_is_described:
        parts = model_parts(model, strict=True)
    norms = {name: norm.eps for name, norm in parts.model.named_modules() if isinstance(norm, NORMS)}
    name = type(model).__name__
    return {"class": name, **_family(name).describe(parts), "norm_eps": norms}


def build_model(config: Mapping[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """The float skeleton that ``model_config`` described, in eval mode, weights uninitialised."""
    with torch.device(device):
        model = _family(config["class"]).build(config)
    for name, eps in config["norm_eps"].items():
        model.get_submodule(name).eps = eps
    return model.eval()


def _family(name: str) -> ModuleType:
    """By the name of a model's class.

    Raises:
        KeyError: it is of no family.
        ImportError: it is of transformers, which is not installed.
    """
    if name in FAMILY_OF:
        return FAMILY_OF[name]
    module = HF_FAMILY_OF[name]
    try:
        return import_module(f"vitq_kernels.models.{module}")
    except ImportError as error:
        raise ImportError(
            f"{name} needs Hugging Face transformers: pip install 'vitq-kernels[hf]' ({error})"
        ) from error
