"""DINOv2 of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from vitq_kernels.models.hf_layers import LayerNames, LayerOfBlock
from vitq_kernels.models.hf_parts import HfParts, cut_trunk, described, rebuilt
from vitq_kernels.models.parts import ModelParts

CLASSES = {c.__name__: c for c in (Dinov2ForImageClassification, Dinov2Model)}
NAMES = LayerNames("attention", "o_proj", "norm1", "norm2", "layer_scale1", "layer_scale2")
FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "use_swiglu_ffn",
    "use_mask_token",
)


class Dinov2BlockLayer(LayerOfBlock, Dinov2Layer):
    """A block in place of a Dinov2Layer."""


class HfDinov2Parts(HfParts):
    """DINOv2; its classifier reads the class token beside the mean of the patch tokens."""

    @property
    def fixed_size(self) -> bool:
        """Of the base class."""
        return False

    def prefix(self) -> Sequence[Tensor]:
        """Of the base class."""
        return [self.trunk.embeddings.cls_token]

    def add_positions(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class."""
        sides = (rows * size for rows, size in zip(grid, self.patch_proj.kernel_size, strict=True))
        return tokens + self.trunk.embeddings.interpolate_pos_encoding(tokens, *sides)

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        if not self.heads:
            return super().head_inputs(tokens)
        return {"classifier": torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)}


def cut(model: nn.Module) -> HfParts:
    """Cuts a DINOv2 into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the model is not laid out as in the transformers that is known.
    """
    return cut_trunk(
        HfDinov2Parts,
        model,
        "" if type(model) is Dinov2Model else "dinov2",
        layers="encoder.layer",
        patch="embeddings.patch_embeddings.projection",
        names=NAMES,
        layer_class=Dinov2BlockLayer,
        heads=[name for name in ("classifier",) if hasattr(model, name)],
    )


def describe(parts: ModelParts) -> dict[str, Any]:
    """What the architecture takes of the config."""
    return described(parts.model.config, FIELDS, labels=hasattr(parts.model, "classifier"))


def build(config: Mapping[str, Any]) -> nn.Module:
    """The inverse of ``describe``, weights uninitialised."""
    return cut(rebuilt(CLASSES[config["class"]], Dinov2Config, config)).model
