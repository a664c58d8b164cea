"""Swin on integer modules: against the float model, against attention window by window, and out of a file."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from small_swins import SWINS, make_swin, quantized_swin, realistic, swin, swin_images
from torch import Tensor, nn

import vitq_kernels as vitq
from tests.numerics import assert_bitwise_equal, integers
from tests.small_vits import mixed_allocation, sqnr_db
from vitq_kernels import ops
from vitq_kernels.attention_converter import _least_score_scale
from vitq_kernels.calibration import calibrate
from vitq_kernels.config import QuantConfig
from vitq_kernels.models import UnsupportedModelError, model_parts, model_sites
from vitq_kernels.nn import QuantPatchMerging, QuantWindowAttention
from vitq_kernels.nn.window_attention import MASKED
from vitq_kernels.quantizers import log2_steps
from vitq_kernels.windows import BIAS_LIMIT

NEAR = 17  # dB of logits at W8A8, by what differs between images; the variants measured 20 to 28


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def fresh_images(variant: str, count: int = 8) -> Tensor:
    """Images that calibration has not seen."""
    return swin_images(variant, count, seed=77)


def window_attentions(model: nn.Module) -> dict[str, QuantWindowAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantWindowAttention)}


@pytest.mark.parametrize("variant", SWINS)
def test_w8a8_is_near_the_float_model(variant: str) -> None:
    model, images = swin(variant), fresh_images(variant)
    exact, found = model(images), quantized_swin(variant)(images)
    assert sqnr_db(found, exact) > NEAR
    assert F.cosine_similarity(found, exact).min() > 0.995


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("swin_tiny_patch4_window7_224", 224), ("swinv2_tiny_window8_256", 256)], ids=["v1", "v2"]
)
def test_swin_tiny_keeps_its_logits(name: str, size: int) -> None:
    """The published shapes, outlier channels of eight times the range; the last image is not of the calibration."""
    model = realistic(timm.create_model(name).eval())
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))
    found = vitq.quantize(model, images[:2])(images)
    assert F.cosine_similarity(found, model(images)).min() >= 0.999


@pytest.mark.parametrize(("window", "version"), [(7, 1), (8, 1), (12, 1), (16, 1), (24, 1), (8, 2), (16, 2)])
def test_windows_of_every_published_size_work(window: int, version: int) -> None:
    """Two blocks with one head of 32 channels on four windows, the second block shifted."""
    arguments = {"img_size": 4 * window, "patch_size": 2, "embed_dim": 32, "depths": (2,), "num_heads": (1,)}
    own = {} if version == 1 else {"pretrained_window_sizes": (0,)}
    model = realistic(make_swin(torch.float32, window_size=window, version=version, **arguments, **own))
    images = torch.randn(3, 3, 4 * window, 4 * window, generator=torch.Generator().manual_seed(1))
    qmodel = vitq.quantize(model, images[:2])
    assert [tuple(m.bias_q.shape) for m in window_attentions(qmodel).values()] == [
        (patterns, 1, window**2, window**2) for patterns in (1, 4)
    ]
    assert F.cosine_similarity(qmodel(images), model(images)).min() > 0.998


@pytest.mark.parametrize("variant", ["shifted", "padded", "odd-sides", "v2-padded"])
def test_attention_is_that_of_each_window_alone(variant: str) -> None:
    """timm's roll, pad, partition and reverse of the codes around the op without windows."""
    for module in window_attentions(quantized_swin(variant)).values():
        windows = module.windows
        channels = module.qkv.in_features
        x = integers(-128, 127, (2, *windows.grid, channels), 0).to(torch.int8)
        before = x if module.codes is None else module.codes(module.qkv(x))
        rolled = torch.roll(before, (-windows.shift[0], -windows.shift[1]), (1, 2))
        full = module.padding.expand(2, *windows.padded, -1).clone()
        full[:, : windows.grid[0], : windows.grid[1]] = rolled
        (rows, columns), (height, width) = windows.padded, windows.size
        out = torch.zeros(2, rows, columns, module.num_heads * module.head_dim, dtype=torch.int8)
        for index in range(windows.count):
            top, left = divmod(index, columns // width)
            place = (slice(None), slice(top * height, (top + 1) * height), slice(left * width, (left + 1) * width))
            qkv = full[place].flatten(1, 2)
            qkv = module.qkv(qkv) if module.codes is None else qkv
            q, k, v = qkv.unflatten(-1, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
            tables = (module.kappa, module.levels, module.multiplier, module.zero_point)
            bias = module.bias_q[module.pattern[index]][None]
            found = ops.attention(q, k, v, *tables, bias, None, module.out_bits)
            out[place] = found.unflatten(1, windows.size)
        cropped = out[:, : windows.grid[0], : windows.grid[1]]
        assert_bitwise_equal(module.attend(x), torch.roll(cropped, windows.shift, (1, 2)))


def test_padding_of_version_2_has_the_codes_of_a_token_of_zeros() -> None:
    """Its key has no direction; the direction of a rounding error would count as much as any other key."""
    model = swin("v2-padded")
    for part in model_parts(model).blocks:
        module = quantized_swin("v2-padded").get_submodule(f"{part.name}.attn")
        zeros = torch.zeros(1, 1, part.attn.qkv.in_features)
        q, k, _ = (part.attn.merged(t, None).flatten() for t in part.attn.heads(part.attn.qkv(zeros), None))
        assert not k.any()
        codes = module.codes
        found_q, found_k, _ = module.padding.float().div(codes.inv_scale).chunk(3)
        step_q, step_k, _ = codes.inv_scale.reciprocal().chunk(3)
        assert ((found_q - q).abs() <= 0.51 * step_q).all()
        assert ((found_k + codes.key_centre - k).abs() <= 0.51 * step_k).all()


@pytest.mark.parametrize("variant", ["shifted", "v2"])
def test_the_bias_is_the_float_models_in_units_of_the_score(variant: str) -> None:
    """``bias_q * kappa`` counts code steps: tau octaves each, a logit being log2(e) octaves."""
    model, stats = swin(variant), calibrate(swin(variant), swin_images(variant))
    for part in model_parts(model).blocks:
        module = quantized_swin(variant).get_submodule(f"{part.name}.attn")
        index = stats.tau_error[f"{part.name}.attn.av"][-1].argmin(0).tolist()
        tau = torch.tensor([log2_steps(8)[i] for i in index]).double()
        octave = (module.kappa.double() * tau)[:, None, None]
        exact = part.attn.bias().double() * math.log2(math.e)
        masked = part.attn.windows.mask()[:, None].expand_as(exact)
        error = (module.bias_q * octave - exact)[~masked].abs()
        assert error.max() <= (0.5 * octave).max() + 1e-5  # half a unit
        if masked.any():
            steps = (module.bias_q * module.kappa[:, None, None])[masked]
            assert steps.max() < -(2**8)  # beyond every level, even from the best of scores
            assert (module.bias_q[masked] <= MASKED + BIAS_LIMIT // 8).all()


def test_scores_that_hardly_differ_leave_the_bias_and_the_mask_their_say() -> None:
    """With tiny q and k a logit would be more units than fit an integer."""
    model, images = swin(), fresh_images("shifted")
    for part in model_parts(model).blocks:
        half = part.attn.qkv.out_features // 3 * 2
        part.attn.qkv.weight[:half] *= 1e-7
        part.attn.qkv.bias[:half] *= 1e-7
    qmodel = vitq.quantize(model, swin_images())
    assert F.cosine_similarity(qmodel(images), model(images)).min() > 0.998
    for module in window_attentions(qmodel).values():
        assert module.bias_table.abs().max() < BIAS_LIMIT


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("variant", ["shifted", "v2"])
def test_narrow_activations_work(variant: str, bits: int) -> None:
    model, images = swin(variant), fresh_images(variant)
    found = quantized_swin(variant, 8, bits)(images)
    assert F.cosine_similarity(found, model(images)).min() > {4: 0.8, 6: 0.98}[bits]


@pytest.mark.parametrize(
    "config",
    [QuantConfig(compensation=None), QuantConfig(gptq=False, bias_correction=False), QuantConfig(reconstruction=2)],
    ids=["no-compensation", "nearest", "reconstruction"],
)
@pytest.mark.parametrize("variant", ["padded", "shifted"])
def test_every_way_to_fit_weights_works(variant: str, config: QuantConfig) -> None:
    model, images = swin(variant), fresh_images(variant)
    found = vitq.quantize(model, swin_images(variant), config=config)(images)
    assert F.cosine_similarity(found, model(images)).min() > 0.995


@pytest.mark.parametrize("variant", ["v2-padded", "v2-odd-sides"])
def test_padding_does_not_enter_the_bias_correction_of_version_2(variant: str) -> None:
    """Its qkv never sees padding: with a mean over padding the correction cost 2 to 4 dB instead of gaining.

    Of one model it gains -1 to 1.3 dB, which the order of a CPU's sums decides too; of several .2 to .5 on average.
    """
    gains = []
    for seed in range(4):
        model, images = swin(variant, seed), fresh_images(variant)
        found = {}
        for on in (True, False):
            config = QuantConfig(compensation=None, bias_correction=on)
            found[on] = sqnr_db(vitq.quantize(model, swin_images(variant), config=config)(images), model(images))
        gains.append(found[True] - found[False])
    assert sum(gains) / len(gains) > -0.5, gains


def test_reconstruction_of_version_2_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"reconstruction: layers\.0\.blocks\.0 must be a block as of ViT"):
        vitq.quantize(swin("v2"), swin_images("v2"), config=QuantConfig(reconstruction=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_half_precision_model_of_version_2_converts(dtype: torch.dtype) -> None:
    """Its constants are float64: 2^28 is beyond float16, and bfloat16 has 3 digits."""
    model, images = swin("v2"), fresh_images("v2")
    half = copy.deepcopy(model).to(dtype)
    for part in model_parts(half).blocks:
        assert part.attn.scale_of_heads.dtype == torch.float64
        assert (_least_score_scale(part.attn) > 0).all()
    found = vitq.quantize(half, swin_images("v2").to(dtype))
    assert F.cosine_similarity(found(images.to(dtype)).float(), model(images)).min() > 0.99


def test_bias_correction_makes_the_mean_output_of_a_merging_exact() -> None:
    model, images = swin("padded"), swin_images("padded")
    allocation = vitq.BitAllocation.uniform(model_sites(model), 3)
    mean = {}
    for on in (True, False):
        config = QuantConfig(bias_correction=on, compensation=None)
        qmodel = vitq.quantize(model, images, allocation, config=config)
        found: list[Tensor] = []
        qmodel.layers[1].downsample.register_forward_hook(lambda _, args, out, found=found: found.append(out))
        qmodel(images)
        wanted = calibrate(model, images).output_mean["layers.1.downsample.reduction"]
        mean[on] = (found[0].flatten(0, -2).mean(0) - wanted).abs().max()
    assert mean[True] < 0.05 * mean[False]


def test_rows_of_many_widths_work_and_are_stored() -> None:
    model, images = swin(), fresh_images("shifted")
    allocation = mixed_allocation(model)
    qmodel = vitq.quantize(model, swin_images(), allocation)
    assert isinstance(qmodel.layers[1].downsample, QuantPatchMerging)
    assert len(set(qmodel.layers[1].downsample.reduction.groups.bits)) > 1
    assert F.cosine_similarity(qmodel(images), model(images)).min() > 0.8


@pytest.mark.parametrize("variant", ["padded", "any-size", "window-by-stage", "v2-pretrained", "v2-any-size"])
def test_a_file_gives_the_same_model(variant: str, tmp_path) -> None:
    qmodel, images = quantized_swin(variant), fresh_images(variant)
    vitq.save(qmodel, tmp_path / "swin.safetensors")
    assert_bitwise_equal(vitq.load(tmp_path / "swin.safetensors")(images), qmodel(images))


def test_index_tables_are_never_stored() -> None:
    stored = quantized_swin().state_dict()
    for name in window_attentions(quantized_swin()):
        assert f"{name}.bias_table" in stored
        assert not stored.keys() & {f"{name}.{table}" for table in ("table", "pattern", "bias_q")}


def test_a_bias_beyond_the_limit_is_cut_when_loaded() -> None:
    """What the op adds must not overflow, whatever a file holds."""
    (name, module), *_ = window_attentions(quantized_swin()).items()
    state = {**quantized_swin().state_dict(), f"{name}.bias_table": torch.full_like(module.bias_table, 2**31 - 1)}
    model = vitq.quantize(swin(), stats=calibrate(swin(), swin_images()))
    model.load_state_dict(state)
    assert model.get_submodule(name).bias_q.abs().max() <= 2 * BIAS_LIMIT


@pytest.mark.parametrize("variant", ["any-size", "v2-any-size"])
def test_maps_of_any_size_go_through_a_model_that_takes_them(variant: str) -> None:
    model = swin(variant)
    images = torch.randn(4, 3, 44, 20, generator=torch.Generator().manual_seed(0))
    found, exact = quantized_swin(variant)(images), model(images)
    assert F.cosine_similarity(found, exact).min() > 0.995
    features = quantized_swin(variant).forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(features, model.forward_intermediates(images, intermediates_only=True), strict=True):
        assert ours.shape == theirs.shape
        assert F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).min() > 0.99


@pytest.mark.parametrize("variant", ["shifted", "v2"])
def test_half_precision_keeps_the_integers(variant: str) -> None:
    model = vitq.quantize(swin(variant), stats=calibrate(swin(variant), swin_images(variant)))
    images = fresh_images(variant)
    exact = model(images)
    half = model.half()
    assert half.layers[0].blocks[0].attn.bias_q.dtype == torch.int32
    assert F.cosine_similarity(half(images.half()).float(), exact).min() > 0.999
