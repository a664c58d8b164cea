"""A rotated residual stream: the same function, no outlier channels, and a clear no where it would be another."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from random_vits import VARIANTS, make_images, make_vit
from timm.layers import RmsNorm
from torch import Tensor, nn

import vitq_kernels as vitq
from tests.command_line import make_files, run
from tests.numerics import assert_bitwise_equal
from tests.small_vits import quietly, sqnr_db, variant_images, variant_vit
from vitq_kernels.convert import quantize
from vitq_kernels.models import UnsupportedModelError, build_model, model_config
from vitq_kernels.rotation import mean_keeping_rotation, rotate

REFUSED = {"max-pool": "global_pool", "pre-norm": "norm_pre", "embed-norm": "patch_embed.norm"}
ROTATED = [variant for variant in VARIANTS if variant not in REFUSED]


@pytest.mark.parametrize("width", [2, 32, 192])
def test_the_rotation_is_orthogonal_and_keeps_the_ones(width: int) -> None:
    q = mean_keeping_rotation(width, 3)
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    for matrix in (q, q.T):
        torch.testing.assert_close(matrix.sum(1), torch.ones(width, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_rotation_mixes_all_channels() -> None:
    q = mean_keeping_rotation(192, 0)
    assert q.abs().max() < 6 / 192**0.5  # entries are as of a Gaussian of variance 1 / width
    assert (q - torch.eye(192)).norm() > 10


@pytest.mark.parametrize("variant", ROTATED)
def test_rotated_model_computes_the_same_function(variant: str) -> None:
    model = make_vit(**VARIANTS[variant])
    arguments = VARIANTS[variant]
    images = make_images(3, arguments.get("in_chans", 3), arguments.get("image", (32, 32))).double()
    with torch.no_grad():
        expected, actual = model(images), rotate(model)(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_average_pool_behind_a_norm_of_the_tokens() -> None:
    model = make_vit(global_pool="avg", fc_norm=False)
    assert isinstance(model.norm, nn.LayerNorm)
    images = make_images().double()
    with torch.no_grad():
        torch.testing.assert_close(rotate(model)(images), model(images), rtol=1e-9, atol=1e-9)


def test_norms_without_gain_or_bias() -> None:
    model = make_vit()
    model.blocks[0].norm1 = nn.LayerNorm(32, elementwise_affine=False, dtype=torch.float64)
    model.blocks[1].norm2.bias = None
    images = make_images().double()
    with torch.no_grad():
        torch.testing.assert_close(rotate(model)(images), model(images), rtol=1e-9, atol=1e-9)


def test_the_stream_is_the_rotated_stream() -> None:
    """The first block's input itself: a rotation of everything but the stream would pass the test above."""
    model, images = make_vit(reg_tokens=2), make_images().double()
    with torch.no_grad():
        before, after = (
            m.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
            for m in (model, rotate(model, 4))
        )
    q = mean_keeping_rotation(32, 4)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y, x @ q.T, rtol=1e-9, atol=1e-9)


def channel_ranges(model: nn.Module, images: Tensor) -> Tensor:
    """Range of every channel of every norm1 output, [blocks, C]."""
    outputs: list[Tensor] = []
    handles = [b.norm1.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in model.blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return torch.stack([x.flatten(0, 1).amax(0) - x.flatten(0, 1).amin(0) for x in outputs])


@pytest.mark.parametrize("seed", [0, 1])
def test_outlier_channels_are_gone(seed: int) -> None:
    model, images = variant_vit("class-token", seed), variant_images()
    before, after = (channel_ranges(m, images) for m in (model, rotate(model)))
    assert ((before.amax(1) / before.median(1).values) > 5).all()
    assert ((after.amax(1) / after.median(1).values) < 2.5).all()


def test_rotation_is_deterministic_and_leaves_the_model_alone() -> None:
    model = variant_vit("layer-scale")
    untouched = copy.deepcopy(model.state_dict())
    first, same, other = (rotate(model, seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert_bitwise_equal(tensor, same[name])
    assert not torch.equal(first["pos_embed"], other["pos_embed"])
    for name, tensor in model.state_dict().items():
        assert_bitwise_equal(tensor, untouched[name])


@pytest.mark.parametrize("variant", ["distilled", "average-pool", "registers", "no-qkv-bias"])
def test_the_description_of_a_rotated_model_rebuilds_it(variant: str) -> None:
    model, images = rotate(variant_vit(variant)), variant_images(variant, 3)
    skeleton = build_model(model_config(model))
    skeleton.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_bitwise_equal(skeleton(images), model(images))


@pytest.mark.parametrize("variant", ["class-token", "layer-scale", "no-qkv-bias"])
def test_rotated_models_quantize_like_any(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant)
    fresh = variant_images(variant, 32, seed=77)
    with torch.no_grad():
        assert sqnr_db(quantize(rotate(model), images)(fresh), model(fresh)) > 14  # as test_convert.NEAR


def test_quantize_rotates_on_the_command_line(tmp_path: Path) -> None:
    work = make_files(tmp_path)
    data = ("--checkpoint", work / "float.safetensors", "--calibration", work / "calibration", "--weight-bits", 8)
    evaluation = ("--images", work / "flat", "--checkpoint", work / "float.safetensors", "--json", work / "e.json")
    files = [work / name for name in ("plain", "rotated", "again", "other")]
    for out, words in zip(files, [(), ("--rotate",), ("--rotate",), ("--rotate", "--seed", 1)], strict=True):
        run("quantize", "vitq_test_tiny", *data, *words, "-o", out)
        run("eval", out, *evaluation)
        assert json.loads((work / "e.json").read_text())["agreement"] > 80
    tokens = [vitq.load(out).cls_token for out in files]
    assert_bitwise_equal(tokens[1], tokens[2])
    assert not torch.allclose(tokens[0], tokens[1])
    assert not torch.allclose(tokens[1], tokens[3])


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "part"), REFUSED.items())
def test_what_does_not_commute_is_refused(variant: str, part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=part):
        rotate(make_vit(**VARIANTS[variant]))


def test_two_final_norms_are_refused() -> None:
    model = make_vit()
    model.fc_norm = nn.LayerNorm(32)
    with pytest.raises(UnsupportedModelError, match="fc_norm"):
        rotate(model)


def test_another_final_norm_is_refused() -> None:
    model = make_vit()
    model.norm = RmsNorm(32)
    with pytest.raises(UnsupportedModelError, match="norm must be a LayerNorm, got RmsNorm"):
        rotate(model)


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"global_pool": "map"}], ids=["no-classifier", "attn-pool"])
def test_models_without_a_linear_end_are_refused(arguments: dict) -> None:
    with pytest.raises(UnsupportedModelError):
        quietly(rotate, make_vit(**arguments))


def test_no_vision_transformer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        rotate(nn.Linear(4, 4))
