"""Logical integer weights to packed bytes and back: the canonical on-disk layout, an exact pair of functions.

The layout, group after group in stored order: a group of R rows, K columns and b bits is one little-endian bit stream
of its R*K codes, row after row; code i occupies bits [b*i, b*i + b), two's complement, lowest bit first; the stream is
filled with zero bits to a whole byte (never needed when R*K is a multiple of 8). Beside it lies one byte a row, its
place in the tile's model order, for the tiles that have more than one width.

Kernel layouts are made from this one when a module reaches its device and are never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.spec import QuantFormat, RowGroups


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] of signed 2..8-bit codes in the canonical layout."""

    data: Tensor  # uint8 [groups.weight_bytes(cols)]
    row_order: Tensor  # uint8 [groups.order_bytes]
    groups: RowGroups
    cols: int


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes as a little-endian bit stream.

    Args:
        codes: int8, any shape, in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2..8.

    Returns:
        uint8 [ceil(numel * bits / 8)].

    Raises:
        ValueError: dtype or range differ from the above.
    """
    fmt = QuantFormat(bits)
    if codes.dtype != torch.int8:
        raise ValueError(f"pack_codes: codes must be int8, got {codes.dtype}")
    if codes.numel() and not fmt.qmin <= int(codes.min()) <= int(codes.max()) <= fmt.qmax:
        raise ValueError(
            f"pack_codes: {bits}-bit codes must lie in [{fmt.qmin}, {fmt.qmax}], "
            f"got [{int(codes.min())}, {int(codes.max())}]"
        )
    flat = codes.flatten().long() & ((1 << bits) - 1)
    size = -(-flat.numel() * bits // 8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    # Eight codes fill exactly `bits` bytes, so one int64 word holds them.
    shifts = torch.arange(8, device=codes.device)
    words = (flat << (bits * shifts)).sum(1, keepdim=True)
    return ((words >> (8 * shifts[:bits])) & 255).to(torch.uint8).flatten()[:size]


def unpack_codes(data: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of ``pack_codes``: uint8 [ceil(count * bits / 8)] to int8 [count].

    Raises:
        ValueError: dtype or size differ from the above.
    """
    QuantFormat(bits)
    size = -(-count * bits // 8)
    if data.dtype != torch.uint8 or data.shape != (size,):
        raise ValueError(f"unpack_codes: data must be uint8 [{size}], got {data.dtype} {list(data.shape)}")
    shifts = torch.arange(8, device=data.device)
    octets = torch.nn.functional.pad(data.long(), (0, -data.numel() % bits)).view(-1, bits)
    words = (octets << (8 * shifts[:bits])).sum(1, keepdim=True)
    sign = 1 << (bits - 1)
    flat = ((words >> (bits * shifts)) & ((1 << bits) - 1)).flatten()[:count]
    return ((flat ^ sign) - sign).to(torch.int8)


def pack_weight(codes: Tensor, groups: RowGroups) -> PackedWeight:
    """Packs a weight's codes, int8 [N, K] in the model's row order, each row within the width of its group.

    Raises:
        ValueError: shape, dtype or range do not fit ``groups``.
    """
    if codes.dim() != 2 or codes.shape[0] != groups.rows:
        raise ValueError(f"pack_weight: codes must be [N={groups.rows}, K], got {list(codes.shape)}")
    stored = codes if groups.order is None else codes[torch.tensor(groups.order, device=codes.device)]
    data = torch.cat([pack_codes(stored[start:stop], bits) for start, stop, bits in groups.groups()])
    order = groups.order or range(groups.rows)
    offsets = [order[i] - start for start, end in groups.mixed_tiles() for i in range(start, end)]
    return PackedWeight(data, torch.tensor(offsets, dtype=torch.uint8, device=codes.device), groups, codes.shape[1])


def unpack_weight(weight: PackedWeight) -> Tensor:
    """The inverse of ``pack_weight``: int8 [N, K] in the model's row order.

    Raises:
        ValueError: the bytes do not fit the groups.
    """
    groups, cols = weight.groups, weight.cols
    expected = groups.weight_bytes(cols)
    if weight.data.shape != (expected,):
        raise ValueError(
            f"unpack_weight: data must be uint8 [{expected}] for {groups.rows}x{cols}, got {list(weight.data.shape)}"
        )
    pieces, offset = [], 0
    for start, stop, bits in groups.groups():
        count = (stop - start) * cols
        size = -(-count * bits // 8)
        pieces.append(unpack_codes(weight.data[offset : offset + size], count, bits).view(stop - start, cols))
        offset += size
    stored = torch.cat(pieces)
    codes = torch.empty_like(stored)
    codes[stored_rows(groups, weight.row_order)] = stored
    return codes


def stored_rows(groups: RowGroups, row_order: Tensor) -> Tensor:
    """Model row of each stored row, int64 [N], from the order bytes (tiles of one width keep the model's order).

    Raises:
        ValueError: the bytes are not a permutation of the rows inside every tile.
    """
    if row_order.dtype != torch.uint8 or row_order.shape != (groups.order_bytes,):
        raise ValueError(
            f"row_order must be uint8 [{groups.order_bytes}] for {groups.rows} rows, "
            f"got {row_order.dtype} {list(row_order.shape)}"
        )
    rows = torch.arange(groups.rows, device=row_order.device)
    offset = 0
    for start, end in groups.mixed_tiles():
        places = row_order[offset : offset + end - start].long()
        if not torch.equal(places.sort().values, torch.arange(end - start, device=places.device)):
            raise ValueError(f"row_order must permute the rows inside each tile; tile {start}..{end - 1} does not")
        rows[start:end] = start + places
        offset += end - start
    return rows


def groups_with_order(groups: RowGroups, row_order: Tensor) -> RowGroups:
    """``groups`` with the order that the bytes spell; raises ValueError if they are no permutation."""
    order: Sequence[int] = stored_rows(groups, row_order).tolist()
    return RowGroups(groups.rows, groups.bits, groups.group_rows, tuple(order))
