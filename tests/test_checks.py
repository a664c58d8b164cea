"""Bad input to the ops: every argument, one by one: the message names op, argument, expected, got."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import Case, op_arguments
from tests.op_cases import SAMPLES
from vitq_kernels.ops import bit_planes, checks, mma_fragments
from vitq_kernels.packing import PackedWeight

TENSOR_ARGUMENTS = [
    (case, name)
    for case in SAMPLES.values()
    for name, value in case.arguments.items()
    if isinstance(value, Tensor | PackedWeight)
]
FIRST = ("x", "a", "q", "image")  # sets the sizes and the device of the others


def each_argument(but: tuple[tuple[str, str], ...] = (), first: bool = True) -> pytest.MarkDecorator:
    kept = [(c, n) for c, n in TENSOR_ARGUMENTS if (c.op, n) not in but and (first or n not in FIRST)]
    return pytest.mark.parametrize(("case", "name"), kept, ids=[f"{case.op}-{name}" for case, name in kept])


def call_with(op: str, **changes: Any) -> Any:
    """The op on good arguments but for ``changes``: new values, or functions of the old; ``weight`` is a list."""
    function = getattr(torch.ops.vitq, op)
    names = [argument.name for argument in function.default._schema.arguments]
    arguments = dict(zip(names, op_arguments(SAMPLES[op]), strict=True))
    assert set(changes) <= set(names)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return function(**arguments)


def on_each(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda value: [change(t) for t in value] if isinstance(value, list) else change(value)


@pytest.mark.parametrize("op", SAMPLES)
def test_the_arguments_are_good_as_they_are(op: str) -> None:
    call_with(op)


@each_argument()
def test_a_wrong_dtype_is_refused(case: Case, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{case.op}: {name} must be .*, got .*float64"):
        call_with(case.op, **{name: on_each(Tensor.double)})


@each_argument()
def test_a_wrong_rank_is_refused(case: Case, name: str) -> None:
    def change(tensor: Tensor) -> Tensor:
        return tensor.expand(2, 2, 2, *tensor.shape) if name == "residual" else tensor.flatten()[0]

    with pytest.raises(ValueError, match=rf"^vitq::{case.op}: {name} must be .*, got "):
        call_with(case.op, **{name: on_each(change)})


@each_argument(but=(("quantize_per_token", "x"), ("quantize_patches", "image")))
def test_a_wrong_size_is_refused(case: Case, name: str) -> None:
    # The first argument sets the sizes, so there the message names one that does not follow.
    def change(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[..., :1]], -1)

    named = r"\w+" if name in (*FIRST, "multiplier", "levels") else name
    with pytest.raises(ValueError, match=rf"^vitq::{case.op}: {named} must be .*, got "):
        call_with(case.op, **{name: on_each(change)})


@each_argument(first=False)
def test_another_device_is_refused(case: Case, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{case.op}: {name} must be on cpu, got meta$"):
        call_with(case.op, **{name: on_each(lambda t: t.to("meta"))})


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 64])
@pytest.mark.parametrize("op", [op for op, case in SAMPLES.items() if "bits" in case.arguments])
def test_a_width_outside_2_to_8_is_refused(op: str, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{op}: bits must be an integer in 2\.\.8, got {bits}$"):
        call_with(op, bits=bits)


@pytest.mark.parametrize(("name", "size", "side"), [("patch_height", 19, "height"), ("patch_width", 26, "width")])
@pytest.mark.parametrize("beyond", [True, False], ids=["larger-than-the-image", "zero"])
def test_a_patch_that_the_image_does_not_hold_is_refused(name: str, size: int, side: str, beyond: bool) -> None:
    patch = size + 1 if beyond else 0
    message = rf"^vitq::quantize_patches: {name} must be in 1\.\.{size}, the image's {side}, got {patch}$"
    with pytest.raises(ValueError, match=message):
        call_with("quantize_patches", **{name: patch})


@pytest.mark.parametrize(
    "change", [{"image": lambda t: t.expand(-1, 3, -1, -1)}, {"patch_width": 5}], ids=["channels", "patch-width"]
)
def test_patches_of_another_size_than_the_scales_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^vitq::quantize_patches: inv_scale must be float32 \[\d+\], got float32 \[24\]"
    ):
        call_with("quantize_patches", **change)


@pytest.mark.parametrize("op", [op for op, case in SAMPLES.items() if "approximate" in case.arguments])
def test_an_unknown_gelu_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{op}: approximate must be 'none' or 'tanh', got 'erf'$"):
        call_with(op, approximate="erf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32], ids=str)
@pytest.mark.parametrize("op", [op for op, case in SAMPLES.items() if "out_dtype" in case.arguments])
def test_an_output_that_is_no_float_of_ours_is_refused(op: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{op}: out_dtype must be float32, float16 or bfloat16, got {dtype}"):
        call_with(op, out_dtype=dtype)


LINEAR_OPS = [op for op, case in SAMPLES.items() if "weight" in case.arguments and "a" in case.arguments]


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_an_unknown_weight_layout_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{op}: layout must be .*, got 'int8_columns'$"):
        call_with(op, layout="int8_columns")


@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_weight_tensors_is_refused(op: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{op}: weight must be .*, got {count} tensors$"):
        call_with(op, weight=lambda tensors: count * tensors)


@pytest.mark.parametrize("count", [1, 5, 12, 512])
def test_a_level_table_that_is_no_power_of_two_from_4_to_256_is_refused(count: int) -> None:
    levels = torch.ones(3, count, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^vitq::attention: levels must be uint8 \[H, 2\^b\] with b in 2\.\.8, got"):
        call_with("attention", levels=levels)


@pytest.mark.parametrize("shape", [(2, 3, 49, 49), (1, 2, 49, 49), (1, 3, 49, 48), (3, 49, 49)], ids=str)
def test_an_attention_bias_that_does_not_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"bias_q must be int32, broadcasting to \[1, 3, 49, 49\], got"):
        call_with("attention", bias_q=torch.zeros(shape, dtype=torch.int32))


@pytest.mark.parametrize(
    "inv_tau", [torch.ones(3, dtype=torch.float64), torch.ones(2), torch.ones(())], ids=["dtype", "size", "rank"]
)
def test_an_inv_tau_that_is_no_float32_per_head_is_refused(inv_tau: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^vitq::attention: inv_tau must be float32 \[3\], got float"):
        call_with("attention", inv_tau=inv_tau)


def test_an_inv_tau_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^vitq::attention: inv_tau must be on cpu, got meta$"):
        call_with("attention", inv_tau=torch.ones(3, device="meta"))


def windowed(**changes: Any) -> Tensor:
    """Attention inside 7 windows of 7 tokens, the last of which take the second bias, but for ``changes``."""
    bias_q = torch.zeros(2, 3, 7, 7, dtype=torch.int32)
    good = {"windows": torch.arange(48, -1, -1).int().view(7, 7), "pattern": torch.arange(7).int() // 6}
    return call_with("attention", **({"bias_q": bias_q} | good | changes))


def test_good_windows_are_taken() -> None:
    assert windowed().shape == (1, 49, 96)
    assert windowed(bias_q=None, pattern=None).shape == (1, 49, 96)
    assert windowed(bias_q=torch.zeros(1, 1, 7, 7, dtype=torch.int32), pattern=None).shape == (1, 49, 96)


@pytest.mark.parametrize(
    ("windows", "got"),
    [
        (torch.arange(49).view(7, 7), "int64 [7, 7]"),
        (torch.arange(49).int(), "int32 [49]"),
        (torch.arange(42).int().view(6, 7), "int32 [6, 7]"),
        (torch.zeros(0, 7).int(), "int32 [0, 7]"),
    ],
    ids=["dtype", "rank", "tokens", "none"],
)
def test_windows_of_a_wrong_form_are_refused(windows: Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::attention: windows must be int32 \[W, S\].*, got {re.escape(got)}$"):
        windowed(windows=windows)


@pytest.mark.parametrize(
    ("place", "token", "message"),
    [
        (0, 49, r"in 0\.\.48, got 0\.\.49"),
        (9, -1, r"in 0\.\.48, got -1\.\.48"),
        (48, 7, r"a permutation of 0\.\.48, got one without 0"),
    ],
    ids=["beyond", "negative", "twice"],
)
def test_windows_that_are_no_permutation_are_refused(place: int, token: int, message: str) -> None:
    windows = torch.arange(48, -1, -1).int()
    windows[place] = token
    with pytest.raises(ValueError, match=rf"^vitq::attention: windows must be {message}$"):
        windowed(windows=windows.view(7, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": None, "bias_q": None}, r"None without windows, got int32 \[7\]"),
        ({"bias_q": None}, r"None without a bias_q \[P, H, S, S\], got int32 \[7\]"),
        ({"pattern": torch.zeros(7)}, r"int32 \[7\], got float32 \[7\]"),
        ({"pattern": torch.zeros(6).int()}, r"int32 \[7\], got int32 \[6\]"),
        ({"pattern": torch.arange(7).int()}, r"in 0\.\.1, got 0\.\.6"),
        ({"pattern": torch.arange(7).int() // 6 - 1}, r"in 0\.\.1, got -1\.\.0"),
    ],
    ids=["no-windows", "no-bias", "dtype", "size", "beyond", "negative"],
)
def test_a_wrong_pattern_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::attention: pattern must be {message}$"):
        windowed(**changes)


@pytest.mark.parametrize(
    ("shape", "pattern"), [((2, 3, 7, 7), False), ((2, 2, 7, 7), True), ((1, 3, 49, 49), False), ((0, 3, 7, 7), True)]
)
def test_a_bias_that_does_not_fit_the_windows_is_refused(shape: tuple[int, ...], pattern: bool) -> None:
    expected = [max(1, shape[0]) if pattern else 1, 3, 7, 7]
    changes = {} if pattern else {"pattern": None}
    if not shape[0]:
        changes = {"pattern": torch.zeros(7, dtype=torch.int32)}
    message = re.escape(f"bias_q must be int32, broadcasting to {expected}, got torch.int32 {list(shape)}")
    with pytest.raises(ValueError, match=message):
        windowed(bias_q=torch.zeros(shape, dtype=torch.int32), **changes)


@pytest.mark.parametrize("name", ["windows", "pattern"])
def test_windows_on_another_device_are_refused(name: str) -> None:
    good = {"windows": torch.arange(49).int().view(7, 7), "pattern": torch.zeros(7, dtype=torch.int32)}
    with pytest.raises(ValueError, match=rf"^vitq::attention: {name} must be on cpu, got meta$"):
        windowed(**{name: good[name].to("meta")})


def test_attention_over_no_tokens_is_refused() -> None:
    def none(tensor: Tensor) -> Tensor:
        return tensor[:, :, :0]

    with pytest.raises(ValueError, match=r"q must be int8 \[B, H, S, D\] with S > 0, got int8 \[1, 3, 0, 32\]"):
        call_with("attention", q=none, k=none, v=none, bias_q=None)


def test_messages_show_dtypes_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"^vitq::linear_codes: bias_q must be int32 \[72\], got int32 \[71\]$"):
        call_with("linear_codes", bias_q=lambda t: t[1:])
    with pytest.raises(
        ValueError, match=r"^vitq::quantize: x must be float32/float16/bfloat16 \[\.\.\., K\], got int32 "
    ):
        call_with("quantize", x=lambda t: t.int())
    with pytest.raises(
        ValueError, match=r"^vitq::linear_codes: weight must be int8 \[72, 147\], got int8 \[72, 146\]$"
    ):
        call_with("linear_codes", weight=lambda tensors: [tensors[0][:, 1:]])


@pytest.mark.parametrize(
    ("op", "name"),
    [("quantize", "x"), ("quantize_per_token", "x"), ("layernorm", "x"), ("linear_codes", "a"), ("attention", "q")],
)
def test_no_channels_are_refused(op: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^vitq::{op}: {name} must be .*, got .*, 0\]$"):
        call_with(op, **{name: lambda t: t[..., :0]})


def test_a_residual_without_a_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^vitq::linear_residual: residual must be .* \[72\], got bfloat16 \[\]$"):
        call_with("linear_residual", residual=lambda t: t.flatten()[0])


def bit_planes_weight() -> list[Tensor]:
    return bit_planes.prepare_weight(SAMPLES["linear_codes"].arguments["weight"])


def test_planes_are_accepted_as_they_are_made() -> None:
    checks.check_weight("op", SAMPLES["linear_codes"].arguments["a"], bit_planes_weight(), "bit_planes", 72)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[:0], r"weight must be as prepare_weight makes it for 72 rows, got planes of \["),
        (0, lambda t: t.new_empty(512, 0), "weight must be as prepare_weight makes it"),
        (1, lambda t: torch.cat([t, t]), r"weight window_bits must be int32 \[1\]"),
        (2, lambda t: t[1:], r"weight shifts must be int32 \[72\]"),
        (3, lambda t: t[:3], r"weight places must be int32 \[4, 72\]"),
        (3, lambda t: t.t().contiguous().t(), "weight places must be contiguous, got strides"),
        (6, lambda t: t[:0], "weight must be as prepare_weight makes it"),
        (6, lambda t: torch.cat([t, t]), "weight must be as prepare_weight makes it"),
        (6, lambda t: t[:, 1:].contiguous(), r"weight plane 2 must be int32 \[rows, 12\]"),
        (6, lambda t: t.float(), "weight plane 2 must be int32"),
    ],
    ids=["no-widths", "wide", "windows", "shifts", "places", "strides", "absent-plane", "rows", "columns", "dtype"],
)
def test_planes_that_were_not_made_so_are_refused(index: int, change: Callable[[Tensor], Tensor], message: str) -> None:
    weight = bit_planes_weight()
    weight[index] = change(weight[index])
    with pytest.raises(ValueError, match=rf"^vitq::op: {message}"):
        checks.check_weight("op", SAMPLES["linear_codes"].arguments["a"], weight, "bit_planes", 72)


def fragments_weight() -> list[Tensor]:
    return mma_fragments.prepare_weight(SAMPLES["linear_codes"].arguments["weight"])


def test_fragments_are_accepted_as_they_are_made() -> None:
    checks.check_weight("op", SAMPLES["linear_codes"].arguments["a"], fragments_weight(), "mma_fragments", 72)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[:0], "weight must be as prepare_weight makes it for 72 rows, got "),
        (0, lambda t: t.new_empty(512, 8, 0), "weight must be as prepare_weight makes it"),
        (0, lambda t: t.new_empty(t.shape[0], 9, 0), "weight must be as prepare_weight makes it"),
        (0, lambda t: t.new_empty(t.shape[0] | 1 << 8, 8, 0), "weight must be as prepare_weight makes it"),
        (1, lambda t: t[1:], r"weight groups must be int32 \[2, 2\]"),
        (1, lambda t: t.long(), r"weight groups must be int32 \[2, 2\]"),
        (2, lambda t: t[1:], "weight must be as prepare_weight makes it"),
        (3, lambda t: t[: len(t) // 2], "weight must be as prepare_weight makes it"),
        (3, lambda t: torch.cat([t, t]), "weight must be as prepare_weight makes it"),
        (3, lambda t: t[:, 1:].contiguous(), r"weight chunks must be uint8 \[chunks, 128\]"),
        (3, lambda t: t[:, ::2].repeat(1, 2).t().contiguous().t(), "weight chunks must be contiguous, got strides"),
    ],
    ids=[
        *("no-widths", "wide", "input", "another-width", "groups", "dtype", "order", "few", "many", "bytes", "strides"),
    ],
)
def test_fragments_that_were_not_made_so_are_refused(
    index: int, change: Callable[[Tensor], Tensor], message: str
) -> None:
    weight = fragments_weight()
    weight[index] = change(weight[index])
    with pytest.raises(ValueError, match=rf"^vitq::op: {message}"):
        checks.check_weight("op", SAMPLES["linear_codes"].arguments["a"], weight, "mma_fragments", 72)


def test_an_unknown_layout_and_missing_tensors_are_refused() -> None:
    a = SAMPLES["linear_codes"].arguments["a"]
    with pytest.raises(
        ValueError, match=r"^vitq::op: layout must be int8_rows, bit_planes or mma_fragments, got 'rows'$"
    ):
        checks.check_weight("op", a, bit_planes_weight(), "rows", 72)
    with pytest.raises(ValueError, match=r"^vitq::op: weight must be 8 tensors in layout bit_planes, got 7 tensors$"):
        checks.check_weight("op", a, bit_planes_weight()[:-1], "bit_planes", 72)
