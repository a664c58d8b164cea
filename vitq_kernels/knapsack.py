"""Exact multiple-choice knapsack: one choice an item, the least total cost within several whole-number capacities."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy import optimize, sparse

NODE_LIMIT = 4_000  # branch-and-bound nodes a program, about 10 s; unlike seconds they end alike on every machine
CORE = 64  # choices beyond one an item in the first program; it grows fourfold; ViT-B mostly needs no second
SCALE = 1e6  # objective that HiGHS sees: its absolute tolerances, 1e-6 and 1e-7, are then 1e-12 of the real one


@dataclass(frozen=True)
class Solution:
    """A choice for every item."""

    choice: np.ndarray  # integers, [items]
    status: str  # "optimal", or what ended the search: "node limit", "time limit", "solver tolerance"
    gap: float  # fraction of the cost that a better choice might still save; 0 when optimal
    prices: tuple[float, ...] = ()  # cost that one unit more of each room saves, by the linear relaxation; >= 0


def solve(cost: np.ndarray, uses: Sequence[np.ndarray], rooms: Sequence[int], time_limit_s: float) -> Solution:
    """Minimises ``sum_i cost[i, choice[i]]`` where ``sum_i use[i, choice[i]] <= room`` for every use and its room.

    Ties: see ``_canonical``; if every item can have its last choice, it has. The same numbers give the same choice,
    unless the time limit strikes.

    Args:
        cost: float64 [items, choices], >= 0, least at the last choice.
        uses: Python integers, dtype object, [items, choices] each, the least of a row 0.
        rooms: integer >= 0 for each of ``uses``.
        time_limit_s: seconds, > 0; past it the best choice found so far is taken.

    Raises:
        ValueError: the time limit is not positive, or nothing meets all rooms together.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s!r}")
    deadline = time.monotonic() + time_limit_s
    found = Solution(start(cost, uses, rooms), "optimal", 0.0, (0.0,) * len(rooms))
    if (found.choice == cost.shape[1] - 1).all():
        return found
    total = _total(cost, found.choice)
    while total > 0:
        found = _search(cost, found.choice, uses, rooms, deadline)
        before, total = total, _total(cost, found.choice)
        # Tolerances are absolute: they count for more the cheaper the solution is than the one it started from.
        if found.status != "optimal" or total > before / 1000:
            break
    return replace(found, choice=_canonical(cost, found.choice, uses))


def start(cost: np.ndarray, uses: Sequence[np.ndarray], rooms: Sequence[int]) -> np.ndarray:
    """A choice that fits: the last that all items can share, or else any. Arguments and errors as ``solve``."""
    items, choices = cost.shape
    for alike in (np.full(items, j) for j in reversed(range(choices))):
        if fits(alike, uses, rooms):
            return alike
    rows, sides, _ = capacities(uses, rooms)
    result = optimize.milp(
        np.zeros(cost.size),
        integrality=np.ones(cost.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each(items, choices), 1, 1),
            optimize.LinearConstraint(rows, -np.inf, sides),
        ],
        options={"node_limit": NODE_LIMIT},
    )
    choice = None if result.x is None else np.argmax(result.x.reshape(items, choices), axis=1)
    if choice is None or not fits(choice, uses, rooms):
        raise ValueError("the limits of the budget can each be met, but no widths were found that meet all together")
    return choice


def one_each(items: int, choices: int) -> sparse.csr_array:
    """The rows of "every item has one choice" over the columns [items * choices]."""
    return sparse.kron(sparse.eye_array(items), np.ones((1, choices)), format="csr")


def fits(choice: np.ndarray, uses: Sequence[np.ndarray], rooms: Sequence[int]) -> bool:
    """Whether a choice keeps within every room."""
    at = np.arange(len(choice))
    return all(use[at, choice].sum() <= room for use, room in zip(uses, rooms, strict=True))


def _total(cost: np.ndarray, choice: np.ndarray) -> float:
    return float(cost[np.arange(len(choice)), choice].sum())


