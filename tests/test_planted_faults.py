"""The tests tested: faults planted into copies of the reference, each of which the comparison with it must reject."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import check_values
from tests.op_cases import CASES
from vitq_kernels.ops import OPS, reference
from vitq_kernels.ops.backends import BACKENDS, Backend
from vitq_kernels.spec import QuantFormat

Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Registers a backend ``planted``: a copy of the reference with some of its functions exchanged."""

    def plant(**faulty: Callable[..., Any]) -> None:
        spec = importlib.util.spec_from_file_location("planted_reference", reference.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        vars(module).update(faulty)
        if "accumulate" in faulty:  # the linear ops hold the one they were defined with
            for op in OPS:
                if op.startswith("linear"):
                    vars(module)[op] = partial(getattr(module, op), accumulate=faulty["accumulate"])
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(BACKENDS, "planted", Backend("planted", module.__name__, ("cpu",)))

    return plant


def rejected(op: str) -> bool:
    """Whether any case of an op tells the planted backend from the reference."""
    for case in CASES[op]:
        try:
            check_values(case, "planted")
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("op", OPS)
def test_a_faultless_copy_is_accepted(op: str, plant: Plant) -> None:
    plant()
    assert not rejected(op)


# S1. Every fault takes (value, multiplier, zero_point, bits) and gives what goes into the clamp.
def half_away(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    exact = value.float().double() * m.double() + z
    return exact.sign() * (exact.abs() + 0.5).floor()


def half_up(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    return (value.float().double() * m.double() + z + 0.5).floor()


def rounded_before_the_zero_point(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    return (value.float().double() * m.double()).round() + z


def two_roundings_in_float64(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    return (value.float().double() * m.double() + z).round()


def float32_product(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    return (value.float() * m + z).round()


def accumulator_not_rounded_to_float32(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    return (value.double() * m.double() + z).round()


def no_zero_point(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    return (value.float().double() * m.double()).round()


def one_multiplier_for_all_channels(value: Tensor, m: Tensor, z: Tensor) -> Tensor:
    return (value.float().double() * m.double().flatten()[0] + z).round()


REQUANTISE_FAULTS = [
    half_away,
    half_up,
    rounded_before_the_zero_point,
    two_roundings_in_float64,
    float32_product,
    accumulator_not_rounded_to_float32,
    no_zero_point,
    one_multiplier_for_all_channels,
]


@pytest.mark.parametrize("fault", REQUANTISE_FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_rounding_is_rejected(fault: Callable[..., Tensor], plant: Plant) -> None:
    def requantise(value: Tensor, multiplier: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        fmt = QuantFormat(bits)
        return fault(value, multiplier, zero_point).clamp(fmt.qmin, fmt.qmax).to(torch.int8)

    plant(requantise=requantise)
    assert rejected("linear_codes")


@pytest.mark.parametrize("op", ["quantize", "quantize_patches", "quantize_per_token"])
def test_a_product_rounded_by_itself_is_rejected(op: str, plant: Plant) -> None:
    def requantise(value: Tensor, multiplier: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        fmt = QuantFormat(bits)
        return float32_product(value, multiplier, zero_point).clamp(fmt.qmin, fmt.qmax).to(torch.int8)

    plant(requantise=requantise)
    assert rejected(op)


def test_wrapping_instead_of_saturating_is_rejected(plant: Plant) -> None:
    def requantise(value: Tensor, multiplier: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        half = 1 << (bits - 1)
        wrapped = (value.float().double() * multiplier.double() + zero_point).round().long()
        return ((wrapped + half) % (2 * half) - half).to(torch.int8)

    plant(requantise=requantise)
    assert rejected("linear_codes")
    assert rejected("quantize")
    assert rejected("attention")


# S2
def float32_sums(a: Tensor, w: Tensor) -> Tensor:
    # In order, as one thread would: a BLAS may happen to be exact in pairs.
    return (a.float().unsqueeze(-2) * w.float()).cumsum(-1)[..., -1].int()


def saturating_int16_pairs(a: Tensor, w: Tensor) -> Tensor:
    products = torch.nn.functional.pad(a.int().unsqueeze(-2) * w.int(), (0, a.shape[-1] % 2))
    return products.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767).sum(-1, dtype=torch.int32)


def tail_of_k_dropped(a: Tensor, w: Tensor) -> Tensor:
    whole = a.shape[-1] // 32 * 32
    return a[..., :whole].int() @ w[:, :whole].int().t()


def rows_of_a_tile_swapped(a: Tensor, w: Tensor) -> Tensor:
    return (a.int() @ w.int().t())[..., torch.arange(len(w)) ^ 1 if len(w) % 2 == 0 else slice(None)]


@pytest.mark.parametrize(
    "fault", [float32_sums, saturating_int16_pairs, tail_of_k_dropped, rows_of_a_tile_swapped], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("op", ["linear_codes", "linear_real"])
def test_a_wrong_sum_is_rejected(fault: Callable[..., Tensor], op: str, plant: Plant) -> None:
    def accumulate(a: Tensor, weight: list[Tensor], bias_q: Tensor | None) -> Tensor:
        # The widest case would take long and adds nothing to these faults.
        acc = fault(a, weight[0]) if a.shape[0] < 100 else a.int() @ weight[0].int().t()
        return acc if bias_q is None else acc + bias_q

    plant(accumulate=accumulate)
    assert rejected(op)


def test_a_missing_bias_is_rejected(plant: Plant) -> None:
    plant(accumulate=lambda a, weight, bias_q: reference.accumulate(a, weight, None))
    assert rejected("linear_codes")


# S4
def no_zero_last_level(x: dict[str, Any]) -> None:
    count = x["levels"].shape[1]
    # The level that the power law itself gives, tau read off the first step down.
    step = 255 / x["levels"][:, 1].double().clamp_min(1)
    x["levels"] = x["levels"].clone()
    x["levels"][:, -1] = (255 * step ** -(count - 1)).round().to(torch.uint8)


def last_code_never_reached(x: dict[str, Any]) -> None:
    x["levels"] = torch.cat([x["levels"][:, :-1], x["levels"][:, -2:-1]], 1)


def one_head_for_all(x: dict[str, Any]) -> None:
    x["kappa"] = x["kappa"][:1].expand_as(x["kappa"])


def no_attention_zero_point(x: dict[str, Any]) -> None:
    x["zero_point"] = torch.zeros_like(x["zero_point"])


def no_bias(x: dict[str, Any]) -> None:
    x["bias_q"] = None


def no_inv_tau(x: dict[str, Any]) -> None:
    x["inv_tau"] = None


def keys_for_queries(x: dict[str, Any]) -> None:
    x["q"], x["k"] = x["k"], x["q"]


def windows_in_order(x: dict[str, Any]) -> None:
    if x["windows"] is not None:
        x["windows"] = x["windows"].flatten().sort().values.view(x["windows"].shape)


def one_pattern_for_all(x: dict[str, Any]) -> None:
    if x["pattern"] is not None:
        x["pattern"] = torch.zeros_like(x["pattern"])


def the_next_pattern(x: dict[str, Any]) -> None:
    if x["pattern"] is not None:
        x["pattern"] = x["pattern"].roll(1)


def places_transposed(x: dict[str, Any]) -> None:
    if x["windows"] is not None:
        x["windows"] = x["windows"].mT.reshape(x["windows"].shape)


ATTENTION_FAULTS = [
    no_zero_last_level,
    last_code_never_reached,
    one_head_for_all,
    no_attention_zero_point,
    no_bias,
    no_inv_tau,
    keys_for_queries,
    windows_in_order,
    one_pattern_for_all,
    the_next_pattern,
    places_transposed,
]


@pytest.mark.parametrize("fault", ATTENTION_FAULTS, ids=lambda f: f.__name__)
def test_attention_on_wrong_arguments_is_rejected(fault: Callable[[dict[str, Any]], None], plant: Plant) -> None:
    def attention(*arguments: Any) -> Tensor:
        given = inspect.signature(reference.attention).bind(*arguments)
        given.apply_defaults()
        x = dict(given.arguments)
        fault(x)
        return reference.attention(**x)

    plant(attention=attention)
    assert rejected("attention")


def floor_of_steps(distance: Tensor, kappa: Tensor) -> Tensor:
    return (distance.float().double() * kappa.double()).floor()


def distance_not_rounded_to_float32(distance: Tensor, kappa: Tensor) -> Tensor:
    return (distance.double() * kappa.double()).round()


def half_up_steps(distance: Tensor, kappa: Tensor) -> Tensor:
    return (distance.float().double() * kappa.double() + 0.5).floor()


@pytest.mark.parametrize(
    "fault", [floor_of_steps, distance_not_rounded_to_float32, half_up_steps], ids=lambda f: f.__name__
)
def test_wrong_attention_codes_are_rejected(fault: Callable[..., Tensor], plant: Plant) -> None:
    def attention_codes(distance: Tensor, kappa: Tensor, levels: int) -> Tensor:
        return fault(distance, kappa.view(1, -1, 1, 1)).clamp(max=levels - 1).long()

    plant(attention_codes=attention_codes)
    assert rejected("attention")


def one_rounding_of_product_and_sum(distance: Tensor, kappa: Tensor, offset: Tensor) -> Tensor:
    return (distance.float().double() * kappa.double() + offset.double()).float().round()


def steps_in_float64(distance: Tensor, kappa: Tensor, offset: Tensor) -> Tensor:
    return (distance.double() * kappa.double() + offset.double()).round()


def half_up_offset_steps(distance: Tensor, kappa: Tensor, offset: Tensor) -> Tensor:
    return (distance.float() * kappa + offset + 0.5).floor()


def offset_added_to_the_code(distance: Tensor, kappa: Tensor, offset: Tensor) -> Tensor:
    return (distance.float() * kappa).round() + offset.round()


@pytest.mark.parametrize(
    "fault",
    [one_rounding_of_product_and_sum, steps_in_float64, half_up_offset_steps, offset_added_to_the_code],
    ids=lambda f: f.__name__,
)
def test_wrong_codes_of_the_normalised_form_are_rejected(fault: Callable[..., Tensor], plant: Plant) -> None:
    def attention_offset_codes(distance: Tensor, kappa: Tensor, offset: Tensor, levels: int) -> Tensor:
        return fault(distance, kappa.view(-1, 1, 1), offset).clamp(max=levels - 1).long()

    plant(attention_offset_codes=attention_offset_codes)
    assert rejected("attention")


def test_a_logarithm_in_float32_is_rejected(plant: Plant) -> None:
    def attention_offset(total: Tensor, largest: Tensor, inv_tau: Tensor) -> Tensor:
        return (total.float() / largest.float()).log2() * inv_tau[:, None, None]

    plant(attention_offset=attention_offset)
    assert rejected("attention")


def normalised_in_float64(out: Tensor, total: Tensor, m: Tensor) -> Tensor:
    return out.double() * (m.double() / total.double())


def division_for_reciprocal_and_product(out: Tensor, total: Tensor, m: Tensor) -> Tensor:
    return out.float().double() * (m / total.float()).double()


def scale_not_rounded_to_float32(out: Tensor, total: Tensor, m: Tensor) -> Tensor:
    return out.float().double() * (m.double() * (1 / total.float()).double())


@pytest.mark.parametrize(
    "fault",
    [normalised_in_float64, division_for_reciprocal_and_product, scale_not_rounded_to_float32],
    ids=lambda f: f.__name__,
)
def test_a_wrong_normalisation_is_rejected(fault: Callable[..., Tensor], plant: Plant) -> None:
    def attention_output(out: Tensor, total: Tensor, multiplier: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        fmt = QuantFormat(bits)
        y = fault(out, total, multiplier.unsqueeze(-2)) + zero_point.unsqueeze(-2)
        return y.round().clamp(fmt.qmin, fmt.qmax).to(torch.int8).transpose(1, 2).flatten(2)

    plant(attention_output=attention_output)
    assert rejected("attention")


def outputs_left_in_the_order_of_windows(out: Tensor, windows: Tensor) -> Tensor:
    return out.reshape(len(out) // len(windows), windows.numel(), out.shape[-1])


def outputs_gathered_a_second_time(out: Tensor, windows: Tensor) -> Tensor:
    return outputs_left_in_the_order_of_windows(out, windows)[:, windows.flatten().long()]


@pytest.mark.parametrize(
    "fault", [outputs_left_in_the_order_of_windows, outputs_gathered_a_second_time], ids=lambda f: f.__name__
)
def test_windows_not_undone_are_rejected(fault: Callable[..., Tensor], plant: Plant) -> None:
    plant(scatter_windows=fault)
    assert rejected("attention")


# The smallest fault there is, in every op.
@pytest.mark.parametrize("op", OPS)
def test_one_bit_in_one_element_is_rejected(op: str, plant: Plant) -> None:
    def faulty(*arguments: Any) -> Any:
        outputs = getattr(reference, op)(*arguments)
        last = outputs if isinstance(outputs, Tensor) else outputs[-1]
        bits = last.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[last.element_size()])
        bits.view(-1)[bits.numel() // 2] ^= 1
        return outputs

    plant(**{op: faulty})
    assert rejected(op)
