"""Fake quantizers, ranges and weight rounding of the presets, against slow twins that enumerate codes one by one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from tests.numerics import uniform
from vitq_kernels.presets import dopq_vit, is_vit, repq_vit
from vitq_kernels.presets.dopq_vit import Tangent
from vitq_kernels.presets.is_vit import ShiftUniformLog2
from vitq_kernels.presets.quantizers import QUANTIZERS, FakeQuantizer, Log2, LogSqrt2, Uniform
from vitq_kernels.presets.ranges import affine, fake_affine, percentile_affine, tails
from vitq_kernels.presets.weights import asymmetric_rows, symmetric_rows

WIDTHS = (2, 3, 4, 6, 8)


def t(value: float) -> Tensor:
    return torch.tensor(value)


# A real number, in float64, to what the quantizer makes of it.
def uniform_twin(x: float, scale: float, zero: float, qmin: int, qmax: int) -> float:
    return (min(max(round(x / scale) + zero, qmin), qmax) - zero) * scale


def log2_twin(x: float, scale: float, bits: int) -> float:
    code = 2**bits - 1 if x == 0 else min(max(round(-math.log2(x / scale)), 0), 2**bits - 1)
    return scale * 2.0**-code


def log_sqrt2_twin(x: float, scale: float, bits: int) -> float:
    if x == 0:
        return 0.0
    code = round(-2 * math.log2(x / scale))
    return 0.0 if code >= 2**bits else scale * 2.0 ** (-max(code, 0) / 2)


def shift_uniform_log2_twin(x: float, low: float, step: float, eta: float, top: int) -> float:
    code = min(max(round((math.log2(x + eta) - low) / step), 0), top)
    return 2.0 ** round(code * step + low) - eta


def tangent_twin(x: float, scale: float, steepness: float, bits: int) -> float:
    """The codebook by its definition, and the code by the nearest in the bent space."""
    angle, top = math.atan(steepness), 2**bits - 1
    bent = math.tan(angle * (2 * min(max(x / scale, 0), 1) - 1)) / steepness
    code = round((bent + 1) * top / 2)
    return (math.atan((2 * code / top - 1) * steepness) / angle + 1) / 2 * scale


CASES = {
    "uniform": (lambda b: Uniform(t(0.07), t(3.0), 0, 2**b - 1), lambda x, b: uniform_twin(x, 0.07, 3, 0, 2**b - 1)),
    "uniform-signed": (
        lambda b: Uniform(t(0.3), t(0.0), -(2 ** (b - 1)), 2 ** (b - 1) - 1),
        lambda x, b: uniform_twin(x, 0.3, 0, -(2 ** (b - 1)), 2 ** (b - 1) - 1),
    ),
    "uniform-averaged-zero-point": (
        lambda b: Uniform(t(0.11), t(1.375), 0, 2**b - 1),
        lambda x, b: uniform_twin(x, 0.11, 1.375, 0, 2**b - 1),
    ),
    "log2": (lambda b: Log2(t(0.9), b), lambda x, b: log2_twin(x, 0.9, b)),
    "log-sqrt2": (lambda b: LogSqrt2(t(0.9), b), lambda x, b: log_sqrt2_twin(x, 0.9, b)),
    "shift-uniform-log2": (
        lambda b: ShiftUniformLog2(t(-6.5), t(6.6 / 2**b), 0.01, 2**b),
        lambda x, b: shift_uniform_log2_twin(x, -6.5, 6.6 / 2**b, 0.01, 2**b),
    ),
    "tangent": (lambda b: Tangent(t(0.9), 6.0, b), lambda x, b: tangent_twin(x, 0.9, 6.0, b)),
}
PROBABILITY = ("log2", "log-sqrt2", "shift-uniform-log2", "tangent")


def inputs(name: str) -> Tensor:
    """Many magnitudes, both ends, zero; signed where the quantizer is."""
    magnitudes = torch.cat([torch.logspace(-9, 0.2, 400), torch.linspace(0, 1.3, 300), t(0.0)[None]])
    return magnitudes if name in PROBABILITY else torch.cat([magnitudes, -magnitudes, 5 * magnitudes])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_its_slow_twin(name: str, bits: int) -> None:
    make, twin = CASES[name]
    x = inputs(name)
    actual = make(bits)(x)
    for value, got in zip(x.tolist(), actual.tolist(), strict=True):
        # Float32 arithmetic may decide a tie the other way: both neighbours of a value within 1e-5 are right.
        right = [twin(value * (1 + e), bits) for e in (-1e-5, 0, 1e-5)]
        assert any(got == pytest.approx(r, rel=1e-5, abs=2e-7) for r in right), (value, got, right)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_levels_are_counted(name: str, bits: int) -> None:
    """As many different values as come out, over inputs that reach every one; zero points that are no integers too."""
    quantizer = CASES[name][0](bits)
    wide = torch.cat([torch.logspace(-90, 2, 200_001, dtype=torch.float64), torch.linspace(-40, 40, 200_001)])
    x = (wide.clamp_min(0) if name in PROBABILITY else wide).double()
    assert len(quantizer.double()(x).unique()) == quantizer.levels


@pytest.mark.parametrize(
    ("quantizer", "extra"),
    [
        (Uniform(t(0.1), t(7.0), 0, 15), 0),
        (Uniform(t(0.1), t(7.25), 0, 15), 1),
        (Log2(t(1.0), 4), 0),
        (LogSqrt2(t(1.0), 4), 1),
        (Tangent(t(1.0), 4.0, 4), 0),
    ],
    ids=["uniform", "uniform-averaged", "log2", "log-sqrt2", "tangent"],
)
def test_published_four_bits_are_sixteen_or_seventeen_levels(quantizer: FakeQuantizer, extra: int) -> None:
    assert quantizer.levels == 16 + extra
    assert f"levels={16 + extra}" in repr(quantizer)


def test_log_sqrt2_masks_from_two_to_the_bits_on() -> None:
    quantizer = LogSqrt2(t(1.0), 2)
    exact = torch.tensor([4.0, 1.0, 2**-0.5, 0.5, 2**-1.5, 0.25, 0.0])
    expected = torch.tensor([1.0, 1.0, 2**-0.5, 0.5, 2**-1.5, 0.0, 0.0])
    torch.testing.assert_close(quantizer(exact), expected, rtol=1e-6, atol=0)


def test_log_sqrt2_rounds_in_the_logarithm() -> None:
    """Between codes 0 and 1 the border is 2^-0.25, not the middle of 1 and 2^-0.5."""
    quantizer = LogSqrt2(t(1.0), 4)
    assert quantizer(t(2**-0.26)) < 0.8 < quantizer(t(2**-0.24))


def test_uniform_ties_go_to_even_codes() -> None:
    codes = Uniform(t(1.0), t(4.0), 0, 15)(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]))
    assert codes.tolist() == [-2, 0, 0, 2, 2]


def test_uniform_broadcasts_over_channels_and_heads() -> None:
    x = uniform(-1, 1, (2, 3, 4, 5), 0)
    for shape in ((), (5,), (3, 1, 1)):
        scale, zero = uniform(0.1, 0.2, shape, 1), uniform(0, 7, shape, 2).round()
        whole = Uniform(scale, zero, 0, 7)(x)
        s, z = scale.expand(x.shape), zero.expand(x.shape)
        for index in [(0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 3)]:
            expected = uniform_twin(x[index].item(), s[index].item(), z[index].item(), 0, 7)
            assert whole[index].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_config_and_buffers_make_it_again(name: str) -> None:
    quantizer = CASES[name][0](4)
    config = json.loads(json.dumps(quantizer.config()))
    again = QUANTIZERS[type(quantizer).__name__](**dict(quantizer.named_buffers()), **config)
    x = inputs(name)
    assert torch.equal(again(x), quantizer(x))
    assert repr(again) == repr(quantizer)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.97, 0.999, 0.99999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 4099])
def test_tails_are_torch_quantiles(size: int, p: float) -> None:
    x = uniform(-3, 5, (3, size), size)
    low, high = tails(x, p)
    exact = x.double()
    torch.testing.assert_close(high.double(), exact.quantile(p, dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low.double(), exact.quantile(1 - p, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.37, -2.5, 1e-12, 3e5])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_channel_of_one_value_is_exact(bits: int, value: float) -> None:
    x = torch.full((1, 50), value)
    scale, zero = percentile_affine(x, bits)
    assert scale > 0
    torch.testing.assert_close(fake_affine(x, scale, zero, bits), x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_percentile_affine_takes_the_percentile_of_least_error(bits: int) -> None:
    x = uniform(-1, 1, (6, 5000), 1) ** 5
    x[:, 0] = torch.tensor([2.0, 5, 20, 100, 1000, 1e4])  # an outlier that some rows had better clip
    scale, zero = percentile_affine(x, bits)
    actual = (fake_affine(x, scale, zero, bits) - x).double().square().sum(1)
    x, chosen = x.double(), set()
    for row in range(6):
        errors = []
        for p in (0.999, 0.9999, 0.99999):
            high, low = x[row].quantile(p), x[row].quantile(1 - p)
            s = (high - low) / (2**bits - 1)
            z = (-low / s).round()
            q = ((x[row] / s).round() + z).clamp(0, 2**bits - 1)
            errors.append((((q - z) * s - x[row]) ** 2).sum().item())
        assert actual[row].item() == pytest.approx(min(errors), rel=1e-3)
        chosen.add(errors.index(min(errors)))
    if bits in (3, 4):  # at 6 and 8 bits no clipping of so few values pays
        assert len(chosen) > 1, "the case must tell percentiles apart"


def test_affine_spans_the_range() -> None:
    scale, zero = affine(torch.tensor([-1.0, 2.0]), torch.tensor([2.0, 5.0]), 4)
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2]))
    assert zero.tolist() == [5, -10]


@pytest.mark.parametrize("rounding", [asymmetric_rows, symmetric_rows])
@pytest.mark.parametrize("shape", [(7, 40), (7, 3, 4, 4)], ids=["linear", "convolution"])
def test_every_row_is_rounded_at_its_own_width(rounding: object, shape: tuple[int, ...]) -> None:
    weight = uniform(-1, 1, shape, 3) + 0.3
    bits = torch.tensor([2, 3, 4, 5, 6, 7, 8])
    rounded = rounding(weight, bits)
    assert rounded.shape == weight.shape
    for row, width in enumerate(bits.tolist()):
        values = rounded[row].unique()
        assert len(values) <= 2**width
        alone = rounding(weight[row : row + 1], bits[row : row + 1])
        assert torch.equal(alone[0], rounded[row])
    errors = (rounded - weight).flatten(1).square().mean(1)
    assert bool((errors[1:] < errors[:-1]).all())


def test_symmetric_rows_keep_the_largest_weight() -> None:
    weight = torch.tensor([[0.7, -0.1, 0.0], [-3.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    rounded = symmetric_rows(weight, torch.tensor([4, 3, 2]))
    expected = torch.tensor([[0.7, -0.1, 0.0], [-3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rounded, expected)


def probabilities(sharpness: float = 4.0) -> Tensor:
    return (sharpness * uniform(-1, 1, (4, 2, 17, 17), 9)).softmax(-1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_log_sqrt2_takes_the_scale_of_least_error(bits: int) -> None:
    x = probabilities(9.0)
    fitted = repq_vit.log_sqrt2(x, bits)
    candidates = [x.flatten().double().quantile(p).float() for p in (0.999, 0.9999, 0.99999)]
    errors = [((LogSqrt2(scale, bits)(x) - x) ** 2).sum().item() for scale in candidates]
    assert ((fitted(x) - x) ** 2).sum().item() == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_sulq_searches_with_one_code_less_than_it_has(bits: int) -> None:
    x = probabilities()
    fitted = is_vit.shift_uniform_log2(x, bits)
    assert fitted.top == 2**bits
    errors = {}
    for eta in is_vit.SHIFTS:
        low, high = math.log2(x.min() + eta), math.log2(x.max() + eta)
        quantizer = ShiftUniformLog2(t(low), t((high - low) / (2**bits - 1)), eta, 2**bits - 1)
        errors[eta] = ((quantizer(x) - x) ** 2).sum().item()
    assert errors[fitted.eta] == pytest.approx(min(errors.values()), rel=1e-4)
    span = math.log2(x.max() + fitted.eta) - math.log2(x.min() + fitted.eta)
    assert fitted.step.item() * 2**bits == pytest.approx(span, rel=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_steepness_is_of_least_output_error(bits: int) -> None:
    x, value = probabilities(9.0), uniform(0.8, 1.2, (4, 2, 17, 8), 4)  # a common part: what a row loses in sum counts
    errors = [(((dopq_vit.tangent(x, bits, s)(x) - x) @ value) ** 2).sum().item() for s in dopq_vit.STEEPNESSES]
    best = dopq_vit.best_steepness(x, value, bits)
    assert errors[dopq_vit.STEEPNESSES.index(best)] == min(errors)


@pytest.mark.parametrize("steepness", dopq_vit.STEEPNESSES)
def test_tangent_has_more_codes_at_both_ends(steepness: float) -> None:
    codes = Tangent(t(1.0), steepness, 6)(torch.linspace(0, 1, 100_001)).unique()
    gaps = codes.diff()
    assert (codes[0].item(), codes[-1].item()) == pytest.approx((0, 1), abs=1e-6)
    assert gaps[0] < gaps[31]
    assert gaps[-1] < gaps[31]
    torch.testing.assert_close(gaps, gaps.flip(0), rtol=1e-2, atol=1e-5)
