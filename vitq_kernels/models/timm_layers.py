"""Layers of timm that several families share, and what of them has an integer form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, PatchEmbed, RmsNorm, RmsNormFp32, SwiGLU, get_act_layer
from torch import Tensor, nn

from vitq_kernels.activations import ACTIVATIONS, Gate
from vitq_kernels.models.block_parts import MlpParts
from vitq_kernels.models.parts import ModelParts, UnsupportedModelError

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32)
# By the names that stand in a config.
MLP_LAYERS = {
    "Mlp": Mlp,
    "SwiGLU": SwiGLU,
    "GluMlp": partial(GluMlp, gate_last=False),
    "GluMlp, gate last": partial(GluMlp, gate_last=True),
}


def patch_convolution(embed: nn.Module) -> nn.Conv2d:
    """The convolution of a PatchEmbed.

    Raises:
        UnsupportedModelError: it is no convolution over whole patches.
    """
    if type(embed) is not PatchEmbed:
        raise UnsupportedModelError(f"patch_embed must be a timm PatchEmbed, got {type(embed).__name__}")
    conv = embed.proj
    if type(conv) is not nn.Conv2d or (conv.stride, conv.padding, conv.groups) != (conv.kernel_size, (0, 0), 1):
        raise UnsupportedModelError(f"patch_embed.proj must be a Conv2d over whole patches, got {conv}")
    return conv


def embedded_pixels(embed: PatchEmbed, images: Tensor) -> Tensor:
    """What ``ModelParts.pixels`` asks for of a PatchEmbed."""
    size = tuple(images.shape[-2:])
    below, right = (-side % patch for side, patch in zip(size, embed.patch_size, strict=True))
    if embed.img_size is not None and embed.strict_img_size and size != tuple(embed.img_size):
        raise ValueError(f"images must be {tuple(embed.img_size)} pixels for this model, got {size}")
    if embed.dynamic_img_pad:
        return F.pad(images, (0, right, 0, below))
    if (below or right) and not embed.strict_img_size:
        raise ValueError(f"images must have sides divisible by {tuple(embed.patch_size)}, got {size}")
    return images


def constructor_arguments(parts: ModelParts, hidden: int) -> dict[str, Any]:
    """What the constructors of ViT, Eva and Beit have in common; ``hidden``: what fc1 of a block puts out."""
    model = parts.model
    return {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": parts.patch_proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": parts.blocks[0].attn.num_heads,
        # Half a row more: timm truncates the product, which may fall an ulp short of the integer.
        "mlp_ratio": (hidden + 0.5) / model.embed_dim,
    }


def one_form(forms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the blocks have been built with, all alike.

    Raises:
        UnsupportedModelError: the blocks cannot come from one constructor.
    """
    for form in forms:
        if form != forms[0]:
            raise UnsupportedModelError(f"blocks must have one form to be described, got {forms[0]} and {form}")
    return forms[0]


def why_no_attention(attn: nn.Module, kinds: Sequence[type[nn.Module]]) -> str | None:
    """The first feature of a self-attention, of one of these types, that the integer kernels lack, or None."""
    if type(attn) not in kinds:
        return f"attention type {type(attn).__name__}"
    if getattr(attn, "gate", None) is not None:
        return "gated attention"
    for name in ("q_norm", "k_norm", "norm"):
        norm = getattr(attn, name, None)
        if given(norm) is not None and not isinstance(norm, NORMS):
            return f"attn.{name} of type {type(norm).__name__}"
    return None


def why_no_mlp(mlp: nn.Module) -> str | None:
    """The first feature of an MLP that the integer kernels lack, or None."""
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        return f"MLP type {type(mlp).__name__}"
    if given(mlp.norm) is not None and not isinstance(mlp.norm, NORMS):
        return f"mlp.norm of type {type(mlp.norm).__name__}"
    if activation(mlp.act) is None:
        return f"activation {type(mlp.act).__name__}"
    first = ("fc1_g", "fc1_x") if type(mlp) is SwiGLU else ("fc1",)
    return why_no_layers(mlp, (), (*first, "fc2"), "mlp.")


