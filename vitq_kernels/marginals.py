"""What it would cost to move: one width narrower or wider at a site, the rest as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vitq_kernels.limits import Item


def moves(
    items: Sequence[Item], choice: Sequence[int], costs_of: Callable[[int], np.ndarray]
) -> dict[str, dict[str, float]]:
    """Change of the objective at each site by one candidate narrower (>= 0 at an optimum) and wider, the rest fixed.

    Of a site of several groups all groups move that can, and their changes are summed. A site of which nothing can move
    that way lacks the entry. Where a linear's activations are chosen apart from its weights their entries are
    "activation narrower" and "activation wider".

    Args:
        items: what was chosen.
        choice: of each.
        costs_of: an item's costs [choices], the other items as chosen.
    """
    result: dict[str, dict[str, float]] = {}
    for index, item in enumerate(items):
        costs, own = costs_of(index), choice[index]
        of_site = result.setdefault(item.site.name, {})
        for of_weight in (True, False):
            prefix = "" if of_weight or not item.site.has_weight else "activation "
            for label, sign in (("narrower", -1), ("wider", 1)):
                there = _next(item, own, of_weight, sign)
                if there is not None:
                    change = float(costs[there] - costs[own])
                    of_site[prefix + label] = of_site.get(prefix + label, 0.0) + change
    return result


def _next(item: Item, choice: int, of_weight: bool, sign: int) -> int | None:
    """The choice with the next width in one direction, the other width as it is; None without one."""
    moved, kept = (item.weight, item.activation) if of_weight else (item.activation, item.weight)
    if item.tied and not of_weight:
        return None
    there = [
        (sign * width, j)
        for j, width in enumerate(moved)
        if sign * width > sign * moved[choice] and (item.tied or kept[j] == kept[choice])
    ]
    return min(there)[1] if there else None
