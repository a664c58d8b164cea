"""The weight layout ``mma_fragments``: packed codes in the order in which a warp's registers take them.

Rows are taken in windows of 256 and, where a window has rows of several widths, stored from the widest to the
narrowest, in *groups* of 64. A group has the width of its widest row, and each group its own: a layer of several widths
costs its bytes, and its rows' order is undone where a kernel stores. Rows and columns are padded with zeros
to whole groups and whole *steps* of 64 columns. Group follows group, inside it step follows step, inside it the planes
of 8, 4, 2 and 1 bits that the width needs, from the top bit down: 7 = 4 + 2 + 1, 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1.

A step is, for each lane of the warp, 32 registers of four codes: register ``4j + 2h' + h`` of lane ``4n + t`` holds row
``16 (n // 2) + 2j + n % 2`` of the group and columns ``32h' + 16h + 4t .. + 3`` of the step, which is what the B
operands of mma.m16n8k32 ask for if a lane is to end with 16 consecutive rows of an output. Byte i of a word of a plane
of p bits has column i of ``8 / p`` consecutive registers, the first at the top; four words of each lane make a chunk of
512 bytes. So a step of b bits is b chunks, and every access is 16 bytes a lane. csrc/weights.cuh undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.packing import PackedWeight, unpack_weight
from vitq_kernels.spec import MAX_BITS, TILE_ROWS, RowGroups

WEIGHT_LAYOUT = "mma_fragments"
GROUP_ROWS = 64
STEP_COLS = 64
CHUNK_BYTES = 512
MOST_COLS = (1 << 17) - 1  # a left-aligned sum of them fits int32: 2^17 * 128 * 128 = 2^31
MOST_WIDTHS = 1 << (MAX_BITS + 1)  # one above the largest set of widths as a bit mask
# Planes of a b-bit group.
PLANES_OF = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True)
class MmaFragments:
    """A weight [N, K] in this layout; the list of its tensors is what the ops take as ``weight``."""

    # int8 [set of the groups' widths as a bit mask, bits of the input's codes, 0]: no data, only a shape
    widths: Tensor
    groups: Tensor  # int32 [G, 2]: width and first chunk of each group
    # int32 [64 G], model row of each stored row, from N on where there is none; [0] where it is the model's order
    order: Tensor
    chunks: Tensor  # uint8 [chunks, 512]

    def tensors(self) -> list[Tensor]:
        """As the ops take it."""
        return [self.widths, self.groups, self.order, self.chunks]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> MmaFragments:
        """The inverse of ``tensors``."""
        return cls(*tensors)

    def present(self) -> tuple[int, ...]:
        """Widths of the groups, ascending."""
        return tuple(b for b in range(2, MAX_BITS + 1) if self.widths.shape[0] >> b & 1)

    @property
    def input_bits(self) -> int:
        """Width of the codes that the weight is multiplied with; 8 where it is not known."""
        return self.widths.shape[1]

    def is_plausible(self, rows: int, cols: int) -> bool:
        """Whether the sizes fit the widths of a weight [rows, cols], as far as shapes tell."""
        widths, steps = self.present(), -(-cols // STEP_COLS)
        spare = self.groups.shape[0] - len(widths)  # groups beside one of each width
        if not widths or spare < 0 or self.widths.shape[0] >= MOST_WIDTHS or not 2 <= self.input_bits <= MAX_BITS:
            return False
        least, most = (steps * (sum(widths) + spare * width) for width in (widths[0], widths[-1]))
        return least <= self.chunks.shape[0] <= most and self.order.shape[0] in (0, GROUP_ROWS * self.groups.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def forms(rows: int, cols: int) -> list[tuple[str, torch.dtype, tuple[object, ...]]]:
    """Name, dtype and shape of each tensor of a weight [rows, cols]; a string is a size that its data decides."""
    return [
        ("widths", torch.int8, ("set of widths", "input bits", 0)),
        ("groups", torch.int32, (-(-rows // GROUP_ROWS), 2)),
        ("order", torch.int32, ("rows or 0",)),
        ("chunks", torch.uint8, ("chunks", CHUNK_BYTES)),
    ]


def prepare_weight(weight: PackedWeight, input_bits: int = MAX_BITS) -> list[Tensor]:
    """The canonical packed weight in this layout; see MmaFragments for shapes and dtypes.

    Args:
        weight: canonical.
        input_bits: width of the codes that it will be multiplied with, 2..8. A GPU with 4-bit products uses them where
            neither side has more.

    Raises:
        ValueError: the weight has more columns than the kernels' int32 sums hold, or more chunks than int32 counts.
    """
    rows, cols, device = weight.groups.rows, weight.cols, weight.data.device
    steps = -(-cols // STEP_COLS)
    order, bits = place_rows(weight.groups)
    if cols > MOST_COLS or 8 * steps * len(bits) >= 1 << 31:
        raise ValueError(
            f"a weight in layout {WEIGHT_LAYOUT} must have at most {MOST_COLS} columns and 2^31 chunks of 512 bytes, "
            f"got {rows} x {cols}"
        )
    padded = torch.nn.functional.pad(unpack_weight(weight), (0, -cols % STEP_COLS, 0, len(order) - rows))
    index = torch.tensor(order, device=device).view(-1, GROUP_ROWS)
    chunks = torch.cat([_pack_group(padded[rows_of], b) for rows_of, b in zip(index, bits, strict=True)])
    first = [0]
    for b in bits:
        first.append(first[-1] + b * steps)
    kept = order if order != list(range(len(order))) else []
    return MmaFragments(
        torch.empty(sum(1 << b for b in set(bits)), input_bits, 0, dtype=torch.int8, device=device),
        torch.tensor(list(zip(bits, first[:-1], strict=True)), dtype=torch.int32, device=device),
        torch.tensor(kept, dtype=torch.int32, device=device),
        chunks,
    ).tensors()


def place_rows(groups: RowGroups) -> tuple[list[int], list[int]]:
    """Model row of each stored row (from N on where there is none), and the width of each group of 64 stored rows."""
    row_bits = groups.row_bits()
    order: list[int] = []
    for start in range(0, groups.rows, TILE_ROWS):
        window = range(start, min(start + TILE_ROWS, groups.rows))
        order += sorted(window, key=lambda row: -row_bits[row])  # stable: one width keeps the model's order
    in_order = order == list(range(groups.rows))
    order += range(groups.rows, -(-groups.rows // GROUP_ROWS) * GROUP_ROWS)
    members = [order[i : i + GROUP_ROWS] for i in range(0, len(order), GROUP_ROWS)]
    bits = [max(row_bits[row] for row in rows if row < groups.rows) for rows in members]
    return order if in_order else [row for rows in members for row in _spread(rows)], bits


def bank_quarter(row: int) -> int:
    """Which quarter of shared memory's banks a row of outputs is staged in: staged_offset of csrc/gemm_tiles.cuh."""
    return (row ^ row // 8) % 4


def _spread(rows: list[int]) -> list[int]:
    """The rows of a group in the order in which lanes that store together meet in few banks of shared memory.

    Four stored rows are staged together: i, i + 16, i + 32 and i + 48 by mma.sync; i, i + 1, i + 16 and i + 17 (i even)
    by wgmma. So stored row i gets a row of bank_quarter i // 16 ^ 2 (i % 2), as far as there are 16 of each.
    """
    waiting: list[list[int]] = [[], [], [], []]
    for row in reversed(rows):
        waiting[bank_quarter(row)].append(row)
    slots = [i // 16 ^ i % 2 << 1 for i in range(GROUP_ROWS)]
    placed = [waiting[quarter].pop() if waiting[quarter] else None for quarter in slots]
    left = [row for quarter in waiting for row in quarter]
    return [left.pop() if row is None else row for row in placed]


def _pack_group(codes: Tensor, bits: int) -> Tensor:
    """int8 [64, padded K] to the chunks of a group, uint8 [steps * bits, 512]."""
    steps = codes.shape[1] // STEP_COLS
    aligned = (codes.int() << (8 - bits)) & 255
    # Row 16 T + 2 j + c, column 64 step + 32 h' + 16 h + 4 t + i; lane 4 (2 T + c) + t; register 4 j + 2 h' + h.
    parts = aligned.view(4, 8, 2, steps, 2, 2, 4, 4)  # T j c step h' h t i
    registers = parts.permute(3, 1, 4, 5, 0, 2, 6, 7).reshape(steps, 32, 32, 4)  # step, register, lane, byte
    planes, above = [], 0
    for plane in PLANES_OF[bits]:
        above += plane
        values = (registers >> (8 - above)) & ((1 << plane) - 1)
        together = values.view(steps, 4 * plane, 8 // plane, 32, 4)  # word, part
        at = torch.arange(8 - plane, -1, -plane, device=codes.device).view(1, 1, -1, 1, 1)
        words = (together << at).sum(2)  # step, word, lane, byte
        planes.append(words.view(steps, plane, 4, 32, 4).transpose(2, 3).reshape(steps, plane, CHUNK_BYTES))
    return torch.cat(planes, 1).reshape(steps * bits, CHUNK_BYTES).to(torch.uint8)
