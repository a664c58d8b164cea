"""timm's VisionTransformer: ViT, DeiT and distilled DeiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import Attention, GluMlp, LayerScale
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitq_kernels.models.block_parts import AttentionParts, BlockParts
from vitq_kernels.models.parts import (
    FloatStep,
    ModelParts,
    Step,
)
from vitq_kernels.models.timm_layers import (
    MLP_LAYERS,
    activation,
    classifiers,
    constructor_arguments,
    embedded_pixels,
    given,
    mlp_name,
    mlp_parts,
    norm_name,
    one_form,
    patch_convolution,
    why_no_attention,
    why_no_layers,
    why_no_mlp,
)

CLASSES = {c.__name__: c for c in (VisionTransformer, VisionTransformerDistilled)}


@dataclass(frozen=True)
class VitParts(ModelParts):
    """A VisionTransformer; tokens are [B, S, C]."""

    model: VisionTransformer

    def tokens(self, images: Tensor) -> Tensor:
        """Of the base class."""
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the base class."""
        return self.model.forward_head(self.model.norm(tokens))

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Of the base class."""
        names = ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
        found = {name: self.model.get_submodule(name) for name in names}
        if isinstance(self.model, VisionTransformerDistilled):
            found["fc_norm"] = nn.Identity()  # its forward_head never calls it
        return found

    def pixels(self, images: Tensor) -> Tensor:
        """Of the base class."""
        return embedded_pixels(self.model.patch_embed, images)

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class."""
        if self.model.dynamic_img_size:
            patches = patches.unflatten(1, grid)
        return self.model.patch_drop(self.model._pos_embed(patches))

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        if isinstance(self.model, VisionTransformerDistilled):
            return {"head": tokens[:, 0], "head_dist": tokens[:, 1]}
        return {"head": self.model.pool(tokens)}


def cut(model: VisionTransformer) -> VitParts:
    """Cuts a VisionTransformer into its parts; what has no integer form is named in ``left_in_float``.

    Raises:
        UnsupportedModelError: the patch embedding has no integer form.
    """
    conv = patch_convolution(model.patch_embed)
    left: dict[str, str] = {}
    if model.attn_pool is not None:
        left["attn_pool"] = f"{type(model.attn_pool).__name__} pooling"
    patches = model.patch_embed.num_patches
    prefix = int(model.num_prefix_tokens)
    steps: list[Step] = []
    for index, block in enumerate(model.blocks):
        name, reason = f"blocks.{index}", why_no_block(block)
        if reason is None:
            steps.append(block_parts(name, block, patches + prefix))
        else:
            steps.append(FloatStep(name))
            left[name] = reason
    heads, others = classifiers(model, ("head", "head_dist"))
    reads = len(heads) or 1 if model.global_pool == "token" else 0
    return VitParts(model, "patch_embed.proj", conv, patches, tuple(steps), heads, left | others, prefix, reads)


def why_no_block(block: nn.Module) -> str | None:
    """The first feature of a block that the integer kernels lack, or None."""
    if type(block) is not Block:
        return f"block type {type(block).__name__}"
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(block, name), nn.Identity | LayerScale):
            return f"{name} of type {type(getattr(block, name)).__name__}"
    reason = why_no_attention(block.attn, (Attention,)) or why_no_mlp(block.mlp)
    return reason or why_no_layers(block, ("norm1", "norm2"), ("attn.qkv", "attn.proj"))


def block_parts(name: str, block: Block, tokens: int) -> BlockParts:
    """Of a block of which ``why_no_block`` has nothing to say."""
    attn = block.attn
    head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    parts = AttentionParts(
        attn.qkv,
        attn.proj,
        attn.num_heads,
        head_dim,
        float(attn.scale),
        q_norm=given(attn.q_norm),
        k_norm=given(attn.k_norm),
        norm=given(attn.norm),
    )
    scale1, scale2 = (getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2))
    return BlockParts(name, tokens, block.norm1, parts, scale1, block.norm2, mlp_parts(block.mlp), scale2)


def describe(parts: ModelParts) -> dict[str, Any]:
    """The constructor's arguments, and the norm that the patch embedding ends in.

    Raises:
        UnsupportedModelError: the blocks cannot come from one constructor.
    """
    model, first = parts.model, parts.blocks[0]
    form = one_form([block_form(block) for block in model.blocks])
    hidden = first.mlp.fc2.in_features * (2 if isinstance(model.blocks[0].mlp, GluMlp) else 1)
    arguments = {
        **constructor_arguments(parts, hidden),
        "qkv_bias": first.attn.qkv.bias is not None,
        "proj_bias": first.attn.proj.bias is not None,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        **form,
    }
    if getattr(model, "pool_include_prefix", False):
        arguments["pool_include_prefix"] = True
    norm = model.patch_embed.norm
    return {"arguments": arguments, "embed_norm": False if isinstance(norm, nn.Identity) else norm_name(norm)}


def block_form(block: Block) -> dict[str, Any]:
    """The arguments of the constructor that decide what a block computes, beside its sizes."""
    attn, mlp = block.attn, block.mlp
    return {
        "act_layer": activation(mlp.act),
        "mlp_layer": mlp_name(mlp),
        "norm_layer": norm_name(block.norm1),
        "qk_norm": given(attn.q_norm) is not None,
        "scale_attn_norm": given(attn.norm) is not None,
        "scale_mlp_norm": given(mlp.norm) is not None,
    }


def build(config: Mapping[str, Any]) -> VisionTransformer:
    """The inverse of ``describe``, weights uninitialised."""
    arguments = dict(config["arguments"])
    for name in ("img_size", "patch_size"):
        arguments[name] = tuple(arguments[name])
    embed_norm = config["embed_norm"]
    if embed_norm:
        arguments["embed_norm_layer"] = "layernorm" if embed_norm is True else embed_norm  # True in older files
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = MLP_LAYERS[arguments["mlp_layer"]]
    return CLASSES[config["class"]](**arguments, weight_init="skip")
