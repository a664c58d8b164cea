"""Small Swin Transformers whose numbers look like a trained model's, one for every geometry of windows."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from tests.numerics import uniform
from vitq_kernels.convert import quantize
from vitq_kernels.models import model_sites
from vitq_kernels.spec import BitAllocation

OUTLIER_GAIN = 8.0  # of LayerNorm channel 1, which the weights that read it make good, as in trained models

SWINS = {
    "shifted": {},  # grid 8x8 in windows of 4x4, then one window of 4x4
    "padded": {"img_size": 28},  # grids 7x7 and 4x4
    "odd-sides": {"img_size": (20, 36), "window_size": (3, 5)},  # grids 5x9 and 3x5
    "one-window": {"window_size": 8},
    "always-partition": {"window_size": 8, "always_partition": True},  # shifts inside the one window there is
    "window-by-stage": {"window_size": ((2, 4), (4, 2))},
    "any-size": {"img_size": 28, "strict_img_size": False},
    "no-bias": {"qkv_bias": False},
    "wide-heads": {"head_dim": 16},
    "three-stages": {"img_size": 48, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 3},
    "max-pool": {"global_pool": "max"},
    "v2": {"version": 2},
    "v2-padded": {"version": 2, "img_size": 28},
    "v2-odd-sides": {"version": 2, "img_size": (20, 36), "window_size": (3, 5)},
    "v2-pretrained": {"version": 2, "pretrained_window_sizes": (6, 3), "mlp_ratio": 2.7},  # on windows of 6, then 3
    "v2-any-size": {"version": 2, "img_size": 28, "strict_img_size": False, "qkv_bias": False},
}


def make_swin(dtype: torch.dtype = torch.float64, scale: float = 0.3, version: int = 1, **arguments: Any) -> nn.Module:
    """A small random Swin in eval mode, every parameter away from the zeros and ones that timm starts with."""
    base = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 10}
    own = {} if version == 1 else {"pretrained_window_sizes": (0, 0)}
    torch.manual_seed(0)
    model = {1: SwinTransformer, 2: SwinTransformerV2}[version](**{**base, "window_size": 4, **own, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model.to(dtype).eval()


def realistic(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with linears that keep the size of their inputs; some channels stand out, as those that read them know.

    The tables of relative positions say up to 2 logits; a cosine counts for 6 to 16.
    """
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            unit = uniform(-1.7, 1.7, parameter.shape, seed * 1000 + index)
            if name.endswith("bias_table"):
                unit = 1.2 * unit
            elif name.endswith("logit_scale"):
                unit = math.log(10) + 0.3 * unit
            elif parameter.dim() > 1:
                unit = unit / math.sqrt(parameter[0].numel())
                if name.endswith(("qkv.weight", "fc1.weight", "reduction.weight", "head.fc.weight")):
                    unit[:, 1] /= OUTLIER_GAIN
            elif isinstance(model, SwinTransformerV2) and name.startswith("layers") and name.endswith("norm.weight"):
                unit = 1 + 0.2 * unit  # of a merging, whose outputs are the stream
            elif isinstance(model, SwinTransformerV2) and name.startswith("layers") and "norm" in name:
                unit = 0.4 + 0.05 * unit if name.endswith("weight") else 0.1 * unit  # what a branch adds to the stream
            elif "norm" in name and name.endswith("weight"):
                unit = 1 + 0.2 * unit
                unit[1] = OUTLIER_GAIN
            else:
                unit = 0.2 * unit
            parameter.copy_(unit)
    return model


def swin(variant: str = "shifted", seed: int = 0) -> nn.Module:
    """A variant in float32 with realistic numbers."""
    return realistic(make_swin(torch.float32, **SWINS[variant]), seed)


def swin_images(variant: str = "shifted", count: int = 16, seed: int = 5) -> Tensor:
    """Images float32 [n, 3, H, W] of the variant's own size."""
    size = SWINS[variant].get("img_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    return sum(uniform(-1, 1, (count, 3, height, width), seed * 10 + i) for i in range(4))


@functools.cache
def quantized_swin(variant: str = "shifted", weight_bits: int = 8, activation_bits: int = 8) -> nn.Module:
    """A variant on integer modules. Shared between tests: copy it before changing it."""
    model = swin(variant)
    allocation = BitAllocation.uniform(model_sites(model), weight_bits, activation_bits)
    return quantize(model, swin_images(variant), allocation)
