"""The vocabulary: sizes by independent arithmetic, JSON round trips, and errors that say what is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vitq_kernels.spec import (
    MAX_BITS,
    MIN_BITS,
    BitAllocation,
    Budget,
    QuantFormat,
    RowGroups,
    Site,
    SiteBits,
    check_bits,
    groups_from_dict,
    groups_to_dict,
)

SITES = (
    Site("patch_embed.proj", "patch_embed", 24, 12, 9 * 24 * 12),
    Site("blocks.0.attn.qkv", "qkv", 300, 24, 10 * 300 * 24),
    Site("blocks.0.attn.qk", "qk", 0, 0, 10 * 10 * 24),
    Site("blocks.0.attn.av", "av", 0, 0, 10 * 10 * 24),
    Site("blocks.0.mlp.fc2", "fc2", 24, 7, 10 * 24 * 7),
    Site("head", "head", 10, 24, 240),
)


def reversed_tiles(rows: int) -> tuple[int, ...]:
    """Each tile's rows backwards."""
    return tuple(row for tile in range(0, rows, 256) for row in reversed(range(tile, min(tile + 256, rows))))


def mixed(rows: int = 300) -> RowGroups:
    """Groups of 64 rows, four of them and a short one in the second tile, in reversed order."""
    return RowGroups(rows, (8, 5, 5, 2, 3), 64, reversed_tiles(rows))


def allocation(**weights: RowGroups) -> BitAllocation:
    """Four bits everywhere but for the given weights, by the last part of the site's name."""
    sites = dict(BitAllocation.uniform(SITES, 4, activation_bits=6).sites)
    for name, site_bits in list(sites.items()):
        if (last := name.rsplit(".", 1)[-1]) in weights:
            sites[name] = SiteBits(site_bits.activation, weights[last])
    return BitAllocation(sites, {"objective": 1.5})


# Widths and formats


