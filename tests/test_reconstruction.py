"""Block reconstruction: its float twin is the integer block, and what it fits holds on images it has not seen."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitq_kernels as vitq
from tests.command_line import invoke, make_files, run
from tests.numerics import assert_bitwise_equal
from tests.small_vits import variant_images, variant_quantized, variant_vit
from vitq_kernels.config import QuantConfig
from vitq_kernels.convert import quantize
from vitq_kernels.models import model_sites
from vitq_kernels.nn import QuantBlock
from vitq_kernels.reconstruction import BlockTwin, reconstruct
from vitq_kernels.spec import BitAllocation

FITTED = ("multiplier", "bias_q")


def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """What enters the first block."""
    with torch.no_grad():
        return model._pos_embed(model.patch_embed(images))


def first_block(variant: str, bits: tuple[int, int]) -> tuple[QuantBlock, list[Tensor]]:
    """A block of its own and the batches that enter it."""
    model = variant_quantized(variant, *bits)
    return copy.deepcopy(model.blocks[0]), list(tokens(model, variant_images(variant)).split(8))


def targets_of(variant: str, images: Tensor) -> Tensor:
    model = variant_vit(variant)
    with torch.no_grad():
        return model.blocks[0](tokens(model, images))


@pytest.mark.parametrize("bits", [(4, 4), (3, 8), (8, 2)], ids=["w4a4", "w3a8", "w8a2"])
@pytest.mark.parametrize("variant", ["class-token", "layer-scale", "no-qkv-bias", "tanh-gelu"])
def test_the_twin_is_the_integer_block(variant: str, bits: tuple[int, int]) -> None:
    block, batches = first_block(variant, bits)
    with torch.no_grad():
        twin = BlockTwin(block, batches).double()
        for x in batches:
            error = (twin(x.double()) - block(x)).abs() / x.std()
            # A code on the edge between two may round either way: that moves one token's outputs by one code.
            assert (error > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("bits", [(4, 4), (4, 8)], ids=["levels", "codes"])
def test_gradients_reach_every_layer(bits: tuple[int, int]) -> None:
    block, batches = first_block("class-token", bits)
    twin = BlockTwin(block, batches)
    twin(batches[0]).square().mean().backward()
    for linear in twin.linears:
        for parameter in (linear.growth, linear.shift):
            assert (parameter.grad != 0).float().mean() > 0.5


def test_straight_through_gradients_are_those_of_fine_codes() -> None:
    """At 8 bits the rounded block is nearly the smooth one, so finite differences see most of the gradient."""
    block, batches = first_block("class-token", (8, 8))
    twin = BlockTwin(block, batches).double()
    x, step = torch.cat(batches).double(), 0.1
    direction = torch.randn_like(x, generator=torch.Generator().manual_seed(0))
    for linear in twin.linears:
        for parameter in (linear.growth, linear.shift):
            twin.zero_grad()
            (twin(x) * direction).sum().backward()
            toward = parameter.grad / parameter.grad.norm()
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * step * toward)
                    ends.append(float((twin(x) * direction).sum()))
                    parameter.sub_(sign * step * toward)
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(parameter.grad.norm()), rel=0.2)


def test_what_is_written_is_what_was_fitted() -> None:
    block, batches = first_block("class-token", (8, 4))
    with torch.no_grad():
        twin = BlockTwin(block, batches)
        for index, linear in enumerate(twin.linears):
            generator = torch.Generator().manual_seed(index)
            linear.growth.copy_(0.1 * torch.randn(linear.growth.shape, generator=generator))
            linear.shift.copy_(0.5 * torch.randn(linear.shift.shape, generator=generator))
        before = block(batches[0])
        for linear in twin.linears:
            linear.write()
        expected, actual = twin.double()(batches[0].double()).float(), block(batches[0])
    assert (actual - before).square().mean() > 0.05 * before.var()
    # A bias rounds to whole accumulator units and may carry a code across its rounding, so not all are equal.
    assert (actual - expected).square().mean() < 0.01 * (actual - before).square().mean()


@pytest.mark.parametrize("bits", [(4, 4), (3, 8)], ids=["w4a4", "w3a8"])
@pytest.mark.parametrize("variant", ["class-token", "layer-scale"])
def test_the_block_comes_nearer_on_fresh_images(variant: str, bits: tuple[int, int]) -> None:
    """After its scales and biases were disturbed, so that there is something to find."""
    block, _ = first_block(variant, bits)
    model, fresh = variant_quantized(variant, *bits), variant_images(variant, 64, seed=77)
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    for index, linear in enumerate(linears):
        linear.multiplier.mul_(
            1 + 0.2 * torch.rand(linear.multiplier.shape, generator=torch.Generator().manual_seed(index))
        )
    seen = variant_images(variant, 64)
    inputs, targets = (list(x.split(16)) for x in (tokens(model, seen), targets_of(variant, seen)))

    def error() -> float:
        with torch.no_grad():
            return float((block(tokens(model, fresh)) - targets_of(variant, fresh)).square().mean())

    before = error()
    codes = [linear.weight_codes() for linear in linears]
    reconstruct(block, inputs, targets, [torch.ones(x.shape[:2]) for x in inputs], 40)
    assert error() < 0.9 * before
    for linear, kept in zip(linears, codes, strict=True):
        assert_bitwise_equal(linear.weight_codes(), kept)


def test_tokens_count_as_they_are_weighted() -> None:
    seen, errors = variant_images("class-token", 64), []
    for weight in (1.0, 100.0):
        block, _ = first_block("class-token", (3, 4))
        inputs = list(tokens(variant_quantized("class-token", 3, 4), seen).split(16))
        targets = list(targets_of("class-token", seen).split(16))
        token_weights = [torch.ones(x.shape[:2]) for x in inputs]
        for a in token_weights:
            a[:, 0] = weight
        reconstruct(block, inputs, targets, token_weights, 40)
        with torch.no_grad():
            distance = torch.cat([block(x) - y for x, y in zip(inputs, targets, strict=True)]).square().mean(-1)
        errors.append((float(distance[:, 0].mean()), float(distance[:, 1:].mean())))
    (plain_read, plain_rest), (read, rest) = errors
    assert read < plain_read
    assert rest > plain_rest


def test_a_block_that_cannot_get_better_stays() -> None:
    block, batches = first_block("class-token", (4, 4))
    kept = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        targets = [block(x) for x in batches]
    reconstruct(block, batches, targets, [torch.ones(x.shape[:2]) for x in batches], 5)
    for name, tensor in block.state_dict().items():
        assert_bitwise_equal(tensor, kept[name])


# --- in conversion ------------------------------------------------------------------------------------------------


def converted(iterations: int) -> dict[str, Tensor]:
    model = variant_vit("class-token")
    allocation = BitAllocation.uniform(model_sites(model), 3, 8)
    config = QuantConfig(reconstruction=iterations)
    return quantize(model, variant_images(), allocation, config=config).state_dict()


def test_conversion_reconstructs_block_after_block() -> None:
    plain, fitted, again = converted(0), converted(20), converted(20)
    for name, tensor in fitted.items():
        assert_bitwise_equal(tensor, again[name])
    first = {name: tensor for name, tensor in plain.items() if name.startswith("blocks.0.")}
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, fitted[name])}
    assert changed
    assert all(name.endswith(FITTED) for name in changed)
    # The second block sees what comes out of the first, so its weights round in another way.
    assert not torch.equal(plain["blocks.1.attn.qkv.weight_packed"], fitted["blocks.1.attn.qkv.weight_packed"])


def test_no_iterations_change_nothing() -> None:
    for name, tensor in converted(0).items():
        assert_bitwise_equal(tensor, variant_quantized("class-token", 3, 8).state_dict()[name])


def test_without_images_there_is_nothing_to_fit() -> None:
    model = variant_vit("class-token")
    stats = vitq.calibrate(model, variant_images())
    plain, fitted = (quantize(model, stats=stats, config=QuantConfig(reconstruction=n)).state_dict() for n in (0, 5))
    for name, tensor in plain.items():
        assert_bitwise_equal(tensor, fitted[name])


def test_iterations_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="reconstruction must not be negative, got -1"):
        QuantConfig(reconstruction=-1)


def test_quantize_reconstructs_on_the_command_line(tmp_path: Path) -> None:
    work = make_files(tmp_path)
    data = ("--checkpoint", work / "float.safetensors", "--calibration", work / "calibration", "--weight-bits", 3)
    states = []
    for name, words in {"plain": (), "fitted": ("--reconstruct", 30)}.items():
        run("quantize", "vitq_test_tiny", *data, *words, "-o", work / name)
        states.append(vitq.load(work / name).state_dict())
    multipliers = [
        torch.cat([x.flatten() for name, x in state.items() if name.endswith("multiplier")]) for state in states
    ]
    assert not torch.equal(*multipliers)
    run("eval", work / "fitted", "--images", work / "flat", "--json", work / "e.json")
    assert json.loads((work / "e.json").read_text())["images"] == 18
    words = ("--reconstruct", 10, "--method", "repq-vit", "-o", work / "none")
    result = invoke("quantize", "vitq_test_tiny", *data, *words)
    assert result.code == 2
    assert result.err == "vitq: error: --reconstruct fits integer blocks, --method makes none\n"
