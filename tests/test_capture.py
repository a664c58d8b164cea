"""vitq.capture: buckets, padding, slicing, splitting, and what is refused; on the CPU, where nothing is captured."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedCuda
from small_swins import quantized_swin, swin_images
from small_vits import small_vit, variant_images, variant_quantized, variant_vit
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import vitq_kernels as vitq
from tests.numerics import assert_bitwise_equal, reals
from vitq_kernels.data import digits_images, load_digits_vit

Pair = namedtuple("Pair", ["first", "second"])


class Spy(nn.Module):
    """Doubles its input and keeps a copy of every batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return 2 * x


class Calls(nn.Module):
    """A model whose forward is a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function
        self.eval()


def rows(count: int, seed: int = 0) -> Tensor:
    return reals("normal", (count, 3), seed=seed)


# --- buckets ------------------------------------------------------------------------------------------------------

BUCKETS = [
    ((1, 4, 8), 1, [1]),
    ((1, 4, 8), 2, [4]),
    ((1, 4, 8), 4, [4]),
    ((1, 4, 8), 5, [8]),
    ((1, 4, 8), 8, [8]),
    ((1, 4, 8), 9, [8, 1]),
    ((1, 4, 8), 11, [8, 4]),
    ((1, 4, 8), 16, [8, 8]),
    ((1, 4, 8), 21, [8, 8, 8]),
    ((8, 1, 4), 2, [4]),
    ([3], 1, [3]),
    ([3], 7, [3, 3, 3]),
]


@pytest.mark.parametrize(("sizes", "count", "runs"), BUCKETS, ids=lambda value: str(value))
def test_a_batch_runs_in_its_buckets(sizes: list[int], count: int, runs: list[int]) -> None:
    spy = Spy()
    fast = vitq.capture(spy, sizes, rows(2, seed=1))
    spy.seen.clear()
    x = rows(count)
    assert_bitwise_equal(fast(x), 2 * x)
    assert [len(seen) for seen in spy.seen] == runs


def test_padding_repeats_the_first_row_and_never_an_earlier_call() -> None:
    spy = Spy()
    fast = vitq.capture(spy, (4,), rows(1, seed=1))
    fast(rows(4, seed=2))
    x = rows(6, seed=3)
    fast(x)
    assert_bitwise_equal(spy.seen[-2], x[:4])
    assert_bitwise_equal(spy.seen[-1], x[[4, 5, 4, 4]])


@pytest.mark.parametrize(
    "variant", ["class-token", "distilled", "one-channel", "no-class-token", "swin padded", "swin v2-padded"]
)
def test_a_quantized_model_gives_the_same_bits_in_any_bucket(variant: str) -> None:
    if variant.startswith("swin"):
        variant = variant.removeprefix("swin ")
        model, images = quantized_swin(variant), swin_images(variant, 7)
    else:
        model, images = variant_quantized(variant), variant_images(variant, 7)
    fast = vitq.capture(model, (1, 4))
    for count in (1, 2, 4, 7):
        assert_bitwise_equal(fast(images[:count]), model(images[:count]))


def test_a_float_vit_gives_the_same_but_for_the_order_of_its_sums() -> None:
    model, images = variant_vit("class-token"), variant_images(count=5)
    torch.testing.assert_close(vitq.capture(model, (2, 4))(images), model(images))


def test_the_embedded_vit_without_an_example() -> None:
    model = vitq.replace_linears(load_digits_vit(), weight_bits=4)
    images = digits_images("test")[0][:5]
    assert_bitwise_equal(vitq.capture(model, (4,))(images), model(images))


def test_a_captured_model_is_evaluated_as_any_other() -> None:
    model, batches = variant_quantized("class-token"), [(variant_images(count=5), None)]
    assert vitq.evaluate(vitq.capture(model, (2,)), batches, float_model=model).agreement == 100


# --- signatures and structures ------------------------------------------------------------------------------------


def two(x: Tensor, y: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
    total = x + scale * y
    return {"sum": total, "parts": [x, (y.double(), Pair(total[:, 0], None))], "masked": mask, "name": "two"}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "positional": (two, lambda n: ((rows(n), rows(n, 1)), {})),
    "named": (two, lambda n: ((), {"y": rows(n, 1), "x": rows(n)})),
    "constant": (two, lambda n: ((rows(n), rows(n, 1), 0.5), {})),
    "optional tensor": (two, lambda n: ((rows(n), rows(n, 1)), {"mask": rows(n, 2) > 0})),
    "positional only": (lambda x, /: (x, -x), lambda n: ((rows(n),), {})),
    "any number": (lambda *xs: sum(xs), lambda n: ((rows(n), rows(n, 1), rows(n, 2)), {})),
    "any name": (lambda **xs: xs, lambda n: ((), {"b": rows(n), "a": rows(n, 1)})),
    "nested": (lambda d: d["a"][0] * d["b"], lambda n: (({"a": [rows(n)], "b": rows(n, 1)},), {})),
    "integers": (lambda i: torch.arange(9)[i] + 1, lambda n: ((torch.arange(n) % 7,), {})),
    "strided": (lambda x: x.T.contiguous().T, lambda n: ((rows(2 * n)[::2],), {})),
    "other trailing shapes": (lambda x, y: (x.sum((1, 2)), y), lambda n: ((rows(n)[:, :, None], rows(n, 1)), {})),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded graphs"])
@pytest.mark.parametrize("case", CALLS)
def test_arguments_and_outputs_have_the_models_structure(
    case: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = CALLS[case]
    if recorded:
        RecordedCuda().install(monkeypatch)
    fast = vitq.capture(Calls(function), (2, 3))
    for count in (2, 1, 3, 7):
        args, kwargs = arguments(count)
        actual, structure = tree_flatten(fast(*args, **kwargs))
        expected, wanted = tree_flatten(function(*args, **kwargs))
        assert structure == wanted
        for got, value in zip(actual, expected, strict=True):
            if isinstance(value, Tensor):
                assert_bitwise_equal(got, value)
            else:
                assert got == value


def test_positional_and_named_arguments_are_the_same_call() -> None:
    fast = vitq.capture(Calls(two), (2,), (rows(1), rows(1, 1), 0.5))
    x, y = rows(3), rows(3, 1)
    expected = two(x, y, 0.5)["sum"]
    assert_bitwise_equal(fast(x, scale=0.5, y=y)["sum"], expected)
    assert_bitwise_equal(fast(x, y, 0.5, None)["sum"], expected)


EXAMPLES = {"tensor": rows(1), "tuple": (rows(2),), "list": [rows(5)], "mapping": {"x": rows(1)}}


@pytest.mark.parametrize("form", EXAMPLES)
def test_an_example_may_have_any_form_and_batch(form: str) -> None:
    spy = Spy()
    assert_bitwise_equal(vitq.capture(spy, (3,), EXAMPLES[form])(rows(4)), 2 * rows(4))
    assert len(spy.seen) == 3  # one of them before the first call


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded graphs"])
def test_outputs_are_the_callers_own(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if recorded:
        RecordedCuda().install(monkeypatch)
    buffer = torch.zeros(4, 3)
    fast = vitq.capture(Calls(lambda x: (x, buffer[: len(x)].copy_(x))), (4,), rows(1))
    x, y = rows(4), rows(4, seed=1)
    first, second = fast(x), fast(y)
    for output in first:
        assert_bitwise_equal(output, x)
    for output in second:
        assert_bitwise_equal(output, y)


def test_nothing_is_recorded_for_autograd_and_outputs_are_plain_tensors() -> None:
    model = nn.Linear(3, 2).eval()
    with torch.inference_mode():
        fast = vitq.capture(model, (2,), rows(1))
        inside = fast(rows(3))
    outside = fast(rows(3).requires_grad_())
    assert not outside.requires_grad
    assert_bitwise_equal(outside.add_(0), inside)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [(), [], (0,), (1, -4), (1, 1), (4, 1, 4), (1.0,), (True,), ("1",), 8, None, {1: 2}, torch.tensor([1])],
    ids=str,
)
def test_batch_sizes_must_be_distinct_positive_integers(sizes: Any) -> None:
    with pytest.raises(ValueError, match=r"capture: batch_sizes must be distinct positive integers, got "):
        vitq.capture(Spy(), sizes, rows(1))


REFUSED = {
    "dtype": (rows(2).half(), r"x must be float32 \[B, 3\] on cpu, as captured, got float16 \[2, 3\] on cpu"),
    "shape": (torch.zeros(2, 4), r"x must be float32 \[B, 3\] on cpu, as captured, got float32 \[2, 4\] on cpu"),
    "dimensions": (torch.zeros(2, 3, 1), r"x must be float32 \[B, 3\] .* got float32 \[2, 3, 1\] on cpu"),
    "no dimension": (torch.zeros(()), r"x must be float32 \[B, 3\] on cpu, as captured, got float32 \[\] on cpu"),
    "device": (torch.zeros(2, 3, device="meta"), r"x must be float32 \[B, 3\] on cpu, as captured, got .* on meta"),
    "empty batch": (torch.zeros(0, 3), r"tensors must share a batch of at least 1 as first dimension, got x of 0"),
    "no tensor": ([[1.0, 2.0, 3.0]], r"arguments must be \['x'\], as captured, got \['x\[0\]\[0\]', "),
    "nothing": (None, r"x must be float32 \[B, 3\] on cpu, as captured, got None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_must_be_as_captured(case: str) -> None:
    value, message = REFUSED[case]
    spy = Spy()
    fast = vitq.capture(spy, (1, 2), rows(1))
    with pytest.raises(ValueError, match=f"^capture: {message}"):
        fast(value)
    assert len(spy.seen) == 1
    assert_bitwise_equal(fast(rows(2)), 2 * rows(2))


CHANGED = {
    "batches": ((rows(2), rows(3)), {}, r"share a batch of at least 1 as first dimension, got x of 2, y of 3"),
    "constant": ((rows(2), rows(2)), {"scale": 2.0}, r"scale must be 1.0, as captured, got 2.0"),
    "type of a constant": ((rows(2), rows(2)), {"scale": 1}, r"scale must be 1.0, as captured, got 1"),
    "a tensor more": ((rows(2), rows(2)), {"mask": rows(2)}, r"mask must be None, as captured, got float32 \[2, 3\]"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_several_arguments_must_be_as_captured(case: str) -> None:
    args, kwargs, message = CHANGED[case]
    fast = vitq.capture(Calls(two), (2,), (rows(1), rows(1)))
    with pytest.raises(ValueError, match=message):
        fast(*args, **kwargs)


def test_arguments_outside_the_signature_are_refused_as_by_the_model() -> None:
    fast = vitq.capture(Spy(), (2,), rows(1))
    for args, kwargs in (((), {}), ((rows(1), rows(1)), {}), ((rows(1),), {"z": 1})):
        with pytest.raises(TypeError):
            fast(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "example", "message"),
    [
        (lambda x: x, torch.zeros(()), "share a batch of at least 1 as first dimension, got x of no dimension"),
        (lambda x: x, torch.zeros(0, 3), "share a batch of at least 1 as first dimension, got x of 0"),
        (lambda x: x, (3,), "arguments must hold a tensor, got none"),
        (lambda x: x, 3, "example must be a tensor, a tuple or a mapping, got int"),
        (lambda x: x.mean(), rows(1), r"outputs must have the batch, 2, as first dimension, got float32 \[\] on cpu"),
        (lambda x: {"t": x.T}, rows(1), r"outputs must have the batch, 2, as first dimension, got float32 \[3, 2\]"),
        (lambda x, y: x, (rows(1), rows(1).to("meta")), "model and arguments must share a device, got meta, cpu"),
    ],
    ids=["scalar", "empty", "no tensor", "no example", "scalar out", "transposed out", "two devices"],
)
def test_what_cannot_be_captured_is_refused_at_once(function: Any, example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vitq.capture(Calls(function), (2, 5), example)


def test_a_model_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="model and arguments must share a device, got meta, cpu"):
        vitq.capture(nn.Linear(3, 3, device="meta").eval(), (1,), rows(1))


def test_a_first_call_that_fails_leaves_nothing_behind() -> None:
    fast = vitq.capture(nn.Linear(3, 2).eval(), (2,))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(torch.zeros(1, 4))
    assert_bitwise_equal(fast(rows(2)), fast.model(rows(2)).detach())
    with pytest.raises(ValueError, match=r"input must be float32 \[B, 3\]"):
        fast(torch.zeros(1, 4))


def test_a_model_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
    fast = vitq.capture(model, (1,), rows(1))
    for part, named in ((model[1], "1"), (model, "Sequential")):
        part.train()
        with pytest.raises(ValueError, match=f"capture: model must be in eval mode, got {named} in training mode"):
            vitq.capture(model, (1,), rows(1))
    with pytest.raises(ValueError, match="model must be in eval mode"):
        fast(rows(1))
    model.eval()
    with pytest.raises(ValueError, match="train: mode must be False for a captured model, got True"):
        fast.train()
    assert fast.eval().training is False
    assert fast(rows(1)).shape == (1, 3)


@pytest.mark.parametrize("move", ["half", "cpu", "cuda", "double"])
def test_a_captured_model_cannot_be_moved_or_converted(move: str) -> None:
    fast = vitq.capture(nn.Linear(3, 3).eval(), (1,), rows(1))
    with pytest.raises(RuntimeError, match="a captured model cannot be moved or converted"):
        getattr(fast, move)()
    assert fast(rows(1)).dtype == torch.float32


def test_a_model_moved_after_its_capture_is_noticed() -> None:
    for model in (
        small_vit(),
        vitq.quantize(small_vit(), variant_images(count=2)),
        nn.BatchNorm1d(3, affine=False).eval(),
    ):
        example = rows(1) if isinstance(model, nn.BatchNorm1d) else None
        fast = vitq.capture(model, (1,), example)
        model.half()
        with pytest.raises(RuntimeError, match="weights must stay where they were captured; capture it again"):
            fast(rows(1) if example is not None else variant_images(count=1))


def test_packed_weights_loaded_after_the_capture_are_noticed() -> None:
    model = vitq.quantize(small_vit(), variant_images(count=2))
    fast = vitq.capture(model, (1,))
    fast(variant_images(count=1))
    model.load_state_dict(vitq.quantize(small_vit(seed=1), variant_images(count=2)).state_dict())
    with pytest.raises(RuntimeError, match="weights must stay where they were captured; capture it again"):
        fast(variant_images(count=1))


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded graphs"])
def test_float_weights_written_in_place_take_effect(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if recorded:
        RecordedCuda().install(monkeypatch)
    model, other = nn.Linear(3, 2).eval(), nn.Linear(3, 2)
    fast = vitq.capture(model, (2,), rows(1))
    model.load_state_dict(other.state_dict())
    assert_bitwise_equal(fast(rows(2)), other(rows(2)).detach())
