"""Packing: exact round trips, the documented bits against a twin in Python integers, exact sizes, clear refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.numerics import CODE_KINDS, assert_bitwise_equal, codes, integers
from tests.op_cases import weight_codes
from vitq_kernels import packing
from vitq_kernels.packing import PackedWeight, groups_with_order, pack_codes, pack_weight, unpack_codes, unpack_weight
from vitq_kernels.spec import RowGroups

BITS = range(2, 9)


def twin_pack(values: Sequence[int], bits: int) -> bytes:
    """The documented stream as one big integer: code i occupies bits [bits * i, bits * i + bits), lowest bit first."""
    stream = 0
    for i, value in enumerate(values):
        for j in range(bits):
            stream |= (value >> j & 1) << (bits * i + j)  # Python shifts negative integers as two's complement
    return stream.to_bytes(-(-len(values) * bits // 8), "little")


def shuffled(rows: int, seed: int = 1) -> list[int]:
    """A permutation of ``rows`` rows inside tiles of 256."""
    order = []
    for tile in range(0, rows, 256):
        order += [tile + int(i) for i in integers(0, 1 << 30, (min(256, rows - tile),), seed + tile).argsort()]
    return order


def group_count(rows: int, group_rows: int) -> int:
    return sum(-(-min(256, rows - tile) // group_rows) for tile in range(0, rows, 256))


def mixed(rows: int, group_rows: int, seed: int = 0) -> RowGroups:
    """Row groups of widths 2..8 in a shuffled order."""
    bits = integers(2, 8, (group_count(rows, group_rows),), seed).tolist()
    return RowGroups(rows, tuple(bits), group_rows, tuple(shuffled(rows)))


GROUPS = {
    "10-one-width": RowGroups.uniform(10, 3),
    "300-one-width": RowGroups.uniform(300, 5),
    "10-by-4": mixed(10, 4),
    "72-by-16": mixed(72, 16),
    "72-by-64": mixed(72, 64),
    "300-by-64": mixed(300, 64),
    "1000-by-128": mixed(1000, 128),
    "512-first-tile-mixed": RowGroups(512, (2, 3, 4, 5, 6, 6, 6, 6), 64, tuple(shuffled(512))),
    "300-second-tile-mixed": RowGroups(300, (4, 4, 4, 4, 4, 4, 4, 4, 8, 2), 32, tuple(shuffled(300))),
}


def check_layout(values: Tensor, bits: int) -> None:
    """Asserts that ``pack_codes`` gives the documented bytes."""
    expected = torch.frombuffer(bytearray(twin_pack(values.flatten().tolist(), bits)), dtype=torch.uint8)
    assert_bitwise_equal(packing.pack_codes(values, bits), expected)


def check_round_trip(weight: Tensor, groups: RowGroups) -> None:
    """Asserts that a weight comes back as it was."""
    assert_bitwise_equal(packing.unpack_weight(packing.pack_weight(weight, groups)), weight)


@pytest.mark.parametrize("kind", CODE_KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (10, 147), (64, 32)], ids=lambda shape: "{}x{}".format(*shape))
def test_codes_come_back(kind: str, bits: int, shape: tuple[int, int]) -> None:
    values = codes(kind, shape, bits)
    assert_bitwise_equal(unpack_codes(pack_codes(values, bits), values.numel(), bits), values.flatten())


@pytest.mark.parametrize("kind", CODE_KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_the_documented_ones(kind: str, bits: int) -> None:
    for count in (1, 7, 8, 9, 147):
        check_layout(codes(kind, (2, count), bits, seed=1)[1], bits)


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (2, [1, -2, -1, 0], [0b00_11_10_01]),
        (3, [1, 2, 3, -4, -1], [0b11_010_001, 0b0_111_100_0]),
        (4, [1, -8, 7], [0x81, 0x07]),
        (5, [-16, 15], [0b111_10000, 0b01]),
        (8, [-128, 127, -1], [0x80, 0x7F, 0xFF]),
    ],
    ids=lambda value: f"w{value}" if isinstance(value, int) else "",
)
def test_bytes_written_by_hand(bits: int, values: list[int], expected: list[int]) -> None:
    assert pack_codes(torch.tensor(values, dtype=torch.int8), bits).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_every_code_of_a_width_comes_back(bits: int) -> None:
    values = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8)
    assert_bitwise_equal(unpack_codes(pack_codes(values, bits), 1 << bits, bits), values)


def test_no_codes_take_no_bytes() -> None:
    empty = torch.empty(0, dtype=torch.int8)
    assert pack_codes(empty, 3).shape == (0,)
    assert_bitwise_equal(unpack_codes(pack_codes(empty, 3), 0, 3), empty)


@pytest.mark.parametrize("cols", [1, 5, 147, 192])
@pytest.mark.parametrize("kind", CODE_KINDS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_weights_come_back(groups: RowGroups, kind: str, cols: int) -> None:
    check_round_trip(weight_codes(kind, groups, cols, seed=3), groups)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("cols", [5, 16])
def test_weight_bytes_are_the_documented_ones(groups: RowGroups, cols: int) -> None:
    weight = weight_codes("random", groups, cols, seed=4)
    order = groups.order or tuple(range(groups.rows))
    rows = weight.tolist()
    data, order_bytes = b"", b""
    for start, stop, bits in groups.groups():
        data += twin_pack([code for place in range(start, stop) for code in rows[order[place]]], bits)
    for tile in range(0, groups.rows, 256):
        end = min(tile + 256, groups.rows)
        if len({bits for start, _, bits in groups.groups() if tile <= start < end}) > 1:
            order_bytes += bytes(order[place] - tile for place in range(tile, end))
    packed = pack_weight(weight, groups)
    assert bytes(packed.data.tolist()) == data
    assert bytes(packed.row_order.tolist()) == order_bytes


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("cols", [8, 192])
def test_size_is_exactly_the_sum_of_rows_times_columns_times_bits(groups: RowGroups, cols: int) -> None:
    packed = pack_weight(torch.zeros(groups.rows, cols, dtype=torch.int8), groups)
    assert packed.data.numel() * 8 == sum(groups.row_bits()) * cols
    assert packed.data.numel() == groups.weight_bytes(cols)
    assert packed.row_order.numel() == groups.order_bytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("300-one-width", 0), ("72-by-64", 72), ("512-first-tile-mixed", 256), ("300-second-tile-mixed", 44)],
)
def test_order_costs_one_byte_a_row_of_mixed_tiles_only(name: str, expected: int) -> None:
    groups = GROUPS[name]
    assert pack_weight(torch.zeros(groups.rows, 8, dtype=torch.int8), groups).row_order.numel() == expected


def test_an_order_inside_tiles_of_one_width_means_nothing() -> None:
    # Such tiles store no order, so one that is asked for must not reach the bytes.
    groups = RowGroups(72, (4, 4), 64, tuple(reversed(range(72))))
    assert groups == RowGroups(72, (4, 4), 64)
    check_round_trip(codes("counting", (72, 16), 4), groups)


@pytest.mark.parametrize("name", ["10-by-4", "300-by-64", "512-first-tile-mixed"])
def test_groups_are_found_again_from_widths_and_order_bytes(name: str) -> None:
    groups = GROUPS[name]
    packed = pack_weight(torch.zeros(groups.rows, 8, dtype=torch.int8), groups)
    stored = RowGroups(groups.rows, groups.bits, groups.group_rows)
    assert groups_with_order(stored, packed.row_order) == groups


def test_input_is_left_as_it_was() -> None:
    groups = GROUPS["72-by-16"]
    weight = weight_codes("random", groups, 147, seed=5)
    kept = weight.clone()
    packed = pack_weight(weight, groups)
    data, order = packed.data.clone(), packed.row_order.clone()
    unpack_weight(packed)
    assert_bitwise_equal(weight, kept)
    assert_bitwise_equal(packed.data, data)
    assert_bitwise_equal(packed.row_order, order)


def test_a_weight_need_not_be_contiguous() -> None:
    groups = GROUPS["72-by-16"]
    weight = weight_codes("random", groups, 10, seed=6)
    strided = torch.stack([weight, -weight], dim=2)[..., 0]
    assert not strided.is_contiguous()
    assert_bitwise_equal(pack_weight(strided, groups).data, pack_weight(weight, groups).data)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("side", ["below", "above"])
def test_codes_out_of_range_are_refused(bits: int, side: str) -> None:
    limit = 1 << (bits - 1)
    bad = -limit - 1 if side == "below" else limit
    with pytest.raises(ValueError, match=rf"{bits}-bit codes must lie in \[-{limit}, {limit - 1}\], got .*{bad}"):
        pack_codes(torch.tensor([0, bad], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", [0, 1, 9, 2.0, True])
def test_widths_outside_2_to_8_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"must be an integer in 2\.\.8, got"):
        pack_codes(torch.zeros(8, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=r"must be an integer in 2\.\.8, got"):
        unpack_codes(torch.zeros(8, dtype=torch.uint8), 8, bits)


def test_codes_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes must be int8, got torch\.int32"):
        pack_codes(torch.zeros(8, dtype=torch.int32), 4)


@pytest.mark.parametrize("shape", [(71, 8), (72,), (72, 2, 4)], ids=str)
def test_a_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"codes must be \[N=72, K\], got"):
        pack_weight(torch.zeros(shape, dtype=torch.int8), GROUPS["72-by-16"])


def test_a_row_wider_than_its_group_is_refused() -> None:
    groups = RowGroups(72, (2, 8), 64)
    with pytest.raises(ValueError, match=r"2-bit codes must lie in \[-2, 1\], got \[0, 3\]"):
        pack_weight(torch.arange(4, dtype=torch.int8).expand(72, 4), groups)


@pytest.fixture
def packed() -> PackedWeight:
    groups = GROUPS["72-by-16"]
    return pack_weight(weight_codes("random", groups, 8, seed=7), groups)


@pytest.mark.parametrize("change", [-1, 1], ids=["one-too-few", "one-too-many"])
def test_a_wrong_number_of_bytes_is_refused(packed: PackedWeight, change: int) -> None:
    size = packed.data.numel()
    wrong = torch.zeros(size + change, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"data must be uint8 \[{size}\] for 72x8, got \[{size + change}\]"):
        unpack_weight(dataclasses.replace(packed, data=wrong))
    with pytest.raises(ValueError, match=rf"row_order must be uint8 \[72\] for 72 rows, got .*\[{72 + change}\]"):
        unpack_weight(dataclasses.replace(packed, row_order=torch.zeros(72 + change, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"data must be uint8 \[6\], got"):
        unpack_codes(torch.zeros(6 + change, dtype=torch.uint8), 15, 3)


@pytest.mark.parametrize("field", ["data", "row_order"])
def test_bytes_of_another_dtype_are_refused(packed: PackedWeight, field: str) -> None:
    signed = dataclasses.replace(packed, **{field: getattr(packed, field).view(torch.int8)})
    with pytest.raises(ValueError, match=r"must be uint8 .*got torch\.int8"):
        unpack_weight(signed)


@pytest.mark.parametrize("value", [0, 72, 255], ids=["row-twice", "row-outside-the-tile", "largest-byte"])
def test_order_bytes_that_are_no_permutation_are_refused(packed: PackedWeight, value: int) -> None:
    order = packed.row_order.clone()
    order[int((order == 71).nonzero())] = value
    with pytest.raises(ValueError, match=r"row_order must permute the rows inside each tile; tile 0\.\.71 does not"):
        unpack_weight(dataclasses.replace(packed, row_order=order))
    with pytest.raises(ValueError, match=r"row_order must permute"):
        groups_with_order(packed.groups, order)


def test_the_second_tile_is_checked_after_a_permuted_first_one() -> None:
    groups = GROUPS["1000-by-128"]
    weight = pack_weight(torch.zeros(1000, 8, dtype=torch.int8), groups)
    order = weight.row_order.clone()
    order[256 + 5] = order[256 + 6]
    with pytest.raises(ValueError, match=r"tile 256\.\.511 does not"):
        unpack_weight(dataclasses.replace(weight, row_order=order))
