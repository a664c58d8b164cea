"""Bit allocation against brute force: least cost, never over the budget, ties and errors as documented."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vitq_kernels import knapsack
from vitq_kernels.allocation import allocate_bits
from vitq_kernels.costs import layer_costs, relevance_costs
from vitq_kernels.spec import BitAllocation, Budget, RowGroups, Site

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
TOKENS = 7
OTHERS = {"activation_bits": 6, "boundary_bits": 7}  # where brute force is compared, unlike each other
Spent = dict[str, Fraction]


def linear(name: str, rows: int, cols: int = 48, kind: str = "fc1") -> Site:
    return Site(name, kind, rows, cols, TOKENS * rows * cols)


def model(*linears: Site) -> list[Site]:
    """The linears of a block between a patch embedding and a head, with the two matmuls."""
    return [
        Site("patch_embed.proj", "patch_embed", 16, 12, 9 * 16 * 12),
        *linears,
        Site("blocks.0.attn.qk", "qk", 0, 0, 1001),
        Site("blocks.0.attn.av", "av", 0, 0, 1003),
        Site("head", "head", 10, 16, 160),
    ]


def vit_base() -> list[Site]:
    """ViT-B/16 at 224 pixels: 85 M weights in 48 linears."""
    shapes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    linears = []
    for block in range(12):
        for name, (rows, cols) in shapes.items():
            kind = name.split(".")[1]
            linears.append(Site(f"blocks.{block}.{name}", kind, rows, cols, 197 * rows * cols))
    return model(*linears)


def decaying(rng: np.random.Generator, *shape: int, widths: Sequence[int] = WIDTHS, noise: float = 0.3) -> np.ndarray:
    """Heavy-tailed costs that fall about fourfold a bit, the last dimension being the widths."""
    scale = np.exp(2 * rng.standard_normal((*shape, 1)))
    return scale * 4.0 ** -np.array(widths) * np.exp(noise * rng.standard_normal((*shape, len(widths))))


def spent(sites: Sequence[Site], bits: BitAllocation) -> Spent:
    """What an allocation uses, in the units of Budget, from the widths of its rows and exact arithmetic."""
    block_bits = block_weights = size = bitops = 0
    for site in sites:
        groups, activation = bits.sites[site.name].weight, bits.sites[site.name].activation
        if groups is None:
            bitops += site.macs * activation**2
            continue
        rows = groups.row_bits()
        bitops += Fraction(site.macs, site.rows) * sum(rows) * activation
        size += sum(math.ceil(Fraction((stop - start) * b * site.cols, 8)) for start, stop, b in groups.groups())
        for tile in range(0, site.rows, 256):
            of_tile = rows[tile : tile + 256]
            size += len(of_tile) if len(set(of_tile)) > 1 else 0
        if site.kind not in ("patch_embed", "head"):
            block_bits += sum(rows) * site.cols
            block_weights += site.rows * site.cols
    return {
        "mean_weight_bits": Fraction(block_bits, block_weights),
        "size_mb": Fraction(size, 10**6),
        "bitops": Fraction(bitops),
    }


def exceeded(sites: Sequence[Site], bits: BitAllocation, budget: Mapping[str, float]) -> list[str]:
    """Limits that an allocation does not meet, the budget read as the decimal that was typed."""
    used = spent(sites, bits)
    return [name for name, value in budget.items() if used[name] > Fraction(str(value))]


def cost_of(bits: BitAllocation, cost: Mapping[str, np.ndarray], widths: Sequence[int]) -> float:
    """Cost of an allocation row by row; the cost of a whole layer is spread on its rows."""
    total = 0.0
    for name, table in cost.items():
        best = np.minimum.accumulate(table, axis=-1)
        rows = bits.sites[name].weight.row_bits()
        total += sum(
            best[row, widths.index(b)] if best.ndim == 2 else best[widths.index(b)] / len(rows)
            for row, b in enumerate(rows)
        )
    return total


def sorted_groups(table: np.ndarray, size: int) -> list[list[int]]:
    """Rows of each group: dearest first at the middle width among the rows of four groups, equal ones by index."""
    middle = table.shape[1] // 2
    groups, together = [], min(4 * size, 256)
    for first in range(0, len(table), together):
        rows = sorted(range(first, min(first + together, len(table))), key=lambda row: (-table[row, middle], row))
        groups += [rows[i : i + size] for i in range(0, len(rows), size)]
    return groups


def least_cost(
    sites: Sequence[Site],
    items: Sequence[tuple[Site, int, np.ndarray]],
    widths: Sequence[int],
    budget: Mapping[str, float],
    order_bytes: int,
) -> float:
    """Least cost over every combination of widths of the items (site, rows, cost at each width)."""
    picks = np.indices((len(widths),) * len(items)).reshape(len(items), -1)
    total = np.zeros(picks.shape[1])
    # What the sites without a choice use: with one free linear, for the mean's sake, less that linear alone.
    pinned = [site for site in sites if site.kind in ("patch_embed", "head", "qk", "av")]
    with_one = spent([*pinned, items[0][0]], uniform(sites, 2))
    one = spent([items[0][0]], uniform(sites, 2))
    fixed = {name: with_one[name] - one[name] for name in one}
    weights = sum(rows * site.cols for site, rows, _ in items)
    use = {name: np.zeros(picks.shape[1], dtype=np.int64) for name in ("mean_weight_bits", "size_mb", "bitops")}
    for pick, (site, rows, cost) in zip(picks, items, strict=True):
        bits = np.array(widths)[pick]
        total += np.minimum.accumulate(cost)[pick]
        use["mean_weight_bits"] += rows * site.cols * bits
        use["size_mb"] += -(-rows * site.cols * bits // 8)
        use["bitops"] += rows * TOKENS * site.cols * bits * OTHERS["activation_bits"]
    limits = {
        "mean_weight_bits": lambda value: value * weights,
        "size_mb": lambda value: (value - fixed["size_mb"]) * 10**6 - order_bytes,
        "bitops": lambda value: value - fixed["bitops"],
    }
    fits = np.ones(len(total), dtype=bool)
    for name, value in budget.items():
        fits &= use[name] <= math.floor(limits[name](Fraction(str(value))))
    return float(total[fits].min())


def uniform(sites: Sequence[Site], bits: int, others: Mapping[str, int] = OTHERS) -> BitAllocation:
    return BitAllocation.uniform(sites, bits, **others)


def draw_budget(
    rng: np.random.Generator, sites: Sequence[Site], widths: Sequence[int], kinds: Sequence[str], order_bytes: int = 0
) -> dict[str, float]:
    """Limits between the narrowest widths, with room for the row orders, and the widest."""
    low, high = (spent(sites, uniform(sites, widths[i])) for i in (0, -1))
    low["size_mb"] += Fraction(order_bytes, 10**6)
    return {kind: float(low[kind]) + rng.uniform(0.02, 0.95) * float(high[kind] - low[kind]) for kind in kinds}


KINDS = ["mean_weight_bits", "size_mb", "bitops"]
COMBINATIONS = [tuple(kind for i, kind in enumerate(KINDS) if mask >> i & 1) for mask in range(1, 8)]
every_kind = pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)


# Optimality and feasibility


@every_kind
def test_layers_cost_as_little_as_brute_force_finds(kinds: tuple[str, ...]) -> None:
    for seed in range(16):
        rng = np.random.default_rng(seed)
        widths = tuple(sorted(rng.choice(WIDTHS, rng.integers(3, 6), replace=False).tolist()))
        linears = [linear(f"l{i}", int(rng.integers(1, 90)), int(rng.integers(1, 70))) for i in range(5 + seed % 2)]
        sites = model(*linears)
        cost = {site.name: decaying(rng, widths=widths, noise=1.0) for site in linears}
        budget = draw_budget(rng, sites, widths, kinds)
        bits = allocate_bits(sites, cost, Budget(**budget), candidates=widths, granularity="layer", **OTHERS)
        expected = least_cost(sites, [(s, s.rows, cost[s.name]) for s in linears], widths, budget, 0)
        assert bits.solver["objective"] == pytest.approx(expected, rel=1e-12), f"seed {seed}"
        assert cost_of(bits, cost, widths) == pytest.approx(expected, rel=1e-9), f"seed {seed}"
        assert exceeded(sites, bits, budget) == [], f"seed {seed}"


@every_kind
def test_row_groups_cost_as_little_as_brute_force_finds(kinds: tuple[str, ...]) -> None:
    for seed in range(16):
        rng = np.random.default_rng(100 + seed)
        widths = tuple(sorted(rng.choice(WIDTHS, rng.integers(3, 6), replace=False).tolist()))
        size = (16, 32, 128)[seed % 3]
        shapes = {16: (30, 10, 41), 32: (90, 65), 128: (300, 200)}[size]
        linears = [linear(f"l{i}", rows, int(rng.integers(30, 70))) for i, rows in enumerate(shapes)]
        sites = model(*linears)
        cost = {site.name: decaying(rng, site.rows, widths=widths, noise=1.0) for site in linears}
        order_bytes = sum(min(256, s.rows - t) for s in linears for t in range(0, s.rows, 256) if s.rows - t > size)
        budget = draw_budget(rng, sites, widths, kinds, order_bytes)
        bits = allocate_bits(sites, cost, Budget(**budget), candidates=widths, group_rows=size, **OTHERS)
        items = []
        for site in linears:
            table = np.minimum.accumulate(cost[site.name], axis=1)
            items += [(site, len(rows), table[rows].sum(axis=0)) for rows in sorted_groups(table, size)]
        expected = least_cost(sites, items, widths, budget, order_bytes)
        assert bits.solver["objective"] == pytest.approx(expected, rel=1e-12), f"seed {seed}"
        assert cost_of(bits, cost, widths) == pytest.approx(expected, rel=1e-9), f"seed {seed}"
        assert exceeded(sites, bits, budget) == [], f"seed {seed}"


def test_costs_of_any_magnitude_are_told_apart() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        linears = [linear(f"l{i}", int(rng.integers(20, 60))) for i in range(6)]
        cost = {s.name: np.sort(10 ** rng.uniform(-250, 250, 4))[::-1] for s in linears}
        sites, widths = model(*linears), (2, 3, 5, 8)
        budget = draw_budget(rng, sites, widths, ["mean_weight_bits"])
        bits = allocate_bits(sites, cost, Budget(**budget), candidates=widths, granularity="layer")
        expected = least_cost(sites, [(s, s.rows, cost[s.name]) for s in linears], widths, budget, 0)
        assert bits.solver["objective"] == pytest.approx(expected, rel=1e-9), f"seed {seed}"


def test_the_core_grows_until_it_holds_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        use = rng.integers(100, 200, (8, 1)).astype(object) * np.arange(4).astype(object)
        room = int(use[:, -1].sum() * rng.uniform(0.1, 0.9))
        cost = decaying(rng, 8, widths=(2, 3, 4, 5))
        cost = np.minimum.accumulate(cost, axis=1)
        picks = np.indices((4,) * 8).reshape(8, -1)
        fits = sum(use[i].astype(int)[picks[i]] for i in range(8)) <= room
        least = sum(cost[i][picks[i]] for i in range(8))[fits].min()
        monkeypatch.setattr(knapsack, "CORE", 1)
        found = knapsack.solve(cost, [use], [room], 60.0)
        assert cost[np.arange(8), found.choice].sum() == pytest.approx(least, rel=1e-12), f"seed {seed}"


def test_vit_base_is_solved_to_the_optimum_in_seconds() -> None:
    sites, rng = vit_base(), np.random.default_rng(0)
    cost = {s.name: decaying(rng, s.rows) for s in sites if s.name.startswith("blocks") and s.rows}
    uniform = spent(sites, BitAllocation.uniform(sites, 4))
    budget = {"mean_weight_bits": 4.0, "size_mb": float(uniform["size_mb"]) * 0.99}
    start = time.perf_counter()
    bits = allocate_bits(sites, cost, Budget(**budget))
    assert time.perf_counter() - start < 10
    assert (bits.solver["status"], bits.solver["gap"]) == ("optimal", 0.0)
    assert exceeded(sites, bits, budget) == []
    # A group of fc2 takes 64 * 3072 / 8 bytes a bit; much more must not be left over, order bytes apart.
    assert (budget["size_mb"] - float(spent(sites, bits)["size_mb"])) * 10**6 < 64 * 3072 / 8 + 12 * 6912


@pytest.mark.parametrize("granularity", ["rows", "layer"])
def test_a_stopped_search_gives_a_feasible_allocation_and_its_gap(granularity: str) -> None:
    rng = np.random.default_rng(3)
    linears = [linear(f"l{i}", 200 + 13 * i, 31 + i) for i in range(24)]
    sites, cost = model(*linears), {s.name: decaying(rng, s.rows) for s in linears}
    budget = draw_budget(rng, sites, WIDTHS, KINDS[:2], order_bytes=20_000)
    best = allocate_bits(sites, cost, Budget(**budget), granularity=granularity)
    bits = allocate_bits(sites, cost, Budget(**budget), granularity=granularity, time_limit_s=1e-9)
    assert best.solver["status"] == "optimal"
    assert bits.solver["status"] == "time limit"
    assert exceeded(sites, bits, budget) == []
    assert 0 < bits.solver["gap"] < 0.2
    lower = bits.solver["objective"] * (1 - bits.solver["gap"])
    assert lower <= best.solver["objective"] < bits.solver["objective"]


def test_a_search_that_stops_at_the_node_limit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        uses = [rng.integers(1000, 2000, (20, 1)).astype(object) * np.arange(3).astype(object) for _ in range(2)]
        rooms = [int(use[:, -1].sum() * 0.4) for use in uses]
        cost = rng.uniform(1, 2, (20, 1)) * 2.0 ** -np.arange(3)
        best = knapsack.solve(cost, uses, rooms, 60.0)
        with monkeypatch.context() as patch:
            patch.setattr(knapsack, "NODE_LIMIT", 1)
            found = knapsack.solve(cost, uses, rooms, 60.0)
        assert best.status == "optimal"
        assert all(use[np.arange(20), found.choice].sum() <= room for use, room in zip(uses, rooms, strict=True))
        least, total = (float(cost[np.arange(20), x.choice].sum()) for x in (best, found))
        assert total * (1 - found.gap) <= least * (1 + 1e-9)
        assert least <= total * (1 + 1e-9)
        assert (found.gap > 0) == (found.status != "optimal")
        stopped.append(found.status)
    assert "node limit" in stopped


# What an allocation looks like


def test_a_dearer_layer_of_equal_size_never_has_fewer_bits() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        linears = [linear(f"l{i:02}", 40) for i in range(12)]
        scale = 10 ** rng.uniform(-12, 0, 12)
        cost = {s.name: scale[i] * 4.0 ** -np.array(WIDTHS) for i, s in enumerate(linears)}
        bits = allocate_bits(model(*linears), cost, Budget(rng.uniform(2.1, 7.9)), granularity="layer")
        given = [bits.sites[linears[i].name].weight.bits[0] for i in np.argsort(scale)]
        assert given == sorted(given), f"seed {seed}"


@pytest.mark.parametrize("rows", [1, 10, 72, 256, 300, 1000])
@pytest.mark.parametrize("size", [None, 16, 32, 64])
def test_groups_are_runs_of_the_rows_sorted_four_groups_at_a_time(rows: int, size: int | None) -> None:
    rng = np.random.default_rng(rows)
    linears = [linear("a", rows), linear("b", 64)]
    cost = {s.name: decaying(rng, s.rows) for s in linears}
    bits = allocate_bits(model(*linears), cost, Budget(3.3), group_rows=size)
    weight = bits.sites["a"].weight
    of_row = weight.row_bits()
    size = size or 16
    groups = sorted_groups(np.minimum.accumulate(cost["a"], axis=1), size)
    widths = [{of_row[row] for row in group} for group in groups]
    assert all(len(width) == 1 for width in widths)
    assert rows <= size or len(set(of_row)) > 1
    if len(set(of_row)) > 1:
        assert (weight.rows, weight.group_rows) == (rows, size)
        assert list(weight.bits) == [width.pop() for width in widths]


def test_rows_of_equal_width_side_by_side_keep_their_order() -> None:
    rng = np.random.default_rng(0)
    sites = model(linear("a", 256))
    weight = allocate_bits(sites, {"a": decaying(rng, 256)}, Budget(3.0)).sites["a"].weight
    widths = [b for start, stop, b in weight.groups() for _ in range(start, stop)]
    assert len(set(widths)) < 8  # of 16 groups some neighbours are alike
    for i in range(255):
        assert widths[i] != widths[i + 1] or weight.order[i] < weight.order[i + 1]


def test_a_tile_of_one_width_keeps_the_models_order_and_has_no_order_bytes() -> None:
    rng = np.random.default_rng(0)
    table = decaying(rng, 600)
    table[256:512] *= 1e-9  # nothing to win in the second tile
    weight = allocate_bits(model(linear("a", 600)), {"a": table}, Budget(3.0)).sites["a"].weight
    assert set(weight.row_bits()[256:512]) == {2}
    assert weight.order[256:512] == tuple(range(256, 512))
    assert weight.order_bytes == 256 + 88
    assert weight.order[:256] != tuple(range(256))


def test_a_layer_of_one_width_is_a_layer_of_one_group_a_tile() -> None:
    sites = model(linear("a", 300), linear("b", 300))
    cost = {"a": np.full((300, 7), 4.0 ** -np.array(WIDTHS)), "b": np.full((300, 7), 1e3 * 4.0 ** -np.array(WIDTHS))}
    bits = allocate_bits(sites, cost, Budget(5.0))
    assert bits.sites["a"].weight == RowGroups.uniform(300, 3)
    assert bits.sites["b"].weight == RowGroups.uniform(300, 7)


def test_one_width_a_layer_with_layer_granularity() -> None:
    rng = np.random.default_rng(1)
    linears = [linear(f"l{i}", 600) for i in range(4)]
    bits = allocate_bits(
        model(*linears), {s.name: decaying(rng, 600) for s in linears}, Budget(4.3), granularity="layer"
    )
    got = {bits.sites[s.name].weight for s in linears}
    assert got <= {RowGroups.uniform(600, b) for b in WIDTHS}
    assert len(got) > 1


@pytest.mark.parametrize("granularity", ["rows", "layer"])
def test_patch_embedding_and_head_are_pinned(granularity: str) -> None:
    sites = model(linear("a", 64), linear("b", 64))
    cost = {"a": 3.0 ** -np.array(WIDTHS), "b": 4.0 ** -np.array(WIDTHS), "head": np.full(7, np.nan)}
    bits = allocate_bits(sites, cost, Budget(3.0), activation_bits=5, boundary_bits=7, granularity=granularity)
    assert list(bits.sites) == [site.name for site in sites]
    for name, rows in (("patch_embed.proj", 16), ("head", 10)):
        assert (bits.sites[name].activation, bits.sites[name].weight) == (7, RowGroups.uniform(rows, 7))
    for name in ("a", "b", "blocks.0.attn.qk", "blocks.0.attn.av"):
        assert bits.sites[name].activation == 5
    assert bits.sites["blocks.0.attn.qk"].weight is None
    bits.check(sites)


@pytest.mark.parametrize("mean", [2.5, 3.0, 3.3, 7.9])
@pytest.mark.parametrize("granularity", ["rows", "layer"])
def test_equal_costs_give_nearly_equal_bits(granularity: str, mean: float) -> None:
    linears = [linear(f"l{i}", 256) for i in range(10)]
    cost = {s.name: np.tile(4.0 ** -np.array(WIDTHS), (256, 1)) for s in linears}
    bits = allocate_bits(model(*linears), cost, Budget(mean), granularity=granularity)
    given = {b for s in linears for b in bits.sites[s.name].weight.row_bits()}
    assert given <= {math.floor(mean), math.ceil(mean)}
    assert bits.solver["mean_weight_bits"] == pytest.approx(mean, abs=0.101)


def test_a_tie_goes_to_the_first_name_then_to_the_first_rows() -> None:
    sites = model(linear("z", 256), linear("a", 256), linear("m", 256))
    cost = {name: 4.0 ** -np.array(WIDTHS) for name in "zam"}
    layers = allocate_bits(sites, cost, Budget(3.34), granularity="layer")
    assert [layers.sites[name].weight.bits[0] for name in "amz"] == [4, 3, 3]
    rows = allocate_bits(sites, cost, Budget(3.5))
    assert rows.sites["a"].weight == RowGroups.uniform(256, 4)
    assert rows.sites["m"].weight == RowGroups(256, (4,) * 8 + (3,) * 8, 16)  # the model's order: order is None
    assert rows.sites["z"].weight == RowGroups.uniform(256, 3)


def test_the_order_of_sites_and_a_second_run_change_nothing() -> None:
    rng = np.random.default_rng(0)
    linears = [linear(f"l{i}", (64, 200, 300)[i % 3]) for i in range(9)]
    table = {rows: decaying(rng, rows) for rows in (64, 200, 300)}
    cost = {s.name: table[s.rows] for s in linears}  # three of each: many ties
    budget = Budget(3.7, size_mb=0.04)
    first = allocate_bits(model(*linears), cost, budget)
    assert allocate_bits(model(*linears), cost, budget) == first
    shuffled = [model(*linears)[i] for i in rng.permutation(len(linears) + 4)]
    assert dict(allocate_bits(shuffled, cost, budget).sites) == dict(first.sites)


def test_a_wider_width_that_costs_no_less_is_not_taken() -> None:
    sites = model(linear("a", 64), linear("b", 64), linear("c", 64))
    rising = {"a": [9.0, 1.0, 5.0, 1.0, 2.0, 1.0, 3.0], "b": np.zeros(7), "c": 4.0 ** -np.array(WIDTHS)}
    bits = allocate_bits(sites, rising, Budget(6.0), granularity="layer")
    assert [bits.sites[name].weight.bits[0] for name in "abc"] == [3, 2, 8]
    assert bits.solver["objective"] == 1.0 + 4.0**-8


def test_no_cost_at_all_needs_no_bits() -> None:
    sites = model(linear("a", 64), linear("b", 300))
    bits = allocate_bits(sites, {"a": np.zeros((64, 7)), "b": np.zeros(7)}, Budget(5.0))
    assert bits.sites == BitAllocation.uniform(sites, 2).sites


@pytest.mark.parametrize("granularity", ["rows", "layer"])
@pytest.mark.parametrize(
    "budget",
    [Budget(8.0), Budget(20), Budget(size_mb=1.0), Budget(bitops=1e9), Budget(8, 1.0, 1e9)],
    ids=["mean 8", "mean 20", "size", "bitops", "all"],
)
def test_a_budget_beyond_the_widest_gives_the_widest(budget: Budget, granularity: str) -> None:
    rng = np.random.default_rng(0)
    sites = model(linear("a", 64), linear("b", 300))
    cost = {"a": rng.uniform(size=(64, 7)), "b": np.zeros(7)}
    bits = allocate_bits(sites, cost, budget, granularity=granularity)
    assert bits.sites == BitAllocation.uniform(sites, 8).sites


def test_a_size_that_holds_the_widest_layers_exactly_needs_no_room_for_row_orders() -> None:
    rng = np.random.default_rng(0)
    sites = model(linear("a", 64), linear("b", 300))
    size = BitAllocation.uniform(sites, 8).weight_bytes(sites) / 10**6
    cost = {"a": decaying(rng, 64), "b": decaying(rng, 300)}
    assert allocate_bits(sites, cost, Budget(size_mb=size)).sites == BitAllocation.uniform(sites, 8).sites
    assert allocate_bits(sites, cost, Budget(size_mb=size - 1e-6)).sites != BitAllocation.uniform(sites, 8).sites


@pytest.mark.parametrize("granularity", ["rows", "layer"])
def test_the_cost_of_a_layer_is_that_of_its_rows_together(granularity: str) -> None:
    rng = np.random.default_rng(5)
    linears = [linear(f"l{i}", (64, 512)[i % 2]) for i in range(5)]
    whole = {s.name: decaying(rng) for s in linears}
    forms: list[Callable[[np.ndarray, int], Any]] = [
        lambda c, rows: c,
        lambda c, rows: c.tolist(),
        lambda c, rows: c[None],
        lambda c, rows: np.tile(c / rows, (rows, 1)),
    ]
    results = [
        allocate_bits(
            model(*linears),
            {s.name: form(whole[s.name], s.rows) for s in linears},
            Budget(3.7),
            granularity=granularity,
        )
        for form in forms
    ]
    assert all(result.sites == results[0].sites for result in results)
    assert all(result.solver["objective"] == pytest.approx(results[0].solver["objective"]) for result in results)
    assert len({b for s in linears for b in results[0].sites[s.name].weight.bits}) > 2


def test_result_survives_json_and_says_how_it_was_found() -> None:
    rng = np.random.default_rng(0)
    sites = model(linear("a", 300), linear("b", 72))
    bits = allocate_bits(sites, {"a": decaying(rng, 300), "b": decaying(rng)}, Budget(4, size_mb=0.02), group_rows=16)
    assert BitAllocation.from_json(bits.to_json()) == bits
    used = spent(sites, bits)
    assert bits.solver["weight_bytes"] == used["size_mb"] * 10**6
    assert bits.solver["mean_weight_bits"] == float(used["mean_weight_bits"])
    assert bits.solver["budget"] == {"mean_weight_bits": 4, "size_mb": 0.02}
    assert (bits.solver["granularity"], bits.solver["candidates"]) == ("rows", list(WIDTHS))
    assert (bits.solver["status"], bits.solver["gap"]) == ("optimal", 0.0)


# Budgets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["rows", "layer"])
def test_an_infeasible_budget_names_the_smallest_which_can_be_met(kind: str, granularity: str) -> None:
    sites = [*model(linear("a", 300, 7), linear("b", 10, 11)), Site("c", "fc2", 9, 5, 1000)]  # 1000 MACs on 9 rows
    rng = np.random.default_rng(0)
    cost = {"a": decaying(rng, 300, widths=(3, 5)), "b": decaying(rng, widths=(3, 5)), "c": [2.0, 1.0]}
    smallest = spent(sites, BitAllocation.uniform(sites, 3))[kind]
    value = float(smallest) * 0.999
    with pytest.raises(ValueError, match=f"{kind}={value} cannot be met: the smallest is ") as raised:
        allocate_bits(sites, cost, Budget(**{kind: value}), candidates=(3, 5), granularity=granularity)
    named = float(str(raised.value).rsplit(" ", 1)[1])
    assert smallest <= Fraction(str(named)) < smallest * (1 + Fraction(1, 10**12))
    bits = allocate_bits(sites, cost, Budget(**{kind: named}), candidates=(3, 5), granularity=granularity)
    assert bits.sites == BitAllocation.uniform(sites, 3).sites


def test_the_smallest_value_is_rounded_up() -> None:
    for macs in (2**60 + 1, 2**60 + 3, 2**60 + 129, 10**17 + 1):  # times 2 bits times 8, no float
        sites = [Site("a", "fc1", 10, 10, macs)]
        with pytest.raises(ValueError, match="bitops=1 cannot be met") as raised:
            allocate_bits(sites, {"a": np.ones(7)}, Budget(bitops=1))
        named = str(raised.value).rsplit(" ", 1)[1]
        assert Fraction(named) >= 16 * macs
        assert allocate_bits(sites, {"a": np.ones(7)}, Budget(bitops=float(named))).solver["status"] == "optimal"


def test_a_share_of_the_macs_is_no_whole_number() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sites = [Site(name, "fc1", rows, 8, macs) for name, rows, macs in (("a", 60, 7), ("b", 45, 11), ("c", 33, 13))]
        cost = {s.name: decaying(rng, s.rows) for s in sites}
        budget = {"bitops": float(rng.integers(31 * 2 * 8, 31 * 6 * 8))}
        bits = allocate_bits(sites, cost, Budget(**budget))
        assert exceeded(sites, bits, budget) == [], f"seed {seed}"
        assert spent(sites, bits)["bitops"] > budget["bitops"] - 8 * 7  # a group of 16 of 60 rows has 1.9 MACs


def test_every_unmet_limit_is_named() -> None:
    sites = model(linear("a", 64))
    with pytest.raises(ValueError, match=r"mean_weight_bits=1.5 .* smallest is 2.0; bitops=3 .* smallest is \d+") as e:
        allocate_bits(sites, {"a": np.ones(7)}, Budget(1.5, size_mb=1.0, bitops=3))
    assert "size_mb" not in str(e.value)


def test_a_size_without_room_for_row_orders_keeps_layers_whole() -> None:
    rng = np.random.default_rng(0)
    sites = model(linear("a", 256, 8), linear("b", 256, 8))  # 256 bytes a bit and layer; 512 bytes of row orders
    cost = {"a": decaying(rng, 256), "b": decaying(rng, 256)}
    narrowest = BitAllocation.uniform(sites, 2).weight_bytes(sites)
    for spare, widths in ((255, [2, 2]), (256, [2, 3]), (511, [2, 3])):
        size = (narrowest + spare) / 10**6
        bits = allocate_bits(sites, cost, Budget(size_mb=size))
        assert sorted(bits.sites[name].weight.mean_bits for name in "ab") == widths
        assert exceeded(sites, bits, {"size_mb": size}) == []
    size = (narrowest + 700) / 10**6
    bits = allocate_bits(sites, cost, Budget(size_mb=size))
    assert any(bits.sites[name].weight.order_bytes for name in "ab")
    assert exceeded(sites, bits, {"size_mb": size}) == []


def test_a_size_in_megabytes_is_the_decimal_that_was_typed() -> None:
    # The bytes of a uniform width, divided by a million, are seldom a float: they must still be enough.
    for rows in range(1, 200, 9):
        sites = model(linear("a", rows, 31), linear("b", 20, rows))
        for bits in (2, 5):
            size = BitAllocation.uniform(sites, bits).weight_bytes(sites) / 10**6
            got = allocate_bits(
                sites, {"a": [3, 1], "b": [3, 1]}, Budget(size_mb=size), candidates=(bits, 8), granularity="layer"
            )
            assert got.sites == BitAllocation.uniform(sites, bits).sites


# Bad input


A, B = linear("a", 10), linear("b", 20)
GOOD = {"a": np.ones(7), "b": np.ones((20, 7))}


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({"a": GOOD["a"]}, r"cost must have every linear of the blocks, got none for b"),
        ({**GOOD, "x": GOOD["a"]}, r"cost must name sites of the model, got \['x'\]"),
        ({**GOOD, "a": np.ones(6)}, r"cost\['a'\] must have shape \(10, 7\) or \(1, 7\) or \(7,\), got \(6,\)"),
        ({**GOOD, "b": np.ones((7, 20))}, r"cost\['b'\] must have shape \(20, 7\) or .*, got \(7, 20\)"),
        ({**GOOD, "b": np.ones((1, 20, 7))}, r"cost\['b'\] must have shape .*, got \(1, 20, 7\)"),
        ({**GOOD, "a": [1, 2, 3, 4, 5, 6, np.nan]}, r"cost\['a'\] must be finite and not negative, got nan"),
        ({**GOOD, "a": [np.inf, 2, 3, 4, 5, 6, 7]}, r"cost\['a'\] must be finite and not negative, got inf"),
        ({**GOOD, "a": [1, 2, 3, -0.5, 5, 6, 7]}, r"cost\['a'\] must be finite and not negative, got -0.5"),
        ({**GOOD, "a": [1e305] * 7}, r"cost\['a'\] must be finite and not negative, got 1e\+305"),
        ({**GOOD, "a": ["x"] * 7}, r"cost\['a'\] must be numbers of shape .*, got .*'x'"),
        ({**GOOD, "b": [[1, 2], [3]]}, r"cost\['b'\] must be numbers of shape"),
    ],
    ids=["missing", "unknown", "short", "transposed", "3d", "nan", "inf", "negative", "huge", "text", "ragged"],
)
def test_a_bad_cost_is_named(cost: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_bits(model(A, B), cost, Budget(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation_bits": 9}, "activation_bits must be an integer in 2..8, got 9"),
        ({"boundary_bits": 1}, "boundary_bits must be an integer in 2..8, got 1"),
        ({"candidates": ()}, r"candidates must be distinct widths, ascending, got \(\)"),
        ({"candidates": (4, 3)}, r"candidates must be distinct widths, ascending, got \(4, 3\)"),
        ({"candidates": (3, 3)}, r"candidates must be distinct widths, ascending, got \(3, 3\)"),
        ({"candidates": (3, 16)}, "candidates must be an integer in 2..8, got 16"),
        ({"granularity": "row"}, r"granularity must be one of \('rows', 'layer'\), got 'row'"),
        ({"group_rows": 0}, "group_rows must divide 256, got 0"),
        ({"group_rows": 48}, "group_rows must divide 256, got 48"),
        ({"group_rows": 512}, "group_rows must divide 256, got 512"),
        ({"time_limit_s": 0.0}, "time_limit_s must be positive, got 0.0"),
        ({"time_limit_s": math.nan}, "time_limit_s must be positive, got nan"),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_bits(model(A, B), GOOD, Budget(4), **arguments)


def test_sites_must_be_distinct_and_include_a_linear_of_a_block() -> None:
    with pytest.raises(ValueError, match="sites must have distinct names, got 'a' more than once"):
        allocate_bits(model(A, B, A), GOOD, Budget(4))
    with pytest.raises(ValueError, match="sites must include a linear of a transformer block, got"):
        allocate_bits(model(), {}, Budget(4))


# Costs of scores


def test_relevance_costs_are_flow_to_the_exponent_times_error() -> None:
    sites = model(linear("a", 2), linear("b", 3))
    flow = {"a": [4.0, -9.0], "b": (0.0, 1.0, 2.0), "head": [1.0] * 10}
    errors = {"a": np.array([[0.5, 0.25], [2.0, 1.0]]), "b": [1.0, 0.125]}
    costs = relevance_costs(sites, flow, errors, candidates=(3, 4))
    assert sorted(costs) == ["a", "b"]
    assert costs["a"].tolist() == [[2.0, 1.0], [18.0, 9.0]]
    assert costs["b"].tolist() == [[0.0, 0.0], [1.0, 0.125], [2.0, 0.25]]
    assert relevance_costs(sites, flow, errors, exponent=0.5, candidates=(3, 4))["a"].tolist() == [[1, 0.5], [6, 3]]
    assert relevance_costs(sites, flow, errors, exponent=0, candidates=(3, 4))["b"].tolist() == [[1, 0.125]] * 3
    assert relevance_costs(sites, flow, candidates=(2, 3))["a"].tolist() == [[1 / 4, 1 / 16], [9 / 16, 9 / 64]]


def test_layer_costs_are_score_to_the_exponent_times_mean_error() -> None:
    sites = model(linear("a", 2), linear("b", 3))
    scores = {"a": -4.0, "b": 2.0}
    errors = {"a": np.array([[0.5, 0.25], [1.5, 0.75]]), "b": np.array([1.0, 0.125])}
    costs = layer_costs(sites, scores, errors, candidates=(3, 4))
    assert {name: cost.tolist() for name, cost in costs.items()} == {"a": [4.0, 2.0], "b": [2.0, 0.25]}
    assert layer_costs(sites, scores, errors, exponent=0.5, candidates=(3, 4))["a"].tolist() == [2.0, 1.0]
    assert layer_costs(sites, scores, candidates=(2, 4))["b"].tolist() == [2 / 16, 2 / 256]


def test_costs_of_scores_are_what_allocation_takes() -> None:
    rng = np.random.default_rng(0)
    linears = [linear(f"l{i}", 64) for i in range(4)]
    flow = {s.name: np.exp(2 * rng.standard_normal(64)) for s in linears}
    sites = model(*linears)
    rows = allocate_bits(sites, relevance_costs(sites, flow), Budget(3.5))
    totals = {name: float(f.sum()) for name, f in flow.items()}
    layers = allocate_bits(sites, layer_costs(sites, totals), Budget(3.5), granularity="layer")
    # 4^-bits a row: the same totals, but rows can be told apart.
    assert rows.solver["objective"] < 0.9 * layers.solver["objective"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: relevance_costs(s, {}), "row_flow must have every linear of the blocks, got none for a"),
        (lambda s: relevance_costs(s, {"a": [1.0]}), r"row_flow\['a'\] must have shape \(2,\), got \(1,\)"),
        (lambda s: relevance_costs(s, {"a": [1, np.nan]}), r"row_flow\['a'\] must be finite, got nan"),
        (lambda s: relevance_costs(s, {"a": [1, 2]}, {}), "errors must have every linear of the blocks, got none"),
        (
            lambda s: relevance_costs(s, {"a": [1, 2]}, {"a": -np.ones(7)}),
            r"errors\['a'\] must be .*negative, got -1.0",
        ),
        (lambda s: relevance_costs(s, {"a": [1, 2]}, {"a": np.ones((3, 7))}), r"errors\['a'\] .* got \(3, 7\)"),
        (lambda s: relevance_costs(s, {"a": [1, 2]}, exponent=-1), "exponent must be finite and not negative, got -1"),
        (lambda s: relevance_costs(s, {"a": [1, 2]}, candidates=(1,)), "candidates must be an integer in 2..8, got 1"),
        (lambda s: layer_costs(s, {}), "scores must have every linear of the blocks, got none for a"),
        (lambda s: layer_costs(s, {"a": [1.0, 2.0]}), r"scores\['a'\] must have shape \(\), got \(2,\)"),
        (lambda s: layer_costs(s, {"a": np.inf}), r"scores\['a'\] must be finite, got inf"),
        (lambda s: layer_costs(s, {"a": 1.0}, exponent=np.nan), "exponent must be finite and not negative, got nan"),
    ],
)
def test_bad_scores_are_named(call: Callable[[list[Site]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model(linear("a", 2)))
