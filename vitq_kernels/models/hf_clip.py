"""The vision towers of CLIP and SigLIP of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from vitq_kernels.models.hf_layers import LayerNames, LayerOfBlock
from vitq_kernels.models.hf_parts import HfParts, cut_trunk, described, rebuilt
from vitq_kernels.models.parts import ModelParts

# The config of each class, and of the vision tower inside it.
CONFIGS: dict[type[nn.Module], tuple[type, type]] = {
    CLIPVisionModel: (CLIPVisionConfig, CLIPVisionConfig),
    CLIPForImageClassification: (CLIPConfig, CLIPVisionConfig),
    SiglipVisionModel: (SiglipVisionConfig, SiglipVisionConfig),
    SiglipForImageClassification: (SiglipConfig, SiglipVisionConfig),
}
CLASSES = {c.__name__: c for c in CONFIGS}
NAMES = LayerNames("self_attn", "out_proj", "layer_norm1", "layer_norm2")
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


class ClipBlockLayer(LayerOfBlock, CLIPEncoderLayer):
    """A block in place of a CLIPEncoderLayer."""


class SiglipBlockLayer(LayerOfBlock, SiglipEncoderLayer):
    """A block in place of a SiglipEncoderLayer."""


class HfClipParts(HfParts):
    """CLIP: a norm before the layers, and one of the pooled class token; a classifier reads the mean of the patches."""

    @property
    def fixed_size(self) -> bool:
        """Of the base class."""
        return True

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Of the base class."""
        pooled = nn.Identity() if self.heads else self.trunk.post_layernorm
        none = nn.Identity()
        return {"patch_embed.norm": none, "norm_pre": self.trunk.pre_layrnorm, "norm": none, "fc_norm": pooled}

    def prefix(self) -> Sequence[Tensor]:
        """Of the base class."""
        return [self.trunk.embeddings.class_embedding]

    def add_positions(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class."""
        return tokens + self.trunk.embeddings.position_embedding.weight

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        return {"classifier": tokens[:, 1:].mean(dim=1)} if self.heads else super().head_inputs(tokens)


class HfSiglipParts(HfClipParts):
    """SigLIP: no class token; a head of attention pools, or a classifier reads the mean."""

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Of the base class."""
        none = nn.Identity()
        return {"patch_embed.norm": none, "norm_pre": none, "norm": self.trunk.post_layernorm, "fc_norm": none}

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the base class."""
        if self.heads or not self.trunk.use_head:
            return super().logits(tokens)
        return self.trunk.head(self.trunk.post_layernorm(tokens))

    def prefix(self) -> Sequence[Tensor]:
        """Of the base class."""
        return []

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        return dict.fromkeys(self.heads or ("features",), tokens.mean(dim=1))


def cut(model: nn.Module) -> HfParts:
    """Cuts a vision tower into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the model is not laid out as in the transformers that is known.
    """
    trunk_name = "" if type(model) in (CLIPVisionModel, SiglipVisionModel) else "vision_model"
    siglip = CONFIGS[type(model)][1] is SiglipVisionConfig
    reads_class = type(model) is CLIPVisionModel
    left = {}
    if type(model) is SiglipVisionModel and model.use_head:
        left["head"] = "attention pooling"
    return cut_trunk(
        HfSiglipParts if siglip else HfClipParts,
        model,
        trunk_name,
        layers="encoder.layers",
        patch="embeddings.patch_embedding",
        names=NAMES,
        layer_class=SiglipBlockLayer if siglip else ClipBlockLayer,
        heads=[name for name in ("classifier",) if hasattr(model, name)],
        left=left,
        prefix_tokens=0 if siglip else 1,
        read_tokens=1 if reads_class else 0,
    )


def describe(parts: ModelParts) -> dict[str, Any]:
    """What the vision tower takes of its config."""
    tower = parts.trunk.config
    extra = ("vision_use_head",) if isinstance(tower, SiglipVisionConfig) else ()
    described_tower = described(tower, (*FIELDS, *extra), labels=False)
    labels = described(parts.model.config, (), labels=hasattr(parts.model, "classifier"))
    return {"config": described_tower["config"] | labels["config"]}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The inverse of ``describe``, weights uninitialised."""
    kind = CLASSES[config["class"]]
    config_class, tower_class = CONFIGS[kind]
    if config_class is not tower_class:
        fields = dict(config["config"])
        labels = {name: fields.pop(name) for name in ("id2label",) if name in fields}
        config = {"config": {"vision_config": fields, **labels}}
    parts = cut(rebuilt(kind, config_class, config))
    embeddings = parts.trunk.embeddings
    # No checkpoint holds them, so they must not be on the meta device.
    embeddings.position_ids = torch.arange(embeddings.num_positions, device="cpu")[None]
    return parts.model
