"""Quantizers against their definitions: ranges covered, scales optimal, GPTQ against a slow float64 twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import twins
from tests.numerics import assert_bitwise_equal, integers, reals, uniform
from vitq_kernels import ops
from vitq_kernels.quantizers import (
    CLIP_GRID,
    ZERO_POINT_LIMIT,
    affine_quantizer,
    gptq,
    log2_levels,
    log2_steps,
    quantization_error,
    query_key_scales,
    round_to_nearest,
    row_errors,
    weight_scale,
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


# --- weights ------------------------------------------------------------------------------------------------------


def adversarial_weight(cols: int = 40) -> Tensor:
    """Rows: bell-shaped twice, an outlier, constant, zero, tiny, huge, two-valued, one-sided, a single spike."""
    w = reals("normal", (10, cols), seed=3)
    w[2, 0] = 40.0
    w[3] = -0.7
    w[4] = 0.0
    w[5] *= 1e-6
    w[6] *= 1e6
    w[7] = w[7].sign() * 0.25
    w[8] = w[8].abs() + 1
    w[9] = 0.0
    w[9, 1] = -3.0
    return w


def squared_error(w: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Of rounding to nearest, in float64."""
    limit = 2.0 ** (bits.double()[:, None] - 1)
    codes = (w.double() / scale.double()[:, None]).round().clamp(-limit, limit - 1)
    return (codes * scale.double()[:, None] - w.double()).square().sum(1)


@pytest.mark.parametrize("bits", [*BITS, "mixed"], ids=str)
def test_weight_scale_is_the_best_of_the_clipping_points(bits: object) -> None:
    w = adversarial_weight()
    row_bits = integers(2, 8, (10,), 9) if bits == "mixed" else torch.full((10,), bits)
    absmax = w.double().abs().amax(1).clamp_min(1e-8)
    grid = [absmax * (0.5 + 0.02 * i) / (2.0 ** (row_bits.double() - 1) - 0.5) for i in range(26)]
    errors = torch.stack([squared_error(w, scale, row_bits) for scale in grid])
    scale = weight_scale(w, row_bits)
    found = squared_error(w, scale, row_bits)
    assert (found <= errors.amin(0) * (1 + 1e-4) + 1e-30).all()
    assert (found <= errors[-1] * (1 + 1e-4) + 1e-30).all()  # the last one clips nothing
    assert (scale > 0).all()
    assert (torch.stack(grid) - scale).abs().div(scale).amin(0).max() < 1e-6  # it is one of them


def test_clipping_is_used_where_it_pays_and_only_there() -> None:
    assert CLIP_GRID[0] == 0.5
    assert CLIP_GRID[-1] == 1.0
    w = adversarial_weight()
    bits = torch.full((10,), 3)
    unclipped = w.abs().amax(1) / 3.5
    clipped = weight_scale(w, bits) / unclipped
    assert clipped[0] < 0.95  # bell-shaped: the tails are few
    assert clipped[9] > 0.8  # a single spike: clipping it is all the error there is


@pytest.mark.parametrize("bits", BITS)
def test_round_to_nearest_saturates_and_rounds_ties_to_even(bits: int) -> None:
    limit = 1 << (bits - 1)
    steps = torch.tensor([[-1e9, -limit - 0.6, -limit, -1.5, -0.5, 0.0, 0.5, 1.5, limit - 1.0, limit + 0.2, 1e9]])
    codes = round_to_nearest(steps * 0.25, torch.tensor([0.25]), torch.tensor([bits]))
    expected = [-limit, -limit, -limit, -2, 0, 0, 0, min(2, limit - 1), limit - 1, limit - 1, limit - 1]
    assert codes.tolist() == [expected]
    assert codes.dtype == torch.int8


def test_round_to_nearest_uses_each_rows_own_scale_and_width() -> None:
    w = torch.tensor([[0.9, -5.0, 5.0], [0.9, -5.0, 5.0]])
    codes = round_to_nearest(w, torch.tensor([0.1, 1.0]), torch.tensor([4, 2]))
    assert codes.tolist() == [[7, -8, 7], [1, -2, 1]]


