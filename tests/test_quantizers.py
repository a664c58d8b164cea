"""Quantizers against their definitions: ranges covered, q and k equalised, levels those of the twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import twins
from tests.numerics import assert_bitwise_equal, integers, reals, uniform
from vitq_kernels import ops
from vitq_kernels.quantizers import (
    ZERO_POINT_LIMIT,
    affine_quantizer,
    log2_levels,
    log2_steps,
    quantization_error,
    query_key_scales,
)

BITS = range(2, 9)

# --- affine activation quantizers ---------------------------------------------------------------------------------

CHANNELS = {
    "symmetric": (-3.0, 3.0),
    "one-sided": (0.0, 5.0),
    "negative": (-7.0, -1.0),
    "gelu": (-0.17, 9.0),
    "skew": (-0.3, 0.7),
    "narrow": (-1e-6, 3e-6),
    "wide": (-1e4, 3e4),
    "off-centre": (100.0, 101.0),
    "far-off-centre": (1000.0, 1000.001),
    "constant": (5.0, 5.0),
    "negative-constant": (-300.0, -300.0),
    "always-zero": (0.0, 0.0),
}


def ends(names: object = CHANNELS) -> tuple[Tensor, Tensor]:
    low, high = zip(*(CHANNELS[name] for name in names), strict=True)
    return torch.tensor(low), torch.tensor(high)


def check_covers(low: Tensor, high: Tensor, bits: int, exponent: float) -> None:
    """Asserts that every value between the ends comes back from its code within half a step."""
    q = affine_quantizer(low, high, bits, exponent)
    x = (low + (high - low) * torch.linspace(0, 1, 2001)[:, None]).clamp(low, high)  # in float32, ends included
    codes = ops.quantize(x, q.inv_scale, q.zero_point, bits)
    back = (codes.double() - q.zero_point) * q.scale.double()
    # A scale and its inverse are rounded to 24 bits each, which shifts a code that counts far from zero.
    shift = x.double().abs() / q.scale.double() * 2**-23
    worst = ((back - x.double()).abs() / q.scale.double() - shift).amax(0)
    assert (worst <= 0.5001).all(), dict(zip(CHANNELS, worst.tolist(), strict=False))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_every_value_of_the_range_has_a_code_within_half_a_step(bits: int, exponent: float) -> None:
    check_covers(*ends(), bits, exponent)


@pytest.mark.parametrize("seed", range(5))
def test_random_ranges_are_covered(seed: int) -> None:
    low = reals("outlier", (64,), seed=seed)
    check_covers(low, low + reals("normal", (64,), seed=seed + 10).abs() * 10.0 ** integers(-3, 3, (64,), seed), 4, 0.5)


@pytest.mark.parametrize("bits", BITS)
def test_exponent_one_gives_each_channel_its_own_range_and_no_more(bits: int) -> None:
    # Off-centre channels are wider, so that their zero points fit.
    names = [name for name in CHANNELS if not name.endswith(("constant", "zero", "centre"))]
    low, high = ends(names)
    span = affine_quantizer(low, high, bits).scale.double() * (2**bits - 1)
    torch.testing.assert_close(span, (high - low).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.75])
def test_scales_follow_the_ranges_by_the_exponent_and_are_as_small_as_they_may(exponent: float) -> None:
    low, high = ends(["symmetric", "one-sided", "gelu", "skew", "narrow", "wide", "off-centre"])
    scale = affine_quantizer(low, high, 4, exponent).scale.double()
    own = affine_quantizer(low, high, 4).scale.double()
    torch.testing.assert_close(scale / scale[0], (own / own[0]) ** exponent, rtol=1e-5, atol=0)
    assert (own / scale).max().item() == pytest.approx(1.0, abs=1e-6)  # the widest channel just fits


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_symmetric_ranges_have_zero_point_zero(bits: int, exponent: float) -> None:
    high = torch.tensor([1e-6, 0.3, 1.0, 7.0, 1e5])
    assert affine_quantizer(-high, high, bits, exponent).zero_point.tolist() == [0] * 5


def test_zero_points_stay_where_s1_rounds_exactly() -> None:
    low = torch.tensor([5.0, -5.0, 1e6, -1e-3, 1e30])
    q = affine_quantizer(low, low, 8)
    assert q.zero_point.abs().max() <= ZERO_POINT_LIMIT == 2**12
    assert (q.scale > 0).all()
    codes = ops.quantize(low[None], q.inv_scale, q.zero_point, 8)
    torch.testing.assert_close((codes[0] - q.zero_point) * q.scale, low, rtol=1e-6, atol=0)  # not saturated


def test_inverse_scale_is_the_nearest_float() -> None:
    q = affine_quantizer(-uniform(0.1, 9, (50,), 1), uniform(0.1, 9, (50,), 2), 8)
    assert_bitwise_equal(q.inv_scale, (1 / q.scale.double()).float())


@pytest.mark.parametrize("bits", [1, 9, 2.5, True], ids=str)
def test_affine_bits_out_of_range_are_refused(bits: object) -> None:
    with pytest.raises(ValueError, match=r"bits must be an integer in 2\.\.8"):
        affine_quantizer(torch.zeros(2), torch.ones(2), bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantization_error_is_that_of_the_codes(bits: int) -> None:
    x = reals("outlier", (300, 7), seed=bits) + torch.arange(7)
    low, high = x.quantile(0.02, 0), x.quantile(0.97, 0)  # clips at both ends
    q = affine_quantizer(low, high, bits)
    back = (ops.quantize(x, q.inv_scale, q.zero_point, bits).double() - q.zero_point) * q.scale.double()
    expected = (back - x.double()).square().mean(0)
    torch.testing.assert_close(quantization_error(x, low, high, bits).double(), expected, rtol=1e-4, atol=0)


# --- q and k ------------------------------------------------------------------------------------------------------


def radii(seed: int, heads: int = 3, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Largest magnitudes of q and k over four orders of magnitude."""
    q, k = (10 ** uniform(-2, 2, (heads * dim,), seed + i) for i in range(2))
    return q, k