def mlp_parts(mlp: Mlp | GluMlp | SwiGLU) -> MlpParts:
    """An MLP of which ``why_no_mlp`` has nothing to say."""
    act, norm = str(activation(mlp.act)), given(mlp.norm)
    if type(mlp) is SwiGLU:
        return MlpParts(stacked(mlp.fc1_g, mlp.fc1_x), act, mlp.fc2, "first", norm, mlp)
    gate: Gate | None = None
    if type(mlp) is GluMlp:
        gate = "last" if mlp.gate_last else "first"
    return MlpParts(mlp.fc1, act, mlp.fc2, gate, norm)


def mlp_name(mlp: Mlp | GluMlp | SwiGLU) -> str:
    """Its name in MLP_LAYERS."""
    return type(mlp).__name__ + (", gate last" if type(mlp) is GluMlp and mlp.gate_last else "")


def norm_name(norm: nn.Module) -> str:
    """The kind of a norm of NORMS, as timm's ``norm_layer`` names it.

    Raises:
        UnsupportedModelError: it is none of NORMS.
    """
    if not isinstance(norm, NORMS):
        raise UnsupportedModelError(f"a norm must be a LayerNorm or RMSNorm to be described, got {type(norm).__name__}")
    return "layernorm" if isinstance(norm, nn.LayerNorm) else "rmsnorm"


def stacked(*linears: nn.Linear) -> nn.Linear:
    """One linear that puts out what these do, side by side; without a bias where none has one."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=False)
    if any(linear.bias is not None for linear in linears):
        biases = [torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias for linear in linears]
        result.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return result


def with_bias(linear: nn.Linear, bias: Tensor) -> nn.Linear:
    """The same weight with another bias [N]."""
    result = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    result.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    result.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return result


def repeated_heads(linear: nn.Linear, head_dim: int, times: int) -> nn.Linear:
    """A linear that puts out each head of ``head_dim`` rows so many times in a row (grouped-query attention)."""
    if times == 1:
        return linear
    rows = torch.arange(linear.out_features, device=linear.weight.device).view(-1, head_dim)
    rows = rows.repeat_interleave(times, dim=0).flatten()
    result = nn.Linear(linear.in_features, len(rows), bias=False, device="meta")
    result.weight = nn.Parameter(linear.weight.detach()[rows], requires_grad=False)
    if linear.bias is not None:
        result.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=False)
    return result


def own_size(embed: PatchEmbed, images: Tensor) -> None:
    """Raises ValueError unless images have the model's own size, where a rotary embedding depends on it."""
    if tuple(images.shape[-2:]) != tuple(embed.img_size):
        raise ValueError(
            f"images must have the model's own size {tuple(embed.img_size)} where a rotary embedding depends on it, "
            f"got {tuple(images.shape[-2:])}"
        )


def given(module: nn.Module | None) -> nn.Module | None:
    """The module, or None for the identity that stands for its absence."""
    return None if isinstance(module, nn.Identity) else module


def why_no_layers(module: nn.Module, norms: Sequence[str], linears: Sequence[str], prefix: str = "") -> str | None:
    """The first of these submodules that is no LayerNorm or RMSNorm, or no nn.Linear, or None.

    ``prefix`` stands before its name.
    """
    for name in norms:
        norm = module.get_submodule(name)
        if not isinstance(norm, NORMS):
            return f"{prefix}{name} of type {type(norm).__name__}"
    for name in linears:
        linear = module.get_submodule(name)
        if type(linear) is not nn.Linear:  # a subclass may compute something else with its weight
            return f"{prefix}{name} of type {type(linear).__name__}"
    return None


def classifiers(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The classifiers among submodules of these names, and why others have no integer form."""
    found = {name: getattr(model, name, nn.Identity()) for name in names}
    heads = {name: head for name, head in found.items() if type(head) is nn.Linear and head.out_features}
    others = {name: type(head).__name__ for name, head in found.items() if type(head) is not nn.Linear}
    return heads, {name: f"classifier of type {kind}" for name, kind in others.items() if kind != "Identity"}


def activation(act: nn.Module) -> str | None:
    """Its name in ACTIVATIONS, or None."""
    if isinstance(act, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
    for name in ACTIVATIONS:
        if type(act) is get_act_layer(name):
            return name
    return None
