"""Rows of a layer that get one width: sorted by cost, four groups of them at a time, and put back as RowGroups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitq_kernels.spec import DEFAULT_GROUP_ROWS, TILE_ROWS, RowGroups, Site

LEAST_SORTED = 64  # rows that are sorted together: as many as a CUDA kernel puts back in order
SORTED_GROUPS = 4


@dataclass(frozen=True)
class Groups:
    """What gets one width each: layers or groups of rows, by site name and place."""

    sites: tuple[Site, ...]  # of each group
    rows: tuple[int, ...]  # rows of each group
    cost: np.ndarray  # [groups, widths]
    order: dict[str, np.ndarray]  # model row at each place, by site name
    order_bytes: int  # of all row orders, if every tile of several groups is mixed


def cut(free: Sequence[Site], tables: Mapping[str, np.ndarray], layer: bool, group_rows: int | None) -> Groups:
    """Sorts the rows of every four groups by cost and cuts them into groups; a layer is the case of one large group.

    Args:
        free: linears.
        tables: cost of each row at each width, [N, widths], or of the whole layer, [1, widths], by site name.
        layer: one group a layer.
        group_rows: rows a group; None: ``DEFAULT_GROUP_ROWS``.
    """
    found, orders, order_bytes = [], {}, 0
    for site in free:
        table = tables[site.name]
        size = site.rows if layer else group_rows or DEFAULT_GROUP_ROWS
        together = site.rows if layer else min(max(LEAST_SORTED, SORTED_GROUPS * size), TILE_ROWS)
        key = np.broadcast_to(-table[:, table.shape[1] // 2], site.rows)
        # lexsort is stable: rows of equal cost, and so all rows of a layer's own cost, keep the model's order.
        order = orders[site.name] = np.lexsort((key, np.arange(site.rows) // together))
        tiles = (min(TILE_ROWS, site.rows - first) for first in range(0, site.rows, TILE_ROWS))
        order_bytes += sum(rows for rows in tiles if rows > size)
        for first in range(0, site.rows, together):
            end = min(first + together, site.rows)
            for start in range(first, end, size):
                rows = order[start : min(start + size, end)]
                # len(rows) / site.rows is exactly 1 for a layer: its own cost must not pick up a rounding error.
                cost = table[rows].sum(axis=0) if len(table) > 1 else table[0] * (len(rows) / site.rows)
                found.append((site, len(rows), cost))
    owners, counts, costs = zip(*found, strict=True)
    return Groups(owners, counts, np.array(costs), orders, order_bytes)


def row_groups(groups: Groups, bits: Sequence[int], group_rows: int | None) -> dict[str, RowGroups]:
    """Widths of the groups as row groups, by site name."""
    result = {}
    for name, order in groups.order.items():
        own = [i for i, site in enumerate(groups.sites) if site.name == name]
        rows, widths = [groups.rows[i] for i in own], [bits[i] for i in own]
        if len(set(widths)) == 1:
            result[name] = RowGroups.uniform(sum(rows), widths[0])
            continue
        # Ascending rows in neighbouring groups of one width: equal widths are then equal data, and a tile of one width
        # keeps the model's order.
        run = np.cumsum(np.diff(np.repeat(widths, rows), prepend=0) != 0)
        order = order[np.lexsort((order, run, np.arange(len(order)) // TILE_ROWS))]
        result[name] = RowGroups(len(order), tuple(widths), group_rows or DEFAULT_GROUP_ROWS, tuple(order.tolist()))
    return result
