"""FQ-ViT: its integer softmax against Python integers, its factors and ranges, and the whole preset."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_vits import sqnr_db, variant_images, variant_vit

from tests.numerics import uniform
from vitq_kernels.presets import fq_vit, simulate
from vitq_kernels.presets.file import load, save
from vitq_kernels.presets.norm import NormWithInput


def softmax_twin(codes: list[int], scale: float, bits: int) -> list[float]:
    """methods.md 3.9 in Python integers: codes are scores in units of the scale, their maximum 0."""
    linear = math.floor(0.96963238 / 0.35815147 / scale)
    constant = math.floor(1 / 0.35815147 / scale**2)
    octave = math.floor(-0.6931 / scale)
    exponentials = []
    for code in codes:
        code = max(code, 30 * octave)
        shift = code // octave
        rest = code - octave * shift
        exponentials.append(max((rest * (rest + linear) + constant) * 2**30 // 2**shift, 0))
    total = sum(exponentials)
    result = []
    for value in exponentials:
        ratio = round(total / value) if value else 2**99
        log = ratio.bit_length() - 1
        log += ratio >= 1.5 * 2**log
        result.append(2.0**-log if log < 2**bits else 0.0)
    return result


@pytest.mark.parametrize("scale", [0.0123, 0.1, 0.4])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_softmax_is_integer_arithmetic(scale: float, bits: int) -> None:
    codes = [0, -1, -2, -5, -17, -40, -41, -100, -300, -2000]
    p = (torch.tensor(codes, dtype=torch.float64) * scale).softmax(-1)
    quantizer = fq_vit.LogIntSoftmax(torch.tensor(scale, dtype=torch.float64), bits)
    assert quantizer(p[None])[0].tolist() == softmax_twin(codes, scale, bits)


def test_the_polynomial_is_the_exponential() -> None:
    quantizer = fq_vit.LogIntSoftmax(torch.tensor(0.01), 4)
    codes = torch.arange(0, -1500, -7, dtype=torch.float64)
    values = quantizer.exponentials(codes)
    # floor() of ln 2 in units of the scale costs up to 1 % an octave.
    ratio = values / values[0] / (codes * 0.01).exp()
    assert float((ratio[codes >= -69] - 1).abs().max()) < 0.01
    assert (values.diff() <= 0).all()


def test_its_levels_are_powers_of_two_and_zero() -> None:
    quantizer = fq_vit.LogIntSoftmax(torch.tensor(0.02), 3)
    rows = uniform(-14, 0, (400, 8), 1).softmax(-1)
    values = torch.cat([quantizer(rows).flatten(), quantizer(torch.full((1, 300), 1 / 300)).flatten()]).unique()
    assert set(values.tolist()) <= {0.0, *(2.0**-q for q in range(8))}
    assert len(values) == quantizer.levels == 9


def test_impossible_scales_give_zeros_and_no_nan() -> None:
    coarse = fq_vit.LogIntSoftmax(torch.tensor(3.0), 4)
    assert torch.equal(coarse(uniform(-1, 1, (3, 5), 1).softmax(-1)), torch.zeros(3, 5))
    assert torch.isfinite(fq_vit.LogIntSoftmax(torch.tensor(0.1), 4)(torch.eye(4))).all()


def test_factors_follow_the_channels() -> None:
    x = uniform(-1, 1, (500, 4), 1) * torch.tensor([1.0, 0.5, 0.25, 0.01])
    found = fq_vit.power_of_two_factors(x, 8)
    whole = (x.max() - x.min()) / 255
    torch.testing.assert_close(found.scale / whole, torch.tensor([1.0, 0.5, 0.25, 0.125]))
    assert found.zero_point.dim() == 0
    assert found.levels == 256


@pytest.mark.parametrize("bits", [3, 8])
def test_factors_are_the_best_of_four(bits: int) -> None:
    x = uniform(-1, 3, (60, 5), 1) * torch.tensor([1.0, 0.6, 0.3, 0.2, 0.1])
    found = fq_vit.power_of_two_factors(x, bits)
    top = 2**bits - 1
    widest = float(x.max() - x.min()) / top
    zero = min(max(round(-float(x.min()) / widest), 0), top)
    for column in range(5):
        errors = []
        for factor in (1, 2, 4, 8):
            scale = widest * factor / 8
            values = [(min(max(round(v / scale) + zero, 0), top) - zero) * scale for v in x[:, column].tolist()]
            errors.append(sum((a - b) ** 2 for a, b in zip(values, x[:, column].tolist(), strict=True)))
        assert float(found.scale[column]) == pytest.approx(widest * 2 ** errors.index(min(errors)) / 8)


def test_ranges_are_those_of_all_tensors() -> None:
    found = fq_vit.min_max([torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 4.0])], 8)
    assert float(found.scale) == pytest.approx(5 / 255)
    assert float(found.zero_point) == 51
    assert fq_vit.min_max([torch.zeros(3)], 4)(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_symmetric_and_nothing_is_clipped(bits: int) -> None:
    weight = torch.tensor([[-1.0, 0.3, 0.9], [0.1, 0.0, 0.2], [0.0, 0.0, 0.0]])
    found = fq_vit.rounded_rows(weight, torch.full((3,), bits))
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    assert ((found - weight).abs() <= 0.5 * scale + 1e-7).all()
    assert all(len(row.unique()) <= 1 << bits for row in found)


def test_everything_it_quantizes_is_quantized() -> None:
    result = simulate(variant_vit("class-token"), variant_images(count=4), "fq-vit", 8, 8)
    block = result.blocks[1]
    assert all(isinstance(norm, NormWithInput) for norm in (block.norm1, block.norm2, result.norm))
    assert block.norm1.input.scale.shape == (32,)
    assert (block.drop_path1.levels, block.drop_path2.levels, block.norm2.input.levels) == (256, 256, 256)
    assert block.attn.probability.levels == 17
    assert torch.equal(block.attn.query.scale, block.attn.value.scale)


def test_a_narrower_probability_stays_narrow() -> None:
    result = simulate(variant_vit("class-token"), variant_images(count=4), "fq-vit", 8, 3)
    assert result.blocks[0].attn.probability.levels == 9


@pytest.mark.parametrize("variant", ["class-token", "average-pool", "fc-norm", "layer-scale", "distilled"])
def test_more_bits_are_closer(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 16)
    exact = model(images).detach()
    quality = [sqnr_db(simulate(model, images, "fq-vit", b, b)(images), exact) for b in (4, 6, 8)]
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 8


def test_a_file_brings_the_same_model_back(tmp_path: Path) -> None:
    images = variant_images(count=4)
    result = simulate(variant_vit("class-token"), images, "fq-vit", 6, 6)
    save(result, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert torch.equal(again(images), result(images))
    assert again.simulation.method == "fq-vit"
