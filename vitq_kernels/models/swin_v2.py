"""timm's Swin Transformer V2: cosine attention, a bias from a small network of positions, norms behind the linears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer_v2 import PatchMerging, SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from torch import Tensor, nn

from vitq_kernels.models.block_parts import AttentionParts, BlockParts
from vitq_kernels.models.parts import MergingParts, ModelParts
from vitq_kernels.models.swin import SwinParts, cut_stages, stage_blocks, swin_arguments, why_no_step
from vitq_kernels.models.timm_layers import (
    activation,
    mlp_parts,
    one_form,
    with_bias,
)
from vitq_kernels.windows import Windows

CLASSES = {SwinTransformerV2.__name__: SwinTransformerV2}
MAX_LOGIT_SCALE = 100.0  # Swin V2 never multiplies a cosine by more
LARGEST_BIAS = 16.0  # logits; the sigmoid of the bias runs from 0 to this


def cut(model: SwinTransformerV2) -> SwinParts:
    """Cuts a SwinTransformerV2 into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the patch embedding has no integer form.
    """
    kinds = {"merging": PatchMerging, "block": SwinTransformerV2Block, "attention": WindowAttention}
    return cut_stages(model, partial(why_no_step, **kinds), _block_parts, _merging_parts)


def _merging_parts(name: str, merging: PatchMerging, tokens: int) -> MergingParts:
    return MergingParts(name, tokens, merging.norm, merging.reduction, post_norm=True)


def _block_parts(name: str, block: SwinTransformerV2Block) -> BlockParts:
    """Of a block of which ``why_no_step`` has nothing to say."""
    attn = block.attn
    grid = tuple(block.input_resolution)
    head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    qkv = attn.qkv
    if attn.q_bias is not None:
        qkv = with_bias(qkv, torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias)))
    parts = AttentionParts(
        qkv,
        attn.proj,
        attn.num_heads,
        head_dim,
        attn.logit_scale.detach().clamp(max=math.log(MAX_LOGIT_SCALE)).exp() / head_dim,
        _bias_table(attn),
        Windows(grid, tuple(block.window_size), tuple(block.shift_size)),
        q_norm=_unit_length(head_dim),
        k_norm=_unit_length(head_dim),
        qkv_reader=attn,
    )
    mlp = mlp_parts(block.mlp)
    return BlockParts(name, grid[0] * grid[1], block.norm1, parts, None, block.norm2, mlp, None, post_norm=True)


def _unit_length(size: int) -> nn.RMSNorm:
    """``sqrt(size) x / |x|`` over so many channels, 0 for 0: the product of two is ``size`` times their cosine."""
    return nn.RMSNorm(size, eps=1e-24, elementwise_affine=False)


@torch.no_grad()
def _bias_table(attn: WindowAttention) -> Tensor:
    """Logits by relative position, [(2h - 1)(2w - 1), H] (arXiv:2111.09883, section 3.3, and the authors' code)."""
    return LARGEST_BIAS * attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2).sigmoid()


def describe(parts: ModelParts) -> dict[str, Any]:
    """The constructor's arguments.

    Raises:
        UnsupportedModelError: the blocks cannot come from one constructor.
    """
    blocks = [parts.model.get_submodule(block.name) for block in parts.blocks]
    first = [parts.model.get_submodule(found[0].name) for found in stage_blocks(parts)]
    # One ratio for stages of several widths, each truncated: from the middle of what fits all of them.
    least = max(block.mlp.fc1.out_features / block.mlp.fc1.in_features for block in first)
    most = min((block.mlp.fc1.out_features + 1) / block.mlp.fc1.in_features for block in first)
    arguments = {
        **swin_arguments(parts),
        **one_form([_form(block) for block in blocks]),
        "mlp_ratio": (least + most) / 2,
        "pretrained_window_sizes": [list(block.attn.pretrained_window_size) for block in first],
    }
    return {"arguments": arguments}


def _form(block: SwinTransformerV2Block) -> dict[str, Any]:
    return {
        "act_layer": activation(block.mlp.act),
        "qkv_bias": block.attn.q_bias is not None,
    }


def build(config: Mapping[str, Any]) -> SwinTransformerV2:
    """The inverse of ``describe``."""
    arguments = dict(config["arguments"])
    for name in ("img_size", "patch_size", "depths", "num_heads"):
        arguments[name] = tuple(arguments[name])
    for name in ("window_size", "pretrained_window_sizes"):
        arguments[name] = tuple(tuple(size) for size in arguments[name])
    return SwinTransformerV2(**arguments)
