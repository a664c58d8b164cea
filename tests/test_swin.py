"""Swin cut into its parts: sites, forward, the skeleton built again, the float block, calibration, what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import timm
import torch
from small_swins import SWINS, make_swin, swin, swin_images
from torch import nn

from tests.numerics import assert_bitwise_equal
from vitq_kernels.calibration import calibrate
from vitq_kernels.compensation import float_block
from vitq_kernels.models import BlockParts, UnsupportedModelError, build_model, model_config, model_parts, model_sites
from vitq_kernels.presets import simulate
from vitq_kernels.rotation import rotate
from vitq_kernels.sensitivity_runs import _attention_settings
from vitq_kernels.simulation import simulated


@pytest.mark.parametrize(
    ("name", "macs"), [("swin_tiny_patch4_window7_224", 4.49), ("swinv2_tiny_window8_256", 5.92)], ids=["v1", "v2"]
)
def test_swin_tiny_has_the_published_counts(name: str, macs: float) -> None:
    """arXiv:2103.14030, table 1: 4.5 G multiply-accumulates, 29 M parameters; 12 blocks, 3 mergings; V2: 5.9 G."""
    with torch.device("meta"):
        model = timm.create_model(name)
    sites = model_sites(model)
    kinds = Counter(site.kind for site in sites)
    blocks = dict.fromkeys(("qkv", "qk", "av", "proj", "fc1", "fc2"), 12)
    assert kinds == {"patch_embed": 1, "reduction": 3, "head": 1} | blocks
    assert sum(site.macs for site in sites) / 1e9 == pytest.approx(macs, abs=0.02)
    assert sum(site.rows * site.cols for site in sites) / 1e6 == pytest.approx(28.2, abs=0.1)
    assert all(block.attn.head_dim == 32 for block in model_parts(model).blocks)


def test_sites_are_in_forward_order() -> None:
    names = [site.name for site in model_sites(make_swin())]
    assert names[1] == "layers.0.blocks.0.attn.qkv"
    assert names[12:15] == ["layers.0.blocks.1.mlp.fc2", "layers.1.downsample.reduction", "layers.1.blocks.0.attn.qkv"]
    assert names[-1] == "head.fc"


@pytest.mark.parametrize("variant", SWINS)
def test_sites_are_the_modules_of_their_names(variant: str) -> None:
    model = make_swin(**SWINS[variant])
    sites = model_sites(model)
    for site in sites:
        if site.has_weight:
            weight = model.get_submodule(site.name).weight
            assert (site.rows, site.cols) == (weight.shape[0], weight[0].numel())
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "cpb_mlp" not in n}
    assert {site.name for site in sites if site.has_weight} == linears


def test_macs_of_a_padded_map_count_its_padding() -> None:
    """A grid of 7x7 in windows of 4x4: qkv and the matmuls see 64 tokens, the other linears 49."""
    macs = {site.name: site.macs for site in model_sites(make_swin(**SWINS["padded"]))}
    block = "layers.0.blocks.1"
    assert macs[f"{block}.attn.qkv"] == 64 * 16 * 48
    assert macs[f"{block}.attn.qk"] == macs[f"{block}.attn.av"] == 4 * 16 * 16 * 16
    assert macs[f"{block}.attn.proj"] == 49 * 16 * 16
    assert macs["layers.1.downsample.reduction"] == 16 * 64 * 32


@pytest.mark.parametrize("variant", SWINS)
def test_tokens_steps_and_logits_are_the_forward(variant: str) -> None:
    model, images = swin(variant), swin_images(variant, 2)
    parts = model_parts(model, strict=True)
    with torch.no_grad():
        x = parts.tokens(images)
        for step in parts.steps:
            x = model.get_submodule(step.name)(x)
        assert_bitwise_equal(parts.logits(x), model(images))


@pytest.mark.parametrize("variant", SWINS)
def test_float_block_is_the_models_block(variant: str) -> None:
    model, images = swin(variant), swin_images(variant, 2)
    parts = model_parts(model)
    with torch.no_grad():
        x = parts.tokens(images)
        for step in parts.steps:
            own = model.get_submodule(step.name)
            if isinstance(step, BlockParts):
                found = float_block(step, x)
                middle = x + (own.norm1(own._attn(x)) if step.post_norm else own._attn(own.norm1(x)))
                torch.testing.assert_close(found.middle, middle, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found.out, own(x), rtol=1e-5, atol=1e-5)
            x = own(x)


@pytest.mark.parametrize("variant", SWINS)
def test_config_builds_the_same_model_again(variant: str) -> None:
    model, images = swin(variant), swin_images(variant, 2)
    built = build_model(json.loads(json.dumps(model_config(model))))
    assert not built.training
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_bitwise_equal(built(images), model(images))


@pytest.mark.parametrize("variant", ["shifted", "v2"])
def test_a_resized_model_is_described_as_it_is(variant: str) -> None:
    model = swin(variant)
    model.set_input_size(img_size=(48, 32), window_size=(3, 4))
    built = build_model(model_config(model))
    built.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        assert_bitwise_equal(built(images), model(images))


@pytest.mark.parametrize("variant", SWINS)
def test_the_simulated_model_is_the_float_model_until_it_quantizes(variant: str) -> None:
    model, images = swin(variant), swin_images(variant, 2)
    with torch.no_grad():
        torch.testing.assert_close(simulated(model)(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_cosine_counts_for_at_most_100() -> None:
    """arXiv:2111.09883, section 3.3, as the authors' code has it: tau is at least 0.01, for each head its own."""
    model = swin("v2")
    logs = torch.tensor([5.0, 2.0]).view(2, 1, 1)
    with torch.no_grad():
        model.layers[1].blocks[0].attn.logit_scale.copy_(logs)
    part = model_parts(model).blocks[2]
    torch.testing.assert_close(part.attn.softmax_scale.flatten() * 16, torch.tensor([100.0, math.exp(2)]))


