"""Sensitivities as data: what allocation reads of them, JSON, and numbers that cannot be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from tests.numerics import uniform
from vitq_kernels.sensitivity import Sensitivity, check_candidates

MEASURED = Sensitivity(
    "weight",
    8,
    (2, 3, 8),
    16,
    0.25,
    {"a": (4.0, 1.5, 0.25), "b": (0.5, 0.75, 0.125), "c": (2.25, 0.25, 0.25)},
    (2, 3),
    {"a": {"b": ((5.0, 4.25), (1.75, 2.0))}, "b": {"c": ((2.5, 0.5), (2.75, 0.75))}},
)


def of_row(row: list[float], base: float = 0.0) -> np.ndarray:
    """Costs of a site with these KLs."""
    return Sensitivity("both", None, tuple(range(2, 2 + len(row))), 1, base, {"a": tuple(row)}).costs()["a"]


def test_costs_are_what_the_baseline_does_not_cost_and_never_rise() -> None:
    costs = MEASURED.costs()
    assert list(costs) == ["a", "b", "c"]
    np.testing.assert_array_equal(costs["a"], [3.75, 1.25, 0])
    np.testing.assert_array_equal(costs["b"], [0.375, 0.375, 0])  # .25 and .5 meet; -.125 counts as 0
    np.testing.assert_array_equal(costs["c"], [2, 0, 0])


@pytest.mark.parametrize("seed", range(20))
def test_costs_are_the_closest_that_never_rise(seed: int) -> None:
    row = uniform(-0.5, 1, (7,), seed).double().numpy()
    clipped = np.maximum(0, row)
    twin = IsotonicRegression(increasing=False).fit_transform(np.arange(7), clipped)
    np.testing.assert_allclose(of_row(row.tolist()), twin, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("row", list(product((0.0, 1.0, 3.0), repeat=3)), ids=str)
def test_no_grid_point_is_closer(row: tuple[float, ...]) -> None:
    """Brute force over all non-increasing rows on a grid that holds the optimum (means of up to three thirds)."""
    grid = [i / 6 for i in range(19)]
    falling = (r for r in product(grid, repeat=3) if r[0] >= r[1] >= r[2])
    best = min(sum((a - b) ** 2 for a, b in zip(row, r, strict=True)) for r in falling)
    costs = of_row(list(row))
    assert all(np.diff(costs) <= 1e-12)
    assert ((costs - row) ** 2).sum() == pytest.approx(best, abs=1e-12)


def test_costs_of_a_better_site_than_the_baseline_are_zero() -> None:
    np.testing.assert_array_equal(of_row([0.5, 0.125, 0.25], base=0.5), 0)


def test_interactions_are_what_both_cost_beyond_their_sum() -> None:
    interactions = MEASURED.interactions()
    assert list(interactions) == [("a", "b"), ("b", "c")]
    # L_a = 3.75, 1.25; L_b = .25, .5 (raw, not projected); L_ab = 4.75, 4; 1.5, 1.75. Width 8 has no pairs.
    np.testing.assert_array_equal(interactions["a", "b"], [[0.75, -0.25, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(interactions["b", "c"], [[0, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_interactions_lie_at_their_widths() -> None:
    some = replace(MEASURED, pair_candidates=(3,), pairs={"a": {"c": ((9.0,),)}}).interactions()["a", "c"]
    expected = np.zeros((3, 3))
    expected[1, 1] = (9 - 0.25) - (1.5 - 0.25) - (0.25 - 0.25)
    np.testing.assert_array_equal(some, expected)


def test_without_pairs_there_are_no_interactions() -> None:
    assert replace(MEASURED, pairs={}, pair_candidates=()).interactions() == {}


@pytest.mark.parametrize("baseline", [8, None])
def test_json_round_trip(baseline: int | None) -> None:
    measured = replace(MEASURED, baseline=baseline, base_kl=1 / 3)
    assert Sensitivity.from_json(measured.to_json()) == measured
    assert json.loads(measured.to_json())["pairs"]["a"]["b"] == [[5.0, 4.25], [1.75, 2.0]]


def test_prints_a_table() -> None:
    head, columns, first, *_ = str(MEASURED).splitlines()
    assert head == "weight sensitivity, 16 images, other sites at 8 bits (KL 0.25)"
    assert columns.split()[-2:] == ["8", "bits"]
    assert first.split() == ["a", "4", "1.5", "0.25"]
    assert "other sites in float" in str(replace(MEASURED, baseline=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": "input"}, r"Sensitivity\.part must be one of .*got 'input'"),
        ({"baseline": 9}, r"Sensitivity\.baseline must be an integer in 2\.\.8, got 9"),
        ({"images": 0}, r"Sensitivity\.images must be a positive integer, got 0"),
        ({"images": True}, r"Sensitivity\.images"),
        ({"candidates": (3, 2, 8)}, r"Sensitivity\.candidates must be rising widths, at least one, got \(3, 2, 8\)"),
        ({"candidates": ()}, r"Sensitivity\.candidates"),
        ({"candidates": (2, 3)}, r"Sensitivity\.kl of a must be 2 finite numbers"),
        ({"base_kl": math.nan}, r"Sensitivity\.base_kl must be 1 finite numbers"),
        ({"kl": {**MEASURED.kl, "b": (1.0, math.inf, 1.0)}}, r"Sensitivity\.kl of b must be 3 finite numbers"),
        ({"kl": {**MEASURED.kl, "b": (1.0, "1", 1.0)}}, r"Sensitivity\.kl of b must be 3 finite numbers"),
        ({"pair_candidates": (2, 4)}, r"pair_candidates must be among candidates \(2, 3, 8\), got \(2, 4\)"),
        ({"pair_candidates": (2,)}, r"pairs of a and b must have 1 rows, got 2"),
        ({"pairs": {"a": {"b": ((1.0, 2.0), (1.0,))}}}, r"pairs of a and b must be 2 finite numbers, got \[1.0\]"),
        ({"pairs": {"a": {"d": ((1.0, 2.0), (1.0, 2.0))}}}, r"pairs must be of sites in kl, got a and d"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MEASURED, **changes)


@pytest.mark.parametrize("text", ["{nope", "[1]", "{}", "3", '{"part": "weight"}', "null"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a sensitivity"):
        Sensitivity.from_json(text)


def test_no_widths_may_be_missing_where_they_are_optional() -> None:
    assert check_candidates("x", [], required=False) == ()
    with pytest.raises(ValueError, match="x must be rising widths, at least one, got"):
        check_candidates("x", [])
