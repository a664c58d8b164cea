"""Layers of timm that several families share, and what of them has an integer form."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from vitq_kernels.models.parts import MlpParts, UnsupportedModelError


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


def why_no_mlp(mlp: nn.Module) -> str | None:
    """The first feature of an MLP that the integer kernels lack, or None."""
    if type(mlp) is not Mlp:
        return f"MLP type {type(mlp).__name__}"
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        return "Mlp.norm (qk-norm or scaled norm)"
    if _gelu(mlp.act) is None:
        return f"activation {type(mlp.act).__name__}"
    return why_no_layers(mlp, (), ("fc1", "fc2"), "mlp.")


def mlp_parts(mlp: Mlp) -> MlpParts:
    """An MLP of which ``why_no_mlp`` has nothing to say."""
    return MlpParts(mlp.fc1, str(_gelu(mlp.act)), mlp.fc2)


def why_no_layers(module: nn.Module, norms: Sequence[str], linears: Sequence[str], prefix: str = "") -> str | None:
    """The first of these submodules that is no LayerNorm, or no nn.Linear, or None; ``prefix`` is for its name."""
    for name in norms:
        norm = module.get_submodule(name)
        if not isinstance(norm, nn.LayerNorm):
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


def _gelu(act: nn.Module) -> str | None:
    """ "none" (erf) or "tanh"; None for an activation without an integer epilogue, as QuickGELU."""
    if isinstance(act, nn.GELU):
        return str(act.approximate)
    # timm's own classes: GELU takes no approximation, GELUTanh is the tanh form.
    return {"GELU": "none", "GELUTanh": "tanh"}.get(type(act).__name__)
