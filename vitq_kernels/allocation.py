"""Costs and a budget to bit widths: the least total cost over layers or groups of output rows, found exactly.

A pure function of numbers: it sees neither model nor images. costs.py makes costs of scores; ``allocate_bits`` spends
the budget where it lowers the sum of costs most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from vitq_kernels import greedy, knapsack, quadratic
from vitq_kernels.choices import Activations, Choices, choices_of, fixed_items, pairs_of
from vitq_kernels.costs import CANDIDATES, block_sites, check_candidates, free_linears, numbers, table
from vitq_kernels.grouping import cut, row_groups
from vitq_kernels.latency import KernelTimes
from vitq_kernels.limits import Limit, limits_of
from vitq_kernels.marginals import moves
from vitq_kernels.spec import TILE_ROWS, BitAllocation, Budget, RowGroups, Site, SiteBits, check_bits

Granularity = Literal["rows", "layer"]
Search = Literal["exact", "greedy"]
COUPLED = ("bitops", "latency_ms")  # limits in which the widths of weights and activations multiply
Costs = Mapping[str, np.ndarray | Sequence[Any]]


def allocate_bits(
    sites: Sequence[Site],
    cost: Costs,
    budget: Budget,
    *,
    activation_bits: int = 8,
    activation_cost: Costs | None = None,
    activation_candidates: Sequence[int] | None = None,
    tied: bool = False,
    boundary_bits: int = 8,
    candidates: Sequence[int] = CANDIDATES,
    granularity: Granularity = "rows",
    group_rows: int | None = None,
    interactions: Mapping[tuple[str, str], np.ndarray] | None = None,
    times: KernelTimes | None = None,
    search: Search = "exact",
    time_limit_s: float = 60.0,
) -> BitAllocation:
    """The widths of least total cost that meet every limit of the budget.

    Costs are first made non-increasing in bits by a running minimum: codes of a narrower width are codes of a wider one
    too, so what the narrower reaches the wider reaches. (Pooling adjacent violators would raise measured costs.)

    With ``granularity="rows"`` the rows of every four groups (at least 64 rows, at most 256) are sorted by cost at the
    middle candidate, ``candidates[len // 2]``, dearest first, then by index, and cut into groups of one width each.
    Order bytes are budgeted as if every tile were mixed; where even the narrowest widths leave no room for them, layers
    stay whole.

    A budget that holds all layers at the widest candidate gives just that. Otherwise ties are broken so that no width
    is wider than its cost justifies, and of groups of equal size the wider goes to the first by site name, then place.
    (With ``interactions`` the widest need not be the best, and ties go by ``quadratic.solve``.)

    Args:
        sites: all sites of the model. Linears of blocks are free; patch embedding and head are at ``boundary_bits``.
        cost: by site name, cost of each output row at each width, [N, len(candidates)], or of the whole layer,
            [len(candidates)], spread evenly on its rows; >= 0, any unit. Entries of sites not free are ignored.
        budget: limits; all hold.
        activation_bits: width of the activations of block sites, 2..8, where they are not chosen.
        activation_cost: by name of every block site, qk and av included, cost of its activations at each of
            ``activation_candidates``; in the unit of ``cost``. With it activation widths are chosen as well.
        activation_candidates: widths to choose activations from, ascending; None: ``candidates``.
        tied: a site's weights and activations have one width (the "MP4" of LRP-QViT and Mix-QViT). Takes
            ``activation_cost`` over ``candidates``, which is added to ``cost``, and ``granularity="layer"``.
        boundary_bits: width of weights and inputs of patch embedding and head, 2..8.
        candidates: widths to choose from, ascending, each in 2..8.
        granularity: "rows", or "layer" for one width a layer.
        group_rows: rows a group, a divisor of 256; None: ``DEFAULT_GROUP_ROWS``.
        interactions: by two sites, [len(candidates), len(candidates)]: what a width of the one and a width of the other
            cost together beyond each alone, of any sign. Needs "layer", and activations fixed or tied.
        times: kernel times, for ``latency_ms``. A group of rows takes its share of the layer's time at its width.
        search: "exact", or "greedy" (greedy.py), which takes no ``interactions``.
        time_limit_s: > 0; after it, or the solver's NODE_LIMIT, the best allocation found so far is taken.

    Returns:
        The allocation. ``solver["gap"]`` is the part of the objective that a better one might still save; 0: optimal.
        ``solver["moves"]`` is what one width more or less costs at each site (marginals.py), ``solver["prices"]`` what
        one unit more of each limit would save, by the linear relaxation.

    Raises:
        ValueError: an argument differs from the above, or a limit cannot be met (with the smallest value that can).
    """
    check_bits(activation_bits, "activation_bits")
    check_bits(boundary_bits, "boundary_bits")
    widths = check_candidates("candidates", candidates)
    for argument, value, known in (("granularity", granularity, Granularity), ("search", search, Search)):
        if value not in get_args(known):
            raise ValueError(f"{argument} must be one of {get_args(known)}, got {value!r}")
    if interactions and (granularity != "layer" or search != "exact" or (activation_cost is not None and not tied)):
        raise ValueError('interactions need granularity="layer", search="exact", and activations fixed or tied')
    if group_rows is not None and (group_rows not in range(1, TILE_ROWS + 1) or TILE_ROWS % group_rows):
        raise ValueError(f"group_rows must divide {TILE_ROWS}, got {group_rows!r}")
    free = free_linears(sites)
    if unknown := sorted(set(cost) - {site.name for site in sites}):
        raise ValueError(f"cost must name sites of the model, got {unknown[:3]}")
    tables = {site.name: np.minimum.accumulate(table("cost", cost, site, widths), axis=1) for site in free}
    activations = _activations(
        sites, budget, widths, activation_bits, activation_cost, activation_candidates, tied, granularity
    )
    fixed = fixed_items(sites, activations, boundary_bits)

    def posed(layer: bool) -> tuple[Choices, list[Limit]]:
        choices = choices_of(sites, cut(free, tables, layer, group_rows), widths, activations)
        return choices, limits_of(choices.items, fixed, budget, choices.groups.order_bytes, times)

    choices, limits = posed(layer=True)
    if unmet := [limit.unmet for limit in limits if limit.room < 0]:
        raise ValueError("; ".join(unmet))
    if granularity == "rows" and any(limit.use[:, -1].sum() > limit.room for limit in limits):
        finer, of_finer = posed(layer=False)
        choices, limits = (finer, of_finer) if all(limit.room >= 0 for limit in of_finer) else (choices, limits)
    uses, rooms, pairs = [x.use for x in limits], [x.room for x in limits], pairs_of(choices, interactions or {})
    if search == "greedy":
        found = greedy.solve(choices.cost, uses, rooms)
    elif pairs:
        found = quadratic.solve(choices.cost, pairs, uses, rooms, time_limit_s)
    else:
        found = knapsack.solve(choices.cost, uses, rooms, time_limit_s)

    picked = [min(j, len(item.weight) - 1) for item, j in zip(choices.items, found.choice.tolist(), strict=True)]
    allocation = _allocation(sites, choices, picked, activations, boundary_bits, group_rows)
    together = (table[picked[i], picked[k]] for (i, k), table in pairs.items())
    solver: dict[str, Any] = {
        "objective": math.fsum([*choices.cost[np.arange(len(picked)), picked], *together]),
        "status": found.status,
        "gap": found.gap,
        "budget": budget.given,
        "granularity": granularity,
        "candidates": list(widths),
        "mean_weight_bits": allocation.mean_weight_bits(sites),
        "weight_bytes": allocation.weight_bytes(sites),
        "prices": {x.name: price * x.unit for x, price in zip(limits, found.prices, strict=True)},
        "moves": moves(choices.items, picked, lambda i: quadratic.alone(choices.cost, pairs, found.choice, i)),
    }
    if activations.cost:
        solver |= {"activation_candidates": list(activations.widths), "tied": tied}
    return BitAllocation(allocation.sites, solver)


def _activations(
    sites: Sequence[Site],
    budget: Budget,
    weight_widths: tuple[int, ...],
    bits: int,
    cost: Costs | None,
    candidates: Sequence[int] | None,
    tied: bool,
    granularity: Granularity,
) -> Activations:
    if cost is None:
        if tied or candidates is not None:
            raise ValueError("tied and activation_candidates need activation_cost, got none")
        return Activations((bits,), {})
    widths = weight_widths if candidates is None else check_candidates("activation_candidates", candidates)
    if tied and widths != weight_widths:
        raise ValueError(f"tied widths must have one list of candidates, got {weight_widths} and {widths}")
    coupled = [name for name in COUPLED if name in budget.given]
    if granularity == "rows" and (tied or coupled):
        why = "tied to its activations" if tied else f"chosen with its activations under {' and '.join(coupled)}"
        raise ValueError(f'granularity must be "layer" where a width is {why}, got "rows"')
    costs = {s.name: numbers("activation_cost", cost, s, (len(widths),)) for s in block_sites(sites)}
    falling = {name: np.minimum.accumulate(values) for name, values in costs.items()}
    return Activations(widths, falling, tied, joined=tied or bool(coupled))


def _allocation(
    sites: Sequence[Site],
    choices: Choices,
    picked: Sequence[int],
    activations: Activations,
    boundary_bits: int,
    group_rows: int | None,
) -> BitAllocation:
    """The picked choices as an allocation, sites in the model's order."""
    of_groups = list(zip(choices.items, picked, strict=True))[: len(choices.groups.sites)]
    weights = {s.name: RowGroups.uniform(s.rows, boundary_bits) for s in sites if s.has_weight}
    weights |= row_groups(choices.groups, [item.weight[j] for item, j in of_groups], group_rows)
    widths = {s.name: activations.widths[0] if s.in_block else boundary_bits for s in sites}
    for item, j in zip(choices.items, picked, strict=True):
        if item.sets_activation:
            widths[item.site.name] = item.activation[j]
    return BitAllocation({s.name: SiteBits(widths[s.name], weights.get(s.name)) for s in sites})
