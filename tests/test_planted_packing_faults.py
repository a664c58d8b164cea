"""The packing tests tested: planted faults that their checks must reject."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import codes, fails
from tests.op_cases import weight_codes
from tests.test_packing import GROUPS, check_layout, check_round_trip
from vitq_kernels import packing
from vitq_kernels.packing import PackedWeight, stored_rows


def test_swapped_nibbles_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packing.pack_codes

    def swapped(values: Tensor, bits: int) -> Tensor:
        data = pack(values, bits)
        return data << 4 | data >> 4

    monkeypatch.setattr(packing, "pack_codes", swapped)
    assert all(fails(check_layout, codes(kind, (8, 5), 4), 4) for kind in ("random", "counting", "extreme"))


def test_ignored_order_bytes_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = packing.unpack_weight
    in_order = torch.arange(72, dtype=torch.uint8)
    monkeypatch.setattr(packing, "unpack_weight", lambda p: unpack(PackedWeight(p.data, in_order, p.groups, p.cols)))
    groups = GROUPS["72-by-16"]
    assert fails(check_round_trip, weight_codes("random", groups, 5, 1), groups)


def test_order_bytes_read_backwards_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "stored_rows", lambda groups, order: stored_rows(groups, order).argsort())
    groups = GROUPS["72-by-16"]
    assert fails(check_round_trip, weight_codes("random", groups, 5, 1), groups)


def test_codes_without_sign_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = packing.unpack_codes
    monkeypatch.setattr(
        packing, "unpack_codes", lambda data, count, bits: unpack(data, count, bits) & ((1 << bits) - 1)
    )
    groups = GROUPS["72-by-16"]
    assert fails(check_round_trip, weight_codes("random", groups, 5, 1), groups)
