"""Kernel times: what is looked up is what was measured, exactly, and what is missing is named."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest

from vitq_kernels.latency import KernelTime, KernelTimes
from vitq_kernels.spec import Site

QKV = Site("blocks.0.attn.qkv", "qkv", 30, 10, 7 * 30 * 10)
FC1 = Site("blocks.0.mlp.fc1", "fc1", 40, 10, 7 * 40 * 10)
QK = Site("blocks.0.attn.qk", "qk", 0, 0, 490)
AV = Site("blocks.0.attn.av", "av", 0, 0, 490)
LINEAR = {"kind": "linear", "rows": 30, "cols": 10, "tokens": 7, "weight_bits": 4, "activation_bits": 8, "us": 1.1}
MISSING = '{"kind": "linear", "rows": %d, "cols": 10, "tokens": 7, "weight_bits": %d, "activation_bits": %d}'
ROWS = [
    LINEAR,
    {**LINEAR, "activation_bits": 4, "us": 0.9, "gpu": "a note"},
    {**LINEAR, "weight_bits": 2, "us": 3},
    {"kind": "qk", "macs": 490, "activation_bits": 8, "us": 2.5},
    {"kind": "av", "macs": 490, "activation_bits": 8, "us": 0},
]


def times(*rows: dict[str, Any], **top: Any) -> KernelTimes:
    return KernelTimes.from_json(json.dumps({"times": rows, **top}))


@pytest.mark.parametrize(
    ("site", "widths", "us"),
    [
        (QKV, (4, 8), "1.1"),
        (QKV, (4, 4), "0.9"),
        (QKV, (2, 8), "3"),
        (QK, (None, 8), "2.5"),
        (AV, (None, 8), "0"),
    ],
)
def test_a_time_is_the_decimal_in_the_file(site: Site, widths: tuple[int | None, int], us: str) -> None:
    assert times(*ROWS).us(site, *widths) == Fraction(us)


def test_a_list_alone_is_a_file_of_batch_one() -> None:
    assert KernelTimes.from_json(json.dumps(ROWS)) == times(*ROWS, batch=1)


def test_times_survive_json() -> None:
    table = times(*ROWS, {"site": FC1.name, "weight_bits": 3, "activation_bits": 8, "us": 7.25}, batch=3)
    assert KernelTimes.from_json(table.to_json()) == table


def test_a_batch_has_its_own_tokens_and_macs() -> None:
    table = times({**LINEAR, "tokens": 28}, {"kind": "qk", "macs": 4 * 490, "activation_bits": 8, "us": 5}, batch=4)
    assert table.us(QKV, 4, 8) == Fraction("1.1")
    assert table.us(QK, None, 8) == 5
    with pytest.raises(ValueError, match='"tokens": 28, "weight_bits": 2, "activation_bits": 8} is missing'):
        table.us(QKV, 2, 8)


def test_a_site_by_name_goes_before_its_shape() -> None:
    named = {"site": QKV.name, "weight_bits": 4, "activation_bits": 8, "us": 9}
    qk = {"site": QK.name, "activation_bits": 8, "us": 0}  # 0 is a time, not a gap
    assert times(*ROWS, named).us(QKV, 4, 8) == 9
    assert times(named, *ROWS).us(QKV, 4, 4) == Fraction("0.9")
    assert times(*ROWS, qk).us(QK, None, 8) == 0


@pytest.mark.parametrize(
    ("site", "widths", "missing"),
    [
        (
            QKV,
            (3, 8),
            MISSING % (30, 3, 8),
        ),
        (
            QKV,
            (2, 4),
            MISSING % (30, 2, 4),
        ),
        (
            FC1,
            (4, 8),
            MISSING % (40, 4, 8),
        ),
        (AV, (None, 4), '{"kind": "av", "macs": 490, "activation_bits": 4}'),
    ],
    ids=["width-between", "pair", "shape", "attention"],
)
def test_nothing_is_interpolated_and_the_missing_row_is_named(
    site: Site, widths: tuple[int | None, int], missing: str
) -> None:
    with pytest.raises(ValueError, match="kernel times have none for site ") as raised:
        times(*ROWS).us(site, *widths)
    assert str(raised.value) == f"kernel times have none for site {site.name}: {missing} is missing"
    # With the row that the message shows, it is found.
    assert times(*ROWS, {**json.loads(missing), "us": 4}).us(site, *widths) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nope", "not kernel times: JSONDecodeError"),
        ("{}", "not kernel times: KeyError: 'times'"),
        ("[1]", "not kernel times: AttributeError"),
        ("3", "not kernel times: TypeError"),
        (json.dumps([{"kind": "qk", "macs": 3, "activation_bits": 8}]), "not kernel times: TypeError: .*'us'"),
        (json.dumps({"times": [], "batch": 0}), "KernelTimes.batch must be a positive integer, got 0"),
        (json.dumps({"times": [], "batch": True}), "KernelTimes.batch must be a positive integer, got True"),
        (json.dumps([LINEAR, {**LINEAR, "us": 2}]), r'more than one of \{"activation_bits": 8, "weight_bits": 4'),
    ],
    ids=["text", "no-times", "number", "scalar", "no-us", "batch", "batch-bool", "twice"],
)
def test_a_bad_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelTimes.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"us": -1}, "us must be a number >= 0, got -1"),
        ({"us": float("nan")}, "us must be a number >= 0, got nan"),
        ({"us": True}, "us must be a number >= 0, got True"),
        ({"us": "1"}, "us must be a number >= 0, got '1'"),
        ({"weight_bits": 9}, "weight_bits must be an integer in 2..8, got 9"),
        ({"activation_bits": 1}, "activation_bits must be an integer in 2..8, got 1"),
        ({"rows": None}, "rows of a linear must be a positive integer, got None"),
        ({"tokens": 0}, "tokens of a linear must be a positive integer, got 0"),
        ({"cols": 2.5}, "cols of a linear must be a positive integer, got 2.5"),
        ({"weight_bits": None}, "weight_bits go with kind linear, got None with linear"),
        ({"kind": "qk", "macs": 5}, "weight_bits go with kind linear, got 4 with qk"),
        ({"kind": "conv"}, r"kind must be one of \('linear', 'qk', 'av'\), got 'conv'"),
        ({"site": "head"}, "exactly one of site and kind, got 'head' and 'linear'"),
        ({"kind": None}, "exactly one of site and kind, got None and None"),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_a_bad_row_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^kernel time: .*{message}$"):
        KernelTime(**LINEAR | change)
