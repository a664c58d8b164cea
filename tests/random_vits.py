"""Small random Vision Transformers, one for every feature that the package supports."""

from __future__ import annotations

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

VARIANTS = {
    "class-token": {},
    "average-pool": {"global_pool": "avg"},
    "no-class-token": {"global_pool": "avg", "class_token": False},
    "max-pool": {"global_pool": "max"},
    "registers": {"reg_tokens": 3},
    "layer-scale": {"init_values": 0.3},
    "no-qkv-bias": {"qkv_bias": False, "proj_bias": False},
    "distilled": {"class": VisionTransformerDistilled},
    "distilled-fc-norm": {"class": VisionTransformerDistilled, "fc_norm": True},
    "pre-norm": {"pre_norm": True},
    "fc-norm": {"fc_norm": True},
    "no-final-norm": {"final_norm": False},
    "embed-norm": {"embed_norm_layer": nn.LayerNorm},
    "no-embed-class": {"no_embed_class": True},
    "no-position": {"pos_embed": "none"},
    "tanh-gelu": {"act_layer": "gelu_tanh"},
    "dynamic-size": {"dynamic_img_size": True, "image": (24, 40)},
    "dynamic-pad": {"dynamic_img_size": True, "dynamic_img_pad": True, "image": (29, 35)},
    "non-square": {"img_size": (16, 40), "image": (16, 40)},
    "one-channel": {"in_chans": 1},
}


def make_vit(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.3, **arguments) -> nn.Module:
    """A small random ViT in eval mode, every parameter away from the zeros and ones that timm starts with."""
    torch.manual_seed(seed)
    cls = arguments.pop("class", VisionTransformer)
    arguments.pop("image", None)
    base = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = cls(**{**base, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model.to(dtype).eval()


def make_images(n: int = 3, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(5))
