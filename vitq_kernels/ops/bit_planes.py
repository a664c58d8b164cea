"""The weight layout ``bit_planes``: every row in the planes that its width needs, in the model's row order.

A b-bit code, left-aligned in its byte (``w * 2^(8-b)``), is the OR of planes of 8, 4, 2 and 1 bits, from the top bit
down: 7 = 4 + 2 + 1, 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1. No sign extension and no zero point: the top bit is the sign.

A kernel takes a *window* of 128 consecutive rows through one decoder, that of the widest row in it. A narrower row lies
in as many of the window's planes as hold its bits: in a 6-bit window (4 + 2) a 4-bit row has the plane of 4 alone, and
reads zeros, not memory, for the other. So rows of several widths mix freely inside a window, outputs come out in the
model's order, and a mixed layer costs what its widest rows cost. (The order of the row groups is undone here, when the
layout is made: Triton cannot scatter rows from shared memory, and scattered bytes to global memory would multiply the
sectors written by up to 8.) What it costs is bytes on the device: a row may occupy up to the window's next prefix.

The columns are padded with zeros to whole steps of the kernel's loop. Within a step of ``block_k`` columns, byte i of
a plane of p bits holds the columns i, q + i, 2q + i, ... with q = block_k * p / 8, at the bits that PART_BITS lists:
the kernel then unpacks with shifts and concatenations along K, and no byte ever moves between threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.packing import PackedWeight, unpack_weight
from vitq_kernels.spec import MAX_BITS, RowGroups

WEIGHT_LAYOUT = "bit_planes"
WINDOW_ROWS = 128  # rows of one decoder: as many as the largest tile has
PLANES = (8, 4, 2, 1)
MOST_COLS = (1 << 17) - 1  # a left-aligned sum of them fits int32: 2^17 * 128 * 128 = 2^31
MOST_CODES = (1 << 31) - 1  # offsets inside a plane are int32
MOST_WIDTHS = 1 << (MAX_BITS + 1)  # one above the largest set of widths as a bit mask
# Planes of a window whose widest row has b bits.
PLANES_OF = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
# Lowest bit, in the byte, of each part of a plane; as concat(p << 4, p), then << 2, then << 1 undo it.
PART_BITS = {8: (0,), 4: (0, 4), 2: (0, 4, 2, 6), 1: (0, 4, 2, 6, 1, 5, 3, 7)}


def block_k(cols: int) -> int:
    """Columns of a step of the kernel's loop: 128, or 64 where the last half of a step would be all padding."""
    return 64 if 0 < cols % 128 <= 64 else 128


