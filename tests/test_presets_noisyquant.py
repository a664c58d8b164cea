"""NoisyQuant: the noise folds into the bias exactly, its searches find the best of their grids, the whole preset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_vits import sqnr_db, variant_images, variant_vit
from torch import Tensor, nn

from tests.numerics import uniform
from vitq_kernels.presets import noisyquant, simulate
from vitq_kernels.presets.file import load, save
from vitq_kernels.presets.output_error import ProductError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CLIPS", 40), ("MEANS", 10), ("STRENGTHS", 20), ("TOKENS", 64)):
        monkeypatch.setattr(noisyquant, name, value)


def noisy_twin(x: Tensor, scale: float, noise: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    rows = [
        [min(max(round((v + n) / scale), -half), half - 1) * scale for v, n in zip(row, noise.tolist(), strict=True)]
        for row in x.tolist()
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_rounds_with_the_noise(bits: int) -> None:
    x, noise = uniform(-1, 1, (50, 6), 1), uniform(-0.4, 0.4, (6,), 2)
    scale = 1.3 / 2 ** (bits - 1)
    quantizer = noisyquant.NoisyUniform(torch.tensor(scale), noise, bits)
    torch.testing.assert_close(quantizer(x), noisy_twin(x, scale, noise, bits))
    assert quantizer.levels == 1 << bits
    if bits < 8:
        assert len(quantizer(torch.linspace(-9, 9, 6000).view(-1, 6)).unique()) == 1 << bits


def test_the_clip_is_the_best_of_the_grid(quick: None) -> None:
    x, weight = uniform(-1, 1, (30, 5), 1).pow(3), uniform(-1, 1, (7, 5), 2)
    found = noisyquant.search_clip(x, torch.ones(30), ProductError(x, weight, weight), x.abs().max(), 3)
    scales = [float(x.abs().max()) * i / 40 / 3 for i in range(40, 0, -1)]
    errors = [float((((x / s).round().clamp(-3, 3) * s - x) @ weight.T).square().sum()) for s in scales]
    assert float(found) == pytest.approx(scales[errors.index(min(errors))])
    assert float(found) < scales[0]


def test_the_noise_is_the_best_of_the_grid(quick: None) -> None:
    x, weight, drawn = uniform(-1, 1, (30, 5), 1), uniform(-1, 1, (7, 5), 2), uniform(-0.5, 0.5, (5,), 3)
    scale = torch.tensor(0.4)

    def error(noise: Tensor) -> float:
        return float(((noisy_twin(x, 0.4, noise, 3) - noise - x) @ weight.T).square().sum())

    means = [torch.full((5,), 0.4 * i / 5) for i in range(-5, 5)]
    mean = min(means, key=error)
    tries = [mean + drawn * i / 10 for i in range(20)]
    found = noisyquant.search_noise(x, torch.ones(30), ProductError(x, weight, weight), scale, drawn, 3)
    assert error(found) == pytest.approx(min(map(error, tries)), rel=1e-5)
    assert error(found) <= error(mean) <= error(torch.zeros(5))


@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias"])
def test_without_rounding_the_noise_changes_nothing(quick: None, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = variant_vit(variant), variant_images(variant, 8)
    monkeypatch.setattr(noisyquant, "symmetric_rows", lambda weight, _: weight)
    result = simulate(model, images, "noisyquant", 3, 3)
    noisy = {n: m for n, m in result.named_modules() if isinstance(m, noisyquant.NoisyUniform)}
    assert len(noisy) == 8
    assert sum(bool(module.noise.any()) for module in noisy.values()) > 4
    for module in noisy.values():
        module.forward = lambda x, noise=module.noise: x + noise
    torch.testing.assert_close(result(images), model(images), rtol=1e-3, atol=1e-3)


def test_only_the_linears_of_blocks_are_quantized(quick: None) -> None:
    model = variant_vit("class-token")
    result = simulate(model, variant_images(count=4), "noisyquant", 4, 4)
    attention = result.blocks[0].attn
    for part in (attention.query, attention.key, attention.value, attention.probability, result.head.input):
        assert isinstance(part, nn.Identity)
    assert torch.equal(result.head.weight, model.head.weight)
    assert torch.equal(result.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert isinstance(result.patch_embed.proj.input, nn.Identity)
    assert max(len(row.unique()) for row in attention.qkv.weight) <= 16


@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias", "distilled"])
def test_more_bits_are_closer(quick: None, variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 16)
    exact = model(images).detach()
    quality = [sqnr_db(simulate(model, images, "noisyquant", b, b)(images), exact) for b in (3, 5, 8)]
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 15


def test_a_seed_gives_the_same_model(quick: None) -> None:
    model, images = variant_vit("class-token"), variant_images(count=8)
    one, two, other = (simulate(model, images, "noisyquant", 4, 4, seed=s)(images) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias"])
def test_a_file_brings_the_same_model_back(quick: None, variant: str, tmp_path: Path) -> None:
    images = variant_images(variant, 4)
    result = simulate(variant_vit(variant), images, "noisyquant", 4, 4)
    save(result, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(images), result(images))
