"""Swin of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification, SwinModel

from vitq_kernels.models.hf_layers import fused_linear, timm_mlp, twin
from vitq_kernels.models.hf_parts import described, pair, rebuilt
from vitq_kernels.models.parts import FloatStep, MergingParts, ModelParts, Step, UnsupportedModelError
from vitq_kernels.models.swin import block_parts, why_no_step
from vitq_kernels.models.timm_layers import classifiers

CLASSES = {c.__name__: c for c in (SwinForImageClassification, SwinModel)}
FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "qkv_bias",
    "hidden_act",
    "use_absolute_embeddings",
    "layer_norm_eps",
)


class MapBlock(nn.Module):
    """A block on maps [B, H, W, C] in place of a SwinLayer."""

    def __init__(self, block: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.block = block
        self.grid = grid

    def forward(self, hidden_states: Tensor, input_dimensions: tuple[int, int], *_: Any, **__: Any) -> Any:
        """Tokens [B, L, C] to tokens, and None in place of attention weights.

        Raises:
            ValueError: the tokens are of another map than the model's own: transformers would then pad before it
                shifts, which is not what timm's blocks do.
        """
        if tuple(input_dimensions) != self.grid:
            raise ValueError(f"images must make a map of {self.grid} tokens here, got {tuple(input_dimensions)}")
        return self.block(hidden_states.unflatten(1, self.grid)).flatten(1, 2), None


class MapMerging(nn.Module):
    """A merging of maps in place of a SwinPatchMerging."""

    def __init__(self, merging: nn.Module) -> None:
        super().__init__()
        self.merging = merging

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        """Tokens [B, L, C] of a map of these dimensions to those of the merged one."""
        return self.merging(input_feature.unflatten(1, tuple(input_dimensions))).flatten(1, 2)


class HfSwinParts(ModelParts):
    """A Swin; tokens are maps [B, H, W, C]. ``model`` is a twin of the caller's, as of ``HfParts``."""

    float_is_described: ClassVar[bool] = True

    @property
    def trunk(self) -> nn.Module:
        """The SwinModel."""
        return self.model if isinstance(self.model, SwinModel) else self.model.swin

    def tokens(self, images: Tensor) -> Tensor:
        """Of the base class."""
        tokens, grid = self.trunk.embeddings(images)
        return tokens.unflatten(1, grid)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the base class."""
        (pooled,) = self.head_inputs(self.trunk.layernorm(tokens)).values()
        return self.model.classifier(pooled) if self.heads else pooled

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Of the base class."""
        none, trunk = nn.Identity(), self.trunk
        return {"patch_embed.norm": trunk.embeddings.norm, "norm_pre": none, "norm": trunk.layernorm, "fc_norm": none}

    def pixels(self, images: Tensor) -> Tensor:
        """Of the base class."""
        size, own = tuple(images.shape[-2:]), pair(self.trunk.config.image_size)
        if size != own:
            raise ValueError(f"images must be {own} pixels for this model, got {size}")
        return images

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class."""
        positions = self.trunk.embeddings.position_embeddings
        return patches if positions is None else patches + positions

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        pooled = nn.functional.adaptive_avg_pool1d(tokens.flatten(1, 2).transpose(1, 2), 1).flatten(1)
        return {"classifier" if self.heads else "features": pooled}


def cut(model: nn.Module) -> HfSwinParts:
    """Cuts a Swin into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: maps are not whole windows in every stage, or the model is not laid out as in the
            transformers that is known.
    """
    prefix = "" if isinstance(model, SwinModel) else "swin."
    patch = f"{prefix}embeddings.patch_embeddings.projection"
    if not isinstance(model.get_submodule(f"{prefix}encoder.layers.0.blocks.0"), MapBlock):
        model = twin(model, layers_are_replaced=False)
        _replace_layers(model, f"{prefix}encoder.layers")
    trunk = model.get_submodule(prefix.removesuffix("."))
    steps: list[Step] = []
    left: dict[str, str] = {}
    for index, stage in enumerate(trunk.encoder.layers):
        path = f"{prefix}encoder.layers.{index}"
        for number, layer in enumerate(stage.blocks):
            name = f"{path}.blocks.{number}.block"
            if reason := why_no_step(layer.block):
                left[name] = reason
            steps.append(FloatStep(name) if reason else block_parts(name, layer.block))
        if stage.downsample is not None:
            merging, (rows, columns) = stage.downsample.merging, stage.blocks[0].grid
            steps.append(
                MergingParts(f"{path}.downsample.merging", rows * columns // 4, merging.norm, merging.reduction)
            )
    heads, others = classifiers(model, ("classifier",))
    conv = model.get_submodule(patch)
    patches = trunk.embeddings.patch_embeddings.num_patches
    return HfSwinParts(model, patch, conv, patches, tuple(steps), heads, left | others, token_map=True)


def _replace_layers(model: nn.Module, path: str) -> None:
    try:
        for index, stage in enumerate(model.get_submodule(path)):
            for number, layer in enumerate(stage.blocks):
                name = f"{path}.{index}.blocks.{number}"
                model.set_submodule(name, _map_block(name, layer))
            if stage.downsample is not None:
                merging = PatchMerging(1, device="meta")
                merging.norm, merging.reduction = stage.downsample.norm, stage.downsample.reduction
                stage.downsample = MapMerging(merging)
    except AttributeError as error:
        raise UnsupportedModelError(f"{path} is not laid out as in transformers 5.24: {error}") from error


def _map_block(name: str, layer: nn.Module) -> MapBlock:
    grid, size, attn = tuple(layer.input_resolution), layer.attention.config.window_size, layer.attention
    if any(side % size for side in grid):
        raise UnsupportedModelError(f"{name}: a map of {grid} tokens is not whole windows of {size}x{size}")
    shift = 0 if min(grid) <= size else layer.shift_size
    dim = layer.layernorm_before.normalized_shape[0]
    with torch.device("cpu"):  # its index of relative positions is in no checkpoint
        block = SwinTransformerBlock(
            dim, grid, attn.num_attention_heads, attn.head_dim, size, shift, always_partition=True, dynamic_mask=True
        )
    block.norm1, block.norm2 = layer.layernorm_before, layer.layernorm_after
    block.attn.qkv = fused_linear(f"{name}.attention", attn.q_proj, attn.k_proj, attn.v_proj)
    block.attn.proj = attn.o_proj
    block.attn.relative_position_bias_table = attn.relative_position_bias.relative_position_bias_table
    block.mlp = timm_mlp(layer.mlp, block.mlp)
    return MapBlock(block.train(layer.training), grid)


def describe(parts: ModelParts) -> dict[str, Any]:
    """What the architecture takes of the config."""
    return described(parts.model.config, FIELDS, labels=hasattr(parts.model, "classifier"))


def build(config: Mapping[str, Any]) -> nn.Module:
    """The inverse of ``describe``, weights uninitialised."""
    return cut(rebuilt(CLASSES[config["class"]], SwinConfig, config)).model
