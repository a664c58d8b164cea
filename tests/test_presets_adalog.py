"""AdaLog: its logarithm, its searches against brute force, its foldings, and the whole preset on a small model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_vits import sqnr_db, variant_images, variant_vit
from torch import Tensor

from tests.numerics import uniform
from vitq_kernels.presets import adalog, simulate
from vitq_kernels.presets.affine_search import search_channels, search_heads, search_rows, search_tensor, tensor_grid
from vitq_kernels.presets.file import load, save
from vitq_kernels.presets.output_error import ProductError, in_chunks
from vitq_kernels.presets.progressive_search import Grid, progressive_search, uniform_grid

QUICK = adalog.Effort(steps=2, rounds=1, tokens=64)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adalog, "EFFORT", QUICK)


def adalog_twin(x: float, scale: float, bits: int, base: int, shift: float) -> float:
    """methods.md 3.2, number by number."""
    scaled = min(max((x + shift) / scale, 1e-15), 1.0)
    code = round(-math.log2(scaled) * 37 / base)
    if code >= 2**bits:
        return 0.0
    octaves, rest = divmod(code * base, 37)
    top = 2 ** (bits + 1) - 2
    return scale * 2.0**-octaves * round(2 ** (-rest / 37) * top) / top


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("base", [10, 37, 74, 137])
@pytest.mark.parametrize("shift", [0.0, adalog.GELU_SHIFT], ids=["softmax", "gelu"])
def test_the_logarithm_is_the_papers(bits: int, base: int, shift: float) -> None:
    scale = 0.9
    # Between the thresholds, so that a logarithm's last bit decides nothing; and beyond both ends.
    codes = torch.arange(-2, (1 << bits) + 3, dtype=torch.float64)
    x = torch.cat([scale * torch.exp2(-(codes + part) * base / 37) - shift for part in (-0.4, 0.0, 0.4)])
    x = torch.cat([x, torch.tensor([-shift])]).float()
    quantizer = adalog.AdaLog(torch.tensor(scale), bits, base, shift)
    expected = [adalog_twin(v, scale, bits, base, shift) for v in x.tolist()]
    torch.testing.assert_close(quantizer(x), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("base", [10, 37, 60, 137])
def test_its_levels_are_those_it_takes(bits: int, base: int) -> None:
    quantizer = adalog.AdaLog(torch.tensor(1.0), bits, base)
    values = quantizer(torch.cat([torch.exp2(-torch.linspace(0, 60, 200_000)), torch.zeros(1)])).unique()
    assert quantizer.levels == len(values)
    if base * (1 << bits) < 37 * 49 and bits <= 4:  # 2^b codes, and a zero that needs one more
        assert quantizer.levels == (1 << bits) + 1


def product_case(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """a, b, b quantized, candidates for a, importance."""
    batch = (2, 3) if "batch" in kind else ()
    rows = 3 if "wide" in kind else 11
    a, b = uniform(-1, 1, (*batch, 5, 4), 1), uniform(-1, 1, (*batch, rows, 4), 2)
    importance = uniform(0, 1, (*batch, 5, rows), 3) if "weighted" in kind else None
    return a, b, b + 0.1 * uniform(-1, 1, b.shape, 4), a + 0.1 * uniform(-1, 1, (6, *a.shape), 5), importance


@pytest.mark.parametrize("kind", ["tall", "wide", "batch-tall", "batch-wide", "weighted-tall", "weighted-batch-wide"])
def test_errors_differ_from_the_direct_sum_by_a_constant(kind: str) -> None:
    a, b, b_q, candidates, importance = (t if t is None else t.double() for t in product_case(kind))
    squared = (candidates @ b_q.mT - a @ b.mT).square()
    direct = (squared if importance is None else squared * importance).sum(-1)
    difference = ProductError(a, b, b_q, importance)(candidates) - direct
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))
    if kind == "wide":
        assert float(difference.abs().max()) < 1e-12


def test_rows_are_rows_of_the_whole() -> None:
    a, b, b_q, candidates, _ = product_case("tall")
    chosen = torch.tensor([True, False, True, True, False])
    product = ProductError(a, b, b_q)
    torch.testing.assert_close(product.rows(chosen)(candidates[:, chosen]), product(candidates)[:, chosen])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = uniform(-1, 1, (7, 3), 1)
    monkeypatch.setattr("vitq_kernels.presets.output_error.CHUNK_ELEMENTS", 20)
    assert torch.equal(in_chunks(lambda p, q: p * q, 9, x, x + 1), x * (x + 1))


def test_one_step_is_the_best_of_the_grid() -> None:
    grid = Grid(uniform(0.1, 1, (12, 3), 1), torch.arange(12.0)[:, None].expand(-1, 3), torch.full((3,), 0.1))
    errors = uniform(0, 1, (12, 3), 2)
    scale, companion = progressive_search(grid, lambda s, c: errors, kept=4, refined=4, steps=1)
    best = errors.argmin(0)
    assert companion.tolist() == best.tolist()
    assert scale.tolist() == grid.scale.gather(0, best[None])[0].tolist()


def test_refinement_finds_the_optimum_between_the_grid() -> None:
    scale = torch.linspace(0.1, 1.0, 8)[:, None].repeat(4, 2)
    grid = Grid(scale, torch.arange(4.0).repeat_interleave(8)[:, None].expand(-1, 2), scale[1] - scale[0])
    wanted_scale, wanted_companion = torch.tensor([0.4321, 0.8888]), torch.tensor([2.0, 1.0])

    def errors(s: Tensor, c: Tensor) -> Tensor:
        return (s - wanted_scale).square() + (c - wanted_companion).square()

    found, companion = progressive_search(grid, errors, kept=4, refined=8, steps=6)
    assert torch.equal(companion, wanted_companion)
    assert float((found - wanted_scale).abs().max()) < 1e-4
    coarse, _ = progressive_search(grid, errors, kept=4, refined=8, steps=1)
    assert float((coarse - wanted_scale).abs().min()) > 1e-3


def test_the_first_grid_spans_the_inner_and_the_whole_range() -> None:
    rows = torch.stack([torch.linspace(-1, 3, 101), torch.linspace(0, 1, 101)])
    grid = uniform_grid(rows, 4, 8, 128)
    assert grid.scale.shape == grid.companion.shape == (128, 2)
    torch.testing.assert_close(grid.scale.amin(0), torch.tensor([3.2, 0.8]) / 15)
    torch.testing.assert_close(grid.scale.amax(0), torch.tensor([4.0, 1.0]) / 15)
    assert grid.companion[:, 0].unique().tolist() == list(range(4, 12))
    torch.testing.assert_close(grid.spacing, (grid.scale.amax(0) - grid.scale.amin(0)) / 15)


def uniform_twin(x: list[float], scale: float, zero: float, bits: int) -> list[float]:
    return [scale * (min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) for v in x]


def test_a_row_is_rounded_as_by_hand() -> None:
    weight = uniform(-1, 1, (3, 40), 1)
    found = search_rows(weight, torch.tensor([3, 4, 3]), None, 1)
    for row, bits, got in zip(weight, (3, 4, 3), found, strict=True):
        grid = uniform_grid(row[None], bits, 1 << (bits - 1), 128)
        tries = [
            uniform_twin(row.tolist(), s, z, bits)
            for s, z in zip(grid.scale[:, 0].tolist(), grid.companion[:, 0].tolist(), strict=True)
        ]
        errors = [sum((a - b) ** 2 for a, b in zip(t, row.tolist(), strict=True)) for t in tries]
        torch.testing.assert_close(got, torch.tensor(tries[errors.index(min(errors))]))


def test_the_output_error_decides() -> None:
    # A loud input channel must be kept exactly, at the cost of the others.
    weight, x = uniform(-1, 1, (6, 8), 1), uniform(-1, 1, (50, 8), 2)
    x[:, 3] *= 40
    bits = torch.full((6,), 3)

    def output_error(w: Tensor) -> float:
        return float((x @ (w - weight).T).square().sum())

    by_output = search_rows(weight, bits, ProductError(weight, x, x), 4)
    assert output_error(by_output) < 0.5 * output_error(search_rows(weight, bits, None, 4))


@pytest.mark.parametrize("part", ["tensor", "channels", "heads"])
def test_groups_have_scales_of_their_own(part: str) -> None:
    x = uniform(-1, 1, (2, 3, 10, 4), 1) * torch.tensor([1.0, 5.0, 25.0])[:, None, None]
    if part == "heads":
        found = search_heads(x, 4, ProductError(x, x, x), 2)
        assert found.scale.shape == found.zero_point.shape == (3, 1, 1)
        assert (found.scale[1:] > 3 * found.scale[:-1]).all()
    elif part == "channels":
        columns = x.transpose(1, 3).flatten(0, 2)
        found = search_channels(columns, torch.ones(len(columns)), 4, 2)
        assert (found.scale[1:] > 3 * found.scale[:-1]).all()
    else:
        found = search_tensor(x.flatten(0, 2), torch.ones(60), 4, None, tensor_grid(x.flatten(0, 2), 4), 2)
        assert found.scale.shape == ()
    assert found.levels == 16
    assert torch.equal(found.zero_point, found.zero_point.round())


def test_the_base_is_the_best_of_all() -> None:
    x = uniform(-6, 4, (2, 2, 9, 9), 1).softmax(-1)
    v = uniform(-1, 1, (2, 2, 5, 9), 2)
    errors = [
        float((adalog.AdaLog(torch.tensor(1.0), 3, base)(x) @ v.mT - x @ v.mT).double().square().sum())
        for base in range(10, 138)
    ]
    assert adalog.search_base(x, 3, ProductError(x, v, v)).base == 10 + errors.index(min(errors))


def test_gelus_search_beats_the_start() -> None:
    x = torch.nn.functional.gelu(uniform(-3, 3, (60, 12), 1))
    weight = uniform(-1, 1, (7, 12), 2)
    low, high = adalog.gelu_ends(x)
    assert float(low) < float(high) == float(x.max() + adalog.GELU_SHIFT)
    start = adalog.AdaLog(high, 3, 37, adalog.GELU_SHIFT)
    found = adalog.search_gelu(x, torch.ones(60), 3, ProductError(x, weight, weight), (low, high), start, 4)
    grid = [adalog.AdaLog(s, 3, b, adalog.GELU_SHIFT) for s in torch.linspace(low, high, 16) for b in range(10, 138)]

    def error(quantizer: adalog.AdaLog) -> float:
        return float(((quantizer(x) - adalog.GELU_SHIFT - x) @ weight.T).square().sum())

    # FPCS first keeps the eight best bases at the scale of the start, so it may miss the best pair, but not by much.
    assert error(found) < error(start)
    assert error(found) <= 1.1 * min(error(q) for q in grid)


def test_ends_without_positive_numbers() -> None:
    low, high = adalog.gelu_ends(torch.full((4, 3), -0.1))
    assert 0 < float(low) < float(high)


def test_foldings_leave_the_float_function_alone(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel scales into norms, the shift into fc2's bias: with quantizers that do not round, nothing changes."""
    model, images = variant_vit("class-token"), variant_images(count=8)

    def whole(rows: Tensor, *_: object) -> Tensor:
        return rows.clone()

    monkeypatch.setattr(adalog, "search_rows", whole)
    result = simulate(model, images, "adalog", 4, 4)
    for name, module in list(result.named_modules()):
        if isinstance(module, adalog.AdaLog):
            module.forward = lambda x, shift=module.shift: x + shift
        elif type(module).__name__ == "Uniform":
            result.set_submodule(name, torch.nn.Identity())
    assert not torch.equal(result.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    assert not torch.equal(result.blocks[0].mlp.fc2.bias, model.blocks[0].mlp.fc2.bias)
    torch.testing.assert_close(result(images), model(images), rtol=1e-3, atol=1e-3)


def test_a_searched_model_has_its_quantizers_everywhere(quick: None) -> None:
    result = simulate(variant_vit("class-token"), variant_images(count=4), "adalog", 3, 4)
    attention = result.blocks[1].attn
    assert [q.levels for q in (attention.query, attention.key, attention.value, attention.proj.input)] == [16] * 4
    assert attention.query.scale.shape == (2, 1, 1)
    assert (attention.probability.levels, result.blocks[1].mlp.fc2.input.levels) == (17, 17)
    assert float(attention.probability.scale) == 1.0
    for linear in (attention.qkv, result.blocks[0].mlp.fc2, result.head, result.patch_embed.proj):
        assert max(len(row.unique()) for row in linear.weight.flatten(1)) <= 8
    assert result.patch_embed.proj.input.levels == 256


@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias", "distilled"])
def test_more_bits_are_closer(quick: None, variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 16)
    exact = model(images)
    quality = [sqnr_db(simulate(model, images, "adalog", b, b)(images), exact) for b in (3, 4, 6)]
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 8


def test_a_seed_gives_the_same_model(quick: None) -> None:
    model, images = variant_vit("class-token"), variant_images(count=8)
    one, two, other = (simulate(model, images, "adalog", 4, 4, seed=s)(images) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_all_tokens_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = variant_vit("class-token"), variant_images(count=4)
    monkeypatch.setattr(adalog, "EFFORT", replace(adalog.PUBLISHED, steps=2))
    assert sqnr_db(simulate(model, images, "adalog", 6, 6)(images), model(images)) > 8


@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias"])
def test_a_file_brings_the_same_model_back(quick: None, variant: str, tmp_path: Path) -> None:
    images = variant_images(variant, 4)
    result = simulate(variant_vit(variant), images, "adalog", 4, 4)
    save(result, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(images), result(images))
