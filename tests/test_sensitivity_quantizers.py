"""A site in float computes what conversion makes of it in integers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from small_vits import variant_images, variant_vit
from torch import Tensor, nn

from tests.numerics import uniform
from vitq_kernels.calibration import Calibrator
from vitq_kernels.config import LEVEL_BITS, QuantConfig
from vitq_kernels.convert import quantize
from vitq_kernels.converter import Converter
from vitq_kernels.folding import fold_linear
from vitq_kernels.models import model_parts, model_sites
from vitq_kernels.packing import unpack_weight
from vitq_kernels.quantizers import log2_levels
from vitq_kernels.sensitivity_quantizers import FakeAffine, FakeLevels, FakeLog2, SiteQuantizers
from vitq_kernels.simulation import simulated
from vitq_kernels.spec import BitAllocation, RowGroups, Site

BITS = (2, 4, 8)
ATTENTION = "blocks.1.attn"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return variant_vit("class-token")


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return [variant_images(count=8)]


@pytest.fixture(scope="module")
def quantizers(model: nn.Module, batches: list[Tensor]) -> SiteQuantizers:
    return SiteQuantizers(model, batches, "both", QuantConfig())


def site_of(model: nn.Module, name: str) -> Site:
    return next(site for site in model_sites(model) if site.name == name)


# --- fake quantizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_affine_takes_the_nearest_number_that_a_code_stands_for(bits: int) -> None:
    scale, zero = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([0.0, 3.0, -0.75])
    x = uniform(-9, 9, (50, 3), 1)
    codes = torch.arange(-(1 << bits - 1), 1 << bits - 1)
    levels = (codes[:, None] - zero) * scale  # [2^b, 3]
    distance = (x[None] - levels[:, None]).abs()
    found = FakeAffine(scale, zero, bits)(x)
    torch.testing.assert_close((found - x).abs(), distance.amin(0), rtol=0, atol=1e-6)
    assert all(value in levels[:, c].tolist() for c in range(3) for value in found[:, c].tolist())


@pytest.mark.parametrize("bits", BITS)
def test_log2_is_the_table_over_its_sum(bits: int) -> None:
    tau = (1.0, 0.5)
    scores = uniform(-6, 6, (2, 2, 5, 7), 3).double()
    found = FakeLog2(bits, tau, torch.device("cpu"))(scores.softmax(-1))
    for image, row in [(i, r) for i in range(2) for r in range(5)]:
        for head, step in enumerate(tau):
            s = scores[image, head, row]
            table = log2_levels(bits, step).tolist()
            octaves = [float(s.max() - v) * math.log2(math.e) for v in s]
            level = [table[min(round(o / step), len(table) - 1)] for o in octaves]
            expected = torch.tensor(level).double() / sum(level)
            torch.testing.assert_close(found[image, head, row], expected, rtol=1e-6, atol=0)


def test_log2_of_a_probability_that_vanished_is_zero() -> None:
    found = FakeLog2(3, (1.0,), torch.device("cpu"))(torch.tensor([[[[1.0, 0.0, 1e-38]]]]))
    assert found.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "fake", [FakeAffine(torch.ones(4), torch.zeros(4), 4), FakeLog2(4, (1.0,), torch.device("cpu"))]
)
def test_fake_quantizers_leave_their_input(fake: nn.Module) -> None:
    x = torch.rand(1, 1, 4, 4)
    before = x.clone()
    fake(x)
    assert torch.equal(x, before)


# --- against conversion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_inputs_have_the_scales_of_conversion(bits: int, model: nn.Module, quantizers: SiteQuantizers) -> None:
    config = quantizers.config
    allocation = BitAllocation.uniform(model_sites(model), bits, bits)
    converter = Converter(quantizers.parts, quantizers.stats, allocation, config, [])
    for suffix in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        site = site_of(model, f"blocks.0.{suffix}")
        expected, found = converter.quantizer(site.name, site.kind), quantizers.input_quantizer(site, bits)
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.zero_point, expected.zero_point)
        form = quantizers.form(site, bits).quantizers[f"{site.name}.input"]
        if suffix != "mlp.fc2" or bits > LEVEL_BITS:
            assert torch.equal(form.scale, expected.scale)


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_gelu_has_the_levels_of_conversion(
    bits: int, model: nn.Module, batches: list[Tensor], quantizers: SiteQuantizers
) -> None:
    site = site_of(model, "blocks.0.mlp.fc2")
    widths = BitAllocation.uniform(model_sites(model), 8).sites
    narrow = BitAllocation({**widths, site.name: replace(widths[site.name], activation=bits)})
    fc1 = quantize(model, batches, narrow, stats=quantizers.stats).blocks[0].mlp.fc1
    form = quantizers.form(site, bits).quantizers[f"{site.name}.input"]
    assert isinstance(form, FakeLevels)
    torch.testing.assert_close(1 / form.scale, fc1.inv_scale, rtol=1e-6, atol=0)
    # Fitted to the stream of 8 bits there, of floats here: other levels, as good ones for these floats.
    block = model.blocks[0]
    hidden: list[Tensor] = []
    handle = block.mlp.fc2.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    units = torch.cat([x.flatten(0, 1) for x in hidden]) / form.scale
    weight = (block.mlp.fc2.weight.detach() * form.scale).square().sum(0)

    def error(levels: Tensor) -> float:
        return float(((units[..., None] - levels).abs().amin(-1).square() * weight).sum())

    assert error(form.levels) < 1.05 * error(fc1.levels.float())
    assert error(form.levels) < 0.8 * error(torch.linspace(-127, 127, len(form.levels)))  # and not any others
    x = torch.linspace(-1, 4, 90)[:, None] * torch.ones(len(form.scale))
    distance = (x[..., None] / form.scale[:, None] - form.levels).abs()
    torch.testing.assert_close((form(x) / form.scale - x / form.scale).abs(), distance.amin(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_attention_has_the_score_scale_and_levels_of_conversion(
    bits: int, model: nn.Module, batches: list[Tensor], quantizers: SiteQuantizers
) -> None:
    sites = model_sites(model)
    converted = quantize(model, batches, BitAllocation.uniform(sites, 8, bits), stats=quantizers.stats)
    attention = converted.get_submodule(ATTENTION)
    query, key, value = quantizers.form(site_of(model, f"{ATTENTION}.qk"), bits).quantizers.values()
    probability = quantizers.form(site_of(model, f"{ATTENTION}.av"), bits).quantizers[f"{ATTENTION}.probability"]
    score = query.scale * key.scale  # one number a head
    assert torch.allclose(score, score[..., :1], rtol=1e-5)
    block = quantizers.blocks["blocks.1"]
    steps = score[:, 0, 0] * block.attn.softmax_scale * math.log2(math.e) / probability.tau.flatten()
    torch.testing.assert_close(steps, attention.kappa, rtol=1e-5, atol=0)
    assert torch.equal(probability.levels.view_as(attention.levels), attention.levels.float())
    out_scale = quantizers.input_quantizer(site_of(model, f"{ATTENTION}.proj"), bits).scale
    expected = value.scale.flatten() / out_scale
    torch.testing.assert_close(attention.multiplier.flatten(), expected, rtol=1e-5, atol=0)


def test_no_code_of_a_calibrated_tensor_is_further_than_half_a_step(
    model: nn.Module, batches: list[Tensor], quantizers: SiteQuantizers
) -> None:
    """At 8 bits the ranges clip nothing: this sees a forgotten centre, and heads and channels that are mixed."""
    seen: dict[str, Tensor] = {}
    copied = simulated(model)
    fakes = quantizers.form(site_of(model, f"{ATTENTION}.qk"), 8).quantizers
    for path in fakes:
        copied.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: seen.__setitem__(path, x[0]))
    copied(batches[0])
    for path, fake in fakes.items():
        assert bool(((fake(seen[path]) - seen[path]).abs() <= 0.501 * fake.scale).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2", "patch_embed.proj", "head"])
def test_weights_are_those_of_folding(name: str, bits: int, model: nn.Module, batches: list[Tensor]) -> None:
    quantizers = SiteQuantizers(model, batches, "weight", QuantConfig(gptq=False))
    site, weight = site_of(model, name), model.get_submodule(name).weight.detach()
    form = quantizers.form(site, bits)
    assert not form.quantizers
    quantizer = quantizers.input_quantizer(site, 8)
    columns = quantizer.scale.repeat_interleave(site.cols // quantizer.scale.numel())
    quantizer = type(quantizer)(columns, torch.zeros_like(columns).int(), 8)
    folded = fold_linear(name, weight.flatten(1), None, quantizer, RowGroups.uniform(site.rows, bits))
    expected = unpack_weight(folded.weight) * folded.scale[:, None].float() / columns
    assert torch.equal(form.weight, expected.view_as(weight))


def test_weights_are_rounded_against_the_input(model: nn.Module, batches: list[Tensor]) -> None:
    """GPTQ costs less of the output than rounding to nearest, and more of the weight."""
    name = "blocks.1.mlp.fc1"
    site, module = site_of(model, name), model.get_submodule(name)
    errors = {}
    for use_gptq in (True, False):
        quantizers = SiteQuantizers(model, batches, "weight", QuantConfig(gptq=use_gptq))
        error = (quantizers.form(site, 3).weight - module.weight.detach()).double()
        errors[use_gptq] = float(((error @ quantizers.covariances[name]) * error).sum()), float(error.square().sum())
    assert errors[True][0] < 0.8 * errors[False][0]
    assert errors[True][1] > errors[False][1]


@pytest.mark.parametrize("part", ["weight", "activation", "both"])
def test_in_float_a_site_is_the_models(part: str, model: nn.Module, batches: list[Tensor]) -> None:
    quantizers = SiteQuantizers(model, batches, part, QuantConfig())
    expected = simulated(model)
    found = copy.deepcopy(expected)
    for site in model_sites(model):
        quantizers.form(site, 4).put(site.name, found)
    assert not torch.equal(found(batches[0]), expected(batches[0]))
    for site in model_sites(model):
        quantizers.form(site, None).put(site.name, found)
    assert torch.equal(found(batches[0]), expected(batches[0]))


@pytest.mark.parametrize(("part", "weights", "activations"), [("weight", 1, 0), ("activation", 0, 1), ("both", 1, 1)])
def test_a_form_changes_its_part_alone(
    part: str, weights: int, activations: int, model: nn.Module, batches: list[Tensor]
) -> None:
    quantizers = SiteQuantizers(model, batches, part, QuantConfig())
    for site in model_sites(model):
        form = quantizers.form(site, 4)
        assert (form.weight is not None) == (weights and site.has_weight)
        fakes = 0 if not activations else 3 if site.kind == "qk" else 1
        assert len(form.quantizers) == fakes


def test_statistics_are_those_of_calibration(
    model: nn.Module, batches: list[Tensor], quantizers: SiteQuantizers
) -> None:
    with Calibrator(model, expected_images=8) as calibrator:
        model(batches[0])
    expected = calibrator.stats()
    for name, ranges in expected.inputs.items():
        assert torch.equal(ranges.low, quantizers.stats.inputs[name].low)
    assert set(quantizers.covariances) == {s.name for s in model_sites(model) if s.in_block and s.has_weight}
    assert quantizers.parts.model is model_parts(model).model