def _search(
    cost: np.ndarray, best: np.ndarray, uses: Sequence[np.ndarray], rooms: Sequence[int], deadline: float
) -> Solution:
    """The best choice, starting from one that fits and has a cost.

    The linear relaxation prices the capacities, and prices bound from below what any choice costs. Only the *core*, the
    choices whose excess over that bound is within the gap to the best known solution, can be in a better one. The
    integer program is solved on a part of the core that grows until it is all of it: ViT-B, 1296 items x 7, takes 0.1
    to 0.4 s, ViT-L 1 s, where the whole program takes 0.2 to 8 s, and up to 30 s with 16-row groups of odd sizes.

    Source: Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83 (1995) 394-410.
    """
    items, choices = cost.shape
    unit = _total(cost, best) / SCALE
    with np.errstate(over="ignore"):
        cost = cost / _total(cost, best) * SCALE
    usable = cost <= SCALE  # dearer alone than a whole solution: not in a better one, and bad for the numerics
    upper = SCALE
    rows, sides, scales = capacities(uses, rooms)
    single = one_each(items, choices)

    relaxed, prices = _relaxed(cost, usable, rows, sides)
    priced = np.where(usable, cost + (prices @ rows).reshape(cost.shape), np.inf)
    least = priced.min(axis=1, keepdims=True)
    lower = float(least.sum() - prices @ sides)
    worth = tuple((prices * scales * unit).tolist())
    excess = priced - least
    ranked = np.sort(excess, axis=None)

    if relaxed.status == 0:
        taken = np.zeros(cost.size)
        taken[usable.flat] = relaxed.x
        rounded = np.argmax(taken.reshape(cost.shape) > 1e-9, axis=1)  # the lower choice of a split item: it fits
        if fits(rounded, uses, rooms) and _total(cost, rounded) < upper:
            best, upper = rounded, _total(cost, rounded)
    size = CORE
    while True:
        reach = max(upper - lower, 0.0)
        if items + size < cost.size:
            reach = min(reach, ranked[items + size - 1])
        core = excess <= reach + 1e-6
        core[np.arange(items), best] = True  # so that the program has a solution
        free = core.sum(axis=1) > 1
        columns, settled = np.flatnonzero(core & free[:, None]), np.flatnonzero(core & ~free[:, None])
        remaining = deadline - time.monotonic()
        stopped = "time limit" if remaining <= 0 else ""
        if len(columns) and not stopped:
            result = optimize.milp(
                cost.flat[columns],
                integrality=np.ones(len(columns)),
                bounds=optimize.Bounds(0, 1),
                constraints=[
                    optimize.LinearConstraint(single[free][:, columns], 1, 1),
                    optimize.LinearConstraint(rows[:, columns], -np.inf, sides - rows[:, settled].sum(axis=1)),
                ],
                options={"mip_rel_gap": 0.0, "node_limit": NODE_LIMIT, "time_limit": remaining},
            )
            if result.status != 0:
                stopped = "time limit" if time.monotonic() >= deadline else "node limit"
            if result.x is not None:
                chosen, choice = columns[result.x > 0.5], best.copy()
                choice[chosen // choices] = chosen % choices
                if not fits(choice, uses, rooms):  # by less than HiGHS sees: capacities of more than 1e12 units
                    stopped = "solver tolerance"
                elif _total(cost, choice) < upper:
                    best, upper = choice, _total(cost, choice)
        if stopped:
            return Solution(best, stopped, max(upper - lower, 0.0) / upper, worth)
        if reach >= upper - lower:
            return Solution(best, "optimal", 0.0, worth)
        size *= 4


def relaxation(cost: np.ndarray, uses: Sequence[np.ndarray], rooms: Sequence[int]) -> tuple[float, tuple[float, ...]]:
    """What any choice costs at least, and ``Solution.prices``. Arguments and errors as ``solve``."""
    unit = _total(cost, start(cost, uses, rooms)) / SCALE
    if unit == 0:
        return 0.0, (0.0,) * len(rooms)
    with np.errstate(over="ignore"):
        scaled = cost / unit
    rows, sides, scales = capacities(uses, rooms)
    usable = scaled <= SCALE
    _, prices = _relaxed(scaled, usable, rows, sides)
    priced = np.where(usable, scaled + (prices @ rows).reshape(cost.shape), np.inf)
    return float(priced.min(axis=1).sum() - prices @ sides) * unit, tuple((prices * scales * unit).tolist())


def _relaxed(cost: np.ndarray, usable: np.ndarray, rows: np.ndarray, sides: np.ndarray) -> tuple[Any, np.ndarray]:
    """The linear relaxation over the usable choices, and its price of each row."""
    items, choices = cost.shape
    columns = np.flatnonzero(usable)
    relaxed = optimize.linprog(
        cost.flat[columns],
        A_ub=rows[:, columns],
        b_ub=sides,
        A_eq=one_each(items, choices)[:, columns],
        b_eq=np.ones(items),
        method="highs-ipm",  # 5 times faster here than the simplex
    )
    # Any prices give a valid bound: should the relaxation fail, these are only looser.
    return relaxed, np.maximum(-relaxed.ineqlin.marginals, 0) if relaxed.status == 0 else np.zeros(len(rows))


def capacities(uses: Sequence[np.ndarray], rooms: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The capacities as float rows and right sides, whole numbers as far as HiGHS' feasibility of 1e-6 allows.

    Third: what one unit of a use is in its row.
    """
    rows, sides, scales = [], [], []
    for use, room in zip(uses, rooms, strict=True):
        unit = int(np.gcd.reduce(use, axis=None)) or 1
        side = room // unit
        scale = 1e6 / max(side, 1e6)  # float64 rounds sums of this size by 1e-9
        rows.append((use // unit).astype(np.float64).ravel() * scale)
        sides.append(side * scale)
        scales.append(scale / unit)
    return np.array(rows), np.array(sides), np.array(scales)


def _canonical(cost: np.ndarray, choice: np.ndarray, uses: Sequence[np.ndarray]) -> np.ndarray:
    """Of the choices that cost as little, the one defined here; it costs and uses no more than ``choice``.

    Among items of equal use, the higher of two choices goes to the items that gain most by it, then to the first: so a
    dearer item never has less, whatever the solver's tolerance. Then every item has the first of the choices that cost
    as much and use no more.
    """
    choice = choice.copy()
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for item in range(len(cost)):
        alike.setdefault(tuple(tuple(use[item]) for use in uses), []).append(item)
    for group in map(np.array, alike.values()):
        for _ in range(cost.shape[1] ** 2):  # a few rounds settle it; the limit is against a cycle by rounding
            before = choice[group].copy()
            for low, high in combinations(sorted(set(before.tolist())), 2):
                pool = group[(choice[group] == low) | (choice[group] == high)]
                gain = cost[pool, low] - cost[pool, high]
                ahead = np.argsort(-gain, kind="stable")[: np.count_nonzero(choice[pool] == high)]
                choice[pool] = low
                choice[pool[ahead]] = high
            if (choice[group] == before).all():
                break
    chosen = np.arange(len(cost)), choice
    as_good = cost == cost[chosen][:, None]
    for use in uses:
        as_good &= (use <= use[chosen][:, None]).astype(bool)
    return np.argmax(as_good, axis=1)
