"""The best levels of a histogram: against brute force, and where they must be known."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from tests.numerics import reals, uniform
from vitq_kernels.levels import FINE, LevelHistogram


def cost_of(values: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> float:
    distance = (values[:, None].double() - levels.double()).abs().amin(1)
    return float((weights.double() * distance.square()).sum())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_levels_costs_less(count: int, seed: int) -> None:
    """Values lie within a few integers, so that every choice of levels around them can be tried."""
    values = (uniform(-4, 5, (40,), seed) * FINE).round() / FINE
    weights = uniform(0, 1, (40,), seed + 10)
    histogram = LevelHistogram()
    histogram.add(values, weights)
    found = cost_of(values, weights, histogram.best_levels(count))
    best = min(cost_of(values, weights, torch.tensor(levels)) for levels in combinations(range(-6, 8), count))
    assert found == pytest.approx(best, rel=1e-9)


def test_integers_that_are_few_become_the_levels() -> None:
    values = torch.tensor([-17.0, 0.0, 3.0, 90.0]).repeat(5, 1)
    histogram = LevelHistogram()
    histogram.add(values, torch.ones(5, 1))
    assert histogram.best_levels(4).tolist() == [-17, 0, 3, 90]
    assert histogram.best_levels(4).dtype == torch.int8


def test_batches_add_up() -> None:
    values, weights = 30 * reals("normal", (6, 7), seed=1), uniform(0.1, 1, (7,), 2)
    whole, parts = LevelHistogram(), LevelHistogram()
    whole.add(values, weights)
    for row in values:
        parts.add(row, weights)
    torch.testing.assert_close(torch.from_numpy(whole.mass), torch.from_numpy(parts.mass))
    assert whole.best_levels(8).tolist() == parts.best_levels(8).tolist()


def test_heavy_values_keep_levels_of_their_own() -> None:
    values = torch.tensor([0.0, 10.0, 20.0])
    for weights, expected in (([1.0, 1.0, 9.0], [5, 20]), ([9.0, 1.0, 1.0], [0, 15]), ([1.0, 9.0, 1.0], None)):
        histogram = LevelHistogram()
        histogram.add(values, torch.tensor(weights))
        levels = histogram.best_levels(2).tolist()
        assert levels == expected if expected else 10 in levels or 9 in levels or 11 in levels


def test_levels_are_distinct_and_ascending_for_one_value_and_for_values_beyond_int8() -> None:
    for values in (torch.zeros(3), torch.tensor([-1e9, 1e9])):
        histogram = LevelHistogram()
        histogram.add(values, torch.ones_like(values))
        levels = histogram.best_levels(16).tolist()
        assert levels == sorted(set(levels))
        assert len(levels) == 16
        assert set(values.clamp(-128, 127).int().tolist()) <= set(levels)
