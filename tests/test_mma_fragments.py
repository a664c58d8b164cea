"""The weight layout of the CUDA kernels: decoded word by word as its head says, at every width and mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import CODE_KINDS, assert_bitwise_equal, fails
from tests.op_cases import some_groups, weight_codes
from vitq_kernels.ops.mma_fragments import MmaFragments, bank_quarter, place_rows, prepare_weight
from vitq_kernels.packing import pack_weight
from vitq_kernels.spec import RowGroups

GROUPS = {f"uniform-{bits}": RowGroups.uniform(72, bits) for bits in range(2, 9)} | {
    "mixed-8": some_groups(200, 8),
    "mixed-4": some_groups(321, 4),
    "two-windows": RowGroups(320, (4, 2, 7, 3, 5), 64, None),
    "one-row": RowGroups.uniform(1, 3),
}
PLANES = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


def of_quarters(widths: int) -> list[int]:
    """The widths of a group's quarters, of which each has a byte."""
    return [widths >> 8 * quarter & 255 for quarter in range(4)]


def decode(tensors: list[Tensor], rows: int, cols: int) -> Tensor:
    """The codes by the definition of the layout, one register at a time in Python integers."""
    weight = MmaFragments.of(tensors)
    chunks, steps = weight.chunks.tolist(), -(-cols // 64)
    order = weight.order.tolist() or list(range(64 * weight.groups.shape[0]))
    codes = torch.zeros(rows, cols, dtype=torch.int8)
    for group, (widths, first) in enumerate(weight.groups.tolist()):
        of_quarter = of_quarters(widths)
        for step in range(steps):
            for register in range(32):
                quarter, word_of = register // 8, register % 8
                bits, chunk = of_quarter[quarter], first + step * sum(of_quarter) + sum(of_quarter[:quarter])
                data = [byte for own in chunks[chunk : chunk + bits] for byte in own]
                for lane in range(32):
                    j, upper, half, n, t = register // 4, register // 2 % 2, register % 2, lane // 4, lane % 4
                    row = order[64 * group + 16 * (n // 2) + 2 * j + n % 2]
                    for i in range(4):
                        col = 64 * step + 32 * upper + 16 * half + 4 * t + i
                        if row >= rows or col >= cols:
                            continue
                        value, left, at = 0, bits, 0
                        for plane in PLANES[bits]:
                            word, part, together = word_of // (8 // plane), word_of % (8 // plane), min(plane, 4)
                            byte = data[at + word // 4 * 512 + 4 * together * lane + 4 * (word % 4) + i]
                            left -= plane
                            value |= (byte >> (8 - plane * (part + 1)) & ((1 << plane) - 1)) << left
                            at += 128 * plane
                        codes[row, col] = value - (1 << bits) if value >> (bits - 1) else value
    return codes


@pytest.mark.parametrize("kind", CODE_KINDS[:2])
@pytest.mark.parametrize("cols", [1, 64, 147])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_layout_holds_the_codes(groups: RowGroups, cols: int, kind: str) -> None:
    codes = weight_codes(kind, groups, cols, seed=3)
    assert_bitwise_equal(decode(prepare_weight(pack_weight(codes, groups)), groups.rows, cols), codes)


def test_the_decoder_would_notice() -> None:
    groups = GROUPS["mixed-8"]
    codes = weight_codes("random", groups, 64, seed=3)
    tensors = prepare_weight(pack_weight(codes, groups))
    tensors[3] = tensors[3].clone()
    tensors[3][0, 0] ^= 128
    assert fails(assert_bitwise_equal, decode(tensors, groups.rows, 64), codes)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_shapes_tell_the_host_what_it_must_know(groups: RowGroups) -> None:
    weight = MmaFragments.of(prepare_weight(pack_weight(weight_codes("random", groups, 65, 1), groups), input_bits=4))
    assert weight.input_bits == 4
    assert weight.present() == tuple(
        sorted({b for widths in weight.groups[:, 0].tolist() for b in of_quarters(widths)})
    )
    assert weight.is_plausible(groups.rows, 65)
    assert not weight.is_plausible(groups.rows, 4 * 65)


def test_one_width_keeps_the_rows_in_order_and_costs_its_bytes() -> None:
    groups = RowGroups.uniform(768, 3)
    weight = MmaFragments.of(prepare_weight(pack_weight(weight_codes("random", groups, 768, 1), groups)))
    assert weight.order.shape == (0,)
    assert weight.chunks.numel() == 768 * 768 * 3 // 8


def test_quarters_cost_their_bytes_in_any_order() -> None:
    shuffled = [64 * group + i for group in (0, 1) for i in torch.randperm(64).tolist()]
    groups = RowGroups(128, (2, 7, 3, 5, 4, 4, 4, 4), 16, tuple(shuffled))
    weight = MmaFragments.of(prepare_weight(pack_weight(weight_codes("random", groups, 128, 1), groups)))
    assert [of_quarters(widths) for widths in weight.groups[:, 0].tolist()] == [[7, 5, 3, 2], [4, 4, 4, 4]]
    assert weight.order[64:].tolist() == list(range(64, 128))  # one width keeps the rows in order
    assert weight.chunks.numel() == 16 * 128 * (2 + 7 + 3 + 5 + 4 * 4) // 8


@pytest.mark.parametrize("rows", [70, 100])
def test_a_quarter_without_rows_adds_no_width(rows: int) -> None:
    """The last group has 6 rows, or 36: of quarters without any the width is the narrowest that is there."""
    groups = RowGroups(rows, tuple((8, 3, 5, 4, 6, 7, 3)[: -(-rows // 16)]), 16)
    weight = MmaFragments.of(prepare_weight(pack_weight(weight_codes("random", groups, 64, 1), groups)))
    assert set(weight.present()) == set(groups.bits)
    last = of_quarters(weight.groups[-1, 0].item())
    assert last == sorted(last, reverse=True)


@pytest.mark.parametrize("together", [(0, 16, 32, 48), (0, 1, 16, 17)], ids=["mma", "wgmma"])
@pytest.mark.parametrize(("bits", "most"), [((2, 7, 3, 5), 1.7), ((8, 8, 4, 4), 1.45)], ids=["four", "two"])
def test_rows_that_are_staged_together_lie_in_different_banks(
    together: tuple[int, ...], bits: tuple[int, ...], most: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    shuffled = [64 * group + i for group in range(16) for i in torch.randperm(64, generator=generator).tolist()]
    order, _ = place_rows(RowGroups(1024, bits * 16, 16, tuple(shuffled)))
    assert sorted(order) == list(range(1024))
    # mma.sync: a row each of 16; wgmma: two neighbours, and those 16 further.
    starts = [i for i in range(1024) if (i % 64 < 16 if together[1] == 16 else i % 32 < 16 and i % 2 == 0)]

    def mean_clocks(placed: list[int]) -> float:
        """Of a write: as many as the rows of the fullest quarter of the banks."""
        quarters = [[bank_quarter(placed[i + j]) for j in together] for i in starts]
        return sum(max(map(four.count, four)) for four in quarters) / len(quarters)

    assert mean_clocks(order) <= most < 2 < mean_clocks(shuffled)  # 1: if each quarter had 4 rows of each


@pytest.mark.parametrize("bits", [1, 9])
def test_a_width_of_the_input_out_of_range_is_refused(bits: int) -> None:
    from vitq_kernels import ops

    groups = GROUPS["uniform-4"]
    with pytest.raises(ValueError, match=f"^vitq::prepare_weight: bits must be .*, got {bits}$"):
        ops.prepare_weight(pack_weight(weight_codes("random", groups, 64, 1), groups), bits)
