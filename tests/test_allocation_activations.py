"""Widths of activations, pair terms and kernel times in an allocation, against brute force over every site's widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vitq_kernels.allocation import allocate_bits
from vitq_kernels.latency import KernelTime, KernelTimes
from vitq_kernels.spec import BitAllocation, Budget, RowGroups, Site

TOKENS, BOUNDARY = 5, 7
LINEARS = [Site(name, kind, r, c, TOKENS * r * c) for name, kind, r, c in (("a", "qkv", 12, 9), ("b", "fc1", 20, 7))]
MATMULS = [Site("qk", "qk", 0, 0, 1001), Site("av", "av", 0, 0, 703)]
SITES = [
    Site("patch_embed.proj", "patch_embed", 4, 6, 3 * 24),
    *LINEARS,
    *MATMULS,
    Site("head", "head", 5, 12, 60),
]
BLOCK = [*LINEARS, *MATMULS]
WIDTHS, ACTIVATIONS = (2, 3, 5), (4, 6, 8)
Widths = dict[str, tuple[int | None, int]]  # (weight, activation) by site


def falling(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.exp(rng.standard_normal()) * np.cumprod(rng.uniform(0.1, 0.9, count))


def measured(seed: int) -> KernelTimes:
    """A time for every site and pair of widths, not monotone in the widths."""
    rng, rows = np.random.default_rng(seed), []
    for site in SITES:
        for weight in range(2, 9) if site.has_weight else (None,):
            for activation in range(2, 9):
                us = round(rng.uniform(1, 2) * ((weight or 4) + activation), 3)
                rows.append(KernelTime(us, activation, weight, site=site.name))
    return KernelTimes(tuple(rows))


def used(widths: Widths, times: KernelTimes) -> dict[str, Fraction]:
    """What widths use, by definition."""
    every = {**widths, "patch_embed.proj": (BOUNDARY, BOUNDARY), "head": (BOUNDARY, BOUNDARY)}
    of = {site.name: site for site in SITES}
    weights, macs = sum(s.rows * s.cols for s in LINEARS), sum(s.macs for s in BLOCK)
    return {
        "mean_weight_bits": Fraction(sum(s.rows * s.cols * widths[s.name][0] for s in LINEARS), weights),
        "size_mb": Fraction(
            sum(math.ceil(Fraction(of[n].rows * of[n].cols * w, 8)) for n, (w, _) in every.items() if w), 10**6
        ),
        "bitops": Fraction(sum(of[n].macs * (w or a) * a for n, (w, a) in every.items())),
        "mean_activation_bits": Fraction(sum(s.macs * widths[s.name][1] for s in BLOCK), macs),
        "latency_ms": sum(times.us(of[n], w, a) for n, (w, a) in every.items()) / 1000,
    }


def combinations(mode: str) -> Iterator[Widths]:
    """All widths that a mode allows."""
    per_site = {
        "fixed": lambda s: [(w, 6) for w in WIDTHS] if s.has_weight else [(None, 6)],
        "tied": lambda s: [(w if s.has_weight else None, w) for w in WIDTHS],
        "separate": lambda s: list(itertools.product(WIDTHS if s.has_weight else (None,), ACTIVATIONS)),
    }[mode]
    for picked in itertools.product(*(per_site(site) for site in BLOCK)):
        yield dict(zip((s.name for s in BLOCK), picked, strict=True))


def costs(mode: str, seed: int) -> dict[str, Any]:
    """Arguments of allocate_bits for a mode."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {"cost": {s.name: falling(rng, len(WIDTHS)) for s in LINEARS}, "activation_bits": 6}
    if mode != "fixed":
        found["activation_cost"] = {s.name: falling(rng, 3) for s in BLOCK}
        found |= {"tied": True} if mode == "tied" else {"activation_candidates": ACTIVATIONS}
    return found


