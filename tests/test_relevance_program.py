"""The relevance program on whole models: it gives the model's own logits, and its sums of relevance are conserved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from random_vits import VARIANTS, make_images, make_vit
from safetensors.torch import load_file
from torch import Tensor, nn

from vitq_kernels.lrp_attnlrp import ATTNLRP
from vitq_kernels.lrp_chefer import CHEFER
from vitq_kernels.models import model_parts, model_sites
from vitq_kernels.relevance import relevance
from vitq_kernels.relevance_program import run_with_rules

METHODS = ("attnlrp", "chefer")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share: two threads of a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def site_relevance(model: nn.Module, images: Tensor, rules) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Relevance at each site and at the pixels, and the logits, of the largest logits."""
    found: dict[str, Tensor] = {}
    images = images.to(next(model.parameters()).dtype).requires_grad_()
    logits = run_with_rules(model_parts(model), rules, images, lambda name, r, _: found.setdefault(name, r))
    start = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
    (flowed,) = torch.autograd.grad(logits, images, start)
    return found, rules.relevance(images.detach(), flowed), logits.detach()


def per_image(r: Tensor) -> Tensor:
    return r.flatten(1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("rules", [ATTNLRP, CHEFER], ids=METHODS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_program_gives_the_models_own_logits(variant: dict, rules, dtype: torch.dtype) -> None:
    model = make_vit(dtype=dtype, **variant)
    images = make_images(2, variant.get("in_chans", 3), variant.get("image", (32, 32))).to(dtype)
    found, pixels, logits = site_relevance(model, images, rules)
    with torch.no_grad():
        expected = model(images)
    assert expected.std() > 0.3  # logits that say something
    assert (logits - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)
    assert set(found) == {site.name for site in model_sites(model)}
    assert pixels.shape == images.shape
    assert all(bool(r.isfinite().all()) for r in found.values())


def test_chefer_conserves_between_sites() -> None:
    """Each sum of R passes through GELU, softmax, the matmuls (half to each factor), linears and the residual Adds."""
    model = make_vit()
    found, _, _ = site_relevance(model, make_images(), CHEFER)
    for block in ("blocks.0", "blocks.1"):
        qkv, qk, av, proj = (per_image(found[f"{block}.attn.{name}"]) for name in ("qkv", "qk", "av", "proj"))
        torch.testing.assert_close(av, proj, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(qk, av / 2, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(qkv, av, rtol=1e-6, atol=1e-6)
        fc1, fc2 = (per_image(found[f"{block}.mlp.{name}"]) for name in ("fc1", "fc2"))
        torch.testing.assert_close(fc1, fc2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0], ids=["calm", "wild"])
def test_chefer_brings_all_relevance_to_the_pixels(scale: float) -> None:
    """Without a class token and position embedding nothing else can take any: Σ R = 1 at patches and at pixels."""
    model = make_vit(global_pool="avg", class_token=False, pos_embed="none", scale=scale)
    found, pixels, _ = site_relevance(model, make_images(), CHEFER)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(per_image(found["head"]), ones)
    torch.testing.assert_close(per_image(found["patch_embed.proj"]), ones, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(per_image(pixels), ones, rtol=1e-5, atol=1e-5)


def test_chefer_distilled_heads_share_the_start() -> None:
    found, _, _ = site_relevance(make_vit(**VARIANTS["distilled"]), make_images(), CHEFER)
    both = per_image(found["head"]) + per_image(found["head_dist"])
    torch.testing.assert_close(both, torch.ones_like(both))


def test_attnlrp_without_biases_loses_relevance_only_in_softmax() -> None:
    """Σ y * g is the logit at the head and keeps its value through everything but softmax, whose rule has a bias term.

    Of what reaches the attention output, half goes to the probabilities; the scores receive Σ R(qk) of it. With biases
    the sums are only bounded: each bias b takes Σ b * g (test_lrp_rules).
    """
    model = make_vit(
        global_pool="avg", class_token=False, pos_embed="none", qkv_bias=False, proj_bias=False, init_values=0.5
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    found, pixels, logits = site_relevance(model, make_images(), ATTNLRP)
    sums = {name: per_image(r) for name, r in found.items()}
    lost = torch.zeros(3, dtype=torch.float64)
    for block in ("blocks.0", "blocks.1"):
        av, qk = sums[f"{block}.attn.av"], sums[f"{block}.attn.qk"]
        torch.testing.assert_close(sums[f"{block}.attn.proj"], av)
        torch.testing.assert_close(sums[f"{block}.attn.qkv"], av / 2 + qk)
        torch.testing.assert_close(sums[f"{block}.mlp.fc1"], sums[f"{block}.mlp.fc2"])
        lost += av / 2 - qk
    assert lost.abs().min() > 1e-3
    largest = logits.amax(1)
    torch.testing.assert_close(sums["head"], largest)
    torch.testing.assert_close(sums["patch_embed.proj"], largest - lost)
    torch.testing.assert_close(per_image(pixels), largest - lost)


def test_closed_form_of_a_model_whose_blocks_add_nothing() -> None:
    """logit_c = W_c · mean_p e_p: AttnLRP gives e_po W_co / P, Chefer shares the positive W_co mean(e_o) over p."""
    model = make_vit(global_pool="avg", class_token=False, pos_embed="none", final_norm=False, depth=1)
    with torch.no_grad():
        for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2, model.patch_embed.proj, model.head):
            layer.bias.zero_()
        for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
            layer.weight.zero_()
        images = make_images(1).double()
        patches = model.patch_embed(images)[0]  # [16, 32]
        logits = model(images)[0]
    share = patches / 16 * model.head.weight.detach()[logits.argmax()]
    positive = share.sum(0).clamp(min=0)
    expected = {
        "attnlrp": (share / logits.max()).abs(),
        "chefer": (share / share.sum(0) * positive / positive.sum()).abs(),
    }
    for method, r in expected.items():
        found = relevance(model, images, method=method)
        assert found.flow["patch_embed.proj"] == pytest.approx(float(r.sum()), rel=1e-6)
        assert found.row_flow["patch_embed.proj"] == pytest.approx(r.sum(0).tolist(), rel=1e-6)
        assert found.flow["head"] == pytest.approx(1.0)


def test_scores_are_those_of_the_definitions() -> None:
    model, images = make_vit(), make_images(3)
    found, _, logits = site_relevance(model, images, ATTNLRP)
    result = relevance(model, images, tokens="image")
    means = {
        name: float(r[..., r.shape[-2] - 16 :, :].mean()) if r.ndim > 2 else float(r.mean())
        for name, r in found.items()
    }
    for name, r in found.items():
        patches = r[..., r.shape[-2] - 16 :, :] if r.ndim > 2 else r
        flow = (patches.abs().flatten(1).sum(1) / logits.amax(1).abs()).mean()
        assert result.flow[name] == pytest.approx(float(flow), rel=1e-9)
        assert result.mean_score[name] == pytest.approx(means[name] / sum(map(abs, means.values())), rel=1e-9)


@pytest.mark.assets
def test_chefer_overrates_q_and_k_of_vit_tiny(assets: Path) -> None:
    """methods.md 2: of the relevance at the blocks' linears Chefer's rules put about half on q and k, AttnLRP 9 %."""
    model = timm.create_model("vit_tiny_patch16_224").eval()
    (weights,) = assets.glob("vit_tiny*.safetensors")
    model.load_state_dict(load_file(weights))
    crop = slice(0, 224)
    files = sorted((assets / "calibration").glob("*.jpg"))[::32]
    pixels = [np.asarray(Image.open(file).convert("RGB"))[crop, crop] for file in files]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    share = {}
    for method in METHODS:
        rows = {name: r for name, r in relevance(model, images, method=method).row_flow.items() if "blocks" in name}
        q_and_k = sum(sum(r[: len(r) * 2 // 3]) for name, r in rows.items() if name.endswith("qkv"))
        share[method] = q_and_k / sum(map(sum, rows.values()))
    assert 0.04 < share["attnlrp"] < 0.15
    assert 0.35 < share["chefer"] < 0.65
