"""Rounding of weights: scales optimal, GPTQ against a slow float64 twin, coordinate descent against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_bitwise_equal, integers, reals, uniform
from vitq_kernels.rounding import CLIP_GRID, gptq, refine, round_to_nearest, row_errors, weight_scale

BITS = range(2, 9)


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


# --- coordinate descent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_refine_loses_less_than_gptq(bits: int) -> None:
    ratios = []
    for seed in range(8):
        w, moment = reals("normal", (16, 90), seed=seed), moment_of(90, seed)
        row_bits = torch.full((16,), bits)
        scale = weight_scale(w, row_bits)
        codes = gptq(w, scale, row_bits, moment)
        refined = refine(w, scale, row_bits, codes, moment, 3)
        ratios.append(loss(w, refined, scale, moment) / loss(w, codes, scale, moment))
    assert max(ratios) <= 1.001, ratios  # it descends on the damped moment
    assert sum(ratios) / len(ratios) < 0.97, ratios


def test_refined_codes_have_no_better_neighbour_in_any_column() -> None:
    w, moment = reals("normal", (4, 12), seed=3), moment_of(12, 3).float().double()
    row_bits = torch.tensor([2, 3, 4, 8])
    scale = weight_scale(w, row_bits)
    codes = refine(w, scale, row_bits, round_to_nearest(w, scale, row_bits), moment, 50)
    damped = moment + 0.001 * moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    for row in range(4):
        limit = 1 << (int(row_bits[row]) - 1)

        def row_loss(candidate: Tensor, row: int = row) -> float:
            return loss(w[row : row + 1], candidate[None], scale[row : row + 1], damped)

        best = row_loss(codes[row])
        for column in range(12):
            for code in range(-limit, limit):
                other = codes[row].clone()
                other[column] = code
                assert row_loss(other) >= best * (1 - 1e-5), (row, column, code)


def test_refine_without_sweeps_and_of_no_inputs_changes_nothing() -> None:
    w = adversarial_weight(70)
    row_bits = integers(2, 8, (10,), 4)
    scale = weight_scale(w, row_bits)
    codes = round_to_nearest(w, scale, row_bits)
    assert_bitwise_equal(refine(w, scale, row_bits, codes, moment_of(70, 1), 0), codes)
    assert_bitwise_equal(refine(w, scale, row_bits, codes, torch.zeros(70, 70, dtype=torch.float64), 2), codes)


def test_a_parameter_is_rounded_as_a_tensor_is() -> None:
    """Blocks of columns are written in place; autograd, where it watches, must not mind."""
    w, moment = reals("normal", (8, 70), seed=1), moment_of(70, 2)
    row_bits = torch.full((8,), 3)
    scale = weight_scale(w, row_bits)
    codes = gptq(w, scale, row_bits, moment)
    parameter = torch.nn.Parameter(w.clone())
    assert_bitwise_equal(gptq(parameter, scale, row_bits, moment), codes)
    refined = refine(w, scale, row_bits, codes, moment, 2)
    assert_bitwise_equal(refine(parameter, scale, row_bits, codes, moment, 2), refined)


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