@dataclass(frozen=True)
class BitPlanes:
    """A weight [N, K] in this layout; the list of its tensors is what the ops take as ``weight``."""

    widths: Tensor  # int8 [set of the windows' widths as a bit mask, 0]: no data, known on the host from its shape
    window_bits: Tensor  # int32 [ceil(N/128)], widest row of each window
    shifts: Tensor  # int32 [N], 8 - bits of each row: what the accumulator is shifted back by
    places: Tensor  # int32 [4, N], each row's place in the planes of 8, 4, 2, 1 bits, or -1
    planes: tuple[Tensor, ...]  # int8 [rows, padded K] of 8 bits; int32 [rows, padded K * p / 32] for p of 4, 2, 1

    def tensors(self) -> list[Tensor]:
        """As the ops take it."""
        return [self.widths, self.window_bits, self.shifts, self.places, *self.planes]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> BitPlanes:
        """The inverse of ``tensors``."""
        widths, window_bits, shifts, places, *planes = tensors
        return cls(widths, window_bits, shifts, places, tuple(planes))

    def present(self) -> tuple[int, ...]:
        """Widths of the windows, ascending."""
        return tuple(b for b in range(2, MAX_BITS + 1) if self.widths.shape[0] >> b & 1)

    def is_plausible(self) -> bool:
        """Whether the planes' sizes fit the widths, as far as shapes tell."""
        widths, rows = self.present(), self.shifts.shape[0]
        held = {bits for bits, plane in zip(PLANES, self.planes, strict=True) if plane.shape[0]}
        fits = all(plane.shape[0] <= rows for plane in self.planes)
        return (
            fits and bool(widths) and self.widths.shape[0] < MOST_WIDTHS and held >= {PLANES_OF[b][0] for b in widths}
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def forms(rows: int, cols: int) -> list[tuple[str, torch.dtype, tuple[object, ...]]]:
    """Name, dtype and shape of each tensor of a weight [rows, cols]; a string is a size that its data decides."""
    step = block_k(cols)
    padded = -(-cols // step) * step
    return [
        ("widths", torch.int8, ("set of widths", 0)),
        ("window_bits", torch.int32, (-(-rows // WINDOW_ROWS),)),
        ("shifts", torch.int32, (rows,)),
        ("places", torch.int32, (len(PLANES), rows)),
        ("plane 8", torch.int8, ("rows", padded)),
        *((f"plane {bits}", torch.int32, ("rows", padded * bits // 32)) for bits in PLANES[1:]),
    ]


def prepare_weight(weight: PackedWeight, input_bits: int = MAX_BITS) -> list[Tensor]:
    """The canonical packed weight in this layout, whatever the input's width; see BitPlanes for shapes and dtypes.

    Raises:
        ValueError: the weight has more columns or codes than the kernels' int32 sums and offsets hold.
    """
    rows, cols = weight.groups.rows, weight.cols
    if cols > MOST_COLS or rows * (cols + 127) > MOST_CODES:
        raise ValueError(
            f"a weight in layout {WEIGHT_LAYOUT} must have at most {MOST_COLS} columns and {MOST_CODES} codes, "
            f"got {rows} x {cols}"
        )
    codes, device = unpack_weight(weight), weight.data.device
    row_bits, windows, places = place_rows(weight.groups)
    padded = torch.nn.functional.pad(codes, (0, -weight.cols % block_k(weight.cols)))
    shifts = torch.tensor([8 - b for b in row_bits], dtype=torch.int32, device=device)
    aligned = (padded.int() << shifts[:, None]) & 255
    above = torch.zeros(len(row_bits), 1, dtype=torch.int32, device=device)  # bits of a row in the planes so far
    planes, places_of_rows = [], torch.tensor(places, dtype=torch.int32, device=device)
    for bits, place in zip(PLANES, places_of_rows, strict=True):
        has = place >= 0
        values = (aligned >> (8 - bits - above).clamp_min(0))[has] & ((1 << bits) - 1)
        planes.append(_pack_plane(values, bits, block_k(weight.cols)))
        above += bits * has[:, None]
    mask = sum(1 << b for b in set(windows))
    return BitPlanes(
        torch.empty(mask, 0, dtype=torch.int8, device=device),
        torch.tensor(windows, dtype=torch.int32, device=device),
        shifts,
        places_of_rows,
        tuple(planes),
    ).tensors()


def place_rows(groups: RowGroups) -> tuple[list[int], list[int], list[list[int]]]:
    """Width of each row, widest row of each window, and each row's place in each plane (or -1), as in BitPlanes."""
    row_bits = groups.row_bits()
    windows = [max(row_bits[i : i + WINDOW_ROWS]) for i in range(0, len(row_bits), WINDOW_ROWS)]
    places = [[-1] * len(row_bits) for _ in PLANES]
    used = [0] * len(PLANES)
    for row, bits in enumerate(row_bits):
        held = 0
        for plane in PLANES_OF[windows[row // WINDOW_ROWS]]:
            if held < bits:
                index = PLANES.index(plane)
                places[index][row], used[index], held = used[index], used[index] + 1, held + plane
    return row_bits, windows, places


def _pack_plane(values: Tensor, bits: int, step: int) -> Tensor:
    """int32 [R, padded K] of ``bits``-bit values to a plane; its words are little-endian."""
    rows, cols = values.shape
    parts = values.view(rows, cols // step, 8 // bits, step * bits // 8)
    shifts = torch.tensor(PART_BITS[bits], device=values.device).view(1, 1, -1, 1)
    packed = (parts << shifts).sum(2).view(rows, cols * bits // 8)
    return packed.to(torch.uint8).view(torch.int8 if bits == 8 else torch.int32)