@pytest.mark.parametrize("bits", BITS)
def test_a_head_has_one_score_scale_and_both_codes_use_the_range_alike(bits: int) -> None:
    q_radius, k_radius = radii(bits)
    q_scale, k_scale, score = query_key_scales(q_radius, k_radius, 3, bits)
    torch.testing.assert_close(q_scale * k_scale, score.repeat_interleave(5), rtol=1e-6, atol=0)
    q_used, k_used = q_radius / q_scale, k_radius / k_scale
    torch.testing.assert_close(q_used, k_used, rtol=1e-6, atol=0)
    # The widest channel of each head fills the codes and nothing passes them.
    torch.testing.assert_close(q_used.view(3, 5).amax(1), torch.full((3,), 2.0 ** (bits - 1) - 0.5), rtol=1e-6, atol=0)
    assert score.unique().numel() == 3  # heads do not share


def test_scores_are_preserved() -> None:
    q, k = reals("normal", (9, 15), seed=1).double(), reals("outlier", (9, 15), seed=2).double()
    q_scale, k_scale, score = query_key_scales(q.abs().amax(0), k.abs().amax(0), 3, 8)
    q_steps, k_steps = ((x / s).view(9, 3, 5).transpose(0, 1) for x, s in ((q, q_scale), (k, k_scale)))
    exact = q.view(9, 3, 5).transpose(0, 1) @ k.view(9, 3, 5).permute(1, 2, 0)
    torch.testing.assert_close(q_steps @ k_steps.mT * score[:, None, None], exact, rtol=1e-5, atol=1e-5)


def test_dead_channels_of_q_and_k_have_finite_scales() -> None:
    q_radius, k_radius = radii(7)
    q_radius[2] = k_radius[2] = k_radius[6] = 0.0
    q_radius[10:] = 0.0  # a whole head
    for scale in query_key_scales(q_radius, k_radius, 3, 8):
        assert bool(scale.isfinite().all())
        assert (scale > 0).all()


# --- attention levels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_twins(bits: int) -> None:
    for tau in (*log2_steps(bits), 0.3, 1 / 3):
        levels = log2_levels(bits, tau).tolist()
        assert levels == twins.level_table(bits, tau)
        assert levels[0] == 255
        assert levels[-1] == 0
        assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize("bits", BITS)
def test_steps_are_few_ascending_and_reach_far_enough(bits: int) -> None:
    steps = log2_steps(bits)
    assert 1 <= len(steps) <= 5
    assert list(steps) == sorted(set(steps))
    if bits > 4:
        assert all((1 << bits) * tau in (8, 16) for tau in steps)  # octaves; powers of two, then
    assert all(2 <= (1 << bits) * tau <= 16 for tau in steps)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_steps_of_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be in 2\.\.8, got {bits}"):
        log2_steps(bits)
