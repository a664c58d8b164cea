"""Relevance through Swin: the model's logits, conservation, and slow twins of windows, masks, merging and pooling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from small_swins import SWINS, make_swin, swin_images
from torch import Tensor, nn

import vitq_kernels as vitq
from vitq_kernels.lrp_composite import Composite, stable_divide
from vitq_kernels.lrp_rules import ATTNLRP, CHEFER
from vitq_kernels.models import model_parts, model_sites
from vitq_kernels.relevance_program import run_with_rules
from vitq_kernels.windows import Windows, merged_patches

METHODS = ("attnlrp", "chefer")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share: two threads of a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def site_relevance(model: nn.Module, images: Tensor, rules: Composite) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Relevance at each site and at the pixels, and the logits, of the largest logits."""
    found: dict[str, Tensor] = {}
    images = images.double().requires_grad_()
    logits = run_with_rules(model_parts(model), rules, images, lambda name, r, _: found.setdefault(name, r))
    start = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
    (flowed,) = torch.autograd.grad(logits, images, start)
    return found, rules.relevance(images.detach(), flowed), logits.detach()


def per_image(r: Tensor) -> Tensor:
    return r.flatten(1).sum(1)


@pytest.mark.parametrize("rules", [ATTNLRP, CHEFER], ids=METHODS)
@pytest.mark.parametrize("variant", SWINS)
def test_program_gives_the_models_own_logits(variant: str, rules: Composite) -> None:
    model, images = make_swin(**SWINS[variant]), swin_images(variant, 2)
    found, pixels, logits = site_relevance(model, images, rules)
    with torch.no_grad():
        expected = model(images.double())
    assert expected.std() > 0.3  # logits that say something
    assert (logits - expected).abs().max() <= 1e-12
    assert set(found) == {site.name for site in model_sites(model)}
    assert pixels.shape == images.shape
    assert all(bool(r.isfinite().all()) for r in found.values())


