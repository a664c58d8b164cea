"""timm's Eva: EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import AttentionRope, SwiGLU
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from vitq_kernels.models.block_parts import AttentionParts, BlockParts, RopeParts
from vitq_kernels.models.parts import FloatStep, ModelParts, Step, UnsupportedModelError
from vitq_kernels.models.timm_layers import (
    activation,
    classifiers,
    constructor_arguments,
    given,
    mlp_parts,
    norm_name,
    one_form,
    own_size,
    patch_convolution,
    repeated_heads,
    stacked,
    why_no_attention,
    why_no_layers,
    why_no_mlp,
    with_bias,
)
from vitq_kernels.models.vit import VitParts

CLASSES = {Eva.__name__: Eva}
ROPES = {
    "cat": RotaryEmbeddingCat,
    "mixed": RotaryEmbeddingMixed,
    "dinov3": RotaryEmbeddingDinoV3,
    "mrope": RotaryEmbeddingMRope,
}


@dataclass(frozen=True)
class EvaParts(VitParts):
    """An Eva; tokens are [B, S, C]. The rotary embedding is that of an image of the model's own size."""

    model: Eva

    def tokens(self, images: Tensor) -> Tensor:
        """Of the base class."""
        self.pixels(images)
        return self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images))[0])

    def pixels(self, images: Tensor) -> Tensor:
        """Of the base class."""
        if self.model.rope is not None:
            own_size(self.model.patch_embed, images)
        return super().pixels(images)

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class."""
        return self.model._pos_embed(patches.unflatten(1, grid) if self.model.dynamic_img_size else patches)[0]


def cut(model: Eva) -> EvaParts:
    """Cuts an Eva into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the patch embedding has no integer form.
    """
    conv = patch_convolution(model.patch_embed)
    left: dict[str, str] = {}
    if model.attn_pool is not None:
        left["attn_pool"] = f"{type(model.attn_pool).__name__} pooling"
    patches, prefix = model.patch_embed.num_patches, int(model.num_prefix_tokens)
    table = _own_table(model)
    steps: list[Step] = []
    for index, block in enumerate(model.blocks):
        name, reason = f"blocks.{index}", _why_unsupported(block)
        own = table[index] if table is not None and model.rope_mixed else table  # [N, 2D], mixed [H, N, 2D]
        if reason is None:
            steps.append(_block_parts(name, block, patches + prefix, own))
        else:
            steps.append(FloatStep(name, _arguments(own)))
            left[name] = reason
    heads, others = classifiers(model, ("head",))
    reads = 1 if model.global_pool == "token" else 0
    return EvaParts(model, "patch_embed.proj", conv, patches, tuple(steps), heads, left | others, prefix, reads)


def _why_unsupported(block: nn.Module) -> str | None:
    """The first feature of a block that the integer kernels lack, or None."""
    if type(block) is not EvaBlock:
        return f"block type {type(block).__name__}"
    reason = why_no_attention(block.attn, (EvaAttention, AttentionRope)) or why_no_mlp(block.mlp)
    if reason:
        return reason
    linears = ("qkv",) if block.attn.qkv is not None else ("q_proj", "k_proj", "v_proj")
    return why_no_layers(block, ("norm1", "norm2"), [f"attn.{name}" for name in (*linears, "proj")])


def _block_parts(name: str, block: EvaBlock, tokens: int, table: Tensor | None) -> BlockParts:
    attn = block.attn
    qkv, reader = attn.qkv, None
    if qkv is None:
        groups = getattr(attn, "num_kv_groups", 1)
        k, v = (repeated_heads(linear, attn.head_dim, groups) for linear in (attn.k_proj, attn.v_proj))
        qkv, reader = stacked(attn.q_proj, k, v), attn
    elif getattr(attn, "q_bias", None) is not None:
        qkv, reader = with_bias(qkv, torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))), attn
    parts = AttentionParts(
        qkv,
        attn.proj,
        attn.num_heads,
        attn.head_dim,
        float(attn.scale),
        q_norm=given(attn.q_norm),
        k_norm=given(attn.k_norm),
        rope=None if table is None else RopeParts(table, attn.num_prefix_tokens, attn.rotate_half),
        norm=given(attn.norm),
        qkv_reader=reader,
    )
    mlp, arguments = mlp_parts(block.mlp), _arguments(table)
    return BlockParts(name, tokens, block.norm1, parts, block.gamma_1, block.norm2, mlp, block.gamma_2, arguments)


def _arguments(table: Tensor | None) -> dict[str, Tensor]:
    return {} if table is None else {"rope": table}


def _own_table(model: Eva) -> Tensor | None:
    """The rotary embedding as the model passes it for an image of its own size."""
    if model.rope is None:
        return None
    if model.dynamic_img_size or not hasattr(model.rope, "feat_shape"):
        return model.rope.get_embed(shape=model.patch_embed.grid_size).detach()
    return model.rope.get_embed().detach()


def describe(parts: ModelParts) -> dict[str, Any]:
    """The constructor's arguments.

    Raises:
        UnsupportedModelError: the blocks cannot come from one constructor.
    """
    model = parts.model
    form = one_form([_form(block) for block in model.blocks])
    embed, attn = model.patch_embed, model.blocks[0].attn
    arguments = {
        **constructor_arguments(parts, parts.blocks[0].mlp.fc2.in_features),
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_pre_transformer_norm": given(model.norm_pre) is not None,
        "use_post_transformer_norm": given(model.norm) is not None,
        "use_fc_norm": given(model.fc_norm) is not None,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        **{name: value for name, value in form.items() if name != "activation"},
    }
    if attn.qkv is None and getattr(attn, "num_kv_groups", 1) > 1:
        arguments["num_kv_heads"] = attn.num_kv_heads
    if model.rope is not None:
        arguments |= _rope_arguments(model.rope)
        arguments["rope_rotate_half"] = attn.rotate_half and not isinstance(model.rope, RotaryEmbeddingMRope)
    return {"arguments": arguments}


def _form(block: EvaBlock) -> dict[str, Any]:
    """The arguments of the constructor that decide what a block computes, beside its sizes."""
    attn, mlp = block.attn, block.mlp
    biased = attn.q_proj if attn.qkv is None else attn.qkv
    return {
        "activation": activation(mlp.act),
        "norm_layer": norm_name(block.norm1),
        "attn_type": "rope" if isinstance(attn, AttentionRope) else "eva",
        "qkv_bias": biased.bias is not None or getattr(attn, "q_bias", None) is not None,
        "qkv_fused": attn.qkv is not None,
        "qk_norm": given(attn.q_norm) is not None,
        "scale_attn_inner": given(attn.norm) is not None,
        "scale_mlp": given(mlp.norm) is not None,
        "swiglu_mlp": mlp_parts(mlp).gate is not None,
        "swiglu_align_to": 1 if type(mlp) is SwiGLU else 0,  # what tells SwiGLU from GluMlp; the width is whole already
    }


def _rope_arguments(rope: nn.Module) -> dict[str, Any]:
    kinds = [kind for kind, cls in ROPES.items() if type(rope) is cls]
    if not kinds:
        raise UnsupportedModelError(f"rope must be one of {tuple(ROPES)} to be described, got {type(rope).__name__}")
    found = {"use_rot_pos_emb": True, "rope_type": kinds[0], "rope_temperature": rope.temperature}
    found["rope_grid_indexing"] = rope.grid_indexing
    if hasattr(rope, "grid_offset"):
        found["rope_grid_offset"] = rope.grid_offset
    if getattr(rope, "ref_feat_shape", None) is not None:
        found["ref_feat_shape"] = list(rope.ref_feat_shape)
    if kinds[0] == "mrope":
        found["rope_mrope_section"] = list(rope.mrope_section)
    return found


def build(config: Mapping[str, Any]) -> Eva:
    """The inverse of ``describe``, weights uninitialised; the rotary embedding's tables are made on the CPU."""
    arguments = dict(config["arguments"])
    for name in ("img_size", "patch_size", "ref_feat_shape", "rope_mrope_section"):
        if name in arguments:
            arguments[name] = tuple(arguments[name])
    arguments["norm_layer"] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[arguments["norm_layer"]]
    model = Eva(**arguments)
    if model.rope is not None and any(buffer.is_meta for buffer in model.rope.buffers()):
        with torch.device("cpu"):  # no file holds these tables
            model.rope.to_empty(device="cpu").init_non_persistent_buffers()
    return model
