"""Vision models of Hugging Face transformers: the parts compute the forward, and quantized models stand in for them."""

from __future__ import annotations

import functools
import json
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from small_hf import MODELS, PARTLY, SWIN, SWINS, hf_images, hf_model, transformers
from small_swins import swin, swin_images
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitq_kernels as vitq
from tests.numerics import assert_bitwise_equal
from tests.small_vits import mixed_allocation, quietly, small_vit
from vitq_kernels.evaluation import evaluate
from vitq_kernels.lrp_rules import ATTNLRP
from vitq_kernels.models import UnsupportedModelError, answer, build_model, model_config, model_parts, model_sites
from vitq_kernels.nn import QuantBlock, QuantPatchEmbed
from vitq_kernels.presets import simulate
from vitq_kernels.relevance_program import run_with_rules

ALL = [*MODELS, *SWINS, *PARTLY]


@functools.cache
def quantized(kind: str) -> nn.Module:
    """W8A8, shared between tests."""
    return quietly(vitq.quantize, hf_model(kind), hf_images())


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every tensor that a forward returns."""
    with torch.no_grad():
        return {name: value for name, value in model(pixel_values=images).items() if isinstance(value, Tensor)}


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_the_twin_computes_what_the_model_computes(kind: str) -> None:
    model, images = hf_model(kind), hf_images(3)
    parts = model_parts(model)
    expected = outputs(model, images)
    found = outputs(parts.model, images)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_tokens_blocks_and_logits_are_the_forward(kind: str) -> None:
    parts, images = model_parts(hf_model(kind)), hf_images(3)
    with torch.no_grad():
        x = parts.tokens(images)
        for step in parts.steps:
            x = parts.model.get_submodule(step.name)(x)
        found = parts.logits(x)
        expected = answer(parts.model, images)
    if kind == "vit-features":  # transformers pools nothing in these two
        expected = expected[:, 0]
    elif kind == "siglip-features":
        expected = expected.mean(1)
    assert_bitwise_equal(found, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_the_finer_cut_is_the_forward(kind: str) -> None:
    parts, images = model_parts(hf_model(kind)), hf_images(3)
    with torch.no_grad():
        patches = parts.patch_proj(parts.pixels(images)).flatten(2).transpose(1, 2)
        tokens = parts.norms["norm_pre"](parts.embed(patches, (4, 4)))
    torch.testing.assert_close(tokens, parts.tokens(images), rtol=1e-6, atol=1e-6)
    assert tokens.shape[1] == 16 + parts.prefix_tokens


@pytest.mark.parametrize("kind", ALL)
def test_the_model_is_left_as_it_is(kind: str) -> None:
    model = hf_model(kind)
    before, classes = {n: t.clone() for n, t in model.state_dict().items()}, [type(m) for m in model.modules()]
    result = quietly(vitq.quantize, model, hf_images(2))
    quietly(vitq.calibrate, model, hf_images(2))
    assert [type(m) for m in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert_bitwise_equal(tensor, before[name])
    own = {tensor.data_ptr() for tensor in model.parameters()}
    assert not own & {tensor.data_ptr() for tensor in result.parameters()}


def test_a_twin_is_its_own_twin() -> None:
    twin = model_parts(hf_model("vit")).model
    assert model_parts(twin).model is twin


def test_sites_have_names_and_sizes_of_the_twin() -> None:
    model = hf_model("vit")
    sites, modules = model_sites(model), dict(model_parts(model).model.named_modules())
    assert [s.name for s in sites[:3]] == [
        "vit.embeddings.patch_embeddings.projection",
        "vit.layers.0.block.attn.qkv",
        "vit.layers.0.block.attn.qk",
    ]
    assert sites[-1].name == "classifier"
    for site in sites:
        if site.has_weight:
            assert (site.rows, site.cols) == (len(modules[site.name].weight), modules[site.name].weight[0].numel())


def test_shared_weights_are_shared() -> None:
    model = hf_model("vit")
    block = model_parts(model).model.vit.layers[1].block
    assert block.attn.proj.weight is model.vit.layers[1].attention.o_proj.weight
    q, k, v = (getattr(model.vit.layers[1].attention, f"{name}_proj").weight for name in "qkv")
    assert_bitwise_equal(block.attn.qkv.weight.detach(), torch.cat([q, k, v]).detach())


# --- quantized ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_w8a8_is_close_to_float(kind: str) -> None:
    images = hf_images(8)
    expected, found = outputs(hf_model(kind), images), outputs(quantized(kind), images)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.cosine_similarity(value.flatten(), expected[name].flatten(), dim=0) >= 0.999, name
    assert any((value != expected[name]).any() for name, value in found.items())


@pytest.mark.parametrize("kind", ALL)
def test_every_layer_is_integer(kind: str) -> None:
    model = quantized(kind)
    parts = model_parts(hf_model(kind))
    assert sum(isinstance(m, QuantBlock) for m in model.modules()) == (4 if kind in SWINS else 2)
    assert sum(isinstance(m, QuantPatchEmbed) for m in model.modules()) == 1
    assert type(model).__name__ == type(hf_model(kind)).__name__
    floats = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    unused = ("vision_model.head",)  # SigLIP's classifier reads the mean instead
    assert all(name.startswith((*parts.left_in_float, *unused)) for name in floats)


@pytest.mark.parametrize("kind", PARTLY)
def test_what_stays_in_float_is_named(kind: str) -> None:
    model = hf_model(kind)
    with pytest.warns(UserWarning, match=r"^(pooler|head) stays in float"):
        vitq.quantize(model, hf_images(2))
    with pytest.raises(UnsupportedModelError, match=r"^(pooler|head): "):
        vitq.quantize(model, hf_images(2), strict=True)


@pytest.mark.parametrize("kind", ALL)
def test_hidden_states_are_recorded(kind: str) -> None:
    images = hf_images(4)
    with torch.no_grad():
        found = quantized(kind)(images, output_hidden_states=True).hidden_states
        expected = hf_model(kind)(images, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.cosine_similarity(ours.flatten(1), theirs.flatten(1)).min() >= 0.999


def test_hidden_states_are_recorded_of_a_model_that_recorded_them_in_float() -> None:
    model = hf_model("dinov2")
    with torch.no_grad():
        model(hf_images(2), output_hidden_states=True)  # transformers hooks the layers now
        result = vitq.quantize(model, hf_images())
        assert len(result(hf_images(2), output_hidden_states=True).hidden_states) == 3
        assert len(model(hf_images(2), output_hidden_states=True).hidden_states) == 3


def test_tuples_and_losses_come_as_of_the_float_model() -> None:
    model, images = quantized("vit"), hf_images(4)
    with torch.no_grad():
        logits = model(images).logits
        (found,) = model(images, return_dict=False)
        assert_bitwise_equal(found, logits)
        labels = torch.tensor([0, 1, 2, 3])
        loss = model(images, labels=labels).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask must be None, got a mask"):
        quantized("vit")(hf_images(1), attention_mask=torch.tensor([[1] * 16 + [0]]))


def test_other_sizes_interpolate_positions() -> None:
    images = torch.nn.functional.interpolate(hf_images(4), (48, 40))
    for kind, arguments in (("vit", {"interpolate_pos_encoding": True}), ("dinov2", {})):
        with torch.no_grad():
            found, expected = (m(images, **arguments).logits for m in (quantized(kind), hf_model(kind)))
        assert torch.cosine_similarity(found, expected).min() >= 0.998


def test_half_precision_runs() -> None:
    model = quietly(vitq.quantize, hf_model("clip-features"), hf_images(8)).half()
    with torch.no_grad():
        out = model(hf_images(2)).pooler_output
    assert out.dtype == torch.float16
    expected = outputs(quantized("clip-features"), hf_images(2))["pooler_output"]
    assert torch.cosine_similarity(out.float(), expected).min() > 0.999


# --- the same weights through timm --------------------------------------------------------------------------------


def copied(source: nn.Module, model: nn.Module, trunk: nn.Module) -> nn.Module:
    """timm's weights in a ViT of transformers."""
    state = {n: t.detach().clone() for n, t in source.named_parameters()}
    embeddings = trunk.embeddings
    pairs = {
        embeddings.cls_token: "cls_token",
        embeddings.position_embeddings: "pos_embed",
        embeddings.patch_embeddings.projection.weight: "patch_embed.proj.weight",
        embeddings.patch_embeddings.projection.bias: "patch_embed.proj.bias",
    }
    if hasattr(embeddings, "distillation_token"):
        pairs[embeddings.distillation_token] = "dist_token"
        heads = {"head": model.cls_classifier, "head_dist": model.distillation_classifier}
    else:
        heads = {"head": model.classifier}
    modules = {**heads, "norm": trunk.layernorm}
    for i, layer in enumerate(trunk.layers):
        ours = {
            "norm1": layer.layernorm_before,
            "norm2": layer.layernorm_after,
            "attn.proj": layer.attention.o_proj,
            "mlp.fc1": layer.mlp.fc1,
            "mlp.fc2": layer.mlp.fc2,
        }
        modules |= {f"blocks.{i}.{name}": module for name, module in ours.items()}
        for name in ("weight", "bias"):
            for part, chunk in zip("qkv", state[f"blocks.{i}.attn.qkv.{name}"].chunk(3), strict=True):
                getattr(getattr(layer.attention, f"{part}_proj"), name).data.copy_(chunk)
    pairs |= {getattr(m, n): f"{path}.{n}" for path, m in modules.items() for n in ("weight", "bias")}
    for parameter, name in pairs.items():
        parameter.data.copy_(state[name])
    return model.eval()