# --- GPTQ ---------------------------------------------------------------------------------------------------------


def twin_gptq(weight: Tensor, scale: Tensor, row_bits: Tensor, moment: Tensor, damp: float = 0.01) -> list[list[int]]:
    """Optimal Brain Quantization in a given order, as GPTQ's paper states it (its equations 2 and 3), float64.

    Of the columns not yet rounded, the first is rounded, and the others move to where the loss is least:
    ``w_F -= (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_q,:``, with H_F^-1 computed anew each time.
    """
    h = moment.double() + damp * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    order = sorted(range(len(moment)), key=lambda k: -float(moment[k, k]))  # stable, as the paper's act-order
    result = []
    for w, s, bits in zip(weight.double(), scale.double().tolist(), row_bits.tolist(), strict=True):
        w, codes, left = w.clone(), [0] * len(w), list(order)
        while left:
            inverse = torch.linalg.inv(h[left][:, left])
            column = left[0]
            codes[column] = min(max(round(float(w[column]) / s), -(1 << (bits - 1))), (1 << (bits - 1)) - 1)
            error = (w[column] - codes[column] * s) / inverse[0, 0]
            w[left] -= error * inverse[0]
            left = left[1:]
        result.append(codes)
    return result


def moment_of(cols: int, seed: int, tokens: int = 200) -> Tensor:
    """Second moments of correlated inputs, channels of very different size."""
    mix = reals("normal", (cols, cols), seed=seed) + torch.eye(cols)
    x = (reals("normal", (tokens, cols), seed=seed + 50) @ mix * 10 ** uniform(-1, 1, (cols,), seed)).double()
    return x.t() @ x / tokens


@pytest.mark.parametrize(("cols", "bits"), [(1, 4), (3, 2), (40, 3), (70, 4), (130, 8)], ids=lambda x: str(x))
def test_gptq_is_the_papers_algorithm(cols: int, bits: int) -> None:
    w = reals("normal", (6, cols), seed=cols)
    row_bits = torch.tensor([bits, bits, 2, 8, bits, bits])
    scale, moment = weight_scale(w, row_bits), moment_of(cols, cols)
    codes = gptq(w, scale, row_bits, moment)
    expected = torch.tensor(twin_gptq(w, scale, row_bits, moment), dtype=torch.int8)
    # float32 may fall on the other side of a tie, after which the rest of the row may differ; a fault moves all rows.
    assert int((codes != expected).any(1).sum()) <= 1, (codes != expected).sum(1)
    assert codes.dtype == torch.int8
    if cols > 3:
        assert (codes != round_to_nearest(w, scale, row_bits)).any()


def loss(w: Tensor, codes: Tensor, scale: Tensor, moment: Tensor) -> float:
    error = codes.double() * scale.double()[:, None] - w.double()
    return float(torch.trace(error @ moment @ error.t()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_loses_less_than_rounding_to_nearest(bits: int) -> None:
    ratios = []
    for seed in range(8):
        w, moment = reals("normal", (16, 48), seed=seed), moment_of(48, seed)
        row_bits = torch.full((16,), bits)
        scale = weight_scale(w, row_bits)
        nearest = loss(w, round_to_nearest(w, scale, row_bits), scale, moment)
        ratios.append(loss(w, gptq(w, scale, row_bits, moment), scale, moment) / nearest)
    assert sum(ratios) / len(ratios) < 0.7, ratios  # measured .13 to .52
    assert max(ratios) < 1.0, ratios


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20, 0.0], ids=lambda s: f"{s:g}")
def test_gptq_of_white_or_of_no_inputs_rounds_to_nearest(size: float) -> None:
    w = adversarial_weight(80)
    row_bits = integers(2, 8, (10,), 4)
    scale = weight_scale(w, row_bits)
    codes = gptq(w, scale, row_bits, size * torch.eye(80, dtype=torch.float64))
    assert_bitwise_equal(codes, round_to_nearest(w, scale, row_bits))


