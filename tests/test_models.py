"""Cutting a VisionTransformer: sites and their sizes, the skeleton built again, unsupported parts named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from random_vits import VARIANTS, make_vit
from timm.layers import GatedMlp, GluMlp, LayerNorm, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from tests.numerics import assert_bitwise_equal
from tests.small_vits import small_vit, variant_images, variant_vit
from vitq_kernels.models import UnsupportedModelError, build_model, model_config, model_parts, model_sites
from vitq_kernels.spec import Site

CHECKOUT = Path(__file__).parents[1]

# --- sites --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_tiny_sites() -> tuple[Site, ...]:
    with torch.device("meta"):
        return model_sites(timm.create_model("vit_tiny_patch16_224"))


def test_vit_tiny_has_the_published_counts(vit_tiny_sites: tuple[Site, ...]) -> None:
    """methods.md 1.2 and 6: 74 modules, 1.254 G multiply-accumulates, 5.648 M weights in GEMMs."""
    assert len(vit_tiny_sites) == 74
    assert sum(site.macs for site in vit_tiny_sites) / 1e9 == pytest.approx(1.254, abs=5e-4)
    assert sum(site.rows * site.cols for site in vit_tiny_sites) / 1e6 == pytest.approx(5.648, abs=5e-4)
    kinds = Counter(site.kind for site in vit_tiny_sites)
    assert kinds == {"patch_embed": 1, "head": 1} | dict.fromkeys(("qkv", "qk", "av", "proj", "fc1", "fc2"), 12)


def test_vit_tiny_sites_are_in_forward_order(vit_tiny_sites: tuple[Site, ...]) -> None:
    names = [site.name for site in vit_tiny_sites]
    assert names[:8] == [
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn.qk",
        "blocks.0.attn.av",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.1.attn.qkv",
    ]
    assert names[-1] == "head"


def macs_by_formula(tokens: int, patches: int, dim: int, hidden: int, depth: int, patch: int, channels: int) -> int:
    """Of everything but the heads, from the architecture alone."""
    linears = 3 * dim * dim + dim * dim + 2 * dim * hidden
    return patches * patch * dim + depth * (tokens * linears + 2 * tokens * tokens * dim)


# patches, tokens before them, image channels * patch area
GRIDS = {
    "class-token": (16, 1, 192),
    "no-class-token": (16, 0, 192),
    "registers": (16, 4, 192),
    "distilled": (16, 2, 192),
    "non-square": (10, 1, 192),
    "one-channel": (16, 1, 64),
    "dynamic-size": (16, 1, 192),
}


@pytest.mark.parametrize("variant", GRIDS)
def test_macs_are_those_of_the_architecture(variant: str) -> None:
    patches, prefix, patch = GRIDS[variant]
    sites = model_sites(make_vit(**VARIANTS[variant]))
    heads = [site for site in sites if site.kind == "head"]
    assert len(heads) == (2 if variant == "distilled" else 1)
    assert all((site.rows, site.cols, site.macs) == (10, 32, 320) for site in heads)
    expected = macs_by_formula(patches + prefix, patches, 32, 128, 2, patch, 3)
    assert sum(site.macs for site in sites) - sum(site.macs for site in heads) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_sites_are_the_modules_of_their_names(variant: str) -> None:
    model = make_vit(**VARIANTS[variant])
    sites = model_sites(model)
    assert len({site.name for site in sites}) == len(sites)
    for site in sites:
        if site.has_weight:
            weight = model.get_submodule(site.name).weight
            assert (site.rows, site.cols) == (weight.shape[0], weight[0].numel())
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {site.name for site in sites if site.has_weight} == linears  # none is missed


def test_a_model_without_a_classifier_has_no_head_site() -> None:
    sites = model_sites(make_vit(num_classes=0))
    assert [site for site in sites if site.kind == "head"] == []


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_blocks_and_logits_are_the_forward(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 3)
    parts = model_parts(model)
    assert not parts.left_in_float
    with torch.no_grad():
        x = parts.tokens(images)
        assert_bitwise_equal(parts.logits(model.blocks(x)), model(images))


@pytest.mark.parametrize(
    ("variant", "count"), [("class-token", 1), ("distilled", 2), ("average-pool", 0), ("registers", 1)], ids=str
)
def test_read_tokens_are_those_the_classifier_reads(variant: str, count: int) -> None:
    assert model_parts(make_vit(**VARIANTS[variant])).read_tokens == count


def test_block_parts_are_the_blocks_modules() -> None:
    model = make_vit(**VARIANTS["layer-scale"], num_classes=7)
    for index, part in enumerate(model_parts(model).blocks):
        block = model.blocks[index]
        assert part.name == f"blocks.{index}"
        assert part.attn.qkv is block.attn.qkv
        assert part.attn.proj is block.attn.proj
        assert part.mlp.fc1 is block.mlp.fc1
        assert part.mlp.fc2 is block.mlp.fc2
        assert part.layer_scale1 is block.ls1.gamma
        assert part.layer_scale2 is block.ls2.gamma
        attn = part.attn
        assert (attn.num_heads, attn.head_dim, attn.softmax_scale, part.mlp.gelu) == (2, 16, 0.25, "none")


# --- the skeleton built again -------------------------------------------------------------------------------------

MORE = {
    "register-mean": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "average-max-pool": {"global_pool": "avgmax"},
    "no-pool": {"global_pool": ""},
    "no-classifier": {"num_classes": 0},
    "eps": {"norm_layer": partial(LayerNorm, eps=1e-2)},
    "narrow-mlp": {"mlp_ratio": 0.5},
    "odd-mlp": {"embed_dim": 224, "num_heads": 2, "depth": 1, "mlp_ratio": 61.5 / 224},  # 61 / 224 * 224 < 61
    "six-heads": {"embed_dim": 48, "num_heads": 6},
    "dropout": {"drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_path_rate": 0.5, "patch_drop_rate": 0.5},
    "long-patches": {"patch_size": (8, 4)},
    "distilled-no-bias": {"class": VisionTransformerDistilled, "qkv_bias": False},
}
ALL = VARIANTS | MORE


@pytest.mark.parametrize("variant", ALL)
def test_config_builds_the_same_model_again(variant: str) -> None:
    model = small_vit(**ALL[variant])
    config = json.loads(json.dumps(model_config(model)))  # as it comes out of a checkpoint
    built = build_model(config)
    assert not built.training
    state = model.state_dict()
    assert {n: t.shape for n, t in built.state_dict().items()} == {
        n: t.shape for n, t in state.items() if ".ls" not in n
    }
    # Layer scale is folded when a model is quantized, so the skeleton has none; put it where the float model has it.
    for index, block in enumerate(model.blocks):
        built.blocks[index].ls1, built.blocks[index].ls2 = block.ls1, block.ls2
    built.load_state_dict(state)
    images = variant_images(variant if variant in VARIANTS else "class-token", 3)
    with torch.no_grad():
        expected = model(images)
        assert expected.std() > 0.1
        assert_bitwise_equal(built(images), expected)


def test_skeleton_needs_no_memory() -> None:
    built = build_model(model_config(make_vit()), "meta")
    assert {t.device.type for t in built.state_dict().values()} == {"meta"}


# --- what is not supported ----------------------------------------------------------------------------------------


class ScaledLinear(nn.Linear):
    """Computes something else with its weight, as adapters do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def with_block(change: Callable[[nn.Module], None]) -> nn.Module:
    """A model whose second block has been changed."""
    model = small_vit()
    change(model.blocks[1])
    return model


