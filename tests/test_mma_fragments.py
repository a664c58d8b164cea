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


def decode(tensors: list[Tensor], rows: int, cols: int) -> Tensor:
    """The codes by the definition of the layout, one register at a time in Python integers."""
    weight = MmaFragments.of(tensors)
    chunks, steps = weight.chunks.tolist(), -(-cols // 64)
    order = weight.order.tolist() or list(range(64 * weight.groups.shape[0]))
    codes = torch.zeros(rows, cols, dtype=torch.int8)
    for group, (bits, first) in enumerate(weight.groups.tolist()):
        for step in range(steps):
            for register in range(32):
                for lane in range(32):
                    j, upper, half, n, t = register // 4, register // 2 % 2, register % 2, lane // 4, lane % 4
                    row = order[64 * group + 16 * (n // 2) + 2 * j + n % 2]
                    for i in range(4):
                        col = 64 * step + 32 * upper + 16 * half + 4 * t + i
                        if row >= rows or col >= cols:
                            continue
                        value, left, chunk = 0, bits, first + step * bits
                        for plane in PLANES[bits]:
                            word, part = register // (8 // plane), register % (8 // plane)
                            byte = chunks[chunk + word // 4][16 * lane + 4 * (word % 4) + i]
                            left -= plane
                            value |= (byte >> (8 - plane * (part + 1)) & ((1 << plane) - 1)) << left
                            chunk += plane
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
    assert weight.present() == tuple(sorted(set(weight.groups[:, 0].tolist())))
    assert weight.is_plausible(groups.rows, 65)
    assert not weight.is_plausible(groups.rows, 65 + 64)


def test_one_width_keeps_the_rows_in_order_and_costs_its_bytes() -> None:
    groups = RowGroups.uniform(768, 3)
    weight = MmaFragments.of(prepare_weight(pack_weight(weight_codes("random", groups, 768, 1), groups)))
    assert weight.order.shape == (0,)
    assert weight.chunks.numel() == 768 * 768 * 3 // 8


def test_groups_of_64_cost_their_bytes_in_any_order() -> None:
    groups = RowGroups(256, (2, 7, 3, 5), 64, tuple(torch.randperm(256, generator=torch.manual_seed(0)).tolist()))
    weight = MmaFragments.of(prepare_weight(pack_weight(weight_codes("random", groups, 128, 1), groups)))
    assert weight.groups[:, 0].tolist() == [7, 5, 3, 2]
    assert weight.chunks.numel() == 64 * 128 * (2 + 7 + 3 + 5) // 8


@pytest.mark.parametrize(
    ("starts", "together"),
    [
        ([64 * group + i for group in range(4) for i in range(16)], (0, 16, 32, 48)),
        (
            [64 * group + 32 * pair + i for group in range(4) for pair in (0, 1) for i in range(0, 16, 2)],
            (0, 1, 16, 17),
        ),
    ],
    ids=["mma", "wgmma"],
)
def test_rows_that_are_staged_together_lie_in_different_banks(starts: list[int], together: tuple[int, ...]) -> None:
    shuffled = torch.randperm(256, generator=torch.manual_seed(1)).tolist()
    order, _ = place_rows(RowGroups(256, (2, 7, 3, 5), 64, tuple(shuffled)))
    assert sorted(order) == list(range(256))

    def mean_clocks(placed: list[int]) -> float:
        """Of a write: as many as the rows of the fullest quarter of the banks."""
        quarters = [[bank_quarter(placed[i + j]) for j in together] for i in starts]
        return sum(max(map(four.count, four)) for four in quarters) / len(quarters)

    assert mean_clocks(order) <= 1.5 < 2 < mean_clocks(shuffled)  # 1: if each group had 16 rows of each quarter


@pytest.mark.parametrize("bits", [1, 9])
def test_a_width_of_the_input_out_of_range_is_refused(bits: int) -> None:
    from vitq_kernels import ops

    groups = GROUPS["uniform-4"]
    with pytest.raises(ValueError, match=f"^vitq::prepare_weight: bits must be .*, got {bits}$"):
        ops.prepare_weight(pack_weight(weight_codes("random", groups, 64, 1), groups), bits)
