"""The only file that knows timm's attribute names: a VisionTransformer as named parts and as quantization sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitq_kernels.spec import Site

MODEL_CLASSES = {c.__name__: c for c in (VisionTransformer, VisionTransformerDistilled)}
GELU_APPROXIMATIONS = ("none", "tanh")  # erf and tanh form; QuickGELU and others have no integer epilogue


class UnsupportedModelError(ValueError):
    """The model, or a part of it, has no integer form here; the message names the part."""


@dataclass(frozen=True)
class BlockParts:
    """The modules of one pre-norm transformer block ``x + ls1(attn(norm1(x)))``, ``x + ls2(mlp(norm2(x)))``."""

    name: str  # "blocks.3"
    norm1: nn.LayerNorm
    qkv: nn.Linear  # rows are [3, H, D]
    proj: nn.Linear
    layer_scale1: Tensor | None  # [C]
    norm2: nn.LayerNorm
    fc1: nn.Linear
    gelu: str  # "none" (erf) or "tanh"
    fc2: nn.Linear
    layer_scale2: Tensor | None  # [C]
    num_heads: int
    head_dim: int
    softmax_scale: float


@dataclass(frozen=True)
class VitParts:
    """A VisionTransformer cut into what is quantized and what stays float."""

    model: VisionTransformer
    patch_proj: nn.Conv2d  # module "patch_embed.proj"
    blocks: tuple[BlockParts, ...]  # the supported blocks
    heads: Mapping[str, nn.Linear]  # "head" and, for distilled models, "head_dist"; empty without a classifier
    left_in_float: Mapping[str, str]  # module name -> why it has no integer form

    @property
    def read_tokens(self) -> int:
        """How many of the first tokens the classifier reads: class and distillation token, or 0 where it pools all."""
        if self.model.global_pool != "token":
            return 0
        return len(self.heads) or 1

    def tokens(self, patches: Tensor) -> Tensor:
        """Patch embeddings, as ``patch_embed`` gives them, to the tokens [B, S, C] that enter the first block.

        The patch tokens are the last ones; class, distillation and register tokens stand before them.
        """
        return self.model.norm_pre(self.model.patch_drop(self.model._pos_embed(patches)))

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S, C] after the last block to logits [B, classes], or pooled features without a classifier."""
        return self.model.forward_head(self.model.norm(tokens))

    # The same way cut finer, for a program that replaces every norm and linear (relevance.py).

    @property
    def prefix_tokens(self) -> int:
        """How many class, distillation and register tokens stand before the patch tokens."""
        return int(self.model.num_prefix_tokens)

    @property
    def norms(self) -> dict[str, nn.Module]:
        """The norms outside the blocks in forward order, nn.Identity where the model has none."""
        names = ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
        found = {name: self.model.get_submodule(name) for name in names}
        if isinstance(self.model, VisionTransformerDistilled):
            found["fc_norm"] = nn.Identity()  # its forward_head never calls it
        return found

    def pixels(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as ``patch_proj`` takes them: zero-padded to whole patches where the model does so.

        Raises:
            ValueError: the model does not take images of this size.
        """
        embed, size = self.model.patch_embed, tuple(images.shape[-2:])
        below, right = (-side % patch for side, patch in zip(size, embed.patch_size, strict=True))
        if embed.img_size is not None and embed.strict_img_size and size != tuple(embed.img_size):
            raise ValueError(f"images must be {tuple(embed.img_size)} pixels for this model, got {size}")
        if embed.dynamic_img_pad:
            return F.pad(images, (0, right, 0, below))
        if (below or right) and not embed.strict_img_size:
            raise ValueError(f"images must have sides divisible by {tuple(embed.patch_size)}, got {size}")
        return images

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches [B, P, C] of a ``grid`` of (rows, columns) to the tokens [B, S, C] that enter ``norm_pre``."""
        if self.model.dynamic_img_size:
            patches = patches.unflatten(1, grid)
        return self.model.patch_drop(self.model._pos_embed(patches))

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens [B, S, C] after ``norm`` to what each head reads after ``fc_norm``, [B, C] where the model pools.

        The logits are the mean of the heads' outputs.
        """
        if isinstance(self.model, VisionTransformerDistilled):
            return {"head": tokens[:, 0], "head_dist": tokens[:, 1]}
        return {"head": self.model.pool(tokens)}


def vit_parts(model: nn.Module, *, strict: bool = False) -> VitParts:
    """Cuts a timm VisionTransformer (ViT, DeiT, distilled DeiT) into its parts.

    Raises:
        UnsupportedModelError: the model is no VisionTransformer, or ``strict`` and a part has no integer form.
    """
    if type(model) not in MODEL_CLASSES.values():
        raise UnsupportedModelError(
            f"model must be a timm {' or '.join(MODEL_CLASSES)}, got {type(model).__name__}; "
            "replace_linears() takes any model"
        )
    left: dict[str, str] = {}
    if type(model.patch_embed) is not PatchEmbed:
        raise UnsupportedModelError(f"patch_embed must be a timm PatchEmbed, got {type(model.patch_embed).__name__}")
    conv = model.patch_embed.proj
    if type(conv) is not nn.Conv2d or (conv.stride, conv.padding, conv.groups) != (conv.kernel_size, (0, 0), 1):
        raise UnsupportedModelError(f"patch_embed.proj must be a Conv2d over whole patches, got {conv}")
    if model.attn_pool is not None:
        left["attn_pool"] = f"{type(model.attn_pool).__name__} pooling"
    blocks = []
    for index, block in enumerate(model.blocks):
        reason = _why_unsupported(block)
        if reason is None:
            blocks.append(_block_parts(f"blocks.{index}", block))
        else:
            left[f"blocks.{index}"] = reason
    classifiers = {name: getattr(model, name, nn.Identity()) for name in ("head", "head_dist")}
    heads = {name: head for name, head in classifiers.items() if type(head) is nn.Linear and head.out_features}
    others = {name: type(head).__name__ for name, head in classifiers.items() if type(head) is not nn.Linear}
    left |= {name: f"classifier of type {kind}" for name, kind in others.items() if kind != "Identity"}
    if left and strict:
        name, reason = next(iter(left.items()))
        raise UnsupportedModelError(f"{name}: {reason} has no integer form ({len(left)} such parts)")
    if not blocks:
        raise UnsupportedModelError(f"no block of the model has an integer form: {left}")
    return VitParts(model, conv, tuple(blocks), heads, left)


def _why_unsupported(block: nn.Module) -> str | None:
    """The first feature of a block that the integer kernels lack, or None."""
    if type(block) is not Block:
        return f"block type {type(block).__name__}"
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        return f"attention type {type(attn).__name__}"
    if type(mlp) is not Mlp:
        return f"MLP type {type(mlp).__name__}"
    if getattr(attn, "gate", None) is not None:
        return "gated attention"
    for owner, names in ((attn, ("q_norm", "k_norm", "norm")), (mlp, ("norm",))):
        for name in names:
            if not isinstance(getattr(owner, name, nn.Identity()), nn.Identity):
                return f"{type(owner).__name__}.{name} (qk-norm or scaled norm)"
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        if not isinstance(norm, nn.LayerNorm):
            return f"{name} of type {type(norm).__name__}"
    for name in ("ls1", "ls2"):
        if not isinstance(getattr(block, name), nn.Identity | LayerScale):
            return f"{name} of type {type(getattr(block, name)).__name__}"
    if _gelu(mlp.act) is None:
        return f"activation {type(mlp.act).__name__}"
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        linear = block.get_submodule(name)
        if type(linear) is not nn.Linear:  # a subclass may compute something else with its weight
            return f"{name} of type {type(linear).__name__}"
    return None


def _gelu(act: nn.Module) -> str | None:
    if isinstance(act, nn.GELU):
        return str(act.approximate)
    # timm's own classes: GELU takes no approximation, GELUTanh is the tanh form.
    return {"GELU": "none", "GELUTanh": "tanh"}.get(type(act).__name__)


def _block_parts(name: str, block: Block) -> BlockParts:
    attn = block.attn
    head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    return BlockParts(
        name,
        block.norm1,
        attn.qkv,
        attn.proj,
        getattr(block.ls1, "gamma", None),
        block.norm2,
        block.mlp.fc1,
        str(_gelu(block.mlp.act)),
        block.mlp.fc2,
        getattr(block.ls2, "gamma", None),
        attn.num_heads,
        head_dim,
        float(attn.scale),
    )


def vit_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of a VisionTransformer in forward order; MACs are per image at the model's own image size."""
    parts = vit_parts(model)
    conv, embed = parts.patch_proj, parts.model.patch_embed
    patches = embed.num_patches
    tokens = patches + parts.model.num_prefix_tokens
    cols = conv.weight[0].numel()
    sites = [Site("patch_embed.proj", "patch_embed", conv.out_channels, cols, patches * conv.weight.numel())]
    for b in parts.blocks:
        matmul = b.num_heads * tokens * tokens * b.head_dim

        def linear(module: nn.Linear, suffix: str, kind: Any, name: str = b.name) -> Site:
            macs = tokens * module.weight.numel()
            return Site(f"{name}.{suffix}", kind, module.out_features, module.in_features, macs)

        sites += [
            linear(b.qkv, "attn.qkv", "qkv"),
            Site(f"{b.name}.attn.qk", "qk", 0, 0, matmul),
            Site(f"{b.name}.attn.av", "av", 0, 0, matmul),
            linear(b.proj, "attn.proj", "proj"),
            linear(b.fc1, "mlp.fc1", "fc1"),
            linear(b.fc2, "mlp.fc2", "fc2"),
        ]
    for name, head in parts.heads.items():
        # the head sees one pooled token
        sites.append(Site(name, "head", head.out_features, head.in_features, head.weight.numel()))
    return tuple(sites)


def vit_config(model: VisionTransformer) -> dict[str, Any]:
    """What ``build_vit`` needs to make the same float skeleton again: constructor arguments and LayerNorm eps.

    Raises:
        UnsupportedModelError: a part of the model was left in float and cannot be described.
    """
    parts = vit_parts(model, strict=True)
    first = parts.blocks[0]
    if any(block.gelu != first.gelu for block in parts.blocks):
        raise UnsupportedModelError("blocks must share one form of GELU to be described")
    norms = {n: m.eps for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    arguments = {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": parts.patch_proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": first.num_heads,
        # Half a row more: timm truncates the product, which may fall an ulp short of the integer.
        "mlp_ratio": (first.fc1.out_features + 0.5) / model.embed_dim,
        "qkv_bias": first.qkv.bias is not None,
        "proj_bias": first.proj.bias is not None,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        "act_layer": {"none": "gelu", "tanh": "gelu_tanh"}[first.gelu],
    }
    if getattr(model, "pool_include_prefix", False):
        arguments["pool_include_prefix"] = True
    embed_norm = not isinstance(model.patch_embed.norm, nn.Identity)
    return {"class": type(model).__name__, "arguments": arguments, "embed_norm": embed_norm, "norm_eps": norms}


def build_vit(config: Mapping[str, Any], device: torch.device | str = "cpu") -> VisionTransformer:
    """The float skeleton that ``vit_config`` described, in eval mode, weights uninitialised."""
    arguments = dict(config["arguments"])
    for name in ("img_size", "patch_size"):
        arguments[name] = tuple(arguments[name])
    if config["embed_norm"]:
        arguments["embed_norm_layer"] = partial(nn.LayerNorm)
    with torch.device(device):
        model = MODEL_CLASSES[config["class"]](**arguments, weight_init="skip")
    for name, eps in config["norm_eps"].items():
        model.get_submodule(name).eps = eps
    return model.eval()
