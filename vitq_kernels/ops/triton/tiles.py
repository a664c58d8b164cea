"""Which tile a linear layer gets: enumerate, drop what is not legal, rank by a cost model. No measurement at import.

The tables below are data: tiles per architecture class, all of which compile without a spilled register for every
epilogue and width (``benchmarks/results/triton_resources.csv``, by ``python -m benchmarks.triton_resources``).
``ranking`` says what the model thinks; ``vitq tune`` measures instead, and its result goes before the model.

The model, in clocks of one SM, for tiles of R rows and T tokens and steps of k columns:

    mma    = 2 R T k / rate             integer MMA; ``rate`` is the peak times what Triton's loop reaches of it
    load   = (R b/8 + T) k / l2         bytes from L2, ``l2`` a clock and SM
    unpack = R k u(b) / 128             u(b) instructions a weight (counted in SASS), 128 lanes a clock
    chain  = FILL + steps (max(mma, load) + unpack) + R T e / 128          one program from start to end
    time   = max(ceil(n/r) chain, n steps max(mma, load, unpack))          n programs an SM, r at a time

plus a launch, and for split sums a second launch and their bytes. It is a model: u(b) was counted, ``rate``, ``l2``,
FILL, e and the launch are assumptions until a GPU has measured them (``triton_microbenchmarks`` of device_check).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitq_kernels.ops.bit_planes import PLANES_OF, block_k
from vitq_kernels.ops.triton.launch import Device

FILL_CLOCKS = 1200  # first bytes from memory, then the pipeline
EPILOGUE_INSTRUCTIONS = 12.0  # an output, on average over the epilogues
LAUNCH_US = 2.5  # a kernel inside a graph (../shared/docs/kernels.md 5)
# Instructions a weight to unpack, by width: what the loop of 128 x 128 on sm_90 has over that of 8 bits, for 64 weights
# a thread (column ``loops`` of triton_resources.csv).
UNPACK_INSTRUCTIONS = {8: 0.0, 7: 2.2, 6: 1.3, 5: 1.2, 4: 1.1, 3: 1.1, 2: 0.8}
MOST_LEVELS = 128 * 128  # more spill: outputs of a program with an epilogue of levels
SPLITS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Tile:
    """A configuration of the linear kernel."""

    rows: int  # weight rows, the M operand of the MMA
    tokens: int  # its N operand
    warps: int
    stages: int
    splits: int = 1  # parts of K

    def __str__(self) -> str:
        split = f", {self.splits} splits" if self.splits > 1 else ""
        return f"{self.rows} rows x {self.tokens} tokens, {self.warps} warps, {self.stages} stages{split}"


@dataclass(frozen=True)
class Architecture:
    """A class of GPUs: limits that are facts, rates that the model uses, and the tiles that are shipped for it."""

    name: str  # of the GPU that stands for it
    sms: int  # of that GPU
    cc: int  # the first compute capability of the class
    shared_bytes: int  # a program may use
    shared_per_sm: int
    int8_ops: int  # a clock and SM, dense peak
    reached: float  # part of it that Triton's loop is assumed to reach
    l2_bytes: float  # a clock and SM; assumed
    ghz: float
    tiles: tuple[Tile, ...]


# With 4 warps ptxas takes 168 registers, so as to hold three programs, and spills a few now and then; with 8 it takes
# 128 and spills four where a layer has several widths.
ONE_WIDTH = Tile(64, 128, 8, 3)
_SMALL = (Tile(64, 16, 4, 4), Tile(64, 32, 4, 4), Tile(64, 64, 4, 4))
_AMPERE = (*_SMALL, ONE_WIDTH, Tile(128, 128, 8, 3))
_CONSUMER = (*_SMALL, ONE_WIDTH, Tile(128, 128, 8, 2))
_HOPPER = (*_SMALL, Tile(64, 128, 4, 4), Tile(64, 256, 8, 3), Tile(128, 128, 8, 4), Tile(128, 256, 8, 3))
# With 4 warps ptxas takes 72 registers for the 64 x 64 tile and spills three.
_BLACKWELL = (*_SMALL[:2], Tile(64, 64, 8, 4), *_HOPPER[3:])

# Ascending; a GPU belongs to the last class whose cc it reaches.
ARCHITECTURES = (
    Architecture("A100", 108, 80, 163 << 10, 164 << 10, 4096, 0.7, 32, 1.41, _AMPERE),
    Architecture("RTX 3090", 82, 86, 99 << 10, 100 << 10, 2048, 0.7, 20, 1.7, _CONSUMER),
    Architecture("RTX 4090", 128, 89, 99 << 10, 100 << 10, 2048, 0.7, 20, 2.5, _CONSUMER),
    Architecture("H100", 132, 90, 227 << 10, 228 << 10, 8192, 0.6, 32, 1.755, _HOPPER),
    Architecture("B200", 148, 100, 227 << 10, 228 << 10, 16384, 0.4, 32, 1.85, _BLACKWELL),
    Architecture("RTX 5090", 170, 120, 99 << 10, 100 << 10, 2048, 0.7, 20, 2.4, _CONSUMER),
)


@dataclass(frozen=True)
class Problem:
    """A linear layer as the choice of a tile sees it."""

    tokens: int  # M
    rows: int  # N
    cols: int  # K
    widths: tuple[int, ...]  # of the weight's windows, ascending
    epilogue: str  # a name of epilogue.EPILOGUES

    @property
    def steps(self) -> int:
        """Steps of the kernel's loop over K."""
        return -(-self.cols // block_k(self.cols))


def named_device(name: str) -> Device:
    """The GPU that stands for a class, by its name."""
    for arch in ARCHITECTURES:
        if arch.name.lower() == name.lower():
            return Device(arch.cc, arch.sms, arch.name)
    raise ValueError(f"GPU must be one of {', '.join(a.name for a in ARCHITECTURES)}, got {name!r}")


def architecture(device: Device) -> Architecture:
    """The class that a GPU belongs to."""
    return [a for a in ARCHITECTURES if a.cc <= max(device.cc, ARCHITECTURES[0].cc)][-1]


def shared_bytes(tile: Tile, problem: Problem) -> int:
    """Shared memory of a program: the pipeline's stages, or the transposed tile before it is stored."""
    step, bits = block_k(problem.cols), _stored_bits(problem)
    return max(tile.stages * step * (tile.rows * bits // 8 + tile.tokens), 4 * tile.rows * tile.tokens // 2)


def candidates(problem: Problem, device: Device) -> list[Tile]:
    """Every legal tile, with every useful number of splits."""
    arch = architecture(device)
    legal = []
    for tile in arch.tiles:
        if tile == ONE_WIDTH and len(problem.widths) > 1:
            continue
        if problem.epilogue.endswith("levels") and tile.rows * tile.tokens > MOST_LEVELS:
            continue
        if shared_bytes(tile, problem) > arch.shared_bytes:
            continue
        # A split keeps at least two steps to run through.
        legal += [
            Tile(tile.rows, tile.tokens, tile.warps, tile.stages, s) for s in SPLITS if s == 1 or problem.steps >= 2 * s
        ]
    return legal


def estimate_us(tile: Tile, problem: Problem, device: Device) -> float:
    """Microseconds by the model at the head of this file."""
    arch, k, bits = architecture(device), block_k(problem.cols), _stored_bits(problem)
    mma = 2 * tile.rows * tile.tokens * k / (arch.int8_ops * arch.reached)
    load = (tile.rows * bits / 8 + tile.tokens) * k / arch.l2_bytes
    unpack = tile.rows * k * UNPACK_INSTRUCTIONS[problem.widths[-1]] / 128
    steps = -(-problem.steps // tile.splits)
    chain = FILL_CLOCKS + steps * (max(mma, load) + unpack) + tile.rows * tile.tokens * EPILOGUE_INSTRUCTIONS / 128
    programs = -(-problem.rows // tile.rows) * -(-problem.tokens // tile.tokens) * tile.splits
    each_sm = -(-programs // device.sms)
    clocks = max(math.ceil(each_sm / resident(tile, problem, arch)) * chain, each_sm * steps * max(mma, load, unpack))
    us = LAUNCH_US + clocks / (1e3 * arch.ghz)
    if tile.splits > 1:
        partial_bytes = 8 * tile.splits * problem.tokens * problem.rows  # written and read, in L2
        us += LAUNCH_US + partial_bytes / (device.sms * arch.l2_bytes * 1e3 * arch.ghz)
    return us


def resident(tile: Tile, problem: Problem, arch: Architecture) -> int:
    """Programs that an SM holds at a time, by shared memory and by registers (sums, and 80 for everything else)."""
    threads = 32 * tile.warps
    registers = min(255, tile.rows * tile.tokens // threads + 80)
    by_shared = arch.shared_per_sm // (shared_bytes(tile, problem) + 1024)  # the system takes 1 KB a program
    return max(1, min(by_shared, 65536 // (threads * registers), 1536 // threads))


def rank(problem: Problem, device: Device) -> list[tuple[Tile, float]]:
    """Legal tiles and their estimates in microseconds, best first; of equals the first in the table."""
    tiles = candidates(problem, device)
    return sorted(((t, estimate_us(t, problem, device)) for t in tiles), key=lambda pair: pair[1])


def ranking(problem: Problem, device: Device, most: int = 8) -> str:
    """The ranking as text, for a reader who asks why."""
    widths = "/".join(map(str, problem.widths))
    shape = f"{problem.tokens} tokens x {problem.rows} rows x {problem.cols} columns"
    lines = [f"{shape}, w{widths}, {problem.epilogue}, {device.name}"]
    lines += [f"  {us:8.1f} us  {tile}" for tile, us in rank(problem, device)[:most]]
    return "\n".join(lines)


def _stored_bits(problem: Problem) -> int:
    return sum(PLANES_OF[problem.widths[-1]])