def without_biases(model: nn.Module) -> nn.Module:
    """Nothing but the tokens can take relevance: no biases of linears and norms, no relative positions."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "bias_table")):
                parameter.zero_()
    return model


@pytest.mark.parametrize("variant", ["one-window", "three-stages", "shifted"])
def test_chefer_brings_all_relevance_to_the_pixels(variant: str) -> None:
    """Σ R stays 1 through windows, masks, mergings and the pool, where no position and no padding takes any."""
    model = make_swin(**SWINS[variant])
    for part in model_parts(model).blocks:
        nn.init.zeros_(part.attn.bias_table)
    found, pixels, _ = site_relevance(model, swin_images(variant, 3), CHEFER)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(per_image(found["head.fc"]), ones)
    torch.testing.assert_close(per_image(found["patch_embed.proj"]), ones, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(per_image(pixels), ones, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["shifted", "padded", "odd-sides", "always-partition", "v2", "v2-padded"])
def test_chefer_conserves_between_the_sites_of_a_block(variant: str) -> None:
    """The bias takes its share of the scores by Chefer's Add; the values' half passes windows, shift and crop whole."""
    found, _, _ = site_relevance(make_swin(**SWINS[variant]), swin_images(variant, 3), CHEFER)
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.1"):
        qkv, qk, av, proj = (per_image(found[f"{block}.attn.{name}"]) for name in ("qkv", "qk", "av", "proj"))
        torch.testing.assert_close(av, proj, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(qkv, av / 2 + qk, rtol=1e-6, atol=1e-6)
        fc1, fc2 = (per_image(found[f"{block}.mlp.{name}"]) for name in ("fc1", "fc2"))
        torch.testing.assert_close(fc1, fc2, rtol=1e-6, atol=1e-6)


def test_attnlrp_without_biases_loses_relevance_only_in_softmax() -> None:
    """As in a ViT (test_relevance_program): y * g keeps its sum through windows, shifts, mergings and the pool."""
    model = without_biases(make_swin(**SWINS["three-stages"]))
    found, pixels, logits = site_relevance(model, swin_images("three-stages", 3), ATTNLRP)
    sums = {name: per_image(r) for name, r in found.items()}
    lost = torch.zeros(3, dtype=torch.float64)
    for part in model_parts(model).blocks:
        av, qk = sums[f"{part.name}.attn.av"], sums[f"{part.name}.attn.qk"]
        torch.testing.assert_close(sums[f"{part.name}.attn.proj"], av)
        torch.testing.assert_close(sums[f"{part.name}.attn.qkv"], av / 2 + qk)
        lost += av / 2 - qk
    assert lost.abs().min() > 1e-3
    largest = logits.amax(1)
    torch.testing.assert_close(sums["head.fc"], largest)
    torch.testing.assert_close(sums["patch_embed.proj"], largest - lost)
    torch.testing.assert_close(per_image(pixels), largest - lost)


# --- slow twins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (5, 3)], ids=["even", "odd"])
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)], ids=["still", "shifted"])
def test_windows_only_move_relevance(grid: tuple[int, int], shift: tuple[int, int]) -> None:
    """Each token's relevance is that of its place, found by a loop over places; padding's is dropped."""
    windows = Windows(grid, (3, 3), shift)
    x = torch.randn(1, *grid, 2, dtype=torch.float64, requires_grad=True)
    y = windows.gather(windows.pad(x))
    flowed = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, flowed)
    expected = torch.zeros_like(found)
    (rows, columns), wide = windows.padded, windows.padded[1] // 3
    for row in range(rows):
        for column in range(columns):
            if row < grid[0] and column < grid[1]:
                place = flowed[0, row // 3 * wide + column // 3, row % 3 * 3 + column % 3]
                expected[0, (row + shift[0]) % grid[0], (column + shift[1]) % grid[1]] += place
    torch.testing.assert_close(found, expected)


def test_merging_only_moves_relevance() -> None:
    x = torch.randn(1, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    y = merged_patches(x)
    flowed = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, flowed)
    expected = torch.zeros_like(found)
    for row in range(3):
        for column in range(5):
            first = (column % 2 * 2 + row % 2) * 2
            expected[0, row, column] = flowed[0, row // 2, column // 2, first : first + 2]
    torch.testing.assert_close(found, expected)


def test_pooling_shares_relevance_by_value() -> None:
    """Chefer: x_i / Σ x of each channel; AttnLRP: the same, as value x gradient of the mean."""
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    parts = model_parts(make_swin())
    relevance = torch.randn(2, 5, dtype=torch.float64)
    expected = x / x.sum((1, 2), keepdim=True) * relevance[:, None, None]
    for rules in (CHEFER, ATTNLRP):
        y = rules.pool(x, lambda t: parts.head_inputs(t)["head.fc"])
        start = relevance if rules is CHEFER else relevance / y.detach()
        (flowed,) = torch.autograd.grad(y, x, start)
        torch.testing.assert_close(rules.relevance(x.detach(), flowed), expected.detach())


@pytest.mark.parametrize("variant", ["shifted", "padded", "v2-padded"])
def test_attention_is_that_of_each_window_alone(variant: str) -> None:
    """Chefer's rules written out for every head of every window: scores, bias, probabilities and values."""
    model, images = make_swin(**SWINS[variant]), swin_images(variant, 1)
    found, _, _ = site_relevance(model, images, CHEFER)
    step = model_parts(model).blocks[1]
    attn, windows = step.attn, step.attn.windows
    with torch.no_grad():
        x = model.layers[0].blocks[0](model.patch_embed(images.double()))
        q, k, v = attn.heads(attn.qkv(windows.pad(x if step.post_norm else step.norm1(x))), windows)
        r = windows.pad(found[f"{step.name}.attn.av"])  # crop gives padding nothing
        r = windows.gather(r).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(-3, -2)
        bias, before = attn.bias_of(windows), []
        scale = torch.as_tensor(attn.scale_of_heads).expand(attn.num_heads)
        for window in range(windows.count):
            for head in range(attn.num_heads):
                place = (0, window, head)
                scores = q[place] @ k[place].T * scale[head]
                logits = scores + bias[window, head]
                probability = logits.softmax(-1)
                quotient = stable_divide(r[place], probability @ v[place])
                of_probability = probability * (quotient @ v[place].T) / 2
                before.append((scores, logits, of_probability))
        # Chefer's Add shares by the sums of the whole image.
        quotients = [stable_divide(of, logits) for _, logits, of in before]
        of_scores = sum((s * q).sum() for (s, _, _), q in zip(before, quotients, strict=True))
        of_bias = sum((b * q).sum() for b, q in zip(bias.flatten(0, 1), quotients, strict=True))
        total = sum(of.sum() for _, _, of in before)
        share = total / (of_scores.abs() + of_bias.abs()) * of_scores.sign()
        expected = [s * q * share for (s, _, _), q in zip(before, quotients, strict=True)]
    actual = found[f"{step.name}.attn.qk"][0].flatten(0, 1)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [*METHODS, "fisher"])
def test_rows_add_up_to_their_site(method: str) -> None:
    model = make_swin(torch.float32, **SWINS["padded"])
    scores = vitq.relevance(model, swin_images("padded", 4), method=method)
    assert list(scores.flow) == [site.name for site in model_sites(model)]
    for name, rows in scores.row_flow.items():
        assert sum(rows) == pytest.approx(scores.flow[name], rel=1e-6)
    assert scores.flow["layers.1.downsample.reduction"] > 0


def test_a_model_without_class_token_counts_image_tokens_alone() -> None:
    model, images = make_swin(torch.float32), swin_images("shifted", 2)
    assert vitq.relevance(model, images, tokens="image").flow == vitq.relevance(model, images).flow
    with pytest.raises(ValueError, match="'image' or 'all' for a model without a class token"):
        vitq.relevance(model, images, tokens="class")
