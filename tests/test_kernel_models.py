"""Whole models on our kernels: every module gives the integers of the cpu backend on the same inputs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vitq_kernels as vitq
from tests.conftest import BackendCase
from tests.numerics import assert_bitwise_equal, assert_codes_close
from tests.small_swins import quantized_swin, swin_images
from vitq_kernels.data import digits_images, load_digits_vit
from vitq_kernels.images import eval_transform, load_folder
from vitq_kernels.nn import PackedLinear, QuantAttention, QuantLayerNorm, QuantLinear, QuantPatchEmbed
from vitq_kernels.ops import BackendUnavailableError, use_backend
from vitq_kernels.ops.backends import BACKENDS

BOUNDED = (QuantLayerNorm,)  # docs/semantics.md; and linears with GELU


def compared_modules(model: nn.Module, images: Tensor, case: BackendCase) -> dict[str, int]:
    """Runs a model on the cpu backend; every module's output is compared with the other backend's on the same input.

    Returns:
        How many modules of each type were compared bit for bit.
    """
    exact: dict[str, int] = {}
    modules, plain = (dict(copy.deepcopy(model).to(device).named_modules()) for device in (case.device, "cpu"))

    def compare(name: str, module: nn.Module, arguments: tuple[Tensor | None, ...], expected: Tensor) -> None:
        if case.device != "cpu" and isinstance(module, QuantAttention) and module.codes is not None:
            return  # torch's norm of q and k sums in another order there
        with use_backend(case.name):
            got = modules[name](*(t.to(case.device) for t in arguments if t is not None)).cpu()
            if isinstance(module, QuantAttention):
                codes = modules[name].attend(arguments[0].to(case.device)).cpu()
                with use_backend("cpu"):
                    assert_bitwise_equal(codes, plain[name].attend(arguments[0]))
        if isinstance(module, BOUNDED) or (isinstance(module, QuantLinear) and module.epilogue.startswith("gelu")):
            assert_codes_close(got, expected)
        else:
            assert_bitwise_equal(got, expected)
            exact[type(module).__name__] = exact.get(type(module).__name__, 0) + 1

    kinds = (PackedLinear, QuantLayerNorm, QuantAttention, QuantPatchEmbed)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda m, args, out, name=name: compare(name, m, args, out))
    with torch.no_grad(), use_backend("cpu"):
        model(images)
    return exact


def test_the_demo_model(kernels: BackendCase) -> None:
    model = load_digits_vit()
    calibration, _ = digits_images("calibration")
    scores = vitq.relevance(model, calibration)
    bits = vitq.allocate(model, scores, vitq.Budget(mean_weight_bits=3), images=calibration)
    qmodel = vitq.quantize(model, calibration, bits)
    images, _ = digits_images("test")
    found = compared_modules(qmodel, images[:4], kernels)
    assert found == {"QuantPatchEmbed": 1, "QuantLinear": 1 + 4 * 3 + 1, "QuantAttention": 4}


@pytest.mark.assets
def test_a_block_of_the_real_vit_tiny(assets: Path, kernels: BackendCase) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    state = load_file(next(assets.glob("vit_tiny_patch16_224*.safetensors")))
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("blocks") or k.startswith("blocks.0.")})
    transform = eval_transform(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    calibration, _ = load_folder(assets / "calibration", transform, limit=8, seed=0)
    scores = vitq.relevance(model, calibration)
    bits = vitq.allocate(model, scores, vitq.Budget(mean_weight_bits=4), images=calibration)
    qmodel = vitq.quantize(model, calibration, bits)
    assert any(site.weight and len(set(site.weight.bits)) > 1 for site in bits.sites.values())
    found = compared_modules(qmodel, calibration[:1], kernels)
    assert found == {"QuantPatchEmbed": 1, "QuantLinear": 1 + 3 + 1, "QuantAttention": 1}


@pytest.mark.parametrize("variant", ["shifted", "odd-sides", "v2-padded"])
def test_a_small_swin(variant: str, kernels: BackendCase) -> None:
    """Every integer output, windows with shift, padding, bias and mask included."""
    found = compared_modules(copy.deepcopy(quantized_swin(variant)), swin_images(variant, 2), kernels)
    attentions = 0 if variant == "v2-padded" and kernels.device != "cpu" else 4
    assert found.pop("QuantWindowAttention", 0) == attentions
    assert found == {"QuantPatchEmbed": 1, "QuantLinear": 1 + 4 * 3 + 1 + 1}


def test_a_model_waits_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a process that does not interpret: weights are made on the CPU, where the backend does not run.
    monkeypatch.setattr(BACKENDS["triton"].load(), "unavailable", lambda device: "is elsewhere")
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    with use_backend("triton"):
        model = vitq.replace_linears(nn.Sequential(nn.Linear(32, 8)))
        model.load_state_dict(model.state_dict())
        with pytest.raises(BackendUnavailableError, match="backend triton is elsewhere"):
            model(x)
    assert model(x).shape == (3, 8)


def test_a_head_dim_beyond_the_kernels_is_named(kernels: BackendCase) -> None:
    limit = {"triton": 256, "cuda": 128}[kernels.name]
    q = torch.zeros(1, 1, 2, 320, dtype=torch.int8, device=kernels.device)
    vectors = (torch.ones(1), torch.full((1, 4), 255, dtype=torch.uint8), torch.ones(1, 320))
    arguments = (*vectors, torch.zeros(1, 320, dtype=torch.int32))
    message = f": backend {kernels.name} takes head dims up to {limit}, got 320; can: reference$"
    with use_backend(kernels.name), pytest.raises(BackendUnavailableError, match=message):
        torch.ops.vitq.attention(q, q, q, *(t.to(kernels.device) for t in arguments), None, None, 8)