def cost_of(widths: Widths, given: Mapping[str, Any], interactions: Mapping[tuple[str, str], np.ndarray]) -> float:
    activations = WIDTHS if given.get("tied") else ACTIVATIONS
    total = sum(given["cost"][s.name][WIDTHS.index(widths[s.name][0])] for s in LINEARS)
    for name, values in given.get("activation_cost", {}).items():
        total += values[activations.index(widths[name][1])]
    for (a, b), table in interactions.items():
        total += table[tuple(WIDTHS.index(widths[n][0] or widths[n][1]) for n in (a, b))]
    return float(total)


def read(allocation: BitAllocation) -> Widths:
    bits = {s.name: allocation.sites[s.name] for s in BLOCK}
    assert all(b.weight is None or len(set(b.weight.bits)) == 1 for b in bits.values())
    return {name: (b.weight.bits[0] if b.weight else None, b.activation) for name, b in bits.items()}


def check(mode: str, kinds: Sequence[str], seed: int, with_pairs: bool = False) -> None:
    rng = np.random.default_rng(1000 + seed)
    given, times, everything = costs(mode, seed), measured(seed), list(combinations(mode))
    spent = [used(widths, times) for widths in everything]
    inner = rng.choice(len(everything))  # limits that at least one choice meets together
    budget = {kind: float(spent[inner][kind]) * rng.uniform(1, 1.1) for kind in kinds}
    interactions = {}
    if with_pairs:
        names = [s.name for s in (LINEARS if mode == "fixed" else BLOCK)]
        interactions = {pair: 0.3 * rng.standard_normal((3, 3)) for pair in itertools.combinations(names, 2)}
    found = allocate_bits(
        SITES,
        budget=Budget(**budget),
        candidates=WIDTHS,
        boundary_bits=BOUNDARY,
        granularity="layer",
        times=times,
        interactions=interactions,
        **given,
    )
    fits = [
        cost_of(widths, given, interactions)
        for widths, use in zip(everything, spent, strict=True)
        if all(use[kind] <= Fraction(str(budget[kind])) for kind in kinds)
    ]
    widths = read(found)
    assert widths in everything, f"seed {seed}"
    assert cost_of(widths, given, interactions) == pytest.approx(min(fits), rel=1e-9), f"seed {seed}"
    assert found.solver["objective"] == pytest.approx(min(fits), rel=1e-9), f"seed {seed}"
    for kind in kinds:
        assert used(widths, times)[kind] <= Fraction(str(budget[kind])), f"seed {seed}: {kind}"
    assert found.solver["status"] == "optimal"


