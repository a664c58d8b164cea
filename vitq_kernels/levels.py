"""The best few integer levels for a distribution: codebooks of post-GELU activations (semantics S2, gelu levels)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitq_kernels.quantizers import SCALE_FLOOR

LOWEST, HIGHEST = -128, 127  # a level is an int8
FINE = 8  # bins of the histogram a unit


def level_scale(low: Tensor, high: Tensor) -> Tensor:
    """Real units per unit of a level, float32 [C]: the largest magnitude of a channel's range [low, high] is 127."""
    return torch.maximum(low.abs(), high.abs()).clamp_min(SCALE_FLOOR * HIGHEST) / HIGHEST


@dataclass
class LevelHistogram:
    """Weighted values in units of the levels, in bins of an eighth; values outside the levels count at the ends."""

    mass: np.ndarray = field(default_factory=lambda: np.zeros((HIGHEST - LOWEST) * FINE + 1))

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Adds values, float of any shape, each with its weight, float of a shape that broadcasts."""
        bins = ((values.clamp(LOWEST, HIGHEST) - LOWEST) * FINE).round().long().flatten()
        weight = weights.expand_as(values).double().flatten()
        self.mass += torch.bincount(bins, weight, len(self.mass)).cpu().numpy()

    def best_levels(self, count: int) -> Tensor:
        """The ``count`` distinct levels of least weighted squared distance from the values to their nearest level.

        Exact, by dynamic programming over all integers of an int8 (the scalar quantizer of Bruce, 1965, MIT technical
        report 429): the cost between two neighbouring levels depends on these two alone.

        Returns:
            int8 [count], ascending.
        """
        grid = np.arange(LOWEST, HIGHEST + 1)
        at = (grid - LOWEST) * FINE  # bin of each possible level
        place = LOWEST + np.arange(len(self.mass)) / FINE
        sums = [np.concatenate([[0.0], np.cumsum(self.mass * place**power)]) for power in range(3)]

        def cost(first: np.ndarray, end: np.ndarray, level: np.ndarray) -> np.ndarray:
            """Of the bins [first, end) at a level."""
            m0, m1, m2 = (s[end] - s[first] for s in sums)
            return m2 - 2 * level * m1 + level**2 * m0

        left, right = grid[:, None], grid[None, :]
        middle = (at[:, None] + at[None, :] + 1) // 2
        between = cost(np.broadcast_to(at[:, None], middle.shape), middle, left)
        between = between + cost(middle, np.broadcast_to(at[None, :], middle.shape), right)
        between[left >= right] = np.inf
        best = cost(np.zeros_like(at), at, grid)  # of all values below a level, that level being the lowest
        cameby = []
        for _ in range(count - 1):
            total = best[:, None] + between
            cameby.append(total.argmin(axis=0))
            best = total.min(axis=0)
        chosen = [int((best + cost(at, np.full_like(at, len(self.mass)), grid)).argmin())]
        for previous in reversed(cameby):
            chosen.append(int(previous[chosen[-1]]))
        return torch.from_numpy(grid[chosen[::-1]].astype(np.int8))
