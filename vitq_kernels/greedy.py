"""Greedy allocation: from the widest choices, the cheapest narrowing per unit saved, until the budget holds.

MPTQ-ViT's "Greedy MP" is "layer-wise greedy by performance and compressibility" (arXiv 2401.14895, abstract; no code).
The rest is our completion: which steps there are, and what a unit is under several limits (methods.md 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitq_kernels.knapsack import Solution, relaxation


def solve(cost: np.ndarray, uses: Sequence[np.ndarray], rooms: Sequence[int]) -> Solution:
    """Starts at the last choice of every item and narrows one item at a time while a room is exceeded.

    A step takes one item to any choice that saves and does not break a limit that holds. Taken is the step with the
    least cost per unit saved; under several exceeded limits a saving counts by its share of what each still has to
    save. Of equal steps the first item's first choice is taken.

    Args:
        cost: float64 [items, choices], >= 0, least at the last choice.
        uses: Python integers, dtype object, [items, choices] each, the least of a row 0.
        rooms: integer >= 0 for each of ``uses``.

    Returns:
        The choice; its gap is to the bound of the linear relaxation.

    Raises:
        ValueError: no step is left and a limit is still exceeded, which needs two limits that pull apart.
    """
    items, choices = cost.shape
    at, choice = np.arange(items), np.full(items, choices - 1)
    while True:
        left = [int(room - use[at, choice].sum()) for use, room in zip(uses, rooms, strict=True)]
        if min(left) >= 0:
            break
        saved, allowed = np.zeros(cost.shape), np.ones(cost.shape, dtype=bool)
        for use, room in zip(uses, left, strict=True):
            less = use[at, choice][:, None] - use
            saved += (less / -room).astype(float) if room < 0 else 0.0
            allowed &= (less >= min(-room, 0)).astype(bool)
        steps = allowed & (saved > 0)
        if not steps.any():
            raise ValueError("the limits of the budget can each be met, but narrowing greedily meets not all together")
        rate = np.where(steps, (cost - cost[at, choice][:, None]) / np.where(steps, saved, 1), np.inf)
        item, found = np.unravel_index(np.argmin(rate), rate.shape)
        choice[item] = found
    bound, prices = relaxation(cost, uses, rooms)
    total = float(cost[at, choice].sum())
    return Solution(choice, "greedy", max(total - bound, 0.0) / total if total else 0.0, prices)
