"""Small vision models of Hugging Face transformers, made from configs, whose numbers look like a trained model's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.numerics import uniform
from tests.small_vits import OUTLIER_GAIN

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WIDE = {**SIZES, "intermediate_size": 48}
LABELS = {"num_labels": 10}


def _clip(kind: str, hidden_act: str, **more: object) -> nn.Module:
    config = getattr(transformers, f"{kind}VisionConfig")(**WIDE, hidden_act=hidden_act, **more)
    return getattr(transformers, f"{kind}VisionModel")(config)


def _classifying(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(vision_config={**WIDE, "hidden_act": "gelu"}, **LABELS)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**WIDE, **LABELS)),
    "vit-tanh-no-bias": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**WIDE, **LABELS, hidden_act="gelu_pytorch_tanh", qkv_bias=False, layer_norm_eps=1e-3)
    ),
    "vit-features": lambda: transformers.ViTModel(transformers.ViTConfig(**WIDE), add_pooling_layer=False),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**WIDE, **LABELS)),
    "deit-teacher": lambda: transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(**WIDE, **LABELS)
    ),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SIZES, **LABELS, mlp_ratio=2)
    ),
    "dinov2-features": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**SIZES, mlp_ratio=2, use_mask_token=False)
    ),
    "dinov2-giant": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SIZES, **LABELS, mlp_ratio=2, use_swiglu_ffn=True)
    ),
    "clip-features": lambda: _clip("CLIP", "gelu"),
    "clip-quick-gelu": lambda: _clip("CLIP", "quick_gelu"),  # as OpenAI's weights have it
    "clip": lambda: _classifying("CLIP"),
    "siglip-features": lambda: _clip("Siglip", "gelu_pytorch_tanh", vision_use_head=False),
    "siglip": lambda: _classifying("Siglip"),
}
# Grids of 8x8 tokens in windows of 4x4, then one such window: maps, not rows of tokens.
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
SWINS: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, **LABELS)),
    "swin-features": lambda: transformers.SwinModel(
        transformers.SwinConfig(**SWIN, use_absolute_embeddings=True, qkv_bias=False)
    ),
}
# A part of these stays in float.
PARTLY: dict[str, Callable[[], nn.Module]] = {
    "vit-pooler": lambda: transformers.ViTModel(transformers.ViTConfig(**WIDE, pooler_output_size=20)),
    "siglip-attention-pool": lambda: _clip("Siglip", "gelu"),
}


def hf_model(kind: str) -> nn.Module:
    """In eval mode, scaled as ``small_vits.small_vit``: outlier channels in norms, both signs in layer scales."""
    model = (MODELS | SWINS | PARTLY)[kind]().eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            unit = uniform(-1.7, 1.7, parameter.shape, index)
            if name.endswith("lambda1"):
                unit = 0.4 * unit
            elif "norm" in name and name.endswith("weight"):
                unit = 1 + 0.2 * unit
                unit[1], unit[3], unit[5] = OUTLIER_GAIN, -1.0, 0.0
            elif name.endswith("weight") and "position" not in name:
                unit = unit / math.sqrt(parameter[0].numel())
                if name.endswith(
                    ("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight", "classifier.weight")
                ):
                    unit[:, 1] /= OUTLIER_GAIN
            else:
                unit = 0.2 * unit
            parameter.copy_(unit)
    return model


def hf_images(count: int = 32) -> Tensor:
    """Images float32 [n, 3, 32, 32]."""
    return sum(uniform(-1, 1, (count, 3, 32, 32), 50 + i) for i in range(4))