KINDS = {
    "weight-bits": ["mean_weight_bits"],
    "activation-bits": ["mean_activation_bits"],
    "bitops": ["bitops"],
    "latency": ["latency_ms"],
    "bits": ["mean_weight_bits", "mean_activation_bits"],
    "size+bitops": ["size_mb", "bitops"],
    "latency+bits": ["latency_ms", "mean_weight_bits", "mean_activation_bits"],
    "all": ["mean_weight_bits", "size_mb", "bitops", "mean_activation_bits", "latency_ms"],
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mode", ["fixed", "tied", "separate"])
def test_the_least_cost_that_brute_force_finds(mode: str, kinds: list[str]) -> None:
    for seed in range(4):
        check(mode, kinds, seed)


@pytest.mark.parametrize("kinds", [KINDS["weight-bits"], KINDS["latency+bits"]], ids=["weight-bits", "latency+bits"])
@pytest.mark.parametrize("mode", ["fixed", "tied"])
def test_the_least_cost_with_pair_terms(mode: str, kinds: list[str]) -> None:
    for seed in range(4):
        check(mode, kinds, seed, with_pairs=True)


def allocated(mode: str, budget: Budget, seed: int = 0, **arguments: Any) -> BitAllocation:
    given = {"candidates": WIDTHS, "boundary_bits": BOUNDARY, "granularity": "layer"} | costs(mode, seed) | arguments
    return allocate_bits(SITES, budget=budget, **given)


def test_greedy_holds_the_budget_and_is_never_better() -> None:
    some = used({s.name: (4 if s.has_weight else None, 6) for s in BLOCK}, measured(0))["bitops"]
    budget = Budget(mean_weight_bits=3.2, bitops=float(some))
    for seed, mode in itertools.product(range(8), ("fixed", "tied", "separate")):
        exact, found = (allocated(mode, budget, seed, search=search) for search in ("exact", "greedy"))
        assert found.solver["objective"] >= exact.solver["objective"] * (1 - 1e-12)
        spent = used(read(found), measured(0))
        assert all(spent[kind] <= Fraction(str(value)) for kind, value in budget.given.items())
        assert found.solver["status"] == "greedy"


@pytest.mark.parametrize("mode", ["tied", "separate"])
def test_a_budget_beyond_the_widest_gives_the_widest(mode: str) -> None:
    widths = read(allocated(mode, Budget(mean_weight_bits=8, mean_activation_bits=8)))
    top = 5 if mode == "tied" else 8
    assert widths == {s.name: (5 if s.has_weight else None, top) for s in BLOCK}


def test_activations_of_rows_that_are_cut_into_groups() -> None:
    """Where no limit couples them, activation widths are chosen beside row groups, as if each were alone."""
    rng = np.random.default_rng(0)
    sites = [Site("a", "fc1", 128, 16, 9 * 128 * 16), Site("b", "fc2", 128, 16, 9 * 128 * 16)]
    rows = {s.name: np.exp(2 * rng.standard_normal((128, 1))) * 4.0 ** -np.arange(2, 9) for s in sites}
    noise = {s.name: falling(rng, 7) for s in sites}
    both = allocate_bits(sites, rows, Budget(3.5, mean_activation_bits=5), activation_cost=noise)
    alone = allocate_bits(sites, rows, Budget(3.5))
    assert [both.sites[n].weight for n in "ab"] == [alone.sites[n].weight for n in "ab"]
    assert len(set(both.sites["a"].weight.bits)) > 1
    best = min(
        (noise["a"][i - 2] + noise["b"][j - 2], (i, j))
        for i, j in itertools.product(range(2, 9), repeat=2)
        if i + j <= 10
    )
    assert tuple(both.sites[n].activation for n in "ab") == best[1]


def test_a_group_of_rows_takes_its_share_of_the_layers_time() -> None:
    rng = np.random.default_rng(0)
    site = Site("a", "fc1", 96, 16, 96 * 16)
    times = KernelTimes(tuple(KernelTime(10.0 + 3 * b, 8, b, site="a") for b in range(2, 9)))
    cost = {"a": np.exp(2 * rng.standard_normal((96, 1))) * 4.0 ** -np.arange(2, 9)}
    found = allocate_bits([site], cost, Budget(latency_ms=0.0225), times=times, group_rows=32)
    bits = found.sites["a"].weight.row_bits()
    assert len(set(bits)) > 1
    us = sum(Fraction(10 + 3 * b, 96) for b in bits)
    assert us <= Fraction("22.5") < us + 1  # a group of 32 rows takes 1 us more a bit


def test_what_a_move_costs_is_what_it_costs() -> None:
    for mode, seed in itertools.product(("fixed", "tied", "separate"), range(4)):
        rng = np.random.default_rng(seed)
        tables = {("a", "b"): rng.standard_normal((3, 3))} if mode != "separate" else {}
        given = costs(mode, seed)
        found = allocated(mode, Budget(mean_weight_bits=3.4), seed, interactions=tables)
        now = read(found)
        moves = found.solver["moves"]
        assert set(moves) == {s.name for s in (LINEARS if mode == "fixed" else BLOCK)}
        for site in LINEARS if mode == "fixed" else BLOCK:
            expected = {}
            for label, step in (("narrower", -1), ("wider", 1)):
                for of_weight in (True, False):
                    weight, activation = now[site.name]
                    if mode == "tied":
                        changed, prefix = _step(WIDTHS, activation, step), ""
                        there = (changed if site.has_weight else None, changed)
                    elif of_weight:
                        if not site.has_weight:
                            continue
                        changed, prefix = _step(WIDTHS, weight, step), ""
                        there = (changed, activation)
                    else:
                        if mode == "fixed":
                            continue
                        changed = _step(ACTIVATIONS, activation, step)
                        there, prefix = (weight, changed), "activation " if site.has_weight else ""
                    if changed is not None:
                        change = cost_of({**now, site.name: there}, given, tables) - cost_of(now, given, tables)
                        expected[prefix + label] = change
            assert moves[site.name] == pytest.approx(expected, rel=1e-6, abs=1e-12), f"{mode} {seed} {site.name}"


def _step(widths: Sequence[int], now: int, step: int) -> int | None:
    place = widths.index(now) + step
    return widths[place] if 0 <= place < len(widths) else None


def test_moves_of_row_groups_are_those_of_all_groups_together() -> None:
    rng = np.random.default_rng(0)
    site = Site("a", "fc1", 96, 16, 96 * 16)
    table = np.exp(2 * rng.standard_normal((96, 1))) * 4.0 ** -np.arange(2, 9)
    found = allocate_bits([site], {"a": table}, Budget(4), group_rows=32)
    bits = np.array(found.sites["a"].weight.row_bits())
    rows = np.arange(96)
    assert len(set(bits)) > 1
    now = table[rows, bits - 2].sum()
    for label, there in (("narrower", np.maximum(bits - 1, 2)), ("wider", np.minimum(bits + 1, 8))):
        assert found.solver["moves"]["a"][label] == pytest.approx(table[rows, there - 2].sum() - now)


def test_the_price_of_a_limit_is_what_more_of_it_saves() -> None:
    """Many items: then what one more unit saves is nearly what the relaxation says."""
    rng = np.random.default_rng(0)
    sites = [Site(f"l{i:03}", "fc1", 16, 16, 16 * 16 * 9) for i in range(200)]
    cost = {s.name: np.exp(rng.standard_normal()) * 4.0 ** -np.arange(2, 9) for s in sites}
    low, high = (allocate_bits(sites, cost, Budget(mean), granularity="layer") for mean in (3.95, 4.05))
    slope = (low.solver["objective"] - high.solver["objective"]) / 0.1
    price = allocate_bits(sites, cost, Budget(4.0), granularity="layer").solver["prices"]["mean_weight_bits"]
    assert price == pytest.approx(slope, rel=0.05)
    size = allocate_bits(sites, cost, Budget(size_mb=4 * 200 * 32 / 1e6), granularity="layer").solver["prices"][
        "size_mb"
    ]
    assert size == pytest.approx(price * 1e6 / (200 * 32), rel=0.05)  # a bit more on all is 6400 bytes
    assert allocate_bits(sites, cost, Budget(9.0)).solver["prices"] == {"mean_weight_bits": 0.0}


def test_the_result_says_what_was_chosen_and_survives_json() -> None:
    found = allocated("separate", Budget(mean_weight_bits=3, bitops=1e5))
    assert BitAllocation.from_json(found.to_json()) == found
    assert (found.solver["activation_candidates"], found.solver["tied"]) == (list(ACTIVATIONS), False)
    assert found.solver["budget"] == {"mean_weight_bits": 3, "bitops": 1e5}
    assert "tied" not in allocated("fixed", Budget(3)).solver
    assert found.sites["head"].weight == RowGroups.uniform(5, BOUNDARY)
    assert found.sites["head"].activation == BOUNDARY


@pytest.mark.parametrize(
    ("kind", "smallest"), [("mean_activation_bits", 4), ("latency_ms", None)], ids=["activation-bits", "latency"]
)
def test_an_infeasible_budget_names_the_smallest(kind: str, smallest: float | None) -> None:
    times = measured(0)
    least = min(used(widths, times)[kind] for widths in combinations("separate"))
    assert smallest is None or least == smallest
    value = float(least) * 0.99
    with pytest.raises(ValueError, match=rf"^{kind}={value} cannot be met: the smallest is ") as raised:
        allocated("separate", Budget(**{kind: value}), times=times)
    named = str(raised.value).rsplit(" ", 1)[1]
    assert least <= Fraction(named) < least * (1 + Fraction(1, 10**12))
    assert allocated("separate", Budget(**{kind: float(named)}), times=times).solver["status"] == "optimal"


def test_limits_that_cannot_be_met_together_are_refused() -> None:
    """The fastest widths are the widest here."""
    times = KernelTimes(tuple(KernelTime(20.0 - b, 8, b, site="a") for b in range(2, 9)))
    site = Site("a", "fc1", 8, 8, 64)
    arguments = {"times": times, "granularity": "layer"}
    cost = {"a": 4.0 ** -np.arange(2, 9)}
    assert allocate_bits([site], cost, Budget(latency_ms=0.012), **arguments).sites["a"].weight.bits == (8,)
    assert allocate_bits([site], cost, Budget(4, latency_ms=0.016), **arguments).sites["a"].weight.bits == (4,)
    with pytest.raises(ValueError, match="no widths were found that meet all together"):
        allocate_bits([site], cost, Budget(4, latency_ms=0.013), **arguments)


@pytest.mark.parametrize(
    ("mode", "arguments", "message"),
    [
        ("fixed", {"tied": True}, "tied and activation_candidates need activation_cost, got none"),
        ("fixed", {"activation_candidates": (4,)}, "tied and activation_candidates need activation_cost, got none"),
        ("tied", {"activation_candidates": (4, 8)}, r"one list of candidates, got \(2, 3, 5\) and \(4, 8\)"),
        ("tied", {"granularity": "rows"}, 'granularity must be "layer" where a width is tied to its activations'),
        ("separate", {"granularity": "rows", "budget": Budget(bitops=1e6)}, "chosen with its activations under bitops"),
        ("separate", {"activation_candidates": (8, 4, 6)}, "activation_candidates must be distinct widths, ascending"),
        ("separate", {"activation_cost": {"a": [1, 1, 1]}}, "activation_cost must have every .* none for av"),
        ("separate", {"interactions": {("a", "b"): np.zeros((3, 3))}}, "interactions need .* fixed or tied"),
        ("fixed", {"interactions": {("a", "qk"): np.zeros((3, 3))}}, r"widths are chosen, got \('a', 'qk'"),
        ("fixed", {"interactions": {("a", "a"): np.zeros((3, 3))}}, r"widths are chosen, got \('a', 'a'"),
        ("fixed", {"interactions": {("a", "b"): np.zeros((2, 3))}}, r"finite numbers of shape \(3, 3\), got \(2, 3\)"),
        ("fixed", {"interactions": {("a", "b"): np.full((3, 3), np.nan)}}, r"must be finite numbers of shape \(3, 3\)"),
        ("fixed", {"interactions": {("a", "b"): np.zeros((3, 3))}, "search": "greedy"}, 'interactions need .*"exact"'),
        ("fixed", {"search": "best"}, r"search must be one of \('exact', 'greedy'\), got 'best'"),
        ("fixed", {"budget": Budget(latency_ms=1)}, "latency_ms needs kernel times, got none"),
        (
            "fixed",
            {"budget": Budget(latency_ms=1), "times": KernelTimes(())},
            r'kernel times have none for site patch_embed.proj: \{"kind": "linear", "rows": 4',
        ),
    ],
)
def test_a_bad_argument_is_named(mode: str, arguments: dict[str, Any], message: str) -> None:
    budget = arguments.pop("budget", Budget(3))
    with pytest.raises(ValueError, match=message):
        allocated(mode, budget, **arguments)
