"""Windows of a map of tokens, and the positions of two tokens to each other: index arithmetic, made once a model.

Source: Liu et al., "Swin Transformer", ICCV 2021, arXiv:2103.14030, sections 3.2 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

# Of an integer bias, in units of the score: with a mask of the same size it stays inside what the op takes.
BIAS_LIMIT = 1 << 28


@dataclass(frozen=True)
class Windows:
    """How a map of tokens is shifted cyclically, padded below and on the right, and cut into windows.

    A place is (row, column) of the shifted and padded map. The tokens of the padded map, ``tokens`` in all, are counted
    row by row. Windows, places of a window and their patterns are counted row by row too.
    """

    grid: tuple[int, int]  # rows and columns of the map
    size: tuple[int, int]  # of a window
    shift: tuple[int, int] = (0, 0)  # row r of the shifted map is row r + shift of the map

    def at(self, grid: tuple[int, int]) -> Windows:
        """The same windows on a map of another size."""
        return self if grid == self.grid else replace(self, grid=grid)

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the padded map."""
        rows, columns = (-(-length // size) * size for length, size in zip(self.grid, self.size, strict=True))
        return rows, columns

    @property
    def count(self) -> int:
        """How many windows W there are."""
        return (self.padded[0] // self.size[0]) * (self.padded[1] // self.size[1])

    @property
    def places(self) -> int:
        """How many tokens S a window holds."""
        return self.size[0] * self.size[1]

    @property
    def tokens(self) -> int:
        """L = W * S, padding included."""
        return self.padded[0] * self.padded[1]

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """The token at each place of each window: int32 [W, S], a permutation of 0..L-1."""
        (rows, columns), (height, width) = self.padded, self.grid
        row = torch.arange(rows, device=device)[:, None]
        column = torch.arange(columns, device=device)[None]
        inside = (row < height) & (column < width)
        # timm pads what is shifted already: only the places of the map itself are shifted.
        token = torch.where(
            inside,
            (row + self.shift[0]) % height * columns + (column + self.shift[1]) % width,
            row * columns + column,
        )
        return self._cut(token).int()

    def pattern(self, device: torch.device | str | None = None) -> Tensor:
        """The row of ``mask`` that each window takes: int32 [W]."""
        last = torch.zeros(self.padded, dtype=torch.int32, device=device)
        if self.shift[0]:
            last[-self.size[0] :] += 1
        if self.shift[1]:
            last *= 2
            last[:, -self.size[1] :] += 1
        return self._cut(last)[:, 0].contiguous()

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """The pairs of places that must not see each other, of each pattern: bool [P, S, S], P = 1, 2 or 4.

        Along a side with a shift, the last window holds places from both ends of the map.
        """
        regions = []
        for size, shift in zip(self.size, self.shift, strict=True):
            wrapped = torch.arange(size, device=device) >= size - shift
            regions.append(torch.stack([torch.zeros_like(wrapped), wrapped]) if shift else wrapped[None] & False)
        rows, columns = (
            region[:, :, None] != region[:, None, :] for region in regions
        )  # [1 or 2, size, size]: which rows, which columns of a window are apart
        apart = rows[:, None, :, None, :, None] | columns[None, :, None, :, None, :]
        return apart.flatten(4, 5).flatten(2, 3).flatten(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """Tokens [B, L, ...] to windows [B, W, S, ...]."""
        return x[:, self.table(x.device).long()]

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of ``gather``."""
        return x.flatten(1, 2)[:, self.table(x.device).flatten().long().argsort()]

    def pad(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """A map [B, H, W, C] to the tokens [B, L, C] of the padded one; ``fill`` [C] instead of zeros."""
        below, right = self.padded[0] - self.grid[0], self.padded[1] - self.grid[1]
        if fill is None:
            return F.pad(x, (0, 0, 0, right, 0, below)).flatten(1, 2)
        if right:
            x = torch.cat([x, fill.expand(*x.shape[:2], right, -1)], dim=2)
        if below:
            x = torch.cat([x, fill.expand(x.shape[0], below, x.shape[2], -1)], dim=1)
        return x.flatten(1, 2)

    def crop(self, x: Tensor) -> Tensor:
        """Tokens [B, L, C] to the map [B, H, W, C] without its padding."""
        return x.unflatten(1, self.padded)[:, : self.grid[0], : self.grid[1]]

    def _cut(self, x: Tensor) -> Tensor:
        """Places of the padded map to windows, [W, S]."""
        rows, columns = self.padded[0] // self.size[0], self.padded[1] // self.size[1]
        return x.view(rows, self.size[0], columns, self.size[1]).transpose(1, 2).reshape(rows * columns, -1)


def relative_positions(size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Which entry of a table of (2h - 1)(2w - 1) relative positions each pair of places takes: int64 [S, S]."""
    row = torch.arange(size[0], device=device).repeat_interleave(size[1])
    column = torch.arange(size[1], device=device).repeat(size[0])
    down = row[:, None] - row[None] + size[0] - 1
    return down * (2 * size[1] - 1) + column[:, None] - column[None] + size[1] - 1


def positions_with_class(grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """``relative_positions`` of a whole grid behind one class token: int64 [1 + h * w, 1 + h * w].

    The table's last three entries are for class to patch, patch to class and class to class (BEiT, arXiv:2106.08254).
    """
    patches = relative_positions(grid, device)
    count = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    result = patches.new_full((len(patches) + 1,) * 2, count + 2)
    result[1:, 1:] = patches
    result[0, 1:], result[1:, 0] = count, count + 1
    return result


def merged_patches(x: Tensor) -> Tensor:
    """A map [B, H, W, C] to its patches of 2x2 tokens [B, H/2, W/2, 4 * C], padded with zeros to even sides.

    Channels lie as timm's ``PatchMerging`` has them: column after column of a patch, its rows inside.
    """
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, 2, W/2, 2, C]
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)
