"""MPTQ-ViT: SQ-b leaves the float function alone, OPT-m finds its ratio, and the whole preset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_vits import sqnr_db, variant_images, variant_vit
from torch import Tensor, nn

from tests.numerics import uniform
from vitq_kernels.presets import mptq_vit, simulate
from vitq_kernels.presets.file import load, save
from vitq_kernels.presets.ptq4vit import signed
from vitq_kernels.presets.twin_quantizers import TwinSign
from vitq_kernels.simulation import SimulatedLinear


def regions_twin(x: float, split: float, bits: int) -> float:
    top = 2 ** (bits - 1) - 1
    scale = 1 / top if x > split else split / top
    return round(x / scale) * scale


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("split", [0.5, 0.125, 2.0**-9])
def test_regions_are_two_grids(bits: int, split: float) -> None:
    x = torch.cat([uniform(0, 1, (200,), 1), uniform(0, split, (200,), 2), torch.tensor([0.0, split, 1.0])])
    quantizer = mptq_vit.TwoRegions(torch.tensor(split), bits)
    expected = torch.tensor([regions_twin(v, split, bits) for v in x.tolist()])
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-5, atol=1e-9)
    many = torch.cat([torch.linspace(0, 1, 40_001), torch.linspace(0, split, 40_001)])
    values = quantizer(many).double().sort().values
    assert quantizer.levels == 1 + int((values.diff() > 1e-6 * split).sum()) < 1 << bits


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_smoothing_leaves_the_float_function_alone(bias: bool) -> None:
    norm, linear = nn.LayerNorm(6).requires_grad_(False), SimulatedLinear(nn.Linear(6, 4, bias=bias))
    norm.weight.copy_(uniform(0.2, 2, (6,), 1) * torch.tensor([1, 20, 1, -1, 1, 1]))
    norm.bias.copy_(uniform(-3, 3, (6,), 2))
    tokens = uniform(-1, 1, (40, 6), 3)
    before, x = linear(norm(tokens)), norm(tokens)
    weight = linear.weight.clone()
    smooth = mptq_vit.smoothed(linear, norm, x)
    torch.testing.assert_close(norm(tokens), smooth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear(norm(tokens)), before, rtol=1e-4, atol=1e-4)
    # Centred, and the range of a channel and of its column are alike: both moved by half.
    torch.testing.assert_close(smooth.amax(0), -smooth.amin(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(smooth.abs().amax(0), linear.weight.abs().amax(0), rtol=1e-3, atol=1e-4)
    assert not torch.equal(weight, linear.weight)


def test_a_scale_is_the_best_multiple() -> None:
    x = uniform(-1, 1, (200,), 1).pow(5)
    quantizer, error = mptq_vit.closest(x, torch.ones(200), lambda s: signed(s, 3), x.abs().max() / 3.5)
    scales = [float(x.abs().max()) / 3.5 * (0.01 + 0.0119 * i) for i in range(100)]
    tries = [sum((min(max(round(v / s), -4), 3) * s - v) ** 2 for v in x.tolist()) for s in scales]
    assert error == pytest.approx(min(tries), rel=1e-5)
    assert float(quantizer.scale) == pytest.approx(scales[tries.index(min(tries))])


@pytest.mark.parametrize("exponent", [1, 3, 5])
def test_the_ratio_of_the_regions_is_found(exponent: int) -> None:
    """Numbers that lie on the codes of one ratio: no other ratio has no error."""
    scale, negative = 0.5, 0.5 / 2**exponent
    x = torch.cat([torch.arange(0, 8) * scale, -torch.arange(1, 9) * negative])
    found = mptq_vit.opt_m(x, torch.ones(len(x)), 4)
    assert float(found.scale / found.negative_scale) == 2**exponent


def test_the_split_is_the_best() -> None:
    p = uniform(-9, 3, (50, 12), 1).softmax(-1)
    errors = [sum((regions_twin(v, 2.0**-i, 4) - v) ** 2 for v in p.flatten().tolist()) for i in range(1, 16)]
    assert float(mptq_vit.two_regions(p, 4).split) == 2.0 ** -(1 + errors.index(min(errors)))


def test_without_rounding_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = variant_vit("no-qkv-bias"), variant_images("no-qkv-bias", 8)

    def whole(rows: Tensor, *_: object) -> Tensor:
        return rows.clone()

    monkeypatch.setattr(mptq_vit, "search_weight", whole)
    result = simulate(model, images, "mptq-vit", 4, 4)
    for name, module in list(result.named_modules()):
        if type(module).__name__ in ("Uniform", "TwinSign", "TwoRegions"):
            result.set_submodule(name, nn.Identity())
    assert not torch.equal(result.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    torch.testing.assert_close(result(images), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["class-token", "distilled"])
def test_more_bits_are_closer(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 8)
    exact = model(images).detach()
    quality = [sqnr_db(simulate(model, images, "mptq-vit", b, b)(images), exact) for b in (3, 5, 8)]
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 12


def test_it_is_deterministic_and_a_file_brings_it_back(tmp_path: Path) -> None:
    model, images = variant_vit("class-token"), variant_images(count=4)
    one, two = (simulate(model, images, "mptq-vit", 4, 4) for _ in range(2))
    assert torch.equal(one(images), two(images))
    assert isinstance(one.blocks[0].mlp.fc2.input, TwinSign)
    save(one, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(images), one(images))
