"""Folding bias, zero points and scales into integers, against the real linear and Python integers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_bitwise_equal, codes, integers, reals, uniform
from vitq_kernels.folding import FoldedLinear, fold_linear
from vitq_kernels.observers import InputMoments
from vitq_kernels.packing import pack_weight, unpack_weight
from vitq_kernels.quantizers import AffineQuantizer, affine_quantizer
from vitq_kernels.rounding import gptq, round_to_nearest, weight_scale
from vitq_kernels.spec import RowGroups

N, K = 20, 30
GROUPS = {
    "8-bit": RowGroups.uniform(N, 8),
    "mixed": RowGroups(N, (2, 8, 5), 8, (*range(10, 20), *range(10))),
}


def case(kind: str = "8-bit", seed: int = 0) -> tuple[Tensor, Tensor, AffineQuantizer, RowGroups]:
    """A weight, a bias, a quantizer of inputs with channels of all kinds, and the rows' widths."""
    weight, bias = reals("normal", (N, K), seed=seed), uniform(-1, 1, (N,), seed)
    low = -uniform(0.1, 4, (K,), seed + 1)
    high = uniform(0.1, 4, (K,), seed + 2)
    low[3], high[3] = 4.0, 4.0  # never varies
    low[4], high[4] = 2.0, 2.001
    low[5], high[5] = 0.0, 6.0
    low[6] = high[6] = 0.0
    return weight, bias, affine_quantizer(low, high, 8, 0.5), GROUPS[kind]


def moments_of(a: Tensor, quantizer: AffineQuantizer) -> InputMoments:
    moments = InputMoments.empty(K, torch.device("cpu"))
    moments.add((a.int() - quantizer.zero_point).float())
    return moments


def real_output(folded: FoldedLinear, a: Tensor) -> Tensor:
    """What the integer linear gives for codes [T, K], exactly."""
    acc = a.long() @ unpack_weight(folded.weight).long().t() + folded.bias_q().long()
    return acc.double() * folded.scale


@pytest.mark.parametrize("kind", GROUPS)
def test_bias_is_rounded_once_in_python_integers(kind: str) -> None:
    weight, bias, quantizer, groups = case(kind)
    folded = fold_linear("site", weight, bias, quantizer, groups)
    centre = uniform(-1, 1, (N,), 8)
    w, z = unpack_weight(folded.weight).tolist(), quantizer.zero_point.tolist()
    for given in (None, centre):
        found = folded.bias_q(given).tolist()
        for n in range(N):
            offset = Fraction(float(folded.bias[n])) - (0 if given is None else Fraction(float(given[n])))
            exact = offset / Fraction(float(folded.scale[n])) - sum(x * y for x, y in zip(z, w[n], strict=True))
            assert abs(found[n] - exact) <= Fraction(501, 1000)
    assert folded.bias_q().dtype == torch.int32


@pytest.mark.parametrize("kind", GROUPS)
def test_integer_outputs_are_those_of_the_rounded_weight(kind: str) -> None:
    weight, bias, quantizer, groups = case(kind)
    folded = fold_linear("site", weight, bias, quantizer, groups)
    row_bits = torch.tensor(groups.row_bits())
    columns = weight * quantizer.scale
    scale = weight_scale(columns, row_bits)
    rounded = round_to_nearest(columns, scale, row_bits)
    assert_bitwise_equal(unpack_weight(folded.weight), rounded)
    a = codes("random", (50, K), 8, seed=1)
    exact = (a.double() - quantizer.zero_point) @ (rounded.double() * scale[:, None]).t() + folded.bias
    assert ((real_output(folded, a) - exact).abs() <= 0.51 * folded.scale).all()


def test_eight_bits_come_near_the_float_linear() -> None:
    weight, bias, quantizer, groups = case()
    folded = fold_linear("site", weight, bias, quantizer, groups)
    a = codes("random", (200, K), 8, seed=1)
    x = (a.double() - quantizer.zero_point) * quantizer.scale
    exact = x @ weight.double().t() + bias
    error = real_output(folded, a) - exact
    assert error.square().mean() < 1e-4 * (exact - exact.mean(0)).square().mean()  # 40 dB


def test_what_a_channel_always_carries_passes_through_the_exact_weight() -> None:
    """Beside channels that vary, the columns of one that hardly does round to zero: its constant part must not."""
    weight, bias, quantizer, groups = case("mixed")
    folded = fold_linear("site", weight, bias, quantizer, groups)
    z = quantizer.zero_point
    nearest_to_zero = torch.zeros(K).clamp(-128.0 - z, 127.0 - z)
    assert (nearest_to_zero != 0).sum() == 2  # channels 3 and 4
    a = nearest_to_zero + z  # codes: every other channel stands for 0
    exact = bias + (weight[:, 3:5] * (nearest_to_zero * quantizer.scale)[3:5]).double().sum(1)
    assert exact.sub(bias).abs().max() > 1  # it is no small part
    assert ((real_output(folded, a[None])[0] - exact).abs() <= 0.51 * folded.scale + 1e-6).all()


def test_bias_correction_gives_the_wanted_mean() -> None:
    weight, bias, quantizer, groups = case("mixed")
    a = codes("one_sided", (300, K), 8, seed=1)
    wanted = uniform(-3, 3, (N,), 3)
    folded = fold_linear("s", weight, bias, quantizer, groups, moments=moments_of(a, quantizer), output_mean=wanted)
    assert ((real_output(folded, a).mean(0) - wanted).abs() <= 0.51 * folded.scale + 1e-6).all()