@pytest.mark.parametrize("mixed", [False, True], ids=["w8a8", "mixed"])
@pytest.mark.parametrize("distilled", [False, True], ids=["vit", "deit"])
def test_timm_with_the_same_weights_gives_the_same_integers(distilled: bool, mixed: bool) -> None:
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    source = small_vit(**{"class": kind, "mlp_ratio": 1.5})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, "DeiTConfig" if distilled else "ViTConfig")
    config = config(**sizes, intermediate_size=48, num_labels=10, layer_norm_eps=1e-6)
    if distilled:
        model = transformers.DeiTForImageClassificationWithTeacher(config)
        model = copied(source, model, model.deit)
    else:
        model = transformers.ViTForImageClassification(config)
        model = copied(source, model, model.vit)
    images = hf_images(16)
    theirs = (
        mixed_allocation(source, activation_bits=6) if mixed else vitq.BitAllocation.uniform(model_sites(source), 8)
    )
    ours = zip(model_sites(model), theirs.sites.values(), strict=True)
    allocation = vitq.BitAllocation({site.name: bits for site, bits in ours})
    with torch.no_grad():
        expected = vitq.quantize(source, images, theirs)
        found = vitq.quantize(model, images, allocation)
        assert_bitwise_equal(found(images).logits, expected(images))
    integers = [[t for t in m.state_dict().values() if not t.is_floating_point()] for m in (found, expected)]
    assert len(integers[0]) == len(integers[1]) > 20
    by_bytes = [sorted(t.contiguous().numpy().tobytes() for t in tensors) for tensors in integers]
    assert by_bytes[0] == by_bytes[1]


