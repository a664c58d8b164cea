"""Weights fitted to targets: the normal equations, their limits, and the float block they take targets from."""

from __future__ import annotations

import pytest
import torch
from random_vits import VARIANTS
from small_vits import variant_images, variant_vit
from torch import Tensor

from tests.numerics import reals, uniform
from vitq_kernels.compensation import compensated, float_block, mean_output
from vitq_kernels.models import model_parts
from vitq_kernels.observers import InputMoments


def problem(seed: int = 0, tokens: int = 300, k: int = 6, n: int = 4) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A weight [N, K] and three batches of inputs [b, S, K], far from zero, and of token weights."""
    x = 3 * reals("normal", (3, tokens // 30, 10, k), seed=seed) + 5
    a = uniform(0.5, 9.0, (3, tokens // 30, 10), seed + 1)
    return reals("normal", (n, k), seed=seed + 2), list(x), list(a)


def moments_of(inputs: list[Tensor], weights: list[Tensor]) -> InputMoments:
    moments = InputMoments.empty(inputs[0].shape[-1], torch.device("cpu"))
    for x, a in zip(inputs, weights, strict=True):
        moments.add(x.flatten(0, -2), a.flatten())
    return moments


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_it_solves_the_ridge_regression(ridge: float) -> None:
    weight, inputs, weights = problem()
    targets = [reals("normal", (*x.shape[:-1], 4), seed=9 + i) + x[..., :4] for i, x in enumerate(inputs)]
    moments = moments_of(inputs, weights)
    found = compensated(weight, inputs, targets, weights, moments, ridge).double()
    x, y, a = (torch.cat([t.double().flatten(0, -2) if t.dim() == 3 else t.double().flatten() for t in group])
               for group in (inputs, targets, weights))  # fmt: skip
    v = found.clone().requires_grad_()
    left = (y - y.mean(0)) - (x - x.mean(0)) @ v.t()
    scale = moments.covariance.diagonal().mean()
    loss = (a[:, None] * left.square()).sum() / a.sum() + ridge * scale * (v - weight.double()).square().sum()
    loss.backward()
    assert v.grad.abs().max() < 1e-4 * float(scale)  # at the optimum; float32 sums


def test_outputs_that_are_right_leave_the_weight_alone() -> None:
    weight, inputs, weights = problem()
    targets = [x @ weight.t() + 7 for x in inputs]  # a constant is the bias's business
    found = compensated(weight, inputs, targets, weights, moments_of(inputs, weights), 0.01)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-4)


def test_a_small_ridge_finds_other_weights_and_a_large_one_keeps_these() -> None:
    weight, inputs, weights = problem()
    other = reals("normal", weight.shape, seed=77)
    targets = [x @ other.t() for x in inputs]
    moments = moments_of(inputs, weights)
    torch.testing.assert_close(
        compensated(weight, inputs, targets, weights, moments, 1e-9), other, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(compensated(weight, inputs, targets, weights, moments, 1e9), weight)


def test_inputs_that_never_vary_change_nothing() -> None:
    weight, inputs, weights = problem()
    inputs = [torch.full_like(x, 4.0) for x in inputs]
    targets = [reals("normal", (*x.shape[:-1], 4), seed=1) for x in inputs]
    found = compensated(weight, inputs, targets, weights, moments_of(inputs, weights), 1.0)
    torch.testing.assert_close(found, weight)


def test_mean_output_counts_every_token_once() -> None:
    targets = [torch.full((2, 3, 2), 1.0), torch.full((1, 4, 2), 6.0)]
    assert mean_output(targets).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_block_is_the_models_block(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 2)
    parts = model_parts(model)
    with torch.no_grad():
        x = parts.tokens(images)
        for block, own in zip(parts.blocks, model.blocks, strict=True):
            found = float_block(block, x)
            middle = x + own.ls1(own.attn(own.norm1(x)))
            torch.testing.assert_close(found.qkv, own.attn.qkv(own.norm1(x)))
            torch.testing.assert_close(found.middle, middle, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.fc1, own.mlp.fc1(own.norm2(middle)), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.out, own(x), rtol=1e-5, atol=1e-5)
            x = found.out
