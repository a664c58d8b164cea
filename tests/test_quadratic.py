"""The integer quadratic program against brute force: least objective, within every room, ties as documented."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from vitq_kernels import knapsack, quadratic

Problem = tuple[np.ndarray, dict[tuple[int, int], np.ndarray], list[np.ndarray], list[int]]


def problem(seed: int, items: int = 6, choices: int = 3, uses: int = 1, strength: float = 0.5) -> Problem:
    """Falling costs, pairs of both signs between about half of the items, and capacities that bind."""
    rng = np.random.default_rng(seed)
    cost = np.exp(rng.standard_normal((items, 1))) * 3.0 ** -np.arange(choices)
    pairs = {
        (i, k): strength * rng.standard_normal((choices, choices)) * np.sqrt(np.outer(cost[i], cost[k]))
        for i in range(items)
        for k in range(i + 1, items)
        if rng.random() < 0.5
    }
    steps = [np.cumsum(rng.integers(0, 90, (items, choices)).astype(object), axis=1) for _ in range(uses)]
    tables = [step - step[:, :1] for step in steps]
    rooms = [int(table[:, -1].sum() * rng.uniform(0.1, 0.9)) for table in tables]
    return cost, pairs, tables, rooms


def every_choice(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Objective and feasibility of every choice there is."""
    cost, pairs, uses, rooms = problem
    items, choices = cost.shape
    picks = np.indices((choices,) * items).reshape(items, -1)
    value = sum(cost[i][picks[i]] for i in range(items))
    for (i, k), table in pairs.items():
        value = value + table[picks[i], picks[k]]
    fits = np.ones(picks.shape[1], dtype=bool)
    for use, room in zip(uses, rooms, strict=True):
        fits &= sum(use[i].astype(int)[picks[i]] for i in range(items)) <= room
    return value, fits


def check(problem: Problem, found: knapsack.Solution, seed: int) -> None:
    cost, pairs, uses, rooms = problem
    value, fits = every_choice(problem)
    least = value[fits].min()
    assert quadratic.objective(cost, pairs, found.choice) == pytest.approx(least, rel=1e-9, abs=1e-12), f"seed {seed}"
    for use, room in zip(uses, rooms, strict=True):
        assert use[np.arange(len(cost)), found.choice].sum() <= room
    assert (found.status, found.gap) == ("optimal", 0.0)


@pytest.mark.parametrize("uses", [1, 2, 3])
@pytest.mark.parametrize("strength", [0.1, 0.5, 3.0], ids=lambda s: f"pairs-{s}")
def test_the_least_objective_that_brute_force_finds(strength: float, uses: int) -> None:
    for seed in range(6):
        posed = problem(seed, uses=uses, strength=strength)
        check(posed, quadratic.solve(*posed, 60.0), seed)


def test_four_choices_and_costs_of_many_magnitudes() -> None:
    for seed in range(6):
        cost, pairs, uses, rooms = problem(100 + seed, items=5, choices=4)
        scale = 10.0 ** np.random.default_rng(seed).uniform(-6, 6)
        posed = cost * scale, {key: table * scale for key, table in pairs.items()}, uses, rooms
        check(posed, quadratic.solve(*posed, 60.0), seed)


def test_pairs_change_the_answer() -> None:
    """Two items that are dear only together: without the pair both are narrow, with it one is wide."""
    cost = np.array([[1.0, 0.8], [1.0, 0.9], [5.0, 0.0]])
    use = np.array([[0, 10], [0, 10], [0, 10]], dtype=object)
    together = {(0, 1): np.array([[4.0, 0.0], [0.0, 0.0]])}
    assert quadratic.solve(cost, {}, [use], [10], 60.0).choice.tolist() == [0, 0, 1]
    assert quadratic.solve(cost, together, [use], [20], 60.0).choice.tolist() == [1, 0, 1]
    # A pair the other way round is the same pair.
    swapped = {(1, 0): together[0, 1].T}
    assert quadratic.solve(cost, swapped, [use], [20], 60.0).choice.tolist() == [1, 0, 1]


def test_a_negative_pair_can_make_narrow_widths_the_best_of_all() -> None:
    cost = np.array([[0.2, 0.1], [0.2, 0.1]])
    use = np.array([[0, 1], [0, 1]], dtype=object)
    found = quadratic.solve(cost, {(0, 1): np.array([[-1.0, 0.0], [0.0, 0.0]])}, [use], [2], 60.0)
    assert found.choice.tolist() == [0, 0]  # though there is room for the widest