# --- the rest of the line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model, images = quantized(kind), hf_images(3)
    vitq.save(model, tmp_path / "q.safetensors")
    loaded = vitq.load(tmp_path / "q.safetensors")
    assert type(loaded) is type(model)
    expected, found = outputs(model, images), outputs(loaded, images)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_bitwise_equal(value, expected[name])
    assert loaded.quantization == model.quantization


def test_names_of_classes_come_back(tmp_path: Path) -> None:
    model = hf_model("vit")
    model.config.id2label = {i: f"kind {i}" for i in range(10)}
    vitq.save(vitq.quantize(model, hf_images(2)), tmp_path / "q.safetensors")
    assert vitq.load(tmp_path / "q.safetensors").config.id2label == model.config.id2label


@pytest.mark.parametrize("kind", ALL)
def test_a_description_is_json_and_holds_nothing_to_execute(kind: str) -> None:
    config = model_config(hf_model(kind))
    rebuilt = build_model(json.loads(json.dumps(config)), "meta")
    assert model_config(rebuilt) == config
    assert {n: tuple(t.shape) for n, t in rebuilt.state_dict().items()} == {
        n: tuple(t.shape) for n, t in model_parts(hf_model(kind)).model.state_dict().items()
    }
    assert not {"auto_map", "attn_implementation", "_attn_implementation", "_name_or_path"} & set(config["config"])


