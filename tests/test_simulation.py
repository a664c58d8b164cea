"""The simulated model: the float model until a quantizer is set, under the sites' own names."""

from __future__ import annotations

import pytest
import torch
from random_vits import VARIANTS
from small_vits import small_vit, variant_images, variant_vit
from torch import Tensor, nn

from vitq_kernels.models import UnsupportedModelError, model_sites
from vitq_kernels.simulation import SimulatedAttention, SimulatedLinear, SimulatedPatchEmbed, simulated


class Zero(nn.Module):
    """A quantizer whose only code stands for 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_quantizers_it_is_the_float_model(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        torch.testing.assert_close(simulated(model)(images), model(images), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", ["class-token", "distilled", "average-pool"])
def test_every_site_has_its_module(variant: str) -> None:
    model = variant_vit(variant)
    copy = simulated(model)
    for site in model_sites(model):
        if site.has_weight:
            module = copy.get_submodule(site.name)
            assert isinstance(module, SimulatedLinear | SimulatedPatchEmbed)
            assert module.weight.flatten(1).shape == (site.rows, site.cols)
        else:
            assert isinstance(copy.get_submodule(site.name.rpartition(".")[0]), SimulatedAttention)


@pytest.mark.parametrize(
    "place",
    ["patch_embed.proj.input", "head.input"]
    + [f"blocks.1.{p}" for p in ("attn.qkv.input", "attn.query", "attn.key", "attn.value", "attn.probability")]
    + [f"blocks.1.{p}" for p in ("attn.proj.input", "mlp.fc1.input", "mlp.fc2.input")],
)
def test_every_quantizer_is_used(place: str) -> None:
    model, images = variant_vit("class-token"), variant_images(count=2)
    copy = simulated(model)
    before = copy(images)
    copy.set_submodule(place, Zero())
    assert not torch.equal(copy(images), before)


def test_the_copy_shares_nothing_with_the_model() -> None:
    model = variant_vit("class-token")
    copy = simulated(model)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in copy.state_dict().values()}


def test_a_mask_is_refused() -> None:
    copy = simulated(variant_vit("class-token"))
    with pytest.raises(ValueError, match="attn_mask and is_causal must be absent"):
        copy.blocks[0].attn(torch.zeros(1, 5, 32), is_causal=True)


def test_a_model_with_parts_without_sites_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        simulated(small_vit(act_layer="elu"))
