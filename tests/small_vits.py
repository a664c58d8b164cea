"""Small Vision Transformers whose numbers look like a trained model's, and their quantized forms.

The variants are those of random_vits.py; the numbers come from numerics.py, so they are the same everywhere.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from random_vits import VARIANTS, make_vit
from torch import Tensor, nn

from tests.numerics import integers, uniform
from vitq_kernels.convert import quantize
from vitq_kernels.models import model_sites
from vitq_kernels.spec import BitAllocation, RowGroups, SiteBits

CALIBRATION_IMAGES = 32
OUTLIER_GAIN = 8.0  # of LayerNorm channel 1, which the weights that read it make good, as in trained models


def small_vit(seed: int = 0, **arguments: Any) -> nn.Module:
    """A float32 model in eval mode, of random_vits.make_vit's shape.

    Linears keep the size of their inputs. LayerNorms differ by channel: one gain is eight times the others, one is
    negative, one is zero, so that its channel never varies. Layer scales have both signs.
    """
    model = make_vit(seed, torch.float32, **arguments)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            unit = uniform(-1.7, 1.7, parameter.shape, seed * 1000 + index)
            if parameter.dim() > 1 and not name.startswith(("pos_embed", "cls_token", "dist_token", "reg_token")):
                unit = unit / math.sqrt(parameter[0].numel())
            elif name.endswith("gamma"):
                unit = 0.4 * unit
            elif "norm" in name and name.endswith("weight"):
                unit = 1 + 0.2 * unit
                unit[1], unit[3], unit[5] = OUTLIER_GAIN, -1.0, 0.0
            else:
                unit = 0.2 * unit
            if name.endswith(("qkv.weight", "fc1.weight", "head.weight", "head_dist.weight")):
                unit[:, 1] /= OUTLIER_GAIN
            parameter.copy_(unit)
    return model


def variant_vit(variant: str, seed: int = 0) -> nn.Module:
    """``small_vit`` of a variant."""
    return small_vit(seed, **VARIANTS[variant])


def variant_images(variant: str = "class-token", count: int = CALIBRATION_IMAGES, seed: int = 5) -> Tensor:
    """Images float32 [n, C, H, W] that a variant takes."""
    arguments = VARIANTS[variant]
    shape = (count, arguments.get("in_chans", 3), *arguments.get("image", (32, 32)))
    return sum(uniform(-1, 1, shape, seed * 10 + i) for i in range(4))


@functools.cache
def variant_quantized(variant: str, weight_bits: int = 8, activation_bits: int = 8) -> nn.Module:
    """``variant_vit`` on integer modules. Shared between tests: copy it before changing it."""
    model = variant_vit(variant)
    allocation = BitAllocation.uniform(model_sites(model), weight_bits, activation_bits)
    return quantize(model, variant_images(variant), allocation)


def mixed_allocation(model: nn.Module, seed: int = 0, activation_bits: int = 8) -> BitAllocation:
    """Every block linear in row groups of 16 of random widths 2..8, rows reordered inside their tiles."""
    result = {}
    for index, site in enumerate(model_sites(model)):
        if not site.has_weight:
            result[site.name] = SiteBits(activation_bits)
        elif not site.in_block:
            result[site.name] = SiteBits(8, RowGroups.uniform(site.rows, 8))
        else:
            order, bits = [], []
            for tile in range(0, site.rows, 256):
                count = min(256, site.rows - tile)
                places = integers(0, 1 << 30, (count,), seed * 100 + index + tile).argsort()
                order += (tile + places).tolist()
                bits += integers(2, 8, (-(-count // 16),), seed * 100 + index + tile + 50).tolist()
            result[site.name] = SiteBits(activation_bits, RowGroups(site.rows, tuple(bits), 16, tuple(order)))
    return BitAllocation(result)


def sqnr_db(actual: Tensor, exact: Tensor) -> float:
    """Signal to quantization noise of logits [B, classes], in dB; the signal is what differs between images."""
    signal = (exact - exact.mean(0)).double().square().mean()
    return float(10 * torch.log10(signal / (actual - exact).double().square().mean()))


def quietly(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """``function(...)`` with its warnings ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)
