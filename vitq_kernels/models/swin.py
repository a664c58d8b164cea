"""timm's Swin Transformer, and what its second version shares with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import ClassifierHead
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from vitq_kernels.models.block_parts import AttentionParts, BlockParts
from vitq_kernels.models.parts import FloatStep, MergingParts, ModelParts, Step
from vitq_kernels.models.timm_layers import (
    classifiers,
    embedded_pixels,
    mlp_parts,
    patch_convolution,
    why_no_layers,
    why_no_mlp,
)
from vitq_kernels.windows import Windows

CLASSES = {SwinTransformer.__name__: SwinTransformer}


@dataclass(frozen=True)
class SwinParts(ModelParts):
    """A SwinTransformer or SwinTransformerV2; tokens are a map [B, H, W, C]."""

    model: nn.Module

    def tokens(self, images: Tensor) -> Tensor:
        """Of the base class."""
        return self.model.patch_embed(images)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the base class."""
        return self.model.forward_head(self.model.norm(tokens))

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Of the base class."""
        absent = nn.Identity()
        embed = self.model.patch_embed.norm
        return {"patch_embed.norm": embed, "norm_pre": absent, "norm": self.model.norm, "fc_norm": absent}

    def pixels(self, images: Tensor) -> Tensor:
        """Of the base class."""
        return embedded_pixels(self.model.patch_embed, images)

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class: no position embedding, no class token."""
        return patches

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        return {"head.fc": self.model.head.global_pool(tokens)}


def cut(model: SwinTransformer) -> SwinParts:
    """Cuts a SwinTransformer into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the patch embedding has no integer form.
    """
    return cut_stages(model, why_no_step, block_parts, merging_parts)


def cut_stages(
    model: nn.Module,
    why_no_step: Callable[[nn.Module], str | None],
    block_parts: Callable[[str, Any], BlockParts],
    merging_parts: Callable[[str, Any, int], MergingParts],
) -> SwinParts:
    """Cuts a model of stages with blocks behind patch mergings into its parts.

    Args:
        model: with the modules of timm's SwinTransformer.
        why_no_step: the first feature of a block or a merging that the integer kernels lack, or None.
        block_parts: of a block, by its name.
        merging_parts: of a merging, by its name and the number of tokens that come out.
    """
    conv = patch_convolution(model.patch_embed)
    left: dict[str, str] = {}
    steps: list[Step] = []
    for index, stage in enumerate(model.layers):
        name = f"layers.{index}.downsample"
        if not isinstance(stage.downsample, nn.Identity):
            if reason := why_no_step(stage.downsample):
                left[name] = reason
                steps.append(FloatStep(name))
            else:
                rows, columns = stage.output_resolution
                steps.append(merging_parts(name, stage.downsample, rows * columns))
        for number, block in enumerate(stage.blocks):
            name = f"layers.{index}.blocks.{number}"
            if reason := why_no_step(block):
                left[name] = reason
                steps.append(FloatStep(name))
            else:
                steps.append(block_parts(name, block))
    heads, others = {}, {}
    if type(model.head) is ClassifierHead:
        heads, others = classifiers(model.head, ("fc",))
        heads, others = ({f"head.{name}": value for name, value in found.items()} for found in (heads, others))
    else:
        others = {"head": f"classifier of type {type(model.head).__name__}"}
    patches = model.patch_embed.num_patches
    return SwinParts(model, "patch_embed.proj", conv, patches, tuple(steps), heads, left | others, token_map=True)


def why_no_step(
    module: nn.Module,
    merging: type[nn.Module] = PatchMerging,
    block: type[nn.Module] = SwinTransformerBlock,
    attention: type[nn.Module] = WindowAttention,
) -> str | None:
    """The first feature of a block or a merging of these types that the integer kernels lack, or None."""
    if type(module) is merging:
        return why_no_layers(module, ("norm",), ("reduction",))
    if type(module) is not block:
        return f"block type {type(module).__name__}"
    if type(module.attn) is not attention:
        return f"attention type {type(module.attn).__name__}"
    return why_no_mlp(module.mlp) or why_no_layers(module, ("norm1", "norm2"), ("attn.qkv", "attn.proj"))


def merging_parts(name: str, merging: PatchMerging, tokens: int) -> MergingParts:
    """Of a merging of which ``why_no_step`` has nothing to say."""
    return MergingParts(name, tokens, merging.norm, merging.reduction)


def block_parts(name: str, block: SwinTransformerBlock) -> BlockParts:
    """Of a block of which ``why_no_step`` has nothing to say."""
    attn = block.attn
    head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    grid = tuple(block.input_resolution)
    windows = Windows(grid, tuple(block.window_size), tuple(block.shift_size))
    table = attn.relative_position_bias_table
    parts = AttentionParts(attn.qkv, attn.proj, attn.num_heads, head_dim, float(attn.scale), table, windows)
    return BlockParts(name, grid[0] * grid[1], block.norm1, parts, None, block.norm2, mlp_parts(block.mlp), None)


def describe(parts: ModelParts) -> dict[str, Any]:
    """The constructor's arguments."""
    first = [blocks[0] for blocks in stage_blocks(parts)]
    arguments = {
        **swin_arguments(parts),
        "head_dim": [block.attn.head_dim for block in first],
        # Half a row more: timm truncates the product, which may fall an ulp short of the integer.
        "mlp_ratio": [(block.mlp.fc1.out_features + 0.5) / block.mlp.fc1.in_features for block in first],
        "qkv_bias": first[0].attn.qkv.bias is not None,
    }
    return {"arguments": arguments}


def stage_blocks(parts: ModelParts) -> list[list[BlockParts]]:
    """The blocks of each stage."""
    return [[b for b in parts.blocks if b.name.startswith(f"layers.{i}.")] for i in range(len(parts.model.layers))]


def swin_arguments(parts: ModelParts) -> dict[str, Any]:
    """What the constructors of both versions have in common."""
    model, stages = parts.model, stage_blocks(parts)
    return {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": parts.patch_proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depths": [len(blocks) for blocks in stages],
        "num_heads": [blocks[0].attn.num_heads for blocks in stages],
        "window_size": [list(blocks[0].attn.windows.size) for blocks in stages],
        "always_partition": model.layers[0].blocks[0].always_partition,
        "strict_img_size": model.patch_embed.strict_img_size,
    }


def build(config: Mapping[str, Any]) -> SwinTransformer:
    """The inverse of ``describe``, weights uninitialised."""
    arguments = dict(config["arguments"])
    for name in ("img_size", "patch_size", "depths", "num_heads", "head_dim", "mlp_ratio"):
        arguments[name] = tuple(arguments[name])
    arguments["window_size"] = tuple(tuple(size) for size in arguments["window_size"])
    return SwinTransformer(**arguments, weight_init="skip")