def test_relevance_scores_allocate() -> None:
    model, images = hf_model("dinov2"), hf_images(4)
    scores = vitq.relevance(model, images)
    assert list(scores.flow) == [site.name for site in model_sites(model)]
    allocation = vitq.allocate(model, scores, vitq.Budget(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = vitq.quantize(model, images, allocation)
    assert result.quantization.allocation == allocation


@pytest.mark.parametrize("method", ["attnlrp", "chefer", "fisher"])
@pytest.mark.parametrize("kind", ["vit", "deit-teacher", "dinov2", "clip", "siglip", "swin"])
def test_relevance_leaves_no_site_out(kind: str, method: str) -> None:
    model = hf_model(kind)
    scores = vitq.relevance(model, hf_images(2), method=method)
    assert all(flow > 0 for flow in scores.flow.values())


def test_relevance_of_the_same_weights_is_that_of_timm() -> None:
    source = small_vit(mlp_ratio=1.5)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            intermediate_size=48,
            num_labels=10,
            layer_norm_eps=1e-6,
        )
    )
    model = copied(source, model, model.vit)
    ours, theirs = (vitq.relevance(m, hf_images(4)) for m in (model, source))
    assert list(ours.flow.values()) == pytest.approx(list(theirs.flow.values()), rel=1e-5)


def test_evaluation_reads_logits() -> None:
    batches = [(hf_images(8), torch.arange(8))]
    found = evaluate(quantized("vit"), batches, float_model=hf_model("vit"))
    assert (found.images, found.agreement) == (8, 100.0)
    assert 0 < found.kl < 1e-3


def test_sensitivity_is_measured() -> None:
    found = vitq.sensitivity(hf_model("vit"), hf_images(4), part="weight", candidates=(2, 8))
    assert all(narrow > wide >= 0 for narrow, wide in found.kl.values())


# --- what is refused ----------------------------------------------------------------------------------------------


def test_other_models_of_transformers_are_refused() -> None:
    config = transformers.BeitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(UnsupportedModelError, match=r"model must be a ViTForImageClassification, .* got BeitModel"):
        vitq.quantize(transformers.BeitModel(config), hf_images(1))


def test_a_layer_that_is_laid_out_otherwise_is_named() -> None:
    model = hf_model("vit")
    del model.vit.layers[1].attention.k_proj
    with pytest.raises(UnsupportedModelError, match=r"vit\.layers\.1: ViTLayer is not laid out as in transformers"):
        model_parts(model)


def test_a_linear_of_another_type_is_named() -> None:
    model = hf_model("vit")
    model.vit.layers[0].attention.q_proj.__class__ = type("Linear8bit", (nn.Linear,), {})
    with pytest.raises(UnsupportedModelError, match=r"vit\.layers\.0\.attention: q, k and v must be nn\.Linear, got"):
        model_parts(model)