def one_block_from(**arguments: object) -> nn.Module:
    """A model whose second block comes from a model of other arguments."""
    model = small_vit()
    model.blocks[1] = small_vit(1, **arguments).blocks[1]
    return model


def set_on(path: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda block: block.set_submodule(path, make())


PARTLY = {
    "odd-query-norm": (lambda: with_block(set_on("attn.q_norm", lambda: nn.Tanh())), "attn.q_norm of type Tanh"),
    "odd-attention-norm": (lambda: with_block(set_on("attn.norm", lambda: nn.Tanh())), "attn.norm of type Tanh"),
    "odd-mlp-norm": (lambda: with_block(set_on("mlp.norm", lambda: nn.Tanh())), "mlp.norm of type Tanh"),
    "gated-mlp-of-another-kind": (lambda: one_block_from(mlp_layer=GatedMlp), "MLP type GatedMlp"),
    "post-norm": (lambda: one_block_from(block_fn=ResPostBlock), "block type ResPostBlock"),
    "odd-norm": (lambda: with_block(set_on("norm1", lambda: nn.Tanh())), "norm1 of type Tanh"),
    "elu": (lambda: one_block_from(act_layer="elu"), "activation ELU"),
    "sigmoid-gate": (lambda: one_block_from(mlp_layer=GluMlp, act_layer=nn.Sigmoid), "activation Sigmoid"),
    "gated": (lambda: with_block(lambda b: setattr(b.attn, "gate", nn.Linear(32, 32))), "gated attention"),
    "other-attention": (lambda: with_block(set_on("attn", lambda: nn.Identity())), "attention type Identity"),
    "other-layer-scale": (lambda: with_block(set_on("ls2", lambda: nn.Linear(32, 32))), "ls2 of type Linear"),
    "convolutional-mlp": (
        lambda: with_block(set_on("mlp", lambda: Mlp(32, 64, use_conv=True))),
        "mlp.fc1 of type Conv2d",
    ),
    "adapted-qkv": (
        lambda: with_block(set_on("attn.qkv", lambda: ScaledLinear(32, 96))),
        "attn.qkv of type ScaledLinear",
    ),
    "adapted-fc2": (
        lambda: with_block(set_on("mlp.fc2", lambda: ScaledLinear(128, 32))),
        "mlp.fc2 of type ScaledLinear",
    ),
}


@pytest.mark.parametrize("case", PARTLY)
def test_a_block_without_integer_form_is_left_out_and_named(case: str) -> None:
    make, reason = PARTLY[case]
    model = make()
    parts = model_parts(model)
    assert [block.name for block in parts.blocks] == ["blocks.0"]
    assert parts.left_in_float.keys() == {"blocks.1"}
    assert reason in parts.left_in_float["blocks.1"]
    assert not any(site.name.startswith("blocks.1") for site in model_sites(model))
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.1: .*{reason}.* has no integer form"):
        model_parts(model, strict=True)
    with pytest.raises(UnsupportedModelError, match="has no integer form"):
        model_config(model)


@pytest.mark.parametrize("pool", ["map", "prr"])
def test_attention_pooling_is_left_in_float_and_named(pool: str) -> None:
    parts = model_parts(make_vit(global_pool=pool))
    assert len(parts.blocks) == 2
    assert list(parts.left_in_float) == ["attn_pool"]
    assert "pooling" in parts.left_in_float["attn_pool"]


@pytest.mark.parametrize("head", [ScaledLinear(32, 10), nn.Sequential(nn.Linear(32, 10))], ids=["adapted", "mlp"])
def test_another_classifier_is_left_in_float_and_named(head: nn.Module) -> None:
    model = small_vit()
    model.head = head
    parts = model_parts(model)
    assert dict(parts.left_in_float) == {"head": f"classifier of type {type(head).__name__}"}
    assert not any(site.kind == "head" for site in model_sites(model))


class OtherVit(timm.models.vision_transformer.VisionTransformer):
    """A subclass may compute anything."""


REFUSED = {
    "sequential": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        r"VisionTransformer.*got Sequential; replace_linears\(\) takes any",
    ),
    "cait": (lambda: timm.create_model("cait_xxs24_224"), r"got Cait; replace_linears\(\)"),
    "swin": (
        lambda: timm.create_model("swinv2_cr_tiny_224"),
        r"got SwinTransformerV2Cr; replace_linears\(\)",
    ),
    "subclass": (lambda: OtherVit(img_size=16, embed_dim=16, depth=1, num_heads=1), "got OtherVit"),
    "all-blocks": (lambda: make_vit(act_layer="elu"), "no block of the model has an integer form: .*ELU"),
    "hybrid-embedding": (
        lambda: timm.create_model("vit_small_r26_s32_224"),
        "patch_embed must be a timm PatchEmbed, got HybridEmbed",
    ),
    "overlapping-patches": (
        lambda: with_block_of_patches(nn.Conv2d(3, 32, 8, stride=4)),
        r"patch_embed.proj must be a Conv2d over whole patches, got Conv2d\(3, 32.*stride=\(4, 4\)\)",
    ),
    "no-convolution": (
        lambda: with_block_of_patches(nn.Linear(8, 32)),
        "patch_embed.proj must be a Conv2d .*got Linear",
    ),
}


def with_block_of_patches(proj: nn.Module) -> nn.Module:
    model = small_vit()
    model.patch_embed.proj = proj
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_integer_form_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with torch.device("meta") if case in ("cait", "swin", "hybrid-embedding") else torch.device("cpu"):
        model = make()
    with pytest.raises(UnsupportedModelError, match=message):
        model_sites(model)


def test_blocks_of_two_gelus_cannot_be_described() -> None:
    model = one_block_from(act_layer="gelu_tanh")
    assert [block.mlp.gelu for block in model_parts(model).blocks] == ["none", "tanh"]
    with pytest.raises(UnsupportedModelError, match=r"blocks must have one form to be described, got .*gelu_tanh"):
        model_config(model)


def test_a_model_of_transformers_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "vitq_kernels.models.hf_vit", raising=False)
    with pytest.raises(ImportError, match=r"ViTModel needs Hugging Face transformers: pip install"):
        build_model({"class": "ViTModel"})


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, vitq_kernels.cli; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert out.stdout == "False\n"
