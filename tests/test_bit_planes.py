"""The weight layout of the Triton kernels: decoded bit by bit, as the kernel does and as its description says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_bitwise_equal, fails, integers
from tests.op_cases import weight_codes
from vitq_kernels.ops import bit_planes
from vitq_kernels.ops.bit_planes import PART_BITS, PLANES, PLANES_OF, WINDOW_ROWS, BitPlanes, block_k, prepare_weight
from vitq_kernels.packing import PackedWeight, pack_weight
from vitq_kernels.spec import RowGroups


def mixed(rows: int, widths: tuple[int, ...], group_rows: int = 16) -> RowGroups:
    """Groups that take the widths in turn, rows in a shuffled order inside each tile."""
    spans = range(0, rows, 256)
    groups = sum(-(-min(256, rows - start) // group_rows) for start in spans)
    order = [s + int(i) for s in spans for i in integers(0, 10**6, (min(256, rows - s),), rows + s).argsort()]
    return RowGroups(rows, tuple(widths[i % len(widths)] for i in range(groups)), group_rows, tuple(order))


GROUPS = {f"uniform-{b}": RowGroups.uniform(130, b) for b in range(2, 9)} | {
    "2-to-8": mixed(300, (2, 3, 4, 5, 6, 7, 8)),
    "low": mixed(130, (2, 3)),
    "one-row": RowGroups.uniform(1, 5),
    "windows": RowGroups(512, (2, 7), 256),
}


def decode(tensors: list[Tensor], cols: int) -> Tensor:
    """The layout's codes, int8 [N, K], element by element from its description."""
    w, step = BitPlanes.of(tensors), block_k(cols)
    rows, padded = w.shifts.shape[0], -(-cols // step) * step
    aligned = torch.zeros(rows, padded, dtype=torch.int64)
    above = torch.zeros(rows, dtype=torch.int64)
    k = torch.arange(padded)
    for index, bits in enumerate(PLANES):
        place = w.places[index].long()
        has = place >= 0
        octets = w.planes[index].contiguous().view(torch.uint8).long()
        quarter = step * bits // 8
        byte = k // step * quarter + k % step % quarter
        lowest = torch.tensor(PART_BITS[bits])[k % step // quarter]
        if octets.shape[0]:
            values = octets[place.clamp_min(0)][:, byte] >> lowest & ((1 << bits) - 1)
            shifted = values << (8 - bits - above).clamp_min(0)[:, None]
            aligned += torch.where(has[:, None], shifted, 0)
        above += bits * has
    signed = aligned.to(torch.uint8).view(torch.int8)
    assert not signed[:, cols:].any(), "padding must be zero"
    return signed[:, :cols] >> w.shifts[:, None].to(torch.int8)


def check_round_trip(kind: str, groups: RowGroups, cols: int) -> None:
    codes = weight_codes(kind, groups, cols, seed=cols)
    assert_bitwise_equal(decode(prepare_weight(pack_weight(codes, groups)), cols), codes)


@pytest.mark.parametrize("kind", ["counting", "extreme", "random"])
@pytest.mark.parametrize("cols", [1, 64, 147, 192, 384])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_every_code_is_where_the_description_says(groups: RowGroups, cols: int, kind: str) -> None:
    check_round_trip(kind, groups, cols)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_tensors_have_the_forms_that_ops_check(groups: RowGroups) -> None:
    tensors = prepare_weight(pack_weight(weight_codes("random", groups, 147, 1), groups))
    for (name, dtype, shape), tensor in zip(bit_planes.forms(groups.rows, 147), tensors, strict=True):
        assert tensor.dtype == dtype, name
        sizes = zip(shape, tensor.shape, strict=True)
        assert all(isinstance(wanted, str) or wanted == got for wanted, got in sizes), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_layer_of_one_width_takes_its_bits_and_a_little_for_every_row(bits: int) -> None:
    groups = RowGroups.uniform(768, bits)
    w = BitPlanes.of(prepare_weight(pack_weight(weight_codes("random", groups, 768, 1), groups)))
    assert w.present() == (bits,)
    assert w.nbytes == 768 * 768 * bits // 8 + 768 * (4 + 4 * 4) + 4 * 768 // WINDOW_ROWS


def test_rows_of_a_window_take_the_planes_that_hold_them() -> None:
    groups = mixed(256, (2, 4, 6))
    w = BitPlanes.of(prepare_weight(pack_weight(weight_codes("random", groups, 128, 1), groups)))
    row_bits = torch.tensor(groups.row_bits())
    assert w.present() == (6,)
    assert torch.equal(w.places[1] >= 0, torch.ones(256, dtype=torch.bool))
    assert torch.equal(w.places[2] >= 0, row_bits > 4)
    assert w.planes[2].shape == (int((row_bits > 4).sum()), 128 * 2 // 32)
    assert torch.equal(w.shifts, 8 - row_bits.int())


def test_windows_have_the_width_of_their_widest_row() -> None:
    groups = RowGroups(384, (3, 8, 5), 128)  # tiles of 256 and 128 rows
    w = BitPlanes.of(prepare_weight(pack_weight(weight_codes("random", groups, 64, 1), groups)))
    assert w.window_bits.tolist() == [3, 8, 5]
    assert w.present() == (3, 5, 8)


def test_the_planes_of_a_width_add_up_to_it() -> None:
    assert all(sum(planes) == bits for bits, planes in PLANES_OF.items())
    assert all(sorted(parts) == list(range(0, 8, bits)) for bits, parts in PART_BITS.items())


@pytest.mark.parametrize(("cols", "step"), [(1, 64), (64, 64), (65, 128), (128, 128), (147, 64), (192, 64), (768, 128)])
def test_half_a_step_where_the_other_half_would_be_padding(cols: int, step: int) -> None:
    assert block_k(cols) == step


def test_more_columns_than_sums_hold_are_refused() -> None:
    cols = 1 << 17
    packed = PackedWeight(torch.zeros(cols // 4, dtype=torch.uint8), torch.empty(0), RowGroups.uniform(1, 2), cols)
    with pytest.raises(ValueError, match=r"must have at most 131071 columns and 2147483647 codes, got 1 x 131072$"):
        prepare_weight(packed)


# Faults that the round trip must reject.
def test_parts_in_another_order_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = prepare_weight(pack_weight(weight_codes("random", GROUPS["uniform-2"], 64, 1), GROUPS["uniform-2"]))
    monkeypatch.setitem(PART_BITS, 2, (0, 2, 4, 6))
    codes = weight_codes("random", GROUPS["uniform-2"], 64, 1)
    assert fails(assert_bitwise_equal, decode(tensors, 64), codes)


def test_a_row_in_too_few_planes_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANES_OF, 6, (4,))
    assert fails(check_round_trip, "random", GROUPS["uniform-6"], 64)


def test_rows_taken_for_narrower_than_they_are_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = weight_codes("random", GROUPS["windows"], 64, 1)
    packed = pack_weight(codes, GROUPS["windows"])
    monkeypatch.setattr(RowGroups, "row_bits", lambda self: [min(self.bits)] * self.rows)
    assert fails(assert_bitwise_equal, decode(prepare_weight(packed), 64), codes)
