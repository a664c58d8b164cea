"""LayerNorm in one op with the projection before it: the same integers, whoever runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitq_kernels as vitq
from tests.conftest import BackendCase
from tests.numerics import assert_bitwise_equal
from tests.small_swins import quantized_swin, swin_images
from tests.small_vits import variant_images, variant_quantized
from tests.vit_variants import images, quantized
from vitq_kernels.nn import QuantBlock
from vitq_kernels.ops.cuda.tiles import TILES, Plan, forced

FUSED = "linear_residual_layernorm"
LAST_TILE = Plan(len(TILES) - 1, norm=True)


class Called(TorchDispatchMode):
    """Counts the ``vitq::`` ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vitq":
            name = func._schema.name.removeprefix("vitq::")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def outputs_and_ops(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, int]]:
    with torch.no_grad(), Called() as called:
        logits = model(images)
    return logits, called.counts


@pytest.mark.parametrize("variant", ["class-token", "layer-scale", "distilled"])
def test_a_vit_gives_the_same_bits(variant: str) -> None:
    model, images = copy.deepcopy(variant_quantized(variant)), variant_images(variant, count=3)
    expected, apart = outputs_and_ops(model, images)
    blocks = len(model.blocks)
    assert vitq.fuse_layernorm(model) == blocks
    got, together = outputs_and_ops(model, images)
    assert_bitwise_equal(got, expected)
    assert together[FUSED] == blocks
    assert together["linear_residual"] == apart["linear_residual"] - blocks
    assert together["layernorm"] == apart["layernorm"] - blocks
    assert vitq.fuse_layernorm(model, fused=False) == blocks
    assert outputs_and_ops(model, images)[1] == apart


@pytest.mark.parametrize("variant", ["shifted", "odd-sides"])
def test_windows_give_the_same_bits(variant: str) -> None:
    model, images = copy.deepcopy(quantized_swin(variant)), swin_images(variant, 2)
    expected = model(images)
    assert vitq.fuse_layernorm(model) == 4
    assert_bitwise_equal(model(images), expected)


def test_norms_behind_attention_are_left_alone() -> None:
    model, images = copy.deepcopy(quantized_swin("v2-padded")), swin_images("v2-padded", 2)
    expected, ops = outputs_and_ops(model, images)
    assert vitq.fuse_layernorm(model) == 0
    got, same = outputs_and_ops(model, images)
    assert_bitwise_equal(got, expected)
    assert same == ops


def test_a_norm_that_is_no_layernorm_is_left_alone() -> None:
    model, given = copy.deepcopy(quantized("rms-norm")), images(2)
    expected = model(given)
    assert vitq.fuse_layernorm(model) == 0
    assert_bitwise_equal(model(given), expected)


def test_it_compiles_and_is_exported() -> None:
    model, images = copy.deepcopy(variant_quantized("class-token")), variant_images(count=4)
    vitq.fuse_layernorm(model)
    expected = model(images)
    assert_bitwise_equal(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)
    program = torch.export.export(model, (images,))
    assert f"vitq.{FUSED}.default" in {str(node.target) for node in program.graph.nodes}
    assert_bitwise_equal(program.module()(images), expected)


def test_a_checkpoint_does_not_know(tmp_path: Any) -> None:
    model, images = copy.deepcopy(variant_quantized("class-token")), variant_images(count=2)
    vitq.fuse_layernorm(model)
    vitq.save(model, tmp_path / "model.safetensors")
    loaded = vitq.load(tmp_path / "model.safetensors")
    assert not any(module.fused_norm for module in loaded.modules() if isinstance(module, QuantBlock))
    assert_bitwise_equal(loaded(images), model(images))


def test_hoppers_launch_gives_the_block_of_two(emulated: BackendCase) -> None:
    """On the kernel in its emulation: the residual stream differs where a code does, by the MLP of it."""
    block, x = copy.deepcopy(variant_quantized("class-token").blocks[0]), torch.randn(2, 17, 32)
    with vitq.use_backend("cuda"), forced(LAST_TILE):
        apart = block(x)
        vitq.fuse_layernorm(block)
        together = block(x)
    assert (together != apart).float().mean() < 0.1
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-2)
