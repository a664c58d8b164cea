"""Which tile, and how many parts of K, a linear layer gets: the kernel's table, and a model that ranks it.

``TILES`` is the tables of csrc/gemm_tiles.cuh and gemm_sm90_tiles.cuh (a test compares them). The model, in clocks of
one SM, for a tile of R rows and T tokens and steps of 64 columns:

    mma   = R T 64 / rate                 ``rate`` products a clock of mma.sync, times what a loop reaches of it
    load  = (R b/8 + T) 64 / l2           bytes from L2, ``l2`` a clock and SM
    chain = FILL + steps max(mma, load) + R T (EPILOGUE / 128 + REORDER)   one block from start to end
    time  = max(ceil(n/r) chain, n steps max(mma, load))                   n blocks an SM, r at a time

(REORDER where rows of several widths pass through shared memory; all outputs of wgmma do, and find their rows there for
nothing) plus a launch, and for several parts a second launch and their sums' bytes. What b bits add to the loop of
mma.sync with 8-bit products is hidden under mma or load for every tile (benchmarks/results/cuda_cost_model.csv). Sizes
are facts; ``reached``, ``l2``, FILL, EPILOGUE and the launch are assumptions until a GPU has measured them
(``cuda_microbenchmarks`` of device_check).

On Hopper wgmma takes the place of mma.sync: the rate is the whole peak, a step waits for shared memory too (tokens read
by each warpgroup, bytes that arrive, weights read: docs/cuda_cost_model.md), and a block fills its stages only once:
FILL + n (steps max(mma, load, shared) + way out). How much of one warpgroup's way out lies under the other's products
is not known, so nothing of it is counted. Parts of K are the blocks of a cluster there, in one launch: each has the
steps of a part and a share of the way out, and in between

    exchange = MEETING + 4 R T / 128 + 4 R T (parts - 1) / parts / DSMEM   sums staged, and read by the others

A LayerNorm behind the layer is a kernel more, which starts early, or on wgmma part of the way out of a cluster that
holds all rows (csrc/gemm_sm90_norm.cuh), which has one turn:

    time = turns (FILL + steps max(mma, load, shared) + R T (EPILOGUE + NORM) / 128 + 2 NORM_ONCE + MEETING)"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

from vitq_kernels.ops.cuda.gpus import Architecture, Gpu, architecture
from vitq_kernels.ops.mma_fragments import GROUP_ROWS, STEP_COLS

FILL_CLOCKS = 1500  # vectors and first stages from memory
EPILOGUE_INSTRUCTIONS = 12.0  # an output, on average over the epilogues
REORDER_CLOCKS, REORDER_WORD_CLOCKS = 0.02, 0.08  # an output that finds its row through shared memory: code, word
LAUNCH_US = 2.5  # a kernel inside a graph (../shared/docs/kernels.md 5)
NATIVE_4BIT = (80, 86, 89)  # with s4 products in the tensor cores; Hopper and later have none
PARTS = (1, 2, 3, 4, 6, 8, 12)
WGMMA_PARTS = (1, 2, 4)  # the blocks of a cluster
MEETING_CLOCKS = 1000  # two barriers of a cluster, the first sums from another SM; assumed
DSMEM_BYTES = 14  # a clock and SM from other SMs, assumed: what is published adds up to about 3.3 TB/s of a H100
VECTOR_BYTES = 20  # a row of the tile: four vectors and where it is staged
EARLY_LAUNCH_US = 1.7  # a kernel that starts while the one in front ends; assumed
NORM_INSTRUCTIONS, NORM_ONCE = 14.0, 450  # an output more with LayerNorm; a thread of 256; by the machine code
MOST_NORM_TOKENS, MOST_NORM_ROWS, MOST_NORM_TILES = 192, 1024, 65535  # of a tile, of the layer: csrc/launchers.h
NORM_BYTES, NORM_GBPS = 3, 0.8 * 4300  # of LayerNorm's own kernel; the target of ../shared/docs/kernels.md 5.3
BARRIER_BYTES = 1024  # of wgmma, with what aligns the stages behind them
STEPS_OF_STAGE, WGMMA_WORKERS = 2, 256  # of wgmma; threads that multiply


@dataclass(frozen=True)
class Tile:
    """A row of the kernel's table."""

    rows: int
    tokens: int
    threads: int
    stages: int
    blocks: int  # an SM that the registers leave room for
    wgmma: bool = False  # Hopper's kernel
    cluster: int = 1  # blocks that share tokens, one below the other

    def parts(self) -> tuple[int, ...]:
        """Into how many parts of K the kernel can cut."""
        return WGMMA_PARTS if self.wgmma else PARTS

    def exchange_clocks(self, parts: int) -> float:
        """Clocks from the last product of a part on wgmma until its block has its share of the sums."""
        sum_bytes = 4 * self.rows * self.tokens
        return MEETING_CLOCKS + sum_bytes / 128 + sum_bytes * (1 - 1 / parts) / DSMEM_BYTES if parts > 1 else 0.0

    def step_bytes(self, widest: int) -> int:
        """Bytes of one step of 64 columns, for a weight whose widest rows have ``widest`` bits."""
        return STEP_COLS * self.tokens + STEP_COLS * self.rows * widest // 8

    def copied_bytes(self, widest: int) -> float:
        """Bytes that a block asks of L2 for a step."""
        return self.step_bytes(widest) - STEP_COLS * self.tokens * (1 - 1 / self.cluster)

    def blocks_of(self, rows: int, tokens: int) -> int:
        """How many blocks compute so many outputs: whole clusters."""
        return -(-rows // (self.rows * self.cluster)) * -(-tokens // self.tokens) * self.cluster

    def cluster_of_rows(self, rows: int) -> int:
        """How many blocks hold all rows for the same tokens: whole clusters of those that share tokens."""
        return self.cluster * -(-rows // (self.rows * self.cluster))

    def shared_clocks(self, widest: int) -> float:
        """Clocks of shared memory of a step of wgmma: all bytes come in and are read, tokens by each warpgroup."""
        read = STEP_COLS * (self.rows // GROUP_ROWS * self.tokens + self.rows * widest / 8)
        return (read + self.step_bytes(widest)) / 128

    def shared_bytes(self, widest: int) -> int:
        """Shared memory of a block; mma.sync's staged outputs fit where the stages lay, wgmma's lie beside them."""
        stages = self.stages * self.step_bytes(widest)
        if not self.wgmma:
            return VECTOR_BYTES * self.rows + stages
        staged = self.rows * max(self.tokens, 4 * 64)  # codes of all tokens, or words of 64
        return STEPS_OF_STAGE * stages + staged + BARRIER_BYTES


TILES = (
    Tile(256, 128, 256, 3, 1),
    Tile(128, 128, 128, 3, 2),
    Tile(256, 64, 128, 3, 2),
    Tile(128, 64, 128, 4, 3),
    Tile(256, 32, 128, 4, 3),
    Tile(64, 64, 64, 4, 6),
    Tile(128, 256, 384, 4, 1, wgmma=True, cluster=2),
    Tile(128, 192, 384, 4, 1, wgmma=True, cluster=2),
    Tile(128, 128, 384, 4, 1, wgmma=True, cluster=2),
    Tile(128, 64, 384, 4, 1, wgmma=True),
)


@dataclass(frozen=True)
class Problem:
    """A linear layer as the choice sees it."""

    tokens: int
    rows: int
    cols: int
    widest: int  # bits of the widest rows
    reordered: bool  # rows are stored in another order than the model's
    native4: bool  # 4-bit products
    words: bool = False  # outputs are float32 until they are stored, not codes
    norm: bool = False  # a LayerNorm follows

    @property
    def steps(self) -> int:
        """Steps of the kernel's loop."""
        return -(-self.cols // STEP_COLS)


@dataclass(frozen=True)
class Plan:
    """How a layer is launched."""

    tile: int  # in TILES
    parts: int = 1  # of K
    norm: bool = False  # the LayerNorm that follows is in the same launch

    @property
    def has_workspace(self) -> bool:
        """Whether the parts' sums go through memory, and a second kernel adds them."""
        return self.parts > 1 and not TILES[self.tile].wgmma

    def __str__(self) -> str:
        tile = TILES[self.tile]
        parts = f", {self.parts} parts" if self.parts > 1 else ""
        norm = ", LayerNorm" if self.norm else ""
        return f"{tile.rows} rows x {tile.tokens} tokens, {tile.threads // 32} warps, {tile.stages} stages{parts}{norm}"


_forced: ContextVar[Plan | None] = ContextVar("vitq_cuda_plan", default=None)
_asked: ContextVar[list[Problem] | None] = ContextVar("vitq_cuda_problems", default=None)


@contextlib.contextmanager
def forced(plan: Plan | None) -> Iterator[None]:
    """Inside the ``with`` block every linear layer is launched so; None: as the model says."""
    token = _forced.set(plan)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def asked() -> Iterator[list[Problem]]:
    """Notes the problems of the linear layers that run inside the ``with`` block."""
    problems: list[Problem] = []
    token = _asked.set(problems)
    try:
        yield problems
    finally:
        _asked.reset(token)


def choose(problem: Problem, gpu: Gpu) -> Plan:
    """The forced plan, else the model's first."""
    noted = _asked.get()
    if noted is not None:
        noted.append(problem)
    return _forced.get() or _first(problem, gpu)


@lru_cache(maxsize=4096)  # batches of many sizes
def _first(problem: Problem, gpu: Gpu) -> Plan:
    return rank(problem, gpu)[0][0]


def candidates(problem: Problem, gpu: Gpu) -> list[Plan]:
    """Every tile that the layer and the GPU allow, with every useful number of parts, or with the LayerNorm behind."""
    arch = architecture(gpu)
    tiles = [
        (number, tile)
        for number, tile in enumerate(TILES)
        if tile.shared_bytes(problem.widest) <= arch.shared_bytes
        and (not tile.wgmma or (arch.wgmma_products and gpu.has_wgmma and not problem.native4))
    ]
    plans = [
        Plan(number, parts)
        for number, tile in tiles
        for parts in tile.parts()
        # A part keeps at least two steps to run through, of wgmma two stages.
        if parts == 1
        or (
            problem.steps >= 2 * parts * (STEPS_OF_STAGE if tile.wgmma else 1)
            and (not tile.wgmma or gpu.clusters_at_once(tile.cluster * parts) > 0)
        )
    ]
    if problem.norm and problem.rows % 8 == 0 and problem.rows <= MOST_NORM_ROWS:
        plans += [
            Plan(number, norm=True)
            for number, tile in tiles
            if tile.wgmma
            and tile.tokens <= MOST_NORM_TOKENS
            and -(-problem.tokens // tile.tokens) <= MOST_NORM_TILES
            and gpu.clusters_at_once(tile.cluster_of_rows(problem.rows)) > 0
        ]
    return plans


def step_clocks(tile: Tile, problem: Problem, arch: Architecture) -> float:
    """Clocks of a step of 64 columns of a block: the slowest of products, bytes and, on wgmma, shared memory."""
    products = arch.wgmma_products if tile.wgmma else arch.products * (2 if problem.native4 else 1)
    return max(
        tile.rows * tile.tokens * STEP_COLS / (products * arch.reached),
        tile.copied_bytes(problem.widest) / arch.l2_bytes,
        tile.shared_clocks(problem.widest) if tile.wgmma else 0.0,
    )


def estimate_us(plan: Plan, problem: Problem, gpu: Gpu) -> float:
    """Microseconds by the model at the head of this file."""
    arch, tile = architecture(gpu), TILES[plan.tile]
    step = step_clocks(tile, problem, arch)
    steps = -(-problem.steps // plan.parts)
    reorder = 0.0
    if problem.reordered and not tile.wgmma:
        reorder = REORDER_WORD_CLOCKS if problem.words or plan.has_workspace else REORDER_CLOCKS
    outputs = tile.rows * tile.tokens / (plan.parts if tile.wgmma else 1)  # that a block finishes
    busy, way_out = steps * step, outputs * (EPILOGUE_INSTRUCTIONS / 128 + reorder)
    blocks = tile.blocks_of(problem.rows, problem.tokens) * plan.parts
    if plan.norm:
        cluster = tile.cluster_of_rows(problem.rows)
        turns = math.ceil(-(-problem.tokens // tile.tokens) / gpu.clusters_at_once(cluster))
        way_out += outputs * NORM_INSTRUCTIONS / 128 + NORM_ONCE * WGMMA_WORKERS / 128
        clocks = turns * (FILL_CLOCKS + busy + way_out + MEETING_CLOCKS)
    elif tile.wgmma and plan.parts > 1:  # a cluster is placed as a whole, and starts anew for each tile
        cluster = tile.cluster * plan.parts
        turns = math.ceil(blocks / cluster / gpu.clusters_at_once(cluster))
        clocks = turns * (FILL_CLOCKS + busy + tile.exchange_clocks(plan.parts) + way_out)
    elif tile.wgmma:
        clocks = FILL_CLOCKS + -(-blocks // gpu.sms) * (busy + way_out)
    else:
        each_sm = -(-blocks // gpu.sms)
        resident = max(1, min(tile.blocks, arch.shared_per_sm // (tile.shared_bytes(problem.widest) + 1024)))
        clocks = max(math.ceil(each_sm / resident) * (FILL_CLOCKS + busy + way_out), each_sm * busy)
    us = LAUNCH_US + clocks / (1e3 * arch.ghz)
    if plan.has_workspace:
        sum_bytes = 8 * plan.parts * problem.tokens * problem.rows  # written and read, in L2
        us += LAUNCH_US + sum_bytes / (gpu.sms * arch.l2_bytes * 1e3 * arch.ghz)
    if problem.norm and not plan.norm:
        us += EARLY_LAUNCH_US + NORM_BYTES * problem.tokens * problem.rows / NORM_GBPS / 1e3
    return us


def rank(problem: Problem, gpu: Gpu) -> list[tuple[Plan, float]]:
    """Legal plans and their estimates in microseconds, best first; of equals the first in the table."""
    return sorted(((p, estimate_us(p, problem, gpu)) for p in candidates(problem, gpu)), key=lambda pair: pair[1])