def test_without_pairs_it_costs_what_the_knapsack_costs() -> None:
    for seed in range(6):
        cost, _, uses, rooms = problem(seed, items=10, uses=2)
        plain = knapsack.solve(cost, uses, rooms, 60.0)
        found = quadratic.solve(cost, {}, uses, rooms, 60.0)
        at = np.arange(len(cost))
        assert cost[at, found.choice].sum() == pytest.approx(cost[at, plain.choice].sum(), rel=1e-12)
        assert found.prices == pytest.approx(plain.prices, rel=1e-6, abs=1e-12)


def test_a_tie_goes_to_the_choice_that_uses_less() -> None:
    cost = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    use = np.array([[0, 1, 2], [0, 1, 2]], dtype=object)
    assert quadratic.solve(cost, {(0, 1): np.zeros((3, 3))}, [use], [9], 60.0).choice.tolist() == [1, 0]


def test_a_second_run_finds_the_same() -> None:
    posed = problem(3, items=9, choices=4)
    first, second = (quadratic.solve(*posed, 60.0) for _ in range(2))
    assert first.choice.tolist() == second.choice.tolist()
    assert first.prices == second.prices


def vit(seed: int, blocks: int = 12, sites: int = 6, choices: int = 4, strength: float = 0.3) -> Problem:
    """Six sites a block, all pairs of a block: 12 * 15 pairs."""
    rng = np.random.default_rng(seed)
    items = blocks * sites
    cost = np.exp(rng.standard_normal((items, 1))) * 4.0 ** -np.arange(choices)
    pairs = {
        (b + i, b + k): strength * rng.standard_normal((choices, choices)) * np.sqrt(np.outer(cost[b + i], cost[b + k]))
        for b in range(0, items, sites)
        for i in range(sites)
        for k in range(i + 1, sites)
    }
    size = np.tile([[110], [37], [147], [147], [0], [0]], (blocks, 1)).astype(object)
    use = size * np.arange(choices).astype(object)
    return cost, pairs, [use], [int(use[:, -1].sum() * 0.3)]


def test_a_vit_of_twelve_blocks_is_solved_to_the_optimum() -> None:
    posed = vit(0)
    start = time.process_time()
    found = quadratic.solve(*posed, 60.0)
    assert (found.status, found.gap) == ("optimal", 0.0)
    assert time.process_time() - start < 30  # measured 2 to 6
    cost, pairs, uses, rooms = posed
    alone = knapsack.solve(cost, uses, rooms, 60.0)
    assert quadratic.objective(cost, pairs, found.choice) < quadratic.objective(cost, pairs, alone.choice)


@pytest.mark.parametrize("stop", ["nodes", "seconds"])
def test_a_stopped_search_fits_and_tells_its_gap(stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posed = vit(2, blocks=6, strength=1.0)
    cost, pairs, uses, rooms = posed
    best = quadratic.objective(cost, pairs, quadratic.solve(*posed, 60.0).choice)
    if stop == "nodes":
        monkeypatch.setattr(quadratic, "NODE_LIMIT", 0)
    found = quadratic.solve(*posed, 60.0 if stop == "nodes" else 1e-9)
    assert found.status == {"nodes": "node limit", "seconds": "time limit"}[stop]
    assert uses[0][np.arange(len(cost)), found.choice].sum() <= rooms[0]
    value = quadratic.objective(cost, pairs, found.choice)
    terms = quadratic.objective(abs(cost), {key: abs(table) for key, table in pairs.items()}, found.choice)
    assert value >= best * (1 - 1e-9)
    assert 0 < found.gap < math.inf
    assert value - found.gap * terms <= best * (1 + 1e-9)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_bad_time_limit_is_named(limit: float) -> None:
    with pytest.raises(ValueError, match=f"time_limit_s must be positive, got {limit}"):
        quadratic.solve(*problem(0), limit)


def test_rooms_that_nothing_meets_together_are_refused() -> None:
    against = [np.array([[0, 5]], dtype=object), np.array([[5, 0]], dtype=object)]
    with pytest.raises(ValueError, match="no widths were found that meet all together"):
        quadratic.solve(np.array([[1.0, 0.0]]), {}, against, [2, 2], 60.0)
