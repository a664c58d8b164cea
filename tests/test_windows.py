"""Windows against timm's own partition, shift and mask; positions against timm's index; merging against its layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_swins import SWINS, make_swin
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    get_relative_position_index,
    window_partition,
)
from torch import Tensor, nn

from tests.numerics import assert_bitwise_equal, integers
from vitq_kernels.windows import Windows, merged_patches, relative_positions

# grid, window, shift
GEOMETRIES = {
    "whole": ((8, 8), (4, 4), (2, 2)),
    "no-shift": ((8, 12), (4, 4), (0, 0)),
    "rows-only": ((8, 4), (4, 4), (2, 0)),
    "columns-only": ((4, 8), (4, 4), (0, 2)),
    "odd-window": ((14, 21), (7, 7), (3, 3)),
    "padded": ((9, 10), (4, 4), (2, 2)),
    "padded-oblong": ((5, 9), (3, 5), (1, 2)),
    "less-than-a-window": ((5, 6), (7, 7), (3, 3)),
    "one-token": ((1, 1), (1, 1), (0, 0)),
}
CASES = [pytest.param(Windows(*geometry), id=name) for name, geometry in GEOMETRIES.items()]


def partitioned(x: Tensor, windows: Windows) -> Tensor:
    """timm's way to the windows of a map [B, H, W, C]: [B, W, S, C]."""
    x = torch.roll(x, (-windows.shift[0], -windows.shift[1]), (1, 2))
    below, right = (whole - side for whole, side in zip(windows.padded, windows.grid, strict=True))
    return window_partition(F.pad(x, (0, 0, 0, right, 0, below)), windows.size).flatten(1, 2).unflatten(0, (len(x), -1))


def counted(windows: Windows) -> Tensor:
    """A map [2, H, W, 3] of numbers that all differ and are not 0."""
    return torch.arange(1, 1 + 6 * windows.grid[0] * windows.grid[1]).view(2, *windows.grid, 3)


@pytest.mark.parametrize("windows", CASES)
def test_tokens_lie_where_timm_puts_them(windows: Windows) -> None:
    x = counted(windows)
    assert_bitwise_equal(windows.gather(windows.pad(x)), partitioned(x, windows))


@pytest.mark.parametrize("windows", CASES)
def test_the_table_is_a_permutation(windows: Windows) -> None:
    table = windows.table()
    assert table.dtype == torch.int32
    assert table.shape == (windows.count, windows.places)
    assert sorted(table.flatten().tolist()) == list(range(windows.tokens))


@pytest.mark.parametrize("windows", CASES)
def test_scatter_and_crop_go_back(windows: Windows) -> None:
    x = counted(windows)
    assert_bitwise_equal(windows.crop(windows.scatter(windows.gather(windows.pad(x)))), x)


@pytest.mark.parametrize("windows", CASES)
def test_the_mask_is_timms(windows: Windows) -> None:
    block = SwinTransformerBlock(8, windows.grid, 1, window_size=windows.size, always_partition=True)
    block.shift_size = windows.shift
    expected = block.get_attn_mask(device=torch.device("cpu"), dtype=torch.float32)
    found = windows.mask()[windows.pattern().long()]
    assert windows.mask().shape[0] == (1 + bool(windows.shift[0])) * (1 + bool(windows.shift[1]))
    if expected is None:
        assert not found.any()
    else:
        assert_bitwise_equal(found, expected != 0)


def test_padding_may_hold_anything() -> None:
    windows, fill = Windows((3, 5), (4, 4)), torch.tensor([7, -8], dtype=torch.int8)
    x = integers(-100, 100, (2, 3, 5, 2), 0).to(torch.int8)
    padded = windows.pad(x, fill).unflatten(1, windows.padded)
    assert_bitwise_equal(padded[:, :3, :5], x)
    assert (padded[:, 3:] == fill).all()
    assert (padded[:, :, 5:] == fill).all()


@pytest.mark.parametrize("size", [(7, 7), (1, 4), (3, 2), (8, 8), (12, 12), (16, 16), (24, 24)], ids=str)
def test_positions_are_timms(size: tuple[int, int]) -> None:
    assert_bitwise_equal(relative_positions(size), get_relative_position_index(*size))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1), (2, 7)], ids=str)
def test_merged_patches_are_what_timms_norm_reads(grid: tuple[int, int]) -> None:
    merging = PatchMerging(4)
    merging.norm, merging.reduction = nn.Identity(), nn.Identity()
    x = torch.arange(2.0 * grid[0] * grid[1] * 4).view(2, *grid, 4)
    assert_bitwise_equal(merged_patches(x), merging(x))


@pytest.mark.parametrize("variant", SWINS)
def test_blocks_of_timm_have_these_windows(variant: str) -> None:
    for stage in make_swin(**SWINS[variant]).layers:
        for block in stage.blocks:
            windows = Windows(tuple(block.input_resolution), tuple(block.window_size), tuple(block.shift_size))
            if block.attn_mask is not None:
                assert_bitwise_equal(windows.mask()[windows.pattern().long()], block.attn_mask != 0)


def test_windows_at_another_size_are_theirs() -> None:
    windows = Windows((8, 8), (4, 4), (2, 2))
    assert windows.at((8, 8)) is windows
    assert windows.at((9, 4)) == Windows((9, 4), (4, 4), (2, 2))
