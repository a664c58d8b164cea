"""AdaLog's fast progressive combining search (FPCS): a coarse grid, then ever finer scales around the best of it.

Source: Wu et al., ECCV 2024, arXiv:2407.12951; code GoatWu/AdaLog 75a57d2 (methods.md 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.presets.ranges import tails

# (scales [P, G], companions [P, G]) to errors [P, G]: G groups are searched side by side.
Errors = Callable[[Tensor, Tensor], Tensor]
SCALE_FLOOR = 1e-4  # the released code's, of activations; weights have it too here


@dataclass(frozen=True)
class Grid:
    """Candidate pairs of a scale and a companion (a zero point, or the base of a logarithm)."""

    scale: Tensor  # [P, G]
    companion: Tensor  # [P, G]
    spacing: Tensor  # [G], between neighbouring scales


def uniform_grid(rows: Tensor, bits: int, zero_points: int, candidates: int) -> Grid:
    """Scales between those of the inner 80 % and of the whole range, times the middle zero points.

    A group of a single value, which gives no scale, is spanned together with 0.

    Args:
        rows: float [G, T], the numbers of each group.
        bits: codes are 0..2^bits - 1.
        zero_points: how many; they lie around 2^(bits-1).
        candidates: scales times zero points.
    """
    count = max(2, candidates // zero_points)
    (low, high), (least, most) = tails(rows, 0.9), tails(rows, 1.0)
    alone = torch.where(most <= least, most.abs(), 0.0)
    low, least = low - alone, least - alone
    steps = torch.linspace(0, 1, count, device=rows.device)[:, None]
    scale = torch.lerp(high - low, most - least, steps) / ((1 << bits) - 1)  # [count, G]
    first = (1 << (bits - 1)) - zero_points // 2
    zero = torch.arange(first, first + zero_points, device=rows.device, dtype=rows.dtype)
    return Grid(
        scale.repeat(zero_points, 1).clamp_min(SCALE_FLOOR),
        zero.repeat_interleave(count)[:, None].expand(-1, rows.shape[0]),
        scale[1] - scale[0],
    )


def progressive_search(grid: Grid, errors: Errors, *, kept: int, refined: int, steps: int) -> tuple[Tensor, Tensor]:
    """The pair of least error that FPCS finds.

    Args:
        grid: the first candidates.
        errors: what is minimised, group by group.
        kept: candidates that survive a step.
        refined: scales tried around each of them in the next step, over one spacing; the spacing then falls to
            ``1 / (refined - 0.5)`` of itself.
        steps: evaluations in all; 1 is a plain grid search.

    Returns:
        scale [G] and companion [G].
    """
    scale, companion, spacing = grid.scale, grid.companion, grid.spacing
    for step in range(steps):
        last = step == steps - 1
        best = errors(scale, companion).topk(1 if last else min(kept, len(scale)), dim=0, largest=False).indices
        scale, companion = scale.gather(0, best), companion.gather(0, best)
        if not last:
            offsets = torch.linspace(-0.5, 0.5, refined, device=scale.device)[:, None] * spacing
            scale = (scale[:, None] + offsets).flatten(0, 1).clamp_min(SCALE_FLOOR)
            companion = companion.repeat_interleave(refined, 0)
            spacing = spacing / (refined - 0.5)
    return scale[0], companion[0]
