"""PTQ4ViT: its twin grids, its searches against brute force, the weights of its errors, and the whole preset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_vits import sqnr_db, variant_images, variant_vit
from torch import Tensor

from tests.numerics import uniform
from vitq_kernels.models import model_sites
from vitq_kernels.presets import gradients, ptq4vit, published_widths, simulate
from vitq_kernels.presets.file import load, save
from vitq_kernels.presets.output_error import ProductError
from vitq_kernels.presets.preset import Widths
from vitq_kernels.presets.twin_quantizers import TwinSign, TwinSoftmax
from vitq_kernels.simulation import simulated


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptq4vit, "ROUNDS", 1)
    monkeypatch.setattr(ptq4vit, "TOKENS", 64)


def softmax_twin(x: float, split: float, bits: int) -> float:
    """methods.md 3.11: the code returns high + low."""
    top = 2 ** (bits - 1) - 1
    high = round(min(max(x, split), 1.0) * top) / top
    low = round(min(max(x, 0.0), split) / (split / top)) * (split / top)
    return high + low


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("split", [1.0, 0.5, 2.0**-4, 2.0**-19])
def test_the_twin_after_softmax_is_the_codes(bits: int, split: float) -> None:
    x = torch.cat([uniform(0, 1, (300,), 1), uniform(0, split, (300,), 2), torch.tensor([0.0, split, 1.0])])
    expected = torch.tensor([softmax_twin(v, split, bits) for v in x.tolist()])
    torch.testing.assert_close(TwinSoftmax(torch.tensor(split), bits)(x), expected, rtol=1e-6, atol=1e-12)


def test_above_the_split_it_adds_the_split() -> None:
    """methods.md 8.6."""
    x, split = torch.linspace(0.01, 1, 10_000), 2.0**-8
    bias = (TwinSoftmax(torch.tensor(split), 8)(x) - x).mean()
    assert float(bias) == pytest.approx(split, rel=0.05)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("split", [1.0, 0.25, 2.0**-9])
def test_levels_after_softmax_are_those_it_takes(bits: int, split: float) -> None:
    x = torch.cat([torch.linspace(0, 1, 50_001), torch.linspace(0, split, 50_001)])
    quantizer = TwinSoftmax(torch.tensor(split), bits)
    values = quantizer(x).double().sort().values
    distinct = 1 + int((values.diff() > 1e-7 * split).sum())
    assert quantizer.levels == distinct < (1 << bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_twin_after_gelu_has_two_grids(bits: int) -> None:
    scale, negative = 0.25, 0.125
    half = 1 << (bits - 1)
    x = torch.linspace(-2 * half * negative, 2 * half * scale, 4001)
    quantizer = TwinSign(torch.tensor(scale), torch.tensor(negative), bits)
    expected = [
        min(round(v / scale), half - 1) * scale if v > 0 else max(round(v / negative), -half) * negative
        for v in x.tolist()
    ]
    assert quantizer(x).tolist() == expected
    assert len(quantizer(x).unique()) == quantizer.levels == 1 << bits


def test_gelus_smallest_number_is_the_last_code() -> None:
    quantizer = ptq4vit.after_gelu(torch.tensor(0.1), 4)
    assert float(quantizer(torch.tensor(-0.16997))) == pytest.approx(-0.16997, abs=1e-5)


def signed_twin(x: Tensor, scale: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.tensor([[min(max(round(v / scale), -half), half - 1) * scale for v in row] for row in x.tolist()])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_weights_scale_is_the_best_multiple(weighted: bool) -> None:
    weight, x = uniform(-1, 1, (6, 5), 1), uniform(-1, 1, (20, 5), 2)
    importance = uniform(0, 1, (20, 6), 3).pow(8) if weighted else torch.ones(20, 6)
    bits = torch.tensor([3, 3, 3, 4, 4, 4])
    found = ptq4vit.search_weight(weight, bits - 3, bits, ProductError(weight, x, x, importance.T))
    for rows, b in ((slice(0, 3), 3), (slice(3, 6), 4)):
        widest = float(weight[rows].abs().max()) / (2 ** (b - 1) - 0.5)
        tries = [signed_twin(weight[rows], widest * (0.01 + 1.19 * i / 100), b) for i in range(100)]
        errors = [float(((x @ (t - weight[rows]).T).square() * importance[:, rows]).sum()) for t in tries]
        torch.testing.assert_close(found[rows], tries[errors.index(min(errors))])


def test_the_weights_of_errors_decide() -> None:
    weight, x = uniform(-1, 1, (6, 5), 1), uniform(-1, 1, (20, 5), 2)
    weight[0] *= 9
    bits, group = torch.full((6,), 4), torch.zeros(6, dtype=torch.long)
    first = torch.zeros(6, 20)
    first[0] = 1
    others = 1 - first
    loud, quiet = (
        ptq4vit.search_weight(weight, group, bits, ProductError(weight, x, x, m)).abs().max() for m in (first, others)
    )
    assert float(quiet) < 0.5 * float(loud)


def test_an_inputs_scale_is_the_best_multiple() -> None:
    x, weight = uniform(-1, 1, (20, 5), 1), uniform(-1, 1, (6, 5), 2)
    view = gradients.LinearView(x, uniform(0, 1, (20, 6), 3).pow(4), x.abs().max(), x.max())
    widest = view.largest / 3.5
    found = ptq4vit.search_input(view, weight, weight, lambda s: ptq4vit.signed(s, 3), widest)
    tries = [signed_twin(x, float(widest) * (0.01 + 1.19 * i / 100), 3) for i in range(100)]
    errors = [float((((t - x) @ weight.T).square() * view.importance).sum()) for t in tries]
    torch.testing.assert_close(found(x), tries[errors.index(min(errors))])


def test_heads_have_scales_of_their_own() -> None:
    q, k = (uniform(-1, 1, (2, 3, 7, 4), s) * torch.tensor([1.0, 6.0, 36.0])[:, None, None] for s in (1, 2))
    product = ProductError(q, k, k, torch.ones(2, 3, 7, 7))
    scale = ptq4vit.search_heads(q, q.abs().amax((0, 2, 3)) / 7.5, 4, product).scale
    assert scale.shape == (3, 1, 1)
    assert (scale[1:] > 3 * scale[:-1]).all()


def test_the_split_is_the_best_of_twenty() -> None:
    p, v = uniform(-8, 4, (2, 2, 9, 9), 1).softmax(-1), uniform(-1, 1, (2, 2, 5, 9), 2)
    view = gradients.MatmulView(p, v, uniform(0, 1, (2, 2, 9, 5), 3), torch.ones(2), torch.ones(2))
    errors = [
        float(((TwinSoftmax(torch.tensor(2.0**-i), 4)(p) @ v.mT - p @ v.mT).square() * view.importance).sum())
        for i in range(20)
    ]
    assert float(ptq4vit.search_split(view, 4).split) == 2.0 ** -errors.index(min(errors))


@pytest.mark.parametrize(
    ("name", "groups"),
    [("blocks.0.attn.qkv", [0, 0, 1, 1, 2, 2]), ("patch_embed.proj", [0, 1, 2, 3, 4, 5]), ("head", [0] * 6)],
)
def test_rows_share_scales(name: str, groups: list[int]) -> None:
    assert ptq4vit.row_groups(name, torch.full((6,), 4)).tolist() == groups
    assert len(set(ptq4vit.row_groups(name, torch.tensor([3, 4] * 3)).tolist())) == {"head": 2}.get(name, 6)


def test_the_divergence_from_the_own_prediction_has_no_gradient() -> None:
    logits = uniform(-3, 3, (4, 10), 1).double().requires_grad_()
    own = logits.detach().softmax(-1)
    torch.nn.functional.kl_div(logits.log_softmax(-1), own, reduction="batchmean").backward()
    assert float(logits.grad.abs().max()) < 1e-16
    logits.grad = None
    gradients.own_prediction_loss(logits, torch.Generator().manual_seed(0)).backward()
    assert float(logits.grad.abs().max()) > 0.1


@pytest.mark.parametrize("place", ["head", "blocks.0.attn.qkv", "patch_embed.proj", "scores", "outputs"])
def test_importance_is_the_squared_gradient(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences in float64: one element of the output moves, the loss moves by its gradient."""

    def third_label(logits: Tensor, _: object = None) -> Tensor:
        return -logits.log_softmax(-1)[:, 3].sum()

    monkeypatch.setattr(gradients, "own_prediction_loss", third_label)
    copy, images, step = simulated(variant_vit("class-token").double()), variant_images(count=2).double(), 1e-6
    widths = Widths(published_widths(model_sites(variant_vit("class-token")), 4, 4))
    linears, scores, outputs = gradients.observe(
        copy, widths, [images], torch.Generator(), tokens=10_000, attention_images=2
    )
    attention, base = copy.blocks[0].attn, third_label(copy(images))

    def add(index: tuple[int, ...]) -> object:
        def hook(module: torch.nn.Module, arguments: object, out: Tensor) -> Tensor:
            moved = out.clone()
            moved[index] += step
            return moved

        return hook

    def reweight(module: torch.nn.Module, arguments: object, out: Tensor) -> Tensor:
        factor = torch.ones_like(out)
        factor[1, 0, 2, 4] += step * attention.softmax_scale  # e^x for a small x
        return out * factor / (out * factor).sum(-1, keepdim=True)

    module, hook, found = {
        "head": (copy.head, add((1, 7)), lambda: linears["head"].importance[1, 7]),
        "blocks.0.attn.qkv": (attention.qkv, add((1, 5, 9)), lambda: linears[place].importance[17 + 5, 9]),
        "patch_embed.proj": (copy.patch_embed.proj, add((1, 9, 2, 3)), lambda: linears[place].importance[16 + 11, 9]),
        "scores": (attention.probability, reweight, lambda: scores["blocks.0.attn"].importance[1, 0, 2, 4]),
        "outputs": (attention.proj.input, add((1, 5, 16 + 3)), lambda: outputs["blocks.0.attn"].importance[1, 1, 5, 3]),
    }[place]
    module.register_forward_hook(hook)
    moved = (third_label(copy(images)) - base) / step
    assert float(moved) != 0
    assert float(found()) == pytest.approx(float(moved) ** 2, rel=1e-3)