@pytest.mark.parametrize("use_gptq", [True, False], ids=["gptq", "nearest"])
def test_weights_are_rounded_against_the_moments_if_asked(use_gptq: bool) -> None:
    weight, bias, quantizer, groups = case("mixed")
    mix = reals("normal", (K, K), seed=5)
    a = (reals("normal", (300, K), seed=4) @ mix * 4).round().clamp(-128, 127).to(torch.int8)
    moments = moments_of(a, quantizer)
    folded = fold_linear("site", weight, bias, quantizer, groups, moments=moments, use_gptq=use_gptq)
    row_bits, columns = torch.tensor(groups.row_bits()), weight * quantizer.scale
    nearest = round_to_nearest(columns, folded.scale.float(), row_bits)
    against = gptq(columns, folded.scale.float(), row_bits, moments.covariance)
    assert (nearest != against).any()
    assert_bitwise_equal(unpack_weight(folded.weight), against if use_gptq else nearest)


def test_multipliers_are_scales_over_output_scales() -> None:
    weight, bias, quantizer, groups = case("mixed")
    folded = fold_linear("site", weight, bias, quantizer, groups)
    out = uniform(0.1, 2, (N,), 9)
    assert_bitwise_equal(folded.multiplier(), folded.scale.float())
    assert_bitwise_equal(folded.multiplier(out), (folded.scale / out.double()).float())


def test_a_missing_bias_is_zero() -> None:
    weight, bias, quantizer, groups = case("mixed")
    without, zero = (fold_linear("s", weight, b, quantizer, groups) for b in (None, torch.zeros(N)))
    assert_bitwise_equal(without.bias_q(), zero.bias_q())
    assert (without.bias_q() != fold_linear("s", weight, bias, quantizer, groups).bias_q()).any()


# --- int32 --------------------------------------------------------------------------------------------------------


def by_hand(bias: list[float], cols: int = 4) -> FoldedLinear:
    """A linear of unit scale and no zero points."""
    rows = len(bias)
    packed = pack_weight(torch.full((rows, cols), 127, dtype=torch.int8), RowGroups.uniform(rows, 8))
    return FoldedLinear(
        "blocks.7.mlp.fc2",
        packed,
        torch.ones(rows, dtype=torch.float64),
        torch.tensor(bias, dtype=torch.float64),
        torch.zeros(rows, dtype=torch.int64),
        8,
    )


LIMIT = 2**31 - 4 * 2**14  # less what four products of codes may add


@pytest.mark.parametrize("value", [LIMIT, -LIMIT, 3e9, -1e300, float("inf")], ids=lambda v: f"{v:g}")
def test_a_bias_beyond_int32_is_named(value: float) -> None:
    with pytest.raises(
        ValueError, match=r"blocks\.7\.mlp\.fc2: bias of row 1 must fit int32 accumulator units, got -?"
    ):
        by_hand([0.0, float(value), 5.0]).bias_q()


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_an_accumulator_that_starts_from_the_largest_bias_does_not_wrap(sign: int) -> None:
    folded = by_hand([sign * (LIMIT - 1.0)])
    worst = folded.bias_q().long() + 4 * 128 * 127 * sign
    assert -(2**31) <= int(worst) < 2**31


def test_a_centre_counts_against_int32() -> None:
    folded = by_hand([0.0, 1e9])
    assert folded.bias_q().tolist() == [0, 10**9]
    with pytest.raises(ValueError, match="bias of row 1"):
        folded.bias_q(torch.tensor([0.0, -2e9]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_that_never_vary_leave_room_for_the_bias(bits: int) -> None:
    """As behind a dead LayerNorm or under a single image: scales at their floor would push biases past int32."""
    weight, bias = reals("normal", (N, K), seed=1), uniform(-5, 5, (N,), 2)
    for value in (0.0, 3.0, -1e4):
        constant = torch.full((K,), value)
        quantizer = affine_quantizer(constant, constant, bits)
        a = (constant / quantizer.scale + quantizer.zero_point).round().to(torch.int8).expand(9, K)
        exact = weight.double() @ constant.double() + bias
        plain = fold_linear("site", weight, bias, quantizer, RowGroups.uniform(N, bits))
        mean = fold_linear(
            "site",
            weight,
            bias,
            quantizer,
            RowGroups.uniform(N, bits),
            moments=moments_of(a, quantizer),
            output_mean=exact.float(),
        )
        for folded in (plain, mean):
            torch.testing.assert_close(real_output(folded, a)[0], exact, rtol=2e-3, atol=2e-3)


def test_ordinary_layers_keep_their_best_scale() -> None:
    """The room for the bias costs nothing where there is room: scales are those of the weight alone."""
    weight, bias = reals("normal", (N, K), seed=1), uniform(-5, 5, (N,), 2)
    quantizer = affine_quantizer(-uniform(0.5, 2, (K,), 1), uniform(0.5, 9, (K,), 2), 8)
    row_bits = integers(2, 8, (N,), 1)
    groups = RowGroups(N, tuple(row_bits.tolist()), 1)
    folded = fold_linear("site", weight, bias, quantizer, groups, output_mean=bias)
    assert_bitwise_equal(folded.scale.float(), weight_scale(weight * quantizer.scale, row_bits))
