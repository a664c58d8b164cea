"""timm's Beit: BEiT and BEiT v2, whose attention adds a bias by the places of two tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import SwiGLU
from timm.models.beit import Attention, Beit, Block, gen_relative_position_index
from torch import Tensor, nn

from vitq_kernels.models.block_parts import AttentionParts, BlockParts
from vitq_kernels.models.parts import FloatStep, ModelParts, Step
from vitq_kernels.models.timm_layers import (
    activation,
    classifiers,
    constructor_arguments,
    given,
    mlp_parts,
    norm_name,
    one_form,
    patch_convolution,
    why_no_attention,
    why_no_layers,
    why_no_mlp,
    with_bias,
)
from vitq_kernels.models.vit import VitParts

CLASSES = {Beit.__name__: Beit}


@dataclass(frozen=True)
class BeitParts(VitParts):
    """A Beit; tokens are [B, S, C]."""

    model: Beit

    def tokens(self, images: Tensor) -> Tensor:
        """Of the base class."""
        return self.embed(self.model.patch_embed(images), (0, 0))

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Of the base class."""
        model = self.model
        found = {"patch_embed.norm": model.patch_embed.norm, "norm_pre": nn.Identity()}
        return {**found, "norm": model.norm, "fc_norm": model.fc_norm}

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class; images have the model's own size alone."""
        x = torch.cat((self.model.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return x if self.model.pos_embed is None else x + self.model.pos_embed

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        pool = self.model.global_pool
        return {"head": tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0] if pool == "token" else tokens}


def cut(model: Beit) -> BeitParts:
    """Cuts a Beit into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the patch embedding has no integer form.
    """
    conv = patch_convolution(model.patch_embed)
    left: dict[str, str] = {}
    shared = model.rel_pos_bias
    arguments = {} if shared is None else {"shared_rel_pos_bias": shared().detach()}
    steps: list[Step] = []
    for index, block in enumerate(model.blocks):
        name, reason = f"blocks.{index}", _why_unsupported(block)
        if reason is None:
            steps.append(replace(_block_parts(name, block, model.patch_embed.grid_size, shared), arguments=arguments))
        else:
            steps.append(FloatStep(name, arguments))
            left[name] = reason
    heads, others = classifiers(model, ("head",))
    reads = 1 if model.global_pool == "token" else 0
    patches = model.patch_embed.num_patches
    return BeitParts(model, "patch_embed.proj", conv, patches, tuple(steps), heads, left | others, 1, reads)


def _why_unsupported(block: nn.Module) -> str | None:
    """The first feature of a block that the integer kernels lack, or None."""
    if type(block) is not Block:
        return f"block type {type(block).__name__}"
    reason = why_no_attention(block.attn, (Attention,)) or why_no_mlp(block.mlp)
    return reason or why_no_layers(block, ("norm1", "norm2"), ("attn.qkv", "attn.proj"))


def _block_parts(name: str, block: Block, grid: tuple[int, int], shared: nn.Module | None) -> BlockParts:
    attn = block.attn
    qkv, reader = attn.qkv, None
    if attn.q_bias is not None:
        qkv, reader = with_bias(qkv, torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))), attn
    tables = [module.relative_position_bias_table for module in (attn, shared) if module is not None]
    tables = [table.detach() for table in tables if table is not None]
    parts = AttentionParts(
        qkv,
        attn.proj,
        attn.num_heads,
        qkv.out_features // (3 * attn.num_heads),
        float(attn.scale),
        bias_table=torch.stack(tables).sum(0) if tables else None,
        grid=tuple(grid) if tables else None,
        qkv_reader=reader,
    )
    tokens = grid[0] * grid[1] + 1
    mlp = mlp_parts(block.mlp)
    return BlockParts(name, tokens, block.norm1, parts, block.gamma_1, block.norm2, mlp, block.gamma_2)


def describe(parts: ModelParts) -> dict[str, Any]:
    """The constructor's arguments.

    Raises:
        UnsupportedModelError: the blocks cannot come from one constructor.
    """
    model = parts.model
    form = one_form([_form(block) for block in model.blocks])
    arguments = {
        **constructor_arguments(parts, parts.blocks[0].mlp.fc2.in_features),
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
        "use_fc_norm": given(model.fc_norm) is not None,
        **{name: value for name, value in form.items() if name != "activation"},
    }
    return {"arguments": arguments}


def _form(block: Block) -> dict[str, Any]:
    """The arguments of the constructor that decide what a block computes, beside its sizes."""
    return {
        "activation": activation(block.mlp.act),
        "norm_layer": norm_name(block.norm1),
        "qkv_bias": block.attn.q_bias is not None,
        "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
        "scale_mlp": given(block.mlp.norm) is not None,
        "swiglu_mlp": type(block.mlp) is SwiGLU,
    }


def build(config: Mapping[str, Any]) -> Beit:
    """The inverse of ``describe``, weights uninitialised; indices of places are made on the CPU."""
    arguments = dict(config["arguments"])
    for name in ("img_size", "patch_size"):
        arguments[name] = tuple(arguments[name])
    arguments["norm_layer"] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[arguments["norm_layer"]]
    model = Beit(**arguments)
    if model.rel_pos_bias is not None:
        with torch.device("cpu"):  # no file holds the index
            index = gen_relative_position_index(model.patch_embed.grid_size)
        model.rel_pos_bias.register_buffer("relative_position_index", index, persistent=False)
    return model