def test_images_of_another_size_are_refused_by_relevance() -> None:
    with pytest.raises(ValueError, match=r"images must be \(32, 32\) pixels for this model, got \(40, 32\)"):
        vitq.relevance(hf_model("vit"), torch.zeros(1, 3, 40, 32))


@pytest.mark.parametrize("kind", SWINS)
def test_steps_of_swin_are_in_forward_order(kind: str) -> None:
    parts = model_parts(hf_model(kind))
    assert [step.name.removeprefix("swin.") for step in parts.steps][1:4] == [
        "encoder.layers.0.blocks.1.block",
        "encoder.layers.0.downsample.merging",
        "encoder.layers.1.blocks.0.block",
    ]
    assert [block.attn.windows.shift for block in parts.blocks] == [(0, 0), (2, 2), (0, 0), (0, 0)]


@pytest.mark.parametrize("kind", SWINS)
def test_the_relevance_program_of_swin_is_the_forward(kind: str) -> None:
    model, images = hf_model(kind), hf_images(2).requires_grad_()
    parts = model_parts(model)
    found = run_with_rules(parts, ATTNLRP, images, lambda *_: None, features=not parts.heads)
    torch.testing.assert_close(found, answer(model, images), rtol=1e-5, atol=1e-5)


def test_timm_swin_with_the_same_weights_gives_the_same_integers() -> None:
    source = swin("shifted")
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, num_labels=10)).eval()
    state = source.state_dict()
    pairs = {
        "swin.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "swin.embeddings.norm": "patch_embed.norm",
        "swin.layernorm": "norm",
        "classifier": "head.fc",
        "swin.encoder.layers.0.downsample.norm": "layers.1.downsample.norm",
        "swin.encoder.layers.0.downsample.reduction": "layers.1.downsample.reduction",
    }
    inside = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    with torch.no_grad():
        for i, j in product(range(2), range(2)):
            theirs, ours = f"swin.encoder.layers.{i}.blocks.{j}", f"layers.{i}.blocks.{j}"
            pairs |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in inside.items()}
            attention = model.get_submodule(f"{theirs}.attention")
            table = state[f"{ours}.attn.relative_position_bias_table"]
            attention.relative_position_bias.relative_position_bias_table.copy_(table)
            for name in ("weight", "bias"):
                for part, chunk in zip("qkv", state[f"{ours}.attn.qkv.{name}"].chunk(3), strict=True):
                    getattr(getattr(attention, f"{part}_proj"), name).copy_(chunk)
        for theirs, ours in pairs.items():
            for name, parameter in model.get_submodule(theirs).named_parameters():
                parameter.copy_(state[f"{ours}.{name}"])
        images = swin_images("shifted")
        torch.testing.assert_close(model(images).logits, source(images), rtol=1e-4, atol=1e-5)
        expected, found = vitq.quantize(source, images), vitq.quantize(model, images)
        assert_bitwise_equal(found(images).logits, expected(images))


def test_a_swin_of_partial_windows_is_refused() -> None:
    config = transformers.SwinConfig(
        image_size=40, patch_size=4, embed_dim=16, depths=[2], num_heads=[1], window_size=4, num_labels=3
    )
    with pytest.raises(UnsupportedModelError, match=r"a map of \(10, 10\) tokens is not whole windows of 4x4"):
        model_parts(transformers.SwinForImageClassification(config))


def test_a_swin_refuses_other_maps() -> None:
    with pytest.raises(ValueError, match=r"images must make a map of \(8, 8\) tokens here, got \(12, 8\)"):
        quantized("swin")(torch.zeros(1, 3, 48, 32))


def test_rotation_and_presets_are_of_timm() -> None:
    model, images = hf_model("vit"), hf_images(2)
    with pytest.raises(UnsupportedModelError, match="rotate: model must be a timm VisionTransformer, got ViTFor"):
        vitq.rotate(model)
    with pytest.raises(UnsupportedModelError, match=r"simulate: model must be a timm VisionTransformer, .*got ViTFor"):
        simulate(model, images, "fq-vit", 8, 8)
