"""Small models of timm's ViT families beside the plain ViT, with numbers that look like a trained model's.

One for every feature that a block may have: norms of queries and keys, rotary embedding, gates, other activations,
norms inside attention and MLP, biases of positions, layers of q, k and v of their own.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.numerics import uniform
from vitq_kernels.convert import quantize
from vitq_kernels.models import model_sites
from vitq_kernels.spec import BitAllocation

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
FAMILIES = {
    "eva": (Eva, {"use_rot_pos_emb": True}),
    "beit": (Beit, {"init_values": 0.3}),
    "vit": (VisionTransformer, {}),
}
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qk-norm": ("vit", {"qk_norm": True}),
    "norm-in-attention": ("vit", {"scale_attn_norm": True}),
    "norm-in-mlp": ("vit", {"scale_mlp_norm": True}),
    "swiglu": ("vit", {"mlp_layer": SwiGLU, "act_layer": "silu"}),
    "swiglu-norm": ("vit", {"mlp_layer": SwiGLU, "act_layer": "silu", "scale_mlp_norm": True}),
    "swiglu-packed": ("vit", {"mlp_layer": SwiGLUPacked, "act_layer": "silu"}),
    "gate-last": ("vit", {"mlp_layer": GluMlp, "act_layer": "gelu"}),
    "quick-gelu": ("vit", {"act_layer": "quick_gelu"}),
    "relu": ("vit", {"act_layer": "relu"}),
    "rms-norm": ("vit", {"norm_layer": partial(RmsNorm, eps=1e-5), "qk_norm": True, "scale_mlp_norm": True}),
    "rope": ("eva", {}),
    "rope-mixed": ("eva", {"rope_type": "mixed", "attn_type": "rope", "num_reg_tokens": 2}),
    "grouped-query": ("eva", {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "rope_type": "dinov3"}),
    "relative-bias": ("beit", {"use_rel_pos_bias": True, "use_abs_pos_emb": False}),
    "shared-relative-bias": ("beit", {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "qkv_bias": False}),
    # as deployed
    "eva02": (
        "eva",
        {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "ref_feat_shape": (4, 4), "scale_attn_inner": True},
    ),
    "dinov3": (
        "eva",
        {
            "dynamic_img_size": True,
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "attn_type": "rope",
            "num_reg_tokens": 4,
            "use_abs_pos_emb": False,
            "qkv_bias": False,
            "init_values": 0.3,
            "swiglu_mlp": True,
            "swiglu_align_to": 8,
            "global_pool": "avg",
            "use_fc_norm": False,
        },
    ),
    "perception-encoder": (
        "eva",
        {"use_pre_transformer_norm": True, "attn_type": "rope", "rope_grid_indexing": "xy", "global_pool": "token"},
    ),
    "dinov2-reg4": (
        "vit",
        {
            "mlp_layer": SwiGLUPacked,
            "act_layer": nn.SiLU,
            "reg_tokens": 4,
            "no_embed_class": True,
            "init_values": 0.3,
        },
    ),
    "clip": ("vit", {"pre_norm": True, "act_layer": "quick_gelu"}),
    "aimv2": (
        "vit",
        {
            "norm_layer": partial(RmsNorm, eps=1e-5),
            "embed_norm_layer": partial(RmsNorm, eps=1e-5),
            "mlp_layer": SwiGLU,
            "act_layer": "silu",
            "global_pool": "avg",
            "class_token": False,
            "qkv_bias": False,
            "proj_bias": False,
        },
    ),
}


def variant_model(feature: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in eval mode whose every parameter is away from the zeros and ones that timm starts with."""
    family, arguments = FEATURES[feature]
    cls, own = FAMILIES[family]
    model = cls(**{**SIZES, **own, **arguments})
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            unit = uniform(-1.7, 1.7, parameter.shape, seed * 1000 + index)
            if name.rpartition(".")[2] in ("pos_embed", "cls_token", "reg_token") or "bias" in name:
                unit = 0.3 * unit
            elif name.endswith(("gamma", "gamma_1", "gamma_2")):
                unit = 0.4 * unit
            elif parameter.dim() == 1:  # gains
                unit = 1 + 0.2 * unit
            else:
                unit = unit / math.sqrt(parameter[0].numel())
            parameter.copy_(unit)
    return model.to(dtype).eval()


def images(count: int = 32, seed: int = 5) -> Tensor:
    """Float32 [n, 3, 32, 32]."""
    return sum(uniform(-1, 1, (count, 3, 32, 32), seed * 10 + i) for i in range(4))


@functools.cache
def quantized(feature: str, weight_bits: int = 8, activation_bits: int = 8) -> nn.Module:
    """``variant_model`` on integer modules. Shared between tests: copy it before changing it."""
    model = variant_model(feature)
    return quantize(model, images(), BitAllocation.uniform(model_sites(model), weight_bits, activation_bits))
