"""Costs and a budget to bit widths: an exact multiple-choice knapsack over layers or groups of output rows.

A pure function of numbers: it sees neither model nor images. ``relevance_costs`` and ``layer_costs`` make costs of
scores; ``allocate_bits`` spends the budget where it lowers the sum of costs most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

from vitq_kernels import knapsack
from vitq_kernels.spec import (
    TILE_ROWS,
    BitAllocation,
    Budget,
    RowGroups,
    Site,
    SiteBits,
    check_bits,
    default_group_rows,
)

Granularity = Literal["rows", "layer"]
CANDIDATES = (2, 3, 4, 5, 6, 7, 8)
LARGEST = 1e290  # of a cost: sums of as many as memory holds are finite


def relevance_costs(
    sites: Sequence[Site],
    row_flow: Mapping[str, Sequence[float] | np.ndarray],
    errors: Mapping[str, np.ndarray] | None = None,
    *,
    exponent: float = 1.0,
    candidates: Sequence[int] = CANDIDATES,
) -> dict[str, np.ndarray]:
    """Cost of each output row of the blocks' linears at each width, ``|flow|**exponent * error``: [N, len(candidates)].

    Args:
        sites: the model's sites; only linears of blocks get a cost, the others have no choice.
        row_flow: relevance through each output row, by site name, [N]; only its magnitude counts.
        errors: relative output error of each row at each of ``candidates``, by site name, [N, len(candidates)], >= 0;
            or [len(candidates)], alike for all rows. None: 4**-bits, the noise power of a uniform quantizer.
        exponent: >= 0; 0 leaves the error alone.
        candidates: widths, ascending, each in 2..8.

    Raises:
        ValueError: a site is missing, a shape differs from the above, or a value is NaN, infinite or a negative error.

    Source: methods.md 2.
    """
    free, widths = _free_sites(sites), _check_candidates(candidates)
    omega = {s.name: _omega("row_flow", row_flow, s, (s.rows,), exponent) for s in free}
    return {s.name: omega[s.name][:, None] * _table("errors", errors, s, widths) for s in free}


def layer_costs(
    sites: Sequence[Site],
    scores: Mapping[str, float],
    errors: Mapping[str, np.ndarray] | None = None,
    *,
    exponent: float = 1.0,
    candidates: Sequence[int] = CANDIDATES,
) -> dict[str, np.ndarray]:
    """Cost of each linear of the blocks as a whole, ``|score|**exponent * mean error of its rows``: [len(candidates)].

    Arguments and errors as ``relevance_costs``, but one score a site.
    """
    free, widths = _free_sites(sites), _check_candidates(candidates)
    omega = {s.name: _omega("scores", scores, s, (), exponent) for s in free}
    return {s.name: omega[s.name] * _table("errors", errors, s, widths).mean(axis=0) for s in free}


def allocate_bits(
    sites: Sequence[Site],
    cost: Mapping[str, np.ndarray | Sequence[Any]],
    budget: Budget,
    *,
    activation_bits: int = 8,
    boundary_bits: int = 8,
    candidates: Sequence[int] = CANDIDATES,
    granularity: Granularity = "rows",
    group_rows: int | None = None,
    time_limit_s: float = 60.0,
) -> BitAllocation:
    """The widths of least total cost that meet every limit of the budget.

    Costs are first made non-increasing in bits by a running minimum: codes of a narrower width are codes of a wider one
    too, so what the narrower reaches the wider reaches. (Pooling adjacent violators would raise measured costs.)

    With ``granularity="rows"`` the rows of each 256-row tile are sorted by cost at the middle candidate,
    ``candidates[len // 2]``, dearest first, then by index, and cut into groups of one width each. Order bytes are
    budgeted as if every tile were mixed; where even the narrowest widths leave no room for them, layers stay whole.

    A budget that holds all layers at the widest candidate gives just that. Otherwise ties are broken so that no width
    is wider than its cost justifies, and of groups of equal size the wider goes to the first by site name, then place.

    Args:
        sites: all sites of the model. Linears of blocks are free; patch embedding and head are at ``boundary_bits``.
        cost: by site name, cost of each output row at each width, [N, len(candidates)], or of the whole layer,
            [len(candidates)], spread evenly on its rows; >= 0, any unit. Entries of sites not free are ignored.
        budget: limits; all hold.
        activation_bits: width of the activations of block sites, 2..8.
        boundary_bits: width of weights and inputs of patch embedding and head, 2..8.
        candidates: widths to choose from, ascending, each in 2..8.
        granularity: "rows", or "layer" for one width a layer.
        group_rows: rows a group, a divisor of 256; None: ``default_group_rows`` of the layer.
        time_limit_s: > 0; after it, or ``knapsack.NODE_LIMIT``, the best allocation found so far is taken.

    Returns:
        The allocation. ``solver["gap"]`` is the part of the objective that a better one might still save; 0: optimal.

    Raises:
        ValueError: an argument differs from the above, or a limit cannot be met (with the smallest value that can).
    """
    check_bits(activation_bits, "activation_bits")
    check_bits(boundary_bits, "boundary_bits")
    widths = _check_candidates(candidates)
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity must be one of {get_args(Granularity)}, got {granularity!r}")
    if group_rows is not None and (group_rows not in range(1, TILE_ROWS + 1) or TILE_ROWS % group_rows):
        raise ValueError(f"group_rows must divide {TILE_ROWS}, got {group_rows!r}")
    free = _free_sites(sites)
    if unknown := sorted(set(cost) - {site.name for site in sites}):
        raise ValueError(f"cost must name sites of the model, got {unknown[:3]}")
    tables = {site.name: np.minimum.accumulate(_table("cost", cost, site, widths), axis=1) for site in free}

    items = _cut(free, tables, True, None)
    limits = _limits(sites, items, budget, widths, activation_bits, boundary_bits)
    if unmet := [limit.unmet for limit in limits if limit.room < 0]:
        raise ValueError("; ".join(unmet))
    if granularity == "rows" and any(limit.step[:, -1].sum() > limit.room for limit in limits):
        groups = _cut(free, tables, False, group_rows)
        of_groups = _limits(sites, groups, budget, widths, activation_bits, boundary_bits)
        items, limits = (groups, of_groups) if all(limit.room >= 0 for limit in of_groups) else (items, limits)
    found = knapsack.solve(items.cost, [x.step for x in limits], [x.room for x in limits], time_limit_s)

    weights = {s.name: RowGroups.uniform(s.rows, boundary_bits) for s in sites if s.has_weight}
    weights |= _row_groups(items, [widths[j] for j in found.choice], group_rows)
    result = {s.name: SiteBits(activation_bits if s.in_block else boundary_bits, weights.get(s.name)) for s in sites}
    allocation = BitAllocation(result)
    solver = {
        "objective": math.fsum(np.take_along_axis(items.cost, found.choice[:, None], axis=1).flat),
        "status": found.status,
        "gap": found.gap,
        "budget": asdict(budget),
        "granularity": granularity,
        "candidates": list(widths),
        "mean_weight_bits": allocation.mean_weight_bits(sites),
        "weight_bytes": allocation.weight_bytes(sites),
    }
    return BitAllocation(result, solver)


@dataclass(frozen=True)
class _Items:
    """What gets one width each: layers or groups of rows, by site name and place."""

    sites: tuple[Site, ...]  # of each item
    rows: tuple[int, ...]  # rows of each item
    cost: np.ndarray  # [items, widths]
    order: dict[str, np.ndarray]  # model row at each place, by site name
    order_bytes: int  # of all row orders, if every tile of several groups is mixed


def _cut(free: Sequence[Site], tables: Mapping[str, np.ndarray], layer: bool, group_rows: int | None) -> _Items:
    """Sorts the rows inside each tile by cost and cuts them into groups; a layer is the case of one large tile."""
    cut, orders, order_bytes = [], {}, 0
    for site in free:
        table = tables[site.name]
        tile_rows, size = (site.rows,) * 2 if layer else (TILE_ROWS, group_rows or default_group_rows(site.rows))
        key = np.broadcast_to(-table[:, table.shape[1] // 2], site.rows)
        # lexsort is stable: rows of equal cost, and so all rows of a layer's own cost, keep the model's order.
        order = orders[site.name] = np.lexsort((key, np.arange(site.rows) // tile_rows))
        for tile in range(0, site.rows, tile_rows):
            end = min(tile + tile_rows, site.rows)
            order_bytes += end - tile if end - tile > size else 0
            for start in range(tile, end, size):
                rows = order[start : min(start + size, end)]
                # len(rows) / site.rows is exactly 1 for a layer: its own cost must not pick up a rounding error.
                cost = table[rows].sum(axis=0) if len(table) > 1 else table[0] * (len(rows) / site.rows)
                cut.append((site, len(rows), cost))
    owners, counts, costs = zip(*cut, strict=True)
    return _Items(owners, counts, np.array(costs), orders, order_bytes)


def _row_groups(items: _Items, bits: Sequence[int], group_rows: int | None) -> dict[str, RowGroups]:
    """Widths of the items as row groups, by site name."""
    result = {}
    for name, order in items.order.items():
        own = [i for i, site in enumerate(items.sites) if site.name == name]
        rows, widths = [items.rows[i] for i in own], [bits[i] for i in own]
        if len(set(widths)) == 1:
            result[name] = RowGroups.uniform(sum(rows), widths[0])
            continue
        # Ascending rows in neighbouring groups of one width: equal widths are then equal data, and a tile of one width
        # keeps the model's order.
        run = np.cumsum(np.diff(np.repeat(widths, rows), prepend=0) != 0)
        order = order[np.lexsort((order, run, np.arange(len(order)) // TILE_ROWS))]
        size = group_rows or default_group_rows(len(order))
        result[name] = RowGroups(len(order), tuple(widths), size, tuple(order.tolist()))
    return result


@dataclass(frozen=True)
class _Limit:
    """One limit of the budget in whole numbers: Python integers, so that nothing rounds or overflows."""

    step: np.ndarray  # [items, widths], dtype object: what a width uses beyond the narrowest
    room: int  # what the narrowest widths leave; negative: the limit cannot be met
    unmet: str  # what to say then


def _limits(
    sites: Sequence[Site], items: _Items, budget: Budget, widths: Sequence[int], activation: int, boundary: int
) -> list[_Limit]:
    """The limits of ``budget`` on ``items``; ``activation`` and ``boundary`` are bits."""
    pinned = [s for s in sites if not (s.in_block and s.has_weight)]
    pinned_bytes = sum(RowGroups.uniform(s.rows, boundary).weight_bytes(s.cols) for s in pinned if s.has_weight)
    pinned_bitops = sum(s.macs * (activation if s.in_block else boundary) ** 2 for s in pinned)
    rows = np.array(items.rows, dtype=object)[:, None]
    weights = rows * [[site.cols] for site in items.sites]
    bitops = rows * [[Fraction(site.macs * activation, site.rows)] for site in items.sites]
    parts = math.lcm(*(share.denominator for share in bitops.flat))
    bits = np.array(widths, dtype=object)
    # By limit: whole numbers to one of its unit, those used without a choice, those used by each item at each width.
    known = {
        "mean_weight_bits": (weights.sum(), 0, weights * bits),
        "size_mb": (10**6, pinned_bytes + items.order_bytes, -(-weights * bits // 8)),
        "bitops": (parts, parts * pinned_bitops, bitops * parts * bits // 1),
    }
    limits = []
    for name, value in ((n, v) for n, v in asdict(budget).items() if v is not None):
        unit, fixed, use = known[name]
        least = fixed + use[:, 0].sum()
        # str: the shortest decimal that reads back as the float, so what was typed. 5.7 MB are 5 700 000 bytes.
        room = math.floor(Fraction(str(value)) * unit) - least
        smallest = least / unit
        if Fraction(str(smallest)) * unit < least:  # what the message says must itself be met
            smallest = math.nextafter(smallest, math.inf)
        limits.append(_Limit(use - use[:, :1], room, f"{name}={value} cannot be met: the smallest is {smallest}"))
    return limits


def _free_sites(sites: Sequence[Site]) -> list[Site]:
    """Sites whose widths are chosen, by name."""
    names = [site.name for site in sites]
    if len(set(names)) < len(names):
        raise ValueError(f"sites must have distinct names, got {max(names, key=names.count)!r} more than once")
    free = sorted((s for s in sites if s.in_block and s.has_weight), key=lambda site: site.name)
    if not free:
        raise ValueError(f"sites must include a linear of a transformer block, got {names[:3]}")
    return free


def _check_candidates(candidates: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(check_bits(b, "candidates") for b in candidates)
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"candidates must be distinct widths, ascending, got {widths}")
    return widths


def _numbers(
    argument: str, values: Mapping[str, Any], site: Site, *shapes: tuple[int, ...], negative: bool = False
) -> np.ndarray:
    """``values[site.name]`` as float64 of one of ``shapes``, finite, and not negative unless ``negative``."""
    if site.name not in values:
        raise ValueError(f"{argument} must have every linear of the blocks, got none for {site.name}")
    label, expected = f"{argument}[{site.name!r}]", " or ".join(map(str, shapes))
    try:
        array = np.asarray(values[site.name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label} must be numbers of shape {expected}, got {error}") from error
    if array.shape not in shapes:
        raise ValueError(f"{label} must have shape {expected}, got {array.shape}")
    bad = ~((np.abs(array) <= LARGEST) & (negative | (array >= 0)))
    if bad.any():
        raise ValueError(f"{label} must be finite{'' if negative else ' and not negative'}, got {array[bad].flat[0]}")
    return array


def _omega(argument: str, scores: Mapping[str, Any], site: Site, shape: tuple[int, ...], exponent: float) -> np.ndarray:
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be finite and not negative, got {exponent!r}")
    return np.abs(_numbers(argument, scores, site, shape, negative=True)) ** exponent


def _table(argument: str, values: Mapping[str, Any] | None, site: Site, widths: Sequence[int]) -> np.ndarray:
    """[N, widths], or [1, widths] for the whole layer; 4**-bits without values."""
    if values is None:
        return 4.0 ** -np.array([widths])
    n = len(widths)
    return np.atleast_2d(_numbers(argument, values, site, (site.rows, n), (1, n), (n,)))
