"""What LayerNorm in the epilogue of the GEMM in front of it would gain on Hopper, by the rates of ``tiles.py``.

It is not built. A row of N channels is N / 128 tiles, so the blocks of a cluster would hold it, and LayerNorm would
follow behind a barrier of the cluster. The estimate is in its favour: the rows' statistics cost nothing beside the
meeting, every SM finds a place in a cluster, all blocks of one share its tokens, the sums are still at hand for the
codes. What stays: each block of a cluster waits for the others once a tile, finishes its outputs twice (the residual
stream and the codes), and cannot load ahead, because a cluster takes one tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vitq_kernels.ops.cuda.tiles import (
    EPILOGUE_INSTRUCTIONS,
    FILL_CLOCKS,
    LAUNCH_US,
    MEETING_CLOCKS,
    TILES,
    Gpu,
    Problem,
    Tile,
    architecture,
    rank,
    step_clocks,
)

LAYERNORM_BYTES = 3  # an element: 16 bits of the residual stream are read, a code is written
LAYERNORM_GBPS = 0.8 * 4300  # the target of kernels.md 5.3


@dataclass(frozen=True)
class Estimate:
    """Microseconds of a GEMM to the residual stream and the LayerNorm behind it."""

    two_kernels: float
    fused: float


def estimate(problem: Problem, gpu: Gpu) -> Estimate:
    """By the model at the head of ``tiles.py``, the best tile on either side; 8 blocks hold up to 1024 rows."""
    layernorm_us = LAUNCH_US + LAYERNORM_BYTES * problem.tokens * problem.rows / LAYERNORM_GBPS / 1e3
    fused = min(_fused_us(tile, problem, gpu) for tile in TILES if tile.wgmma)
    return Estimate(rank(problem, gpu)[0][1] + layernorm_us, fused)


def _fused_us(tile: Tile, problem: Problem, gpu: Gpu) -> float:
    cluster = -(-problem.rows // tile.rows)
    tile, clusters = replace(tile, cluster=cluster), gpu.sms // cluster
    turns = math.ceil(-(-problem.tokens // tile.tokens) / clusters)
    way_out = tile.rows * tile.tokens * EPILOGUE_INSTRUCTIONS / 128
    arch = architecture(gpu)
    clocks = FILL_CLOCKS + problem.steps * step_clocks(tile, problem, arch) + 2 * way_out + MEETING_CLOCKS
    return LAUNCH_US + turns * clocks / (1e3 * arch.ghz)
