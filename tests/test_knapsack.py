"""The knapsack where choices have no order of use, as pairs of widths have none; ties, bounds and prices."""

from __future__ import annotations

import numpy as np
import pytest

from vitq_kernels import knapsack


def test_any_order_of_use_against_brute_force() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        cost = np.sort(np.exp(rng.standard_normal((5, 4))), axis=1)[:, ::-1]
        uses = [rng.integers(0, 90, (5, 4)).astype(object) for _ in range(2)]
        uses = [use - use.min(axis=1, keepdims=True) for use in uses]
        picks = np.indices((4,) * 5).reshape(5, -1)
        used = [sum(use[i].astype(int)[picks[i]] for i in range(5)) for use in uses]
        some = rng.choice(picks.shape[1])
        rooms = [int(total[some]) for total in used]
        fits = (used[0] <= rooms[0]) & (used[1] <= rooms[1])
        least = sum(cost[i][picks[i]] for i in range(5))[fits].min()
        found = knapsack.solve(cost, uses, rooms, 60.0)
        assert knapsack.fits(found.choice, uses, rooms), f"seed {seed}"
        assert cost[np.arange(5), found.choice].sum() == pytest.approx(least, rel=1e-12), f"seed {seed}"
        assert found.status == "optimal"


def test_a_tie_never_takes_more_of_a_limit() -> None:
    """Choices 0 and 1 cost the same; the first uses less of one limit and more of the other."""
    cost = np.array([[1.0, 1.0, 0.0], [5.0, 5.0, 0.0]])
    uses = [np.array([[0, 3, 9], [0, 0, 0]], dtype=object), np.array([[4, 0, 9], [0, 0, 0]], dtype=object)]
    found = knapsack.solve(cost, uses, [5, 2], 60.0)
    assert found.choice.tolist() == [1, 2]


@pytest.mark.parametrize("unit", [1, 1000, 10**9])
def test_prices_are_those_of_one_unit_of_the_room(unit: int) -> None:
    """Only five ninths of the second item's wide choice have room, and saving is dearest there."""
    cost = np.array([[1.0, 0.0], [4.0, 0.0]])
    use = np.array([[0, 10 * unit], [0, 9 * unit]], dtype=object)
    room = 5 * unit
    bound, prices = knapsack.relaxation(cost, [use], [room])
    assert prices == pytest.approx((4 / (9 * unit),))
    assert bound == pytest.approx(1 + 4 * 4 / 9)
    assert knapsack.solve(cost, [use], [room], 60.0).prices == pytest.approx(prices)
