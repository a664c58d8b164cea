"""Features for detection and segmentation necks: any layer, any image size, from the quantized backbone."""

from __future__ import annotations

import functools

import pytest
import torch
from small_swins import make_swin, realistic
from small_vits import quietly, small_vit
from torch import Tensor, nn

import vitq_kernels as vitq
from tests.numerics import assert_bitwise_equal, assert_codes_close, uniform
from vitq_kernels.nn import QuantMlp

SIZES = [(32, 32), (48, 40), (24, 72)]


def images(size: tuple[int, int], count: int = 8) -> Tensor:
    """Float32 [n, 3, *size], each size other ones."""
    return sum(uniform(-1, 1, (count, 3, *size), 100 * size[0] + size[1] + i) for i in range(4))


def vit() -> nn.Module:
    return small_vit(dynamic_img_size=True, num_classes=0)


def swin() -> nn.Module:
    """Windows of 4x4 tokens of 4x4 pixels: no side of the second and third size is whole windows in every stage."""
    return realistic(make_swin(torch.float32, strict_img_size=False))


def swin_v2() -> nn.Module:
    """The same with norms behind and cosines."""
    return realistic(make_swin(torch.float32, version=2, strict_img_size=False))


BACKBONES = {"vit": vit, "swin": swin, "swin-v2": swin_v2}


@functools.cache
def quantized(kind: str) -> nn.Module:
    """Calibrated on images of several sizes, a batch each."""
    return quietly(vitq.quantize, BACKBONES[kind](), [images(size, 4) for size in SIZES])


def cosine(found: Tensor, expected: Tensor) -> float:
    return float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", BACKBONES)
def test_forward_features(kind: str, size: tuple[int, int]) -> None:
    model, x = BACKBONES[kind](), images(size)
    with torch.no_grad():
        expected, found = model.forward_features(x), quantized(kind).forward_features(x)
    assert found.shape == expected.shape
    assert cosine(found, expected) >= 0.999


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", BACKBONES)
def test_intermediate_maps_of_chosen_layers(kind: str, size: tuple[int, int]) -> None:
    model, x = BACKBONES[kind](), images(size)
    options = {"indices": [0, 1], "norm": kind == "vit", "output_fmt": "NCHW", "intermediates_only": True}
    with torch.no_grad():
        expected, found = (m.forward_intermediates(x, **options) for m in (model, quantized(kind)))
    assert [f.shape for f in found] == [f.shape for f in expected]
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert cosine(ours, theirs) >= 0.999


@pytest.mark.parametrize("kind", BACKBONES)
def test_intermediates_end_in_what_forward_features_returns(kind: str) -> None:
    x = images((48, 40), 2)
    with torch.no_grad():
        last, _ = quantized(kind).forward_intermediates(x)
        assert_bitwise_equal(last, quantized(kind).forward_features(x))


def test_prefix_tokens_come_with_the_maps() -> None:
    with torch.no_grad():
        options = {"return_prefix_tokens": True, "intermediates_only": True}
        found, expected = (m.forward_intermediates(images((48, 40)), **options) for m in (quantized("vit"), vit()))
    for (grid, prefix), (float_grid, float_prefix) in zip(found, expected, strict=True):
        assert cosine(grid, float_grid) >= 0.999
        assert prefix.shape == float_prefix.shape == (8, 1, 32)
        assert cosine(prefix, float_prefix) >= 0.999


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", BACKBONES)
def test_codes_are_the_same_on_every_cpu_backend(kind: str, size: tuple[int, int]) -> None:
    """Those that enter the last linear of the last block, behind every float operation there is."""
    model, seen = quantized(kind), {}
    last = [m for m in model.modules() if isinstance(m, QuantMlp)][-1].fc2
    for name in ("reference", "cpu"):
        hook = last.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        with vitq.use_backend(name), torch.no_grad():
            model.forward_features(images(size, 2))
        hook.remove()
    assert_codes_close(seen["cpu"], seen["reference"])


def test_a_size_does_not_feel_the_sizes_before_it() -> None:
    """Tables that were made for one size must not serve another."""
    with torch.no_grad():
        for kind in BACKBONES:
            alone = [quantized(kind).forward_features(images(size, 1)) for size in SIZES]
            for size, expected in zip(reversed(SIZES), reversed(alone), strict=True):
                assert_bitwise_equal(quantized(kind).forward_features(images(size, 1)), expected)


def test_the_order_of_sizes_in_calibration_does_not_matter_to_ranges() -> None:
    batches = [images(size, 2) for size in SIZES]
    forward, backward = (vitq.calibrate(vit(), b) for b in (batches, batches[::-1]))
    for name, stats in forward.inputs.items():
        assert_bitwise_equal(stats.low[-1], backward.inputs[name].low[-1])


def test_relevance_takes_images_of_several_sizes() -> None:
    scores = vitq.relevance(vit(), [images(size, 2) for size in SIZES], target="feature_norm")
    assert scores.images == 6
    assert all(flow > 0 for flow in scores.flow.values())


class Neck(nn.Module):
    """What a detector adds: 1x1 convolutions on the maps of two layers."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(32, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone.forward_intermediates(x, indices=[0, 1], norm=True, intermediates_only=True)
        return [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]


def test_a_neck_on_the_backbone_is_captured_and_compiled_and_exported() -> None:
    neck, x = Neck(quantized("vit")).eval().requires_grad_(False), images((48, 40), 2)
    expected = neck(x)
    captured = vitq.capture(neck, batch_sizes=(1, 2), example=x[:1])
    for found in (captured(x), torch.export.export(neck, (x,)).module()(x)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_bitwise_equal(ours, theirs)