def test_pixels_stay_float_and_heads_do_not(quick: None) -> None:
    result = simulate(variant_vit("class-token"), variant_images(count=4), "ptq4vit", 4, 4)
    attention = result.blocks[1].attn
    assert isinstance(result.patch_embed.proj.input, torch.nn.Identity)
    assert [q.levels for q in (attention.query, attention.key, attention.value, result.head.input)] == [16] * 4
    assert attention.value.scale.shape == (2, 1, 1)
    assert attention.probability.levels < 16
    assert isinstance(result.blocks[0].mlp.fc2.input, TwinSign)
    assert len(attention.proj.weight.unique()) <= 16
    assert 16 < len(attention.qkv.weight.unique()) <= 48


@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias", "distilled"])
def test_more_bits_are_closer(quick: None, variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 16)
    exact = model(images).detach()
    quality = [sqnr_db(simulate(model, images, "ptq4vit", b, b)(images), exact) for b in (3, 5, 8)]
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 12


def test_a_seed_gives_the_same_model(quick: None) -> None:
    model, images = variant_vit("class-token"), variant_images(count=8)
    one, two, other = (simulate(model, images, "ptq4vit", 4, 4, seed=s)(images) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias"])
def test_a_file_brings_the_same_model_back(quick: None, variant: str, tmp_path: Path) -> None:
    images = variant_images(variant, 4)
    result = simulate(variant_vit(variant), images, "ptq4vit", 4, 4)
    save(result, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(images), result(images))
