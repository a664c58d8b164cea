"""The greedy search: it does what it says, holds every limit, and is never better than the exact one."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vitq_kernels import greedy, knapsack

Problem = tuple[np.ndarray, list[np.ndarray], list[int]]


def problem(seed: int, items: int = 6, choices: int = 3, uses: int = 1) -> Problem:
    rng = np.random.default_rng(seed)
    cost = np.minimum.accumulate(np.exp(rng.standard_normal((items, choices))), axis=1)
    tables = [np.cumsum(rng.integers(0, 90, (items, choices)).astype(object), axis=1) for _ in range(uses)]
    tables = [table - table[:, :1] for table in tables]
    return cost, tables, [int(table[:, -1].sum() * rng.uniform(0.0, 0.9)) for table in tables]


def cost_of(cost: np.ndarray, choice: np.ndarray) -> float:
    return float(cost[np.arange(len(cost)), choice].sum())


def twin(cost: np.ndarray, uses: list[np.ndarray], rooms: list[int]) -> list[int]:
    """The same by Python loops and fractions."""
    choice = [cost.shape[1] - 1] * len(cost)
    while True:
        used = [sum(use[i, j] for i, j in enumerate(choice)) for use in uses]
        over = [k for k, room in enumerate(rooms) if used[k] > room]
        if not over:
            return choice
        best = None
        for item, now in enumerate(choice):
            for there in range(cost.shape[1]):
                change = [use[item, there] - use[item, now] for use in uses]
                if any(used[k] + c > max(used[k], rooms[k]) for k, c in enumerate(change)):
                    continue
                saved = sum(Fraction(-change[k], used[k] - rooms[k]) for k in over)
                if saved > 0:
                    rate = (cost[item, there] - cost[item, now]) / float(saved)
                    if best is None or rate < best[0]:
                        best = (rate, item, there)
        choice[best[1]] = best[2]


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_it_narrows_where_a_unit_saved_costs_least(uses: int) -> None:
    for seed in range(30):
        posed = problem(seed, uses=uses)
        assert greedy.solve(*posed).choice.tolist() == twin(*posed), f"seed {seed}"


@pytest.mark.parametrize("uses", [1, 2])
def test_it_fits_and_is_never_better_than_the_exact_search(uses: int) -> None:
    worse = 0
    for seed in range(30):
        cost, tables, rooms = problem(seed, items=8, choices=4, uses=uses)
        found, best = greedy.solve(cost, tables, rooms), knapsack.solve(cost, tables, rooms, 60.0)
        assert knapsack.fits(found.choice, tables, rooms)
        assert cost_of(cost, found.choice) >= cost_of(cost, best.choice) * (1 - 1e-12)
        assert cost_of(cost, found.choice) * (1 - found.gap) <= cost_of(cost, best.choice) * (1 + 1e-9)
        assert found.status == "greedy"
        assert found.prices == pytest.approx(best.prices, rel=1e-6, abs=1e-9)
        worse += cost_of(cost, found.choice) > cost_of(cost, best.choice) * (1 + 1e-9)
    assert worse > 3  # greedy is greedy


def test_a_known_trap() -> None:
    """The cheapest unit saved is a small step; the large one that is needed then makes the small one vain."""
    cost = np.array([[0.5, 0.0], [10.0, 0.0]])
    use = np.array([[0, 1], [0, 10]], dtype=object)
    assert greedy.solve(cost, [use], [1]).choice.tolist() == [0, 0]
    assert knapsack.solve(cost, [use], [1], 60.0).choice.tolist() == [1, 0]


def test_with_room_for_all_nothing_is_narrowed() -> None:
    cost, tables, _ = problem(0)
    found = greedy.solve(cost, tables, [int(tables[0][:, -1].sum())])
    assert found.choice.tolist() == [2] * 6
    assert found.prices == (0.0,)


def test_limits_that_pull_apart_are_refused() -> None:
    against = [np.array([[0, 5]], dtype=object), np.array([[5, 0]], dtype=object)]
    with pytest.raises(ValueError, match="narrowing greedily meets not all together"):
        greedy.solve(np.array([[1.0, 0.0]]), against, [2, 2])