@pytest.mark.parametrize("bits", range(MIN_BITS, MAX_BITS + 1))
def test_format_covers_twos_complement(bits: int) -> None:
    assert (QuantFormat(bits).qmin, QuantFormat(bits).qmax) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert check_bits(bits, "x") == bits


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", None, True, np.int64(4)], ids=repr)
def test_bits_outside_2_to_8_are_named(bits: Any) -> None:
    for call, name in (
        (lambda: check_bits(bits, "weight_bits"), "weight_bits"),
        (lambda: QuantFormat(bits), "QuantFormat.bits"),
        (lambda: RowGroups(10, (bits,)), "RowGroups.bits"),
        (lambda: SiteBits(bits), "SiteBits.activation"),
        (lambda: BitAllocation.uniform(SITES, bits), "weight_bits"),
        (lambda: BitAllocation.uniform(SITES, 4, bits), "activation_bits"),
        (lambda: BitAllocation.uniform(SITES, 4, 4, bits), "boundary_bits"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be an integer in 2..8, got {re.escape(repr(bits))}$"):
            call()


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (lambda: Site("a", "mlp", 1, 1, 1), r"Site.kind must be one of \('patch_embed', .*'head'\), got 'mlp'"),
        (lambda: Site("a", "fc1", -1, 0, 1), "Site a: rows and cols must be both positive or both 0.*rows=-1, cols=0"),
        (lambda: Site("a", "fc1", 4, 0, 1), "Site a: rows and cols must be .*got rows=4, cols=0, macs=1"),
        (lambda: Site("a", "fc1", 4, -3, 1), "Site a: rows and cols must be .*got rows=4, cols=-3, macs=1"),
        (lambda: Site("a", "qk", 0, 3, 1), "Site a: rows and cols must be .*got rows=0, cols=3, macs=1"),
        (lambda: Site("a", "fc1", 4, 3, -1), "Site a: .*macs not negative, got rows=4, cols=3, macs=-1"),
    ],
    ids=["kind", "negative rows", "no cols", "negative cols", "cols alone", "macs"],
)
def test_a_bad_site_is_named(site: Callable[[], Site], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        site()


def test_which_sites_have_weights_and_are_in_blocks() -> None:
    assert [site.has_weight for site in SITES] == [True, True, False, False, True, True]
    assert [site.in_block for site in SITES] == [False, True, True, True, True, False]


# Row groups


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowGroups(0, ()), "RowGroups.rows must be positive, got 0"),
        (lambda: RowGroups.uniform(-1, 4), "RowGroups.rows must be positive, got -1"),
        (lambda: RowGroups(10, (4,), 0), "RowGroups.group_rows must divide 256, got 0"),
        (lambda: RowGroups(10, (4,), 48), "RowGroups.group_rows must divide 256, got 48"),
        (lambda: RowGroups(10, (4,), 512), "RowGroups.group_rows must divide 256, got 512"),
        (lambda: RowGroups(10, (4, 4)), "RowGroups.bits must have 1 widths for 10 rows in groups of 256, got 2"),
        (lambda: RowGroups(257, (4,)), "RowGroups.bits must have 2 widths for 257 rows in groups of 256, got 1"),
        (lambda: RowGroups(300, (4,) * 4, 64), "must have 5 widths for 300 rows in groups of 64, got 4"),
        (lambda: RowGroups(4, (4,), 256, (0, 1, 2)), r"order must permute the 4 rows .* tile 0..3 does not"),
        (lambda: RowGroups(4, (4,), 256, (0, 1, 2, 3, 4)), r"order must permute the 4 rows .* tile 0..3 does not"),
        (lambda: RowGroups(4, (4,), 256, (0, 1, 1, 3)), r"order must permute the 4 rows .* tile 0..3 does not"),
        (
            lambda: RowGroups(258, (4, 4), 256, (*range(255), 256, 255, 257)),
            r"order must permute the 258 rows inside tiles of 256; tile 0..255 does not",
        ),
        (lambda: RowGroups(258, (4, 4), 256, (*range(256), 256, 256)), r"tile 256..257 does not"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_bad_row_groups_are_named(make: Callable[[], RowGroups], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rows", [1, 10, 72, 255, 256, 257, 300, 512, 1000])
@pytest.mark.parametrize("group_rows", [16, 64, 256])
def test_groups_cover_the_rows_tile_after_tile(rows: int, group_rows: int) -> None:
    spans = [
        (start, min(start + group_rows, rows, tile + 256))
        for tile in range(0, rows, 256)
        for start in range(tile, min(tile + 256, rows), group_rows)
    ]
    bits = [2 + i % 7 for i in range(len(spans))]
    groups = RowGroups(rows, tuple(bits), group_rows)
    assert list(groups.groups()) == [(start, stop, b) for (start, stop), b in zip(spans, bits, strict=True)]
    assert [b for start, stop, b in groups.groups() for _ in range(start, stop)] == groups.row_bits()
    assert Fraction(sum(groups.row_bits()), rows) == Fraction(groups.mean_bits).limit_denominator(rows)


@pytest.mark.parametrize("cols", [1, 3, 7, 24, 768])
@pytest.mark.parametrize("rows", [1, 10, 72, 300, 1000])
def test_weight_bytes_are_the_bits_of_each_group_in_whole_bytes(rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows)
    count = len(range(0, rows, 16)) if rows <= 256 else sum(-(-min(256, rows - t) // 16) for t in range(0, rows, 256))
    groups = RowGroups(rows, tuple(rng.integers(2, 9, count).tolist()), 16)
    expected = 0
    for start, stop, bits in groups.groups():
        group_bits = (stop - start) * cols * bits
        expected += group_bits // 8 + (1 if group_bits % 8 else 0)
    assert groups.weight_bytes(cols) == expected
    assert groups.weight_bytes(cols) >= sum(groups.row_bits()) * cols / 8


def test_order_bytes_are_a_byte_a_row_of_mixed_tiles() -> None:
    rows = 256 + 256 + 88
    one, two = (4, 4, 4, 4), (4, 5, 4, 4)
    assert RowGroups(rows, (*one, *one, 4, 4), 64).order_bytes == 0
    assert RowGroups(rows, (*one, *two, 4, 4), 64).order_bytes == 256
    assert RowGroups(rows, (*one, *one, 4, 3), 64).order_bytes == 88
    assert RowGroups(rows, (*two, *two, 4, 3), 64).order_bytes == 600
    assert RowGroups(rows, (2, 3, 4)).order_bytes == 0  # each tile has its own width: nothing to reorder
    assert list(RowGroups(rows, (*one, *two, 4, 3), 64).mixed_tiles()) == [(256, 512), (512, 600)]


def test_row_bits_undo_the_order() -> None:
    groups = mixed()
    stored = [8] * 64 + [5] * 128 + [2] * 64 + [3] * 44
    assert groups.row_bits() == stored[:256][::-1] + [3] * 44
    rng = np.random.default_rng(0)
    order = tuple(rng.permutation(70).tolist())
    bits = RowGroups(70, (2, 3, 4, 5, 6), 16, order).row_bits()
    assert [bits[row] for row in order] == [b for b in (2, 3, 4, 5) for _ in range(16)] + [6] * 6


def test_the_models_order_is_no_order() -> None:
    assert RowGroups(300, (4, 4), 256, tuple(range(300))).order is None
    assert RowGroups(300, (4, 4), 256, tuple(range(300))) == RowGroups.uniform(300, 4)


def test_a_tile_of_one_width_has_no_order_of_its_own() -> None:
    assert RowGroups(300, (4, 5), 256, reversed_tiles(300)).order is None
    both = RowGroups(300, (2, 3, 2, 2, 4), 64, reversed_tiles(300))
    assert both.order == (*range(255, -1, -1), *range(256, 300))


@pytest.mark.parametrize("rows", [1, 256, 257, 1000])
def test_uniform_is_one_group_a_tile(rows: int) -> None:
    groups = RowGroups.uniform(rows, 3)
    assert groups.bits == (3,) * math.ceil(rows / 256)
    assert groups.row_bits() == [3] * rows
    assert (groups.mean_bits, groups.order_bytes) == (3.0, 0)
    assert groups.weight_bytes(7) == math.ceil(rows * 7 * 3 / 8)


@pytest.mark.parametrize("groups", [RowGroups.uniform(300, 3), mixed()], ids=["uniform", "mixed"])
def test_row_groups_survive_json(groups: RowGroups) -> None:
    assert groups_from_dict(json.loads(json.dumps(groups_to_dict(groups)))) == groups


def test_data_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        mixed().bits = (4,)  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        SITES[0].rows = 3  # type: ignore[misc]


# Allocations


def test_uniform_allocation_pins_patch_embedding_and_head() -> None:
    bits = BitAllocation.uniform(SITES, 3, activation_bits=5, boundary_bits=7).sites
    assert bits["patch_embed.proj"] == SiteBits(7, RowGroups.uniform(24, 7))
    assert bits["head"] == SiteBits(7, RowGroups.uniform(10, 7))
    assert bits["blocks.0.attn.qkv"] == SiteBits(5, RowGroups.uniform(300, 3))
    assert bits["blocks.0.attn.av"] == SiteBits(5, None)
    assert list(bits) == [site.name for site in SITES]
    assert BitAllocation.uniform(SITES, 3).sites["head"] == SiteBits(8, RowGroups.uniform(10, 8))


def test_sizes_of_an_allocation() -> None:
    bits = allocation(qkv=mixed())
    qkv = (64 * 8 + 128 * 5 + 64 * 2 + 44 * 3) * 24
    assert bits.weight_bytes(SITES) == 24 * 12 + qkv // 8 + 256 + 24 * 7 * 4 // 8 + 10 * 24
    assert bits.mean_weight_bits(SITES) == (qkv + 24 * 7 * 4) / (300 * 24 + 24 * 7)
    assert BitAllocation.uniform(SITES, 4).mean_weight_bits(SITES) == 4.0
    assert BitAllocation({}).mean_weight_bits(()) == 0.0


def test_mean_weight_bits_rounds_once() -> None:
    # A budget that holds exactly must not be exceeded by rounding: 1/3 of the rows of every layer at 3 bits, mean 7/3.
    for rows in range(3, 256, 3):
        sites = tuple(Site(f"l{i}", "fc1", rows, 7 + i, 1) for i in range(5))
        mean = (rows // 3 * 3 + rows // 3 * 2 * 2) / rows
        groups = RowGroups(rows, (3,) * (rows // 3) + (2,) * (rows // 3 * 2), 1)
        assert BitAllocation({s.name: SiteBits(8, groups) for s in sites}).mean_weight_bits(sites) == mean


def test_an_allocation_that_fits_passes_the_check() -> None:
    allocation(qkv=mixed()).check(SITES)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (SITES[:-1], r"allocation does not fit the model: unknown sites \['head'\]$"),
        ((*SITES, Site("x", "fc1", 1, 1, 1)), r"allocation does not fit the model: missing sites \['x'\]$"),
        ((SITES[0], *[Site(n, "qk", 0, 0, 1) for n in "wxyz"]), r"unknown sites \[.*\] \.\.\.; missing .* \.\.\.$"),
        ((*SITES[:-1], Site("head", "head", 11, 24, 1)), "allocation of head must have 11 weight rows, got 10"),
        ((*SITES[:-1], Site("head", "qk", 0, 0, 1)), "allocation of head must have 0 weight rows, got 10"),
    ],
    ids=["unknown", "missing", "both", "rows", "no weight"],
)
def test_an_allocation_of_another_model_is_named(sites: tuple[Site, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocation().check(sites)


def test_allocation_survives_json() -> None:
    bits = allocation(qkv=mixed(), fc2=RowGroups.uniform(24, 2))
    again = BitAllocation.from_json(bits.to_json())
    assert again == bits
    assert list(again.sites) == list(bits.sites)
    assert again.solver == {"objective": 1.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a bit allocation: JSONDecodeError"),
        ("{", "not a bit allocation: JSONDecodeError"),
        ("[]", "not a bit allocation: TypeError"),
        ("{}", "not a bit allocation: KeyError: 'sites'"),
        ('{"sites": []}', "not a bit allocation: AttributeError"),
        ('{"sites": {"a": {"activation": 8}}}', "not a bit allocation: KeyError: 'weight'"),
        (
            '{"sites": {"a": {"activation": 9, "weight": null}}}',
            "SiteBits.activation must be an integer in 2..8, got 9",
        ),
        (
            '{"sites": {"a": {"activation": 8, "weight": {"rows": 4, "bits": [4, 4], "group_rows": 256}}}}',
            "RowGroups.bits must have 1 widths for 4 rows in groups of 256, got 2",
        ),
        (
            '{"sites": {"a": {"activation": 8, "weight": {"rows": "4", "bits": [4], "group_rows": 256}}}}',
            "not a bit allocation: TypeError",
        ),
    ],
)
def test_text_that_is_no_allocation_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitAllocation.from_json(text)


def test_allocation_prints_a_line_a_site() -> None:
    lines = str(allocation(qkv=mixed())).splitlines()
    assert len(lines) == 1 + len(SITES)
    assert lines[2].split() == ["blocks.0.attn.qkv", "2b:64", "3b:44", "5b:128", "8b:64", "6"]
    assert lines[3].split() == ["blocks.0.attn.qk", "-", "6"]
    assert lines[5].split() == ["blocks.0.mlp.fc2", "4", "6"]


# Budgets and configuration


def test_a_budget_needs_a_limit() -> None:
    with pytest.raises(ValueError, match=r"Budget needs one of mean_weight_bits, size_mb, .*latency_ms, got none"):
        Budget()
    assert Budget(3).mean_weight_bits == 3
    assert Budget(bitops=1e12, size_mb=2.5) == Budget(None, 2.5, 1e12)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "4", True, 4 + 0j], ids=repr)
@pytest.mark.parametrize("name", ["mean_weight_bits", "size_mb", "bitops", "mean_activation_bits", "latency_ms"])
def test_a_limit_must_be_a_positive_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^Budget.{name} must be a positive number, got {re.escape(repr(value))}$"):
        Budget(**{"mean_weight_bits": 4, name: value})
