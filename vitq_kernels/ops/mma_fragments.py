"""The weight layout ``mma_fragments``: packed codes in the order in which a warp's registers take them.

Rows are stored in *groups* of 64 consecutive ones, whose four *quarters* of 16 have a width each: where a group has
rows of several widths they are stored from the widest to the narrowest, and a quarter has the width of its widest row.
So a layer of several widths costs its bytes, and its rows' order is undone where a kernel stores, inside the 64 rows
that every tile has together. Rows and columns are padded with zeros to whole groups and whole *steps* of 64 columns.
Group follows group, inside it step follows step, inside it quarter follows quarter, inside it the planes of 8, 4, 2 and
1 bits that the width needs, from the top bit down: 7 = 4 + 2 + 1, 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1.

A step of a group is, for each lane of the warp, 32 registers of four codes: register ``4j + 2h' + h`` of lane
``4n + t`` holds stored row ``16 (n // 2) + 2j + n % 2``, columns ``32h' + 16h + 4t .. + 3`` of the step, which is what
the B operands of mma.m16n8k32 ask for if a lane is to end with 16 consecutive rows of an output. Registers
``8q .. 8q + 7`` are quarter q, its stored rows ``16k + 4q + r``, k and r below 4: on wgmma, the rows of warp q. Byte i
of a word of a plane of p bits has column i of ``8 / p`` consecutive registers, the first at the top, and a lane has p
words; up to four of them lie together, then come the next lane's. So a quarter's step of b bits is b chunks of 128
bytes, and a warp reads whole lines. csrc/weights.cuh undoes it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.packing import PackedWeight, unpack_weight
from vitq_kernels.spec import MAX_BITS, RowGroups

WEIGHT_LAYOUT = "mma_fragments"
GROUP_ROWS = 64
QUARTERS = 4
STEP_COLS = 64
CHUNK_BYTES = 128
MOST_COLS = (1 << 17) - 1  # a left-aligned sum of them fits int32: 2^17 * 128 * 128 = 2^31
MOST_WIDTHS = 1 << (MAX_BITS + 1)  # one above the largest set of widths as a bit mask
# Planes of a b-bit quarter.
PLANES_OF = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True)
class MmaFragments:
    """A weight [N, K] in this layout; the list of its tensors is what the ops take as ``weight``."""

    # int8 [set of the quarters' widths as a bit mask, bits of the input's codes, 0]: no data, only a shape
    widths: Tensor
    groups: Tensor  # int32 [G, 2]: widths of each group's quarters, a byte each, the first the lowest; its first chunk
    # int32 [64 G], model row of each stored row, from N on where there is none; [0] where it is the model's order
    order: Tensor
    chunks: Tensor  # uint8 [chunks, 128]

    def tensors(self) -> list[Tensor]:
        """As the ops take it."""
        return [self.widths, self.groups, self.order, self.chunks]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> MmaFragments:
        """The inverse of ``tensors``."""
        return cls(*tensors)

    def present(self) -> tuple[int, ...]:
        """Widths of the quarters, ascending."""
        return tuple(b for b in range(2, MAX_BITS + 1) if self.widths.shape[0] >> b & 1)

    @property
    def input_bits(self) -> int:
        """Width of the codes that the weight is multiplied with; 8 where it is not known."""
        return self.widths.shape[1]

    def is_plausible(self, rows: int, cols: int) -> bool:
        """Whether the sizes fit the widths of a weight [rows, cols], as far as shapes tell."""
        widths, steps = self.present(), -(-cols // STEP_COLS)
        spare = QUARTERS * self.groups.shape[0] - len(widths)  # quarters beside one of each width
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
    if cols > MOST_COLS or QUARTERS * MAX_BITS * steps * len(bits) >= 1 << 31:
        raise ValueError(
            f"a weight in layout {WEIGHT_LAYOUT} must have at most {MOST_COLS} columns and 2^31 chunks of "
            f"{CHUNK_BYTES} bytes, got {rows} x {cols}"
        )
    padded = torch.nn.functional.pad(unpack_weight(weight), (0, -cols % STEP_COLS, 0, len(order) - rows))
    first = [0]
    for widths in bits:
        first.append(first[-1] + sum(widths) * steps)
    starts = [sum(b << 8 * q for q, b in enumerate(widths)) for widths in bits]
    present = {b for widths in bits for b in widths}
    kept = order if order != list(range(len(order))) else []
    return MmaFragments(
        torch.empty(sum(1 << b for b in present), input_bits, 0, dtype=torch.int8, device=device),
        torch.tensor(list(zip(starts, first[:-1], strict=True)), dtype=torch.int32, device=device),
        torch.tensor(kept, dtype=torch.int32, device=device),
        _pack(padded[torch.tensor(order, device=device)], bits),
    ).tensors()


def place_rows(groups: RowGroups) -> tuple[list[int], list[list[int]]]:
    """Model row of each stored row (from N on where there is none), and the widths of each group's quarters."""
    row_bits = groups.row_bits()
    order: list[int] = []
    bits: list[list[int]] = []
    for start in range(0, groups.rows, GROUP_ROWS):
        widths = row_bits[start : start + GROUP_ROWS]
        if len(set(widths)) == 1:
            order += range(start, start + GROUP_ROWS)
            bits.append(widths[:1] * QUARTERS)
            continue
        widths += [0] * (GROUP_ROWS - len(widths))  # of rows that are none
        seen: Counter[tuple[int, int]] = Counter()
        keys = []
        for at, width in enumerate(widths):
            kind = width, bank_quarter(at)
            keys.append((-width, seen[kind]))  # rows of one width take turns by their banks
            seen[kind] += 1
        sorted_rows = sorted(range(GROUP_ROWS), key=lambda at: keys[at])
        size = GROUP_ROWS // QUARTERS
        members = [_spread(sorted_rows[i : i + size]) for i in range(0, GROUP_ROWS, size)]
        # Stored row 16 k + 4 q + r is member 4 k + r of quarter q.
        order += [start + members[i // 4 % 4][i // 16 * 4 + i % 4] for i in range(GROUP_ROWS)]
        narrowest = min(filter(None, widths))  # of a quarter without rows
        bits.append([max(narrowest, *(widths[at] for at in rows)) for rows in members])
    return order, bits


def bank_quarter(row: int) -> int:
    """Which quarter of shared memory's banks a row of outputs is staged in: staged_offset of csrc/gemm_tiles.cuh."""
    return (row ^ row // 8) % 4


def _spread(rows: list[int]) -> list[int]:
    """The rows of a quarter in the order in which lanes that store together meet in few banks of shared memory.

    Four stored rows are staged together: i, i + 16, i + 32 and i + 48 by mma.sync; i, i + 1, i + 16 and i + 17 (i even)
    by wgmma. So member 4 k + r gets a row of bank_quarter k ^ 2 (r % 2), as far as there are four of each.
    """
    waiting: list[list[int]] = [[], [], [], []]
    for row in reversed(rows):
        waiting[bank_quarter(row)].append(row)
    slots = [i // 4 ^ i % 2 << 1 for i in range(len(rows))]
    placed = [waiting[quarter].pop() if waiting[quarter] else None for quarter in slots]
    left = [row for quarter in waiting for row in quarter]
    return [left.pop() if row is None else row for row in placed]


def _pack(codes: Tensor, bits: list[list[int]]) -> Tensor:
    """int8 [64 G, padded K], rows as stored, and the widths of the groups' quarters to uint8 [chunks, 128]."""
    steps = codes.shape[1] // STEP_COLS
    # Row 16 T + 4 q + 2 j + c, column 64 step + 32 h' + 16 h + 4 t + i; lane 4 (2 T + c) + t; register 4 j + 2 h' + h
    # of quarter q.
    parts = codes.view(-1, 4, QUARTERS, 2, 2, steps, 2, 2, 4, 4)  # group T q j c step h' h t i
    registers = parts.permute(0, 2, 5, 3, 6, 7, 1, 4, 8, 9).reshape(-1, steps, 8, 32, 4)  # quarter step register lane i
    flat = torch.tensor(bits, device=codes.device).flatten()
    packed: dict[int, Tensor] = {}
    for width in {b for widths in bits for b in widths}:
        quarters = (flat == width).nonzero().flatten()
        packed |= zip(quarters.tolist(), _pack_quarters(registers[quarters], width), strict=True)
    groups = [torch.cat([packed[QUARTERS * g + q] for q in range(QUARTERS)], 1).flatten() for g in range(len(bits))]
    return torch.cat(groups).view(-1, CHUNK_BYTES)


def _pack_quarters(registers: Tensor, bits: int) -> Tensor:
    """int8 [quarters, steps, 8 registers, 32 lanes, 4] to uint8 [quarters, steps, bits * 128]."""
    aligned = (registers.int() << (8 - bits)) & 255
    planes, above = [], 0
    for plane in PLANES_OF[bits]:
        above += plane
        values = (aligned >> (8 - above)) & ((1 << plane) - 1)
        together = values.unflatten(2, (plane, 8 // plane))  # word, part
        at = torch.arange(8 - plane, -1, -plane, device=registers.device).view(-1, 1, 1)
        words = (together << at).sum(3)  # quarter, step, word, lane, byte
        planes.append(words.unflatten(2, (-1, min(plane, 4))).transpose(3, 4).flatten(2))
    return torch.cat(planes, 2).to(torch.uint8)