def test_gptq_leaves_dead_channels_to_themselves() -> None:
    w, moment = reals("normal", (8, 60), seed=1), moment_of(60, 2)
    live = torch.ones(60, dtype=torch.bool)
    live[[0, 7, 8, 31, 59]] = False
    moment[~live] = 0.0
    moment[:, ~live] = 0.0
    row_bits = torch.full((8,), 4)
    scale = weight_scale(w, row_bits)
    codes = gptq(w, scale, row_bits, moment, damp=0.01)
    assert_bitwise_equal(codes[:, ~live], round_to_nearest(w, scale, row_bits)[:, ~live])
    alone = gptq(w[:, live], scale, row_bits, moment[live][:, live], damp=0.01 * 55 / 60)  # the same damping
    assert int((codes[:, live] != alone).any(1).sum()) <= 1


def test_gptq_follows_a_permutation_of_the_columns() -> None:
    w, moment = reals("normal", (8, 70), seed=4), moment_of(70, 5)
    row_bits = torch.full((8,), 3)
    scale = weight_scale(w, row_bits)
    order = integers(0, 1 << 30, (70,), 6).argsort()
    codes = gptq(w, scale, row_bits, moment)
    moved = gptq(w[:, order].contiguous(), scale, row_bits, moment[order][:, order])
    assert int((moved != codes[:, order]).any(1).sum()) <= 1


def test_gptq_survives_channels_that_always_move_together() -> None:
    x = reals("normal", (50, 6), seed=8).double()
    x = torch.cat((x, x, -x, 0 * x[:, :1]), 1)  # rank 6 of 19
    w = reals("normal", (4, 19), seed=9)
    row_bits = torch.full((4,), 4)
    scale = weight_scale(w, row_bits)
    moment = x.t() @ x
    codes = gptq(w, scale, row_bits, moment)
    assert loss(w, codes, scale, moment) < loss(w, round_to_nearest(w, scale, row_bits), scale, moment)


def test_gptq_leaves_its_arguments_alone() -> None:
    w, moment = reals("normal", (4, 70), seed=1), moment_of(70, 1)
    row_bits = torch.full((4,), 3)
    scale = weight_scale(w, row_bits)
    before = [t.clone() for t in (w, scale, row_bits, moment)]
    gptq(w, scale, row_bits, moment)
    for after, kept in zip((w, scale, row_bits, moment), before, strict=True):
        assert_bitwise_equal(after, kept)


@pytest.mark.parametrize("use_gptq", [True, False], ids=["gptq", "nearest"])
def test_row_errors_are_relative_output_errors(use_gptq: bool) -> None:
    w, moment = reals("normal", (5, 30), seed=2), moment_of(30, 3)
    found = row_errors(w, moment, (3, 8), use_gptq)
    for j, bits in enumerate((3, 8)):
        row_bits = torch.full((5,), bits)
        scale = weight_scale(w, row_bits)
        codes = gptq(w, scale, row_bits, moment) if use_gptq else round_to_nearest(w, scale, row_bits)
        for n in range(5):
            error, row = codes[n].double() * scale[n].double() - w[n].double(), w[n].double()
            expected = float(error @ moment @ error) / float(row @ moment @ row)
            assert found[n, j].item() == pytest.approx(expected, rel=1e-6)
    assert (found[:, 1] < 0.02 * found[:, 0]).all()  # 5 bits: about 4^-5


def test_row_errors_of_a_zero_row_are_zero_and_scale_does_not_matter() -> None:
    w, moment = reals("normal", (3, 20), seed=2), moment_of(20, 3)
    w[1] = 0.0
    w[2] = 16.0 * w[0]
    found = row_errors(w, moment, tuple(BITS))
    assert found.shape == (3, 7)
    assert found[1].tolist() == [0.0] * 7
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=0)


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
