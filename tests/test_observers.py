"""Observers: ranges chosen as configured, extremes exact over all tokens, moments and tau errors by direct sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.numerics import assert_bitwise_equal, integers, reals, uniform
from tests.twins import level_table
from vitq_kernels.config import QuantConfig
from vitq_kernels.observers import (
    ERROR_TOKENS,
    PERCENTILES,
    WIDTHS,
    ChannelSample,
    InputMoments,
    RangeStats,
    tau_errors,
)
from vitq_kernels.quantizers import affine_quantizer, log2_steps

CPU = torch.device("cpu")


def sampled(*batches: Tensor, keep: int = 1 << 30, seed: int = 0) -> ChannelSample:
    """A sample that saw the batches [T, C]."""
    sample, generator = ChannelSample.empty(batches[0].shape[1], CPU), torch.Generator().manual_seed(seed)
    for batch in batches:
        sample.add(batch, keep, generator)
    return sample


# --- which range --------------------------------------------------------------------------------------------------


def made_up_ranges(channels: int = 3) -> RangeStats:
    """Range i is [-1 - i, 1 + i]; at width b the least error is at range (b + channel) % 3."""
    i = torch.arange(3.0)[:, None].expand(3, channels)
    error = torch.ones(len(WIDTHS), 3, channels)
    for j, bits in enumerate(WIDTHS):
        for channel in range(channels):
            error[j, (bits + channel) % 3, channel] = 0.5
    return RangeStats(-1 - i, 1 + i, error)


@pytest.mark.parametrize(
    ("config", "bits", "index"),
    [
        (QuantConfig(observer="minmax"), 2, 2),
        (QuantConfig(observer="minmax"), 8, 2),
        (QuantConfig(observer="percentile", percentile=0.999), 8, 0),
        (QuantConfig(observer="percentile", percentile=0.9999), 3, 1),
        (QuantConfig(observer="percentile"), 8, 1),
        (QuantConfig(observer="percentile", percentile=1.0), 4, 2),
        (QuantConfig(observer="percentile", percentile=0.9), 4, 0),  # the nearest that was kept
        (QuantConfig(), 6, 2),
        (QuantConfig(), 8, 2),
    ],
    ids=["minmax-2", "minmax-8", "p999", "p9999", "default-p", "p1", "p9-nearest", "default-6-minmax", "default-8"],
)
def test_observer_takes_its_range_for_every_channel(config: QuantConfig, bits: int, index: int) -> None:
    low, high = made_up_ranges().choose(bits, config)
    assert low.tolist() == [-1.0 - index] * 3
    assert high.tolist() == [1.0 + index] * 3


@pytest.mark.parametrize("bits", WIDTHS)
def test_mse_takes_the_least_error_of_each_channel_at_that_width(bits: int) -> None:
    low, high = made_up_ranges().choose(bits, QuantConfig(observer="mse"))
    assert high.tolist() == [1.0 + (bits + channel) % 3 for channel in range(3)]
    assert low.tolist() == (-high).tolist()


@pytest.mark.parametrize("bits", [2, 5])
def test_below_six_bits_least_squares_is_the_default(bits: int) -> None:
    stats = made_up_ranges()
    for default, mse in zip(
        stats.choose(bits, QuantConfig()), stats.choose(bits, QuantConfig(observer="mse")), strict=True
    ):
        assert_bitwise_equal(default, mse)


# --- candidate ranges ---------------------------------------------------------------------------------------------


def test_percentiles_are_order_statistics() -> None:
    x = torch.stack((torch.arange(20001.0), -(torch.arange(20001.0) ** 2), reals("outlier", (20001,), seed=1)), 1)
    stats = sampled(x[integers(0, 1 << 30, (20001,), 1).argsort()]).ranges()
    for i, p in enumerate(PERCENTILES):
        np.testing.assert_array_equal(stats.high[i].numpy(), np.quantile(x.numpy(), p, axis=0, method="nearest"))
        np.testing.assert_array_equal(stats.low[i].numpy(), np.quantile(x.numpy(), 1 - p, axis=0, method="nearest"))
    assert stats.high[:, 0].tolist() == [19980.0, 19998.0, 20000.0]


def test_extremes_are_of_all_tokens_however_few_are_kept() -> None:
    batches = [reals("normal", (1000, 3), seed=i) for i in range(4)]
    batches[2][777] = torch.tensor([50.0, -60.0, 0.0])
    sample = sampled(*batches, keep=5)
    assert [len(t) for t in sample.tokens] == [5] * 4
    assert not (torch.cat(sample.tokens).abs() > 10).any()  # the sample missed them
    stats = sample.ranges()
    assert_bitwise_equal(stats.low[-1], torch.cat(batches).amin(0))
    assert_bitwise_equal(stats.high[-1], torch.cat(batches).amax(0))
    assert stats.high[0].max() < 10


def test_mean_is_of_all_tokens_and_does_not_drown() -> None:
    batches = [1e4 + reals("normal", (1000, 2), seed=i) for i in range(30)]
    expected = torch.cat(batches).double().mean(0)
    assert_bitwise_equal(sampled(*batches, keep=1).mean, expected.float())


def test_errors_are_those_of_quantizing_over_each_range() -> None:
    x = reals("outlier", (ERROR_TOKENS, 4), seed=3) * torch.tensor([1.0, 0.01, 1.0, 100.0])
    stats = sampled(x).ranges()
    assert stats.error.shape == (len(WIDTHS), len(PERCENTILES), 4)
    for i, bits in enumerate(WIDTHS):
        for j in range(len(PERCENTILES)):
            q = affine_quantizer(stats.low[j], stats.high[j], bits)
            codes = (x.double() / q.scale + q.zero_point).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
            expected = ((codes - q.zero_point) * q.scale - x).square().mean(0)
            torch.testing.assert_close(stats.error[i, j].double(), expected, rtol=2e-3, atol=0)


def test_least_squares_clips_a_lonely_outlier_at_few_bits_only() -> None:
    x = uniform(-1, 1, (2000, 1), 1)
    x[5] = 4.0  # p = .999 leaves it out
    stats = sampled(x).ranges()
    config = QuantConfig(observer="mse")
    assert stats.choose(2, config)[1].item() < 1.1
    assert stats.choose(8, config)[1].item() == 4.0


def test_the_sample_is_a_function_of_the_seed() -> None:
    x = reals("normal", (500, 3), seed=1)
    kept = [torch.cat(sampled(x, keep=20, seed=seed).tokens) for seed in (0, 0, 1)]
    assert_bitwise_equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    rows = {tuple(row) for row in x.tolist()}
    assert {tuple(row) for row in kept[0].tolist()} <= rows
    assert len({tuple(row) for row in kept[0].tolist()}) == 20  # without replacement


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    x = torch.zeros(4, 3)
    x[2, 1] = value
    with pytest.raises(ValueError, match="activations must be finite, got NaN or Inf"):
        sampled(x)


def test_a_sample_keeps_no_view_of_the_activations() -> None:
    x = torch.zeros(4, 3)
    sample = sampled(x)
    x += 1
    assert sample.tokens[0].abs().max() == 0


# --- moments ------------------------------------------------------------------------------------------------------

INPUTS = {
    "bell-shaped": lambda: reals("normal", (300, 9), seed=1),
    "outlier": lambda: reals("outlier", (300, 9), seed=2),
    "one-sided": lambda: reals("one_sided", (300, 9), seed=3),
    "off-centre": lambda: reals("normal", (300, 9), seed=4) + 1000.0,
    # Codes less zero points of channels that hardly vary: squares of 2^22 drown a variance of 1 in float32.
    "far-zero-points": lambda: integers(-3, 3, (300, 9), 5).float() + 4194304.0 * torch.tensor([1.0, -1.0, 0.5] * 3),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", INPUTS)
def test_moments_are_the_direct_sums(kind: str, weighted: bool) -> None:
    x = INPUTS[kind]()
    weight = uniform(0.5, 8, (300,), 7) if weighted else torch.ones(300)
    moments = InputMoments.empty(9, CPU)
    for part, w in zip(x.split([1, 150, 149]), weight.split([1, 150, 149]), strict=True):
        moments.add(part, w if weighted else None)
    exact = x.double()
    mean = exact.mean(0)  # unweighted, whatever the weights
    centred = exact - mean
    covariance = (centred * weight.double()[:, None]).t() @ centred / weight.double().sum()
    torch.testing.assert_close(moments.mean, mean, rtol=1e-7, atol=1e-7)
    spread = covariance.diagonal().sqrt()
    wrong = (moments.covariance - covariance).abs() / torch.outer(spread, spread)
    assert wrong.max() < 1e-4, wrong.max()
    assert torch.linalg.eigvalsh(moments.covariance / torch.outer(spread, spread)).min() > -1e-5


def test_one_token_has_no_covariance() -> None:
    moments = InputMoments.empty(4, CPU)
    moments.add(torch.tensor([[1e6, 3.3, -0.1, 0.0]]))
    assert moments.covariance.abs().max() == 0
    torch.testing.assert_close(moments.mean, torch.tensor([1e6, 3.3, -0.1, 0.0]).double(), rtol=1e-7, atol=0)


def test_moments_leave_the_inputs_alone() -> None:
    x = reals("normal", (5, 4), seed=1)
    before = x.clone()
    moments = InputMoments.empty(4, CPU)
    moments.add(x, torch.full((5,), 2.0))
    moments.add(x)
    assert_bitwise_equal(x, before)


# --- tau ----------------------------------------------------------------------------------------------------------


def direct_tau_error(qkv: Tensor, head: int, heads: int, scale: float, bits: int, tau: float) -> float:
    """One entry of ``tau_errors``, query by query in float64."""
    b, s, width = qkv.shape
    dim = width // (3 * heads)
    table = level_table(bits, tau)
    total = 0.0
    for image in qkv.double():
        q, k, v = (image[:, (i * heads + head) * dim : (i * heads + head + 1) * dim] for i in range(3))
        for query in q:
            scores = (k @ query) * scale
            exact = torch.softmax(scores, 0) @ v
            distance = (scores.max() - scores) * math.log2(math.e)
            levels = torch.tensor([table[min(round(d / tau), len(table) - 1)] for d in distance.tolist()])
            got = levels.double() @ v / levels.sum()
            total += float((got - exact).square().sum())
    return total / (b * s * dim)


def test_tau_errors_are_those_of_the_attention_output() -> None:
    heads, dim, scale = 2, 4, 0.5
    qkv = reals("normal", (2, 7, 3 * heads * dim), seed=6) * 2
    qkv[..., :dim] *= 4  # the first head is sharp
    found = tau_errors(*qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4), scale)
    assert found.shape == (len(WIDTHS), 5, heads)
    for i, bits in enumerate(WIDTHS):
        steps = log2_steps(bits)
        assert torch.isinf(found[i, len(steps) :]).all()
        for j, tau in enumerate(steps):
            for head in range(heads):
                expected = direct_tau_error(qkv, head, heads, scale, bits, tau)
                assert found[i, j, head].item() == pytest.approx(expected, rel=1e-3), (bits, tau, head)
    assert found[-1].amin(0).max() < 0.05 * found[0].amin(0).max()  # eight bits are far better than two
