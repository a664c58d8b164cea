"""ViT and DeiT of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from vitq_kernels.models.hf_layers import LayerNames, LayerOfBlock
from vitq_kernels.models.hf_parts import HfParts, cut_trunk, described, rebuilt
from vitq_kernels.models.parts import ModelParts

CLASSES = {
    c.__name__: c
    for c in (
        ViTForImageClassification,
        ViTModel,
        DeiTForImageClassification,
        DeiTForImageClassificationWithTeacher,
        DeiTModel,
    )
}
NAMES = LayerNames("attention", "o_proj", "layernorm_before", "layernorm_after")
FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
POOLER_FIELDS = ("pooler_output_size", "pooler_act")


class VitBlockLayer(LayerOfBlock, ViTLayer):
    """A block in place of a ViTLayer."""


class DeitBlockLayer(LayerOfBlock, DeiTLayer):
    """A block in place of a DeiTLayer."""


class HfVitParts(HfParts):
    """ViT, or DeiT with its distillation token."""

    @property
    def fixed_size(self) -> bool:
        """Of the base class."""
        return True

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the base class."""
        trunk = self.trunk
        return super().logits(tokens) if trunk.pooler is None else trunk.pooler(trunk.layernorm(tokens))

    def prefix(self) -> Sequence[Tensor]:
        """Of the base class."""
        embeddings = self.trunk.embeddings
        names = ("cls_token", "distillation_token")[: self.prefix_tokens]
        return [getattr(embeddings, name) for name in names]

    def add_positions(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class."""
        return tokens + self.trunk.embeddings.position_embeddings

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        inputs = super().head_inputs(tokens)
        return {name: tokens[:, 1] if name.startswith("distillation") else x for name, x in inputs.items()}


def cut(model: nn.Module) -> HfParts:
    """Cuts a ViT or DeiT into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the model is not laid out as in the transformers that is known.
    """
    deit = type(model).__name__.startswith("DeiT")
    trunk_name = "" if type(model) in (ViTModel, DeiTModel) else "deit" if deit else "vit"
    left = {}
    if model.get_submodule(trunk_name).pooler is not None:
        left["pooler"] = "a pooler"
    heads = ("classifier", "cls_classifier", "distillation_classifier")
    return cut_trunk(
        HfVitParts,
        model,
        trunk_name,
        layers="layers",
        patch="embeddings.patch_embeddings.projection",
        names=NAMES,
        layer_class=DeitBlockLayer if deit else VitBlockLayer,
        heads=[name for name in heads if hasattr(model, name)],
        left=left,
        prefix_tokens=1 + deit,
        read_tokens=2 if hasattr(model, "distillation_classifier") else 1,
    )


def describe(parts: ModelParts) -> dict[str, Any]:
    """What the architecture takes of the config."""
    model = parts.model
    pooler = getattr(model, "pooler", None) is not None
    fields = (*FIELDS, *POOLER_FIELDS) if pooler else FIELDS
    labels = type(model) not in (ViTModel, DeiTModel)
    return {**described(model.config, fields, labels), "pooler": pooler}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The inverse of ``describe``, weights uninitialised."""
    kind = CLASSES[config["class"]]
    config_class = DeiTConfig if kind.__name__.startswith("DeiT") else ViTConfig
    if kind in (ViTModel, DeiTModel):
        return cut(kind(config_class(**config["config"]), add_pooling_layer=config["pooler"])).model
    return cut(rebuilt(kind, config_class, config)).model
