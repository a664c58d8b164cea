"""Blocks that differ from plain ViT's: on integers, the same ones everywhere, saved, scored, and as the model is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vit_variants import FEATURES, images, quantized, variant_model

import vitq_kernels as vitq
from tests.numerics import assert_bitwise_equal
from vitq_kernels.compensation import float_block
from vitq_kernels.lrp_attnlrp import ATTNLRP
from vitq_kernels.lrp_chefer import CHEFER
from vitq_kernels.models import build_model, model_config, model_parts, model_sites
from vitq_kernels.nn import QuantBlock, QuantLinear
from vitq_kernels.ops import use_backend
from vitq_kernels.relevance_program import run_with_rules
from vitq_kernels.sensitivity_runs import sensitivity
from vitq_kernels.simulation import simulated

# One of a kind; the deployed forms are made of these.
SOME = ("qk-norm", "norm-in-attention", "swiglu-norm", "gate-last", "rms-norm")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


# --- on integers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_w8a8_is_near_the_float_model(feature: str) -> None:
    model, qmodel, fresh = variant_model(feature), quantized(feature), images(seed=77)
    assert not model_parts(model).left_in_float
    assert all(isinstance(block, QuantBlock) for block in qmodel.blocks)
    assert cosine(qmodel(fresh), model(fresh)) >= 0.999


@pytest.mark.parametrize("feature", FEATURES)
def test_all_products_are_integer(feature: str) -> None:
    """No linear of a block is float any more, and attention multiplies codes."""
    seen = []

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    qmodel = quantized(feature)
    x = model_parts(variant_model(feature)).tokens(images(2))
    arguments = model_parts(variant_model(feature)).blocks[0].arguments
    with Ops():
        qmodel.blocks[0](x, **arguments)
    assert not any(isinstance(m, nn.Linear) for m in qmodel.blocks.modules())
    assert seen.count("vitq::attention") == 1
    assert sum(name.startswith("vitq::linear") for name in seen) == 4
    assert not [name for name in seen if name.startswith(("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"))]


@pytest.mark.parametrize("feature", FEATURES)
def test_backends_give_the_same_codes(feature: str) -> None:
    """What enters every product: exact where S3 lies not before, else at most one code apart."""
    qmodel, batch = quantized(feature), images(2, seed=9)
    found: dict[str, list[Tensor]] = {"reference": [], "cpu": []}
    for backend, kept in found.items():
        handles = [
            module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            for module in qmodel.blocks.modules()
            if isinstance(module, QuantLinear)
        ]
        with use_backend(backend):
            qmodel(batch)
        for handle in handles:
            handle.remove()
    for a, b in zip(*found.values(), strict=True):
        assert a.dtype == torch.int8
        apart = (a.int() - b.int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).double().mean() <= 1e-3


def test_reference_runs_the_norms_and_gates_on_the_same_floats() -> None:
    qmodel, batch = quantized("swiglu-packed"), images(3, seed=9)
    expected = qmodel(batch)
    with use_backend("reference"):
        assert_bitwise_equal(qmodel(batch), expected)


@pytest.mark.parametrize("feature", SOME)
def test_narrow_widths_convert(feature: str) -> None:
    model, fresh = variant_model(feature), images(seed=77)
    assert 0.5 < cosine(quantized(feature, 4, 4)(fresh), model(fresh)) < 0.9999


# --- the model as it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_float_block_is_the_models_block(feature: str) -> None:
    model, parts = variant_model(feature), model_parts(variant_model(feature))
    x = parts.tokens(images(2))
    for block, own in zip(parts.blocks, model.blocks, strict=True):
        found = float_block(block, x).out
        torch.testing.assert_close(found, own(x, **block.arguments), rtol=1e-5, atol=2e-5)
        x = found


@pytest.mark.parametrize("feature", FEATURES)
def test_a_saved_model_is_the_same_model(feature: str, tmp_path: Path) -> None:
    batch = images(3)
    vitq.save(quantized(feature), tmp_path / "m.safetensors")
    assert_bitwise_equal(vitq.load(tmp_path / "m.safetensors")(batch), quantized(feature)(batch))


@pytest.mark.parametrize("feature", FEATURES)
def test_simulation_without_quantizers_is_the_float_model(feature: str) -> None:
    model, batch = variant_model(feature), images(3)
    torch.testing.assert_close(simulated(model)(batch), model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature", SOME)
def test_sensitivity_reaches_every_site(feature: str) -> None:
    model = variant_model(feature)
    found = sensitivity(model, images(4), part="both", candidates=(2, 8))
    blocks = [site.name for site in model_sites(model) if site.in_block]
    assert list(found.kl) == blocks
    assert all(wide < narrow for narrow, wide in found.kl.values())


@pytest.mark.parametrize("feature", SOME)
def test_a_model_exports(feature: str) -> None:
    qmodel, batch = quantized(feature), images(3)
    program = torch.export.export(qmodel, (batch,))
    assert_bitwise_equal(program.module()(batch), qmodel(batch))
    assert sum("vitq.attention" in str(node.target) for node in program.graph.nodes) == len(qmodel.blocks)


# --- relevance ----------------------------------------------------------------------------------------------------


def found_relevance(feature: str, rules) -> tuple[dict[str, Tensor], Tensor, Tensor, nn.Module]:
    """Sums of relevance of each image at every site, and at the pixels; the logits; the model."""
    model, sums = variant_model(feature, dtype=torch.float64), {}
    batch = images(2).double().requires_grad_()
    with torch.enable_grad():
        logits = run_with_rules(
            model_parts(model), rules, batch, lambda name, r, _: sums.setdefault(name, r.flatten(1).sum(1))
        )
        start = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        (flowed,) = torch.autograd.grad(logits, batch, start)
    return sums, rules.relevance(batch.detach(), flowed).flatten(1).sum(1), logits.detach(), model


@pytest.mark.parametrize("rules", [ATTNLRP, CHEFER], ids=["attnlrp", "chefer"])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_program_gives_the_models_logits(feature: str, rules) -> None:
    sums, pixels, logits, model = found_relevance(feature, rules)
    torch.testing.assert_close(logits, model(images(2).double()), rtol=1e-9, atol=1e-9)
    assert set(sums) == {site.name for site in model_sites(model)}
    assert bool(pixels.isfinite().all())


@pytest.mark.parametrize("feature", FEATURES)
def test_chefer_conserves_between_sites(feature: str) -> None:
    """Norms, rotations, gates and activations pass on what they get; each factor of a product gets half."""
    sums, *_ = found_relevance(feature, CHEFER)
    for block in ("blocks.0", "blocks.1"):
        qkv, qk, av, proj = (sums[f"{block}.attn.{name}"] for name in ("qkv", "qk", "av", "proj"))
        torch.testing.assert_close(av, proj, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(qkv, av / 2 + qk, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums[f"{block}.mlp.fc1"], sums[f"{block}.mlp.fc2"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in ("norm-in-mlp", "swiglu-norm", "eva02")])
def test_attnlrp_conserves_through_gates_and_activations(feature: str) -> None:
    """Σ y * g behind fc1 is Σ y * g at fc2's output less what fc2's bias takes: both halves of a gated fc1 count."""
    model = variant_model(feature, dtype=torch.float64)
    for block in model.blocks:
        if block.mlp.fc2.bias is not None:
            block.mlp.fc2.bias.zero_()
    sums: dict[str, Tensor] = {}
    batch = images(2).double().requires_grad_()
    with torch.enable_grad():
        logits = run_with_rules(
            model_parts(model), ATTNLRP, batch, lambda name, r, _: sums.setdefault(name, r.flatten(1).sum(1))
        )
        torch.autograd.grad(logits, batch, F.one_hot(logits.argmax(1), logits.shape[1]).to(logits))
    for block in ("blocks.0", "blocks.1"):
        torch.testing.assert_close(sums[f"{block}.mlp.fc1"], sums[f"{block}.mlp.fc2"], rtol=1e-9, atol=1e-9)


# --- the skeleton -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_config_builds_modules_of_the_same_shapes(feature: str) -> None:
    model = variant_model(feature)
    built = build_model(model_config(model))
    scales = (".ls1.gamma", ".ls2.gamma", ".gamma_1", ".gamma_2")  # folded when a model is quantized

    def shapes(of: nn.Module) -> dict[str, torch.Size]:
        return {name: t.shape for name, t in of.state_dict().items() if not name.endswith(scales)}

    assert shapes(built) == shapes(model)
