"""What widths use of a budget, in whole numbers, and what is left of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vitq_kernels.latency import KernelTimes
from vitq_kernels.spec import Budget, Site


@dataclass(frozen=True)
class Item:
    """What gets one choice of widths: a layer, a group of its rows, a site's activations, or both together."""

    site: Site
    rows: int  # weight rows that it sets; 0: activations alone
    weight: tuple[int, ...]  # width of these rows at each choice; 0 without any
    activation: tuple[int, ...]  # width of the site's activations at each choice
    sets_activation: bool  # False: another item does, or they are fixed; counted there

    @property
    def tied(self) -> bool:
        """Whether weights and activations change together."""
        return self.sets_activation and self.rows > 0 and self.weight == self.activation


@dataclass(frozen=True)
class Limit:
    """One limit of the budget in whole numbers: Python integers, so that nothing rounds or overflows."""

    name: str
    unit: int  # whole numbers to one of the limit's unit
    use: np.ndarray  # [items, choices], dtype object: what a choice uses beyond the item's least
    room: int  # what the least of all items leave; negative: the limit cannot be met
    unmet: str  # what to say then


def limits_of(
    items: Sequence[Item], fixed: Sequence[Item], budget: Budget, order_bytes: int, times: KernelTimes | None
) -> list[Limit]:
    """The limits of ``budget``.

    Args:
        items: what has a choice; a shorter list of choices counts as its last repeated.
        fixed: what has none.
        budget: the limits.
        order_bytes: bytes of row orders, used whatever is chosen.
        times: kernel times, needed by latency_ms.

    Raises:
        ValueError: latency_ms without times, or a time that is missing.
    """
    if budget.latency_ms is not None and times is None:
        raise ValueError("latency_ms needs kernel times, got none")
    choices = max(len(item.weight) for item in items)
    limits = []
    for name, value in budget.given.items():
        use_of = _USES[name]
        always = sum(use_of(item, 0, times) for item in fixed) + (order_bytes if name == "size_mb" else 0)
        rows = []
        for item in items:
            row = [use_of(item, choice, times) for choice in range(len(item.weight))]
            rows.append(row + row[-1:] * (choices - len(row)))
        parts = math.lcm(always.denominator, *(use.denominator for row in rows for use in row))
        use = np.array([[int(x * parts) for x in row] for row in rows], dtype=object)
        unit = parts * _unit(name, [*items, *fixed])
        least = int(always * parts) + use.min(axis=1).sum()
        # str: the shortest decimal that reads back as the float, so what was typed. 5.7 MB are 5 700 000 bytes.
        room = math.floor(Fraction(str(value)) * unit) - least
        smallest = least / unit
        if Fraction(str(smallest)) * unit < least:  # what the message says must itself be met
            smallest = math.nextafter(smallest, math.inf)
        unmet = f"{name}={value} cannot be met: the smallest is {smallest}"
        limits.append(Limit(name, unit, use - use.min(axis=1, keepdims=True), room, unmet))
    return limits


def _weight_bits(item: Item, choice: int, times: KernelTimes | None) -> int:
    return item.rows * item.site.cols * item.weight[choice] if item.site.in_block else 0


def _activation_bits(item: Item, choice: int, times: KernelTimes | None) -> int:
    counts = item.sets_activation and item.site.in_block
    return item.site.macs * item.activation[choice] if counts else 0


def _bytes(item: Item, choice: int, times: KernelTimes | None) -> int:
    return -(-item.rows * item.site.cols * item.weight[choice] // 8)


def _bitops(item: Item, choice: int, times: KernelTimes | None) -> Fraction | int:
    activation = item.activation[choice]
    if not item.site.has_weight:
        return item.site.macs * activation**2
    return Fraction(item.site.macs * item.rows, item.site.rows) * item.weight[choice] * activation


def _microseconds(item: Item, choice: int, times: KernelTimes | None) -> Fraction | int:
    assert times is not None  # checked before
    if not item.site.has_weight:
        return times.us(item.site, None, item.activation[choice])
    if not item.rows:
        return 0
    return times.us(item.site, item.weight[choice], item.activation[choice]) * Fraction(item.rows, item.site.rows)


_USES: dict[str, Callable[[Item, int, KernelTimes | None], Fraction | int]] = {
    "mean_weight_bits": _weight_bits,
    "size_mb": _bytes,
    "bitops": _bitops,
    "mean_activation_bits": _activation_bits,
    "latency_ms": _microseconds,
}


def _unit(name: str, items: Sequence[Item]) -> int:
    """What a use of one of the limit's unit comes to."""
    blocks = [item for item in items if item.site.in_block]
    if name == "mean_weight_bits":
        return sum(item.rows * item.site.cols for item in blocks)
    if name == "mean_activation_bits":
        return sum(item.site.macs for item in blocks if item.sets_activation)
    return {"size_mb": 10**6, "bitops": 1, "latency_ms": 1000}[name]
