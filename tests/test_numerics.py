"""The comparisons themselves: what they reject, what they accept, what they say; and the data makers' promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import (
    CODE_KINDS,
    REAL_KINDS,
    assert_bitwise_equal,
    assert_codes_close,
    assert_reals_close,
    codes,
    fails,
    integers,
    reals,
    words,
)


@pytest.mark.parametrize(("every", "step"), [(500, 1), (10000, 2)], ids=["too-many-by-1", "one-by-2"])
def test_codes_beyond_the_tolerance_are_rejected(every: int, step: int) -> None:
    expected = codes("random", (100, 100), 4)
    actual = expected.clone()
    actual.view(-1)[::every] += step
    assert fails(assert_codes_close, actual, expected)


def test_codes_within_the_tolerance_are_accepted() -> None:
    expected = codes("random", (100, 100), 4)
    actual = expected.clone()
    actual.view(-1)[::1000] += 1
    assert_codes_close(actual, expected)


@pytest.mark.parametrize("value", [1.01, float("nan"), float("inf")])
def test_reals_beyond_the_tolerance_are_rejected(value: float) -> None:
    exact = reals("normal", (50, 50)).double()
    actual = exact.half()
    assert_reals_close(actual, exact, exact.half())
    actual.view(-1)[exact.abs().argmax()] *= value
    assert fails(assert_reals_close, actual, exact, exact.half())


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1], dtype=torch.int8), torch.tensor([1], dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(1), torch.tensor([float("nan")])),
    ],
    ids=["sign-of-zero", "dtype", "shape", "nan"],
)
def test_bitwise_equality_is_that(actual: Tensor, expected: Tensor) -> None:
    assert fails(assert_bitwise_equal, actual, expected)
    assert_bitwise_equal(expected, expected.clone())


def test_a_difference_is_reported_with_count_place_and_values() -> None:
    actual = torch.zeros(3, 4, dtype=torch.int8)
    actual[1, 2:] = torch.tensor([7, 8])
    with pytest.raises(AssertionError, match=r"2 of 12 elements differ; first at \(1, 2\): got 7, expected 0"):
        assert_bitwise_equal(actual, torch.zeros(3, 4, dtype=torch.int8))


def test_data_is_the_same_everywhere() -> None:
    # splitmix64 from its definition, in Python integers.
    def splitmix(state: int) -> int:
        mask = (1 << 64) - 1
        z = state & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    expected = [splitmix(i * 0x9E3779B97F4A7C15 + 5 * 0x632BE59B) for i in range(1, 9)]
    assert words(5, 8).tolist() == expected
    assert words(6, 8).tolist() != expected


def test_integers_reach_both_ends() -> None:
    values = integers(-3, 2, (1000,), 1)
    assert values.unique().tolist() == [-3, -2, -1, 0, 1, 2]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", CODE_KINDS)
def test_codes_lie_in_their_width(kind: str, bits: int) -> None:
    values = codes(kind, (64, 64), bits)
    assert values.dtype == torch.int8
    assert -(1 << (bits - 1)) <= int(values.min()) <= int(values.max()) <= (1 << (bits - 1)) - 1


def test_kinds_of_codes_are_what_they_say() -> None:
    assert codes("extreme", (50, 50)).unique().tolist() == [-128, -127, 127]
    assert codes("one_sided", (50, 50)).unique().tolist() == list(range(64, 128))
    assert codes("largest", (2, 2)).tolist() == [[127, 127], [127, 127]]
    assert codes("counting", (2, 3)).tolist() == [[-128, -127, -126], [-125, -124, -123]]
    assert codes("zero_rows", (4, 9)).any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_kinds_of_reals_are_what_they_say(dtype: torch.dtype) -> None:
    data = {kind: reals(kind, (8, 33), dtype) for kind in REAL_KINDS}
    assert all(x.dtype == dtype and x.isfinite().all() for x in data.values())
    assert ((data["ties"].float() - 0.5) % 1 == 0).all()
    assert (data["one_sided"] > 0).all()
    assert data["outlier"].abs().max() > 100 * data["normal"].abs().max()
    assert data["zero_rows"].any(1).tolist() == [False, True] * 4
    assert (data["constant_rows"] == data["constant_rows"][:, :1]).all()
    assert data["constant_rows"].unique().numel() == 8
