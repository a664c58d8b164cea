"""Integer quadratic program: one choice an item, costs of items and of pairs of items, whole-number capacities.

Mix-QViT poses its bit allocation as one (arXiv 2501.06357, abstract; the terms are ours, methods.md 2).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, sparse

from vitq_kernels.knapsack import SCALE, Solution, capacities, fits, one_each, start

NODE_LIMIT = 20_000  # branch-and-bound nodes; ends alike on every machine, unlike seconds
Pairs = Mapping[tuple[int, int], np.ndarray]  # by two items: what a choice of both costs beyond each alone


def objective(cost: np.ndarray, pairs: Pairs, choice: np.ndarray) -> float:
    """``sum_i cost[i, choice[i]] + sum_(i,k) pairs[i, k][choice[i], choice[k]]``."""
    together = sum(float(table[choice[i], choice[k]]) for (i, k), table in pairs.items())
    return float(cost[np.arange(len(cost)), choice].sum()) + together


def solve(
    cost: np.ndarray, pairs: Pairs, uses: Sequence[np.ndarray], rooms: Sequence[int], time_limit_s: float
) -> Solution:
    """Minimises ``objective`` where ``sum_i use[i, choice[i]] <= room`` for every use and its room.

    A product of two choices is a number y in 0..1, and the y of a pair add up to the x of each of its choices: the
    tight linearisation, with no variable to branch on but the x. Adams and Sherali, Management Science 32 (1986).

    Args:
        cost: float64 [items, choices], finite.
        pairs: by (item, other item), [choices, choices], finite, of any sign.
        uses: Python integers, dtype object, [items, choices] each, the least of a row 0.
        rooms: integer >= 0 for each of ``uses``.
        time_limit_s: seconds, > 0.

    Returns:
        The choice; its gap is relative to the sum of the magnitudes of its terms. Of choices of an item that leave the
        objective as it is and use no more, it has the first.

    Raises:
        ValueError: the time limit is not positive, or nothing meets all rooms together.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s!r}")
    deadline = time.monotonic() + time_limit_s
    best = _settled(cost, pairs, uses, rooms, start(cost, uses, rooms))
    scale = SCALE / (_magnitude(cost, pairs, best) or 1.0)
    program = _Program(cost * scale, {key: table * scale for key, table in pairs.items()}, uses, rooms)

    relaxed = optimize.linprog(method="highs-ipm", **program.linear())
    marginals = relaxed.ineqlin.marginals if relaxed.status == 0 else np.zeros(len(rooms))
    prices = tuple((np.maximum(-marginals, 0) * program.scales / scale).tolist())

    columns = len(program.cost)
    integral = np.zeros(columns)
    integral[: cost.size] = 1
    remaining = max(deadline - time.monotonic(), 1e-3)
    result = optimize.milp(
        program.cost,
        integrality=integral,
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(program.equal, program.sums, program.sums),
            optimize.LinearConstraint(program.rows, -np.inf, program.sides),
        ],
        options={"mip_rel_gap": 0.0, "node_limit": NODE_LIMIT, "time_limit": remaining},
    )
    if result.x is not None:
        choice = np.argmax(result.x[: cost.size].reshape(cost.shape), axis=1)
        if fits(choice, uses, rooms) and objective(cost, pairs, choice) < objective(cost, pairs, best):
            best = choice
    best = _settled(cost, pairs, uses, rooms, best)
    if result.status == 0:
        return Solution(best, "optimal", 0.0, prices)
    stopped = "time limit" if time.monotonic() >= deadline else "node limit"
    bound = (result.mip_dual_bound if result.mip_dual_bound is not None else -np.inf) / scale
    if not np.isfinite(bound):
        bound = relaxed.fun / scale if relaxed.status == 0 else -np.inf
    gap = max(objective(cost, pairs, best) - bound, 0.0) / (_magnitude(cost, pairs, best) or 1.0)
    return Solution(best, stopped, gap, prices)


class _Program:
    """The linearised program: columns x [items * choices], then y [choices * choices] of each pair."""

    def __init__(self, cost: np.ndarray, pairs: Pairs, uses: Sequence[np.ndarray], rooms: Sequence[int]) -> None:
        items, choices = cost.shape
        tables = [table for _, table in pairs.items()]
        self.cost = np.concatenate([cost.ravel(), *(table.ravel() for table in tables)])
        products = len(self.cost) - cost.size
        rows, self.sides, self.scales = capacities(uses, rooms)
        self.rows = sparse.hstack([sparse.csr_array(rows), sparse.csr_array((len(rows), products))], format="csr")
        blocks = [sparse.hstack([one_each(items, choices), sparse.csr_array((items, products))])]
        of_first = np.kron(np.eye(choices), np.ones((1, choices)))  # sums of y over the second item's choice
        of_second = np.kron(np.ones((1, choices)), np.eye(choices))
        for place, pair in enumerate(pairs):
            for item, sums in zip(pair, (of_first, of_second), strict=True):
                block = sparse.lil_array((choices, len(self.cost)))
                at = cost.size + place * choices**2
                block[:, at : at + choices**2] = sums
                block[:, item * choices : (item + 1) * choices] = -np.eye(choices)
                blocks.append(block)
        self.equal = sparse.vstack(blocks, format="csr")
        self.sums = np.concatenate([np.ones(items), np.zeros(self.equal.shape[0] - items)])

    def linear(self) -> dict[str, object]:
        """The relaxation, as arguments of linprog."""
        return {
            "c": self.cost,
            "A_ub": self.rows,
            "b_ub": self.sides,
            "A_eq": self.equal,
            "b_eq": self.sums,
            "bounds": (0, 1),
        }


def _magnitude(cost: np.ndarray, pairs: Pairs, choice: np.ndarray) -> float:
    return objective(abs(cost), {key: abs(table) for key, table in pairs.items()}, choice)


def _settled(
    cost: np.ndarray, pairs: Pairs, uses: Sequence[np.ndarray], rooms: Sequence[int], choice: np.ndarray
) -> np.ndarray:
    """``choice`` after moves of one item at a time, each of which lowers the objective, or keeps it by an earlier one.

    For the solution of the program this settles ties, and differences that are below its tolerance.
    """
    choice, at = choice.copy(), np.arange(len(cost))
    left = [room - use[at, choice].sum() for use, room in zip(uses, rooms, strict=True)]
    for _ in range(100):  # a few rounds settle it; the limit is against a cycle by rounding
        moved = False
        for item in range(len(cost)):
            now = choice[item]
            value = alone(cost, pairs, choice, item)
            # A tie may not use more; a gain may use all that is left.
            more = [use[item] - use[item, now] for use in uses]
            fit = np.all([m <= room for m, room in zip(more, left, strict=True)], axis=0)
            frugal = np.all([m <= 0 for m in more], axis=0)
            better = fit & (value < value[now]) | frugal & (value == value[now]) & (np.arange(len(value)) < now)
            if better.any():
                found = np.flatnonzero(better & (value == value[better].min()))[0]
                choice[item], moved = found, True
                left = [room - m[found] for m, room in zip(more, left, strict=True)]
        if not moved:
            break
    return choice


def alone(cost: np.ndarray, pairs: Pairs, choice: np.ndarray, item: int) -> np.ndarray:
    """The part of the objective that one item decides, for each of its choices, the other items as in ``choice``."""
    value = cost[item].copy()
    for (i, k), table in pairs.items():
        if i == item:
            value += table[:, choice[k]]
        elif k == item:
            value += table[choice[i]]
    return value