def test_measurements_of_another_bias_are_other_measurements() -> None:
    """The bias of version 2 depends on the windows of its pretraining, which no weight tells."""
    parts = [model_parts(swin(variant)).blocks[0].attn for variant in ("v2", "v2-pretrained")]
    first, second = map(_attention_settings, parts)
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1]


def test_the_simulated_version_2_moves() -> None:
    with torch.device("meta"):
        images = torch.empty(2, 3, 32, 32)
    assert simulated(swin("v2")).to("meta")(images).shape == (2, 10)


# --- calibration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["shifted", "padded", "v2-padded"])
def test_ranges_are_those_of_the_linears_inputs(variant: str) -> None:
    """Recomputed from the float program; padding enters qkv, but not where a norm stands behind it, and never proj."""
    model, images = swin(variant), swin_images(variant, 4)
    stats, parts = calibrate(model, images), model_parts(model)
    assert stats.images == 4
    with torch.no_grad():
        x = parts.tokens(images)
        for step in parts.steps:
            if isinstance(step, BlockParts):
                windows = step.attn.windows_of(x)
                y = windows.pad(x if step.post_norm else step.norm1(x))
                q, k, v = step.attn.heads(step.attn.qkv(y), windows)
                scores = q @ k.mT * step.attn.softmax_scale + step.attn.bias_of(windows)
                entering = y if step.attn.fused else x
                inputs = {"attn.qkv": entering, "attn.proj": step.attn.merged(scores.softmax(-1) @ v, windows)}
                for suffix, found in inputs.items():
                    ranges = stats.inputs[f"{step.name}.{suffix}"]
                    low, high = found.flatten(0, -2).amin(0), found.flatten(0, -2).amax(0)
                    torch.testing.assert_close(ranges.low[-1], low, rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(ranges.high[-1], high, rtol=1e-4, atol=1e-5)
                mean = stats.output_mean[f"{step.name}.attn.proj"]
                expected = step.attn.proj(inputs["attn.proj"]).flatten(0, -2).mean(0)
                torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
            x = model.get_submodule(step.name)(x)


def test_calibration_on_two_sizes_is_the_mean_of_both() -> None:
    model = swin("any-size")
    first, second = swin_images("any-size", 3), torch.randn(3, 3, 36, 20, generator=torch.Generator().manual_seed(0))
    both = calibrate(model, [first, second]).tau_error
    apart = [calibrate(model, images).tau_error for images in (first, second)]
    for site, error in both.items():
        torch.testing.assert_close(error, (apart[0][site] + apart[1][site]) / 2)


# --- what is not supported ----------------------------------------------------------------------------------------


def test_a_norm_without_integer_form_is_named() -> None:
    model = make_swin()
    model.layers[1].downsample.norm = nn.Tanh()
    parts = model_parts(model)
    assert parts.left_in_float == {"layers.1.downsample": "norm of type Tanh"}
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.downsample: norm of type Tanh has no integer form"):
        model_parts(model, strict=True)


def test_a_block_without_integer_form_is_named() -> None:
    model = make_swin()
    model.layers[0].blocks[1].mlp.act = nn.ELU()
    assert model_parts(model).left_in_float == {"layers.0.blocks.1": "activation ELU"}
    with pytest.raises(UnsupportedModelError, match="has no integer form"):
        model_config(model)


def test_another_version_2_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = timm.create_model("swinv2_cr_tiny_224")
    with pytest.raises(UnsupportedModelError, match="got SwinTransformerV2Cr"):
        model_sites(model)


@pytest.mark.parametrize("use", [rotate, lambda model: simulate(model, torch.zeros(1, 3, 32, 32), "repq-vit", 8, 8)])
def test_what_is_for_one_residual_stream_refuses_stages(use: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"got (a )?SwinTransformer"):
        use(make_swin(torch.float32))  # type: ignore[operator]
