"""Rotary position embedding: every pair of channels of a query or key is turned by an angle of the token's place.

Source: Su et al., "RoFormer", 2021, arXiv:2104.09864, section 3.4; the tables are laid out as timm's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_prefix(table: Tensor, prefix: int) -> Tensor:
    """A table [..., N, 2D] for ``prefix`` tokens more, which stand first and are not turned: [..., prefix + N, 2D]."""
    dim = table.shape[-1] // 2
    still = torch.cat([table.new_zeros(dim), table.new_ones(dim)])
    return torch.cat([still.expand(*table.shape[:-2], prefix, -1), table], dim=-2)


def rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """``x cos + turn(x) sin``, in the dtype of x.

    Args:
        x: float [..., S, D].
        table: sines and cosines side by side, [S, 2 * D], or [H, S, 2 * D] of heads of their own.
        half: the pairs are channels d and d + D/2; else 2d and 2d + 1.
    """
    sin, cos = table.chunk(2, -1)
    if half:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
