"""What there is to choose: the widths of layers, of groups of rows and of activations, and what each choice costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitq_kernels.costs import block_sites
from vitq_kernels.grouping import Groups
from vitq_kernels.limits import Item
from vitq_kernels.spec import Site


@dataclass(frozen=True)
class Activations:
    """Widths that activations of the blocks may have."""

    widths: tuple[int, ...]  # a single one: fixed
    cost: Mapping[str, np.ndarray]  # by name of every block site, [len(widths)]; empty: fixed
    tied: bool = False  # a site's weights have the width of its activations
    joined: bool = False  # one choice settles a site's weights and activations; so it is where they are tied


@dataclass(frozen=True)
class Choices:
    """Everything that has a choice: first the groups of weights, then activations by themselves."""

    items: tuple[Item, ...]
    cost: np.ndarray  # float64 [items, choices]; an item of fewer choices repeats its last
    groups: Groups


def choices_of(sites: Sequence[Site], groups: Groups, widths: tuple[int, ...], activations: Activations) -> Choices:
    """The choices of a model whose weights are cut into groups."""
    items, costs = [], []
    for site, rows, cost in zip(groups.sites, groups.rows, groups.cost, strict=True):
        if activations.tied:
            items.append(Item(site, rows, widths, widths, True))
            costs.append(cost + activations.cost[site.name])
        elif activations.joined:
            pairs = [(w, a) for w in widths for a in activations.widths]
            items.append(Item(site, rows, tuple(w for w, _ in pairs), tuple(a for _, a in pairs), True))
            costs.append(np.add.outer(cost, activations.cost[site.name]).ravel())
        else:
            items.append(Item(site, rows, widths, activations.widths[:1] * len(widths), False))
            costs.append(cost)
    for site in block_sites(sites) if activations.cost else ():
        if not (activations.joined and site.has_weight):
            items.append(Item(site, 0, (0,) * len(activations.widths), activations.widths, True))
            costs.append(activations.cost[site.name])
    longest = max(map(len, costs))
    return Choices(tuple(items), np.array([np.pad(c, (0, longest - len(c)), mode="edge") for c in costs]), groups)


def fixed_items(sites: Sequence[Site], activations: Activations, boundary_bits: int) -> list[Item]:
    """What has no choice: patch embedding and head, and activations of one width."""
    fixed = [Item(s, s.rows, (boundary_bits,), (boundary_bits,), True) for s in sites if not s.in_block]
    if not activations.cost:
        fixed += [Item(s, 0, (0,), activations.widths, True) for s in block_sites(sites)]
    return fixed


def pairs_of(choices: Choices, interactions: Mapping[tuple[str, str], np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """Interactions by the places of the items; raises ValueError where one does not fit."""
    place = {item.site.name: index for index, item in enumerate(choices.items)}
    shape, pairs = (choices.cost.shape[1],) * 2, {}
    for names, table in interactions.items():
        if len(set(names)) != 2 or not set(names) <= set(place):
            raise ValueError(f"interactions must be of two sites whose widths are chosen, got {names}")
        array = np.asarray(table, dtype=np.float64)
        if array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"interactions[{names}] must be finite numbers of shape {shape}, got {array.shape}")
        pairs[place[names[0]], place[names[1]]] = array
    return pairs
