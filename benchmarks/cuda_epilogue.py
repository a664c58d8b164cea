"""How the outputs of a GEMM's tile leave: a warp's instructions after the loops, straight to memory and reordered.

The way through the machine code is the one of whole tiles: every row and token inside, wide stores, no residual and no
scale a token; float32 where outputs are real.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks.cuda_sass import Instruction, Kernel, count
from vitq_kernels.ops.cuda.tiles import GROUP_ROWS, TILES, Tile
from vitq_kernels.ops.mma_fragments import QUARTERS, bank_quarter, place_rows
from vitq_kernels.spec import RowGroups

SCALAR_STORES = ("STG.E", "STG.E.U8", "STG.E.U16")
BYTE_WORTH = 100  # more than the instructions that store it, less than a way through shared memory or past it
Pipes = dict[str, float]


@dataclass(frozen=True)
class Block:
    """Instructions without a jump into or out of them, and what may follow."""

    body: tuple[Instruction, ...]
    following: tuple[int, ...]  # addresses; none: the end


def blocks(kernel: Kernel) -> dict[int, Block]:
    """The basic blocks, by the address of their first instruction."""
    listing = kernel.instructions
    starts = {listing[0].address}
    for here, after in itertools.pairwise(listing):
        target = _target(here)
        starts |= {target} if target is not None else set()
        starts |= {after.address} if _jumps(here) else set()
    found, body = {}, []
    for here, after in zip(listing, [*listing[1:], None], strict=True):
        body.append(here)
        if after is not None and after.address not in starts:
            continue
        target, following = _target(here), []
        if target is not None:
            following.append(target)
        # "@P0 BRA", and "BRA P0", go on where the predicate is false; "BRA.DIV" where no lane diverges.
        maybe = bool(here.predicate or re.match(r"\s*!?U?P\d", here.operands)) or here.name.startswith("BRA.DIV")
        if after is not None and (not _jumps(here) or maybe):
            following.append(after.address)
        found[body[0].address] = Block(tuple(body), tuple(following))
        body = []
    return found


def best_path(
    graph: dict[int, Block], start: int, value: Callable[[Instruction], int], lane_bytes: int
) -> list[Instruction]:
    """The way to the end that is worth the most and stores ``lane_bytes`` of a lane; 0: nothing.

    A byte that is stored is worth ``BYTE_WORTH``. A way goes through a loop once; where it has stored too little then,
    what lies from the first read of staged outputs to the last store is repeated. A loop's own counting is not: a few
    instructions a turn.

    Raises:
        ValueError: there is no such way.
    """
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 4 * len(graph)))
    known: dict[int, dict[int, tuple[int, list[int]]]] = {}  # from a block on: by bytes, worth and blocks of the best
    on_way: set[int] = set()

    def go(at: int) -> dict[int, tuple[int, list[int]]]:
        if at in known:
            return known[at]
        block = graph[at]
        own, stored = sum(map(value, block.body)), sum(map(stored_bytes, block.body))
        last = block.body[-1]
        best = {0: (0, [])} if last.name == "EXIT" and not last.predicate else {}
        on_way.add(at)
        for following in block.following:
            if following in graph and following not in on_way:
                for further, (worth, way) in go(following).items():
                    if further not in best or best[further][0] < worth:
                        best[further] = worth, way
        on_way.discard(at)
        known[at] = {
            stored + further: (own + worth, [at, *way])
            for further, (worth, way) in best.items()
            if stored + further <= lane_bytes
        }
        return known[at]

    ways = go(start)
    if not ways:
        raise ValueError("no way to the end")
    stored = max(ways, key=lambda stored: ways[stored][0] + BYTE_WORTH * stored)
    path = [instruction for at in ways[stored][1] for instruction in graph[at].body]
    if 0 < stored < lane_bytes:
        path = _repeated(path, lane_bytes / stored)
    stored = sum(map(stored_bytes, path))
    if stored != lane_bytes:
        raise ValueError(f"a lane has {lane_bytes} bytes of outputs, the way stores {stored}")
    return path


def _repeated(path: list[Instruction], times: float) -> list[Instruction]:
    """The path with what lies from the first read of staged outputs to the last store, repeated."""
    found: list[Instruction] = []
    for is_barrier, group in itertools.groupby(path, lambda i: i.name.startswith("BAR")):
        section = list(group)
        stores = [place for place, i in enumerate(section) if stored_bytes(i)]
        reads = [place for place, i in enumerate(section) if i.name.startswith("LDS")]
        found += section
        if stores and reads and not is_barrier:
            turn = section[reads[0] : stores[-1] + 1]
            bytes_left = (times - 1) * sum(map(stored_bytes, turn))  # the last turn may leave in its middle
            for instruction in itertools.cycle(turn):
                if bytes_left <= 0:
                    break
                found.append(instruction)
                bytes_left -= stored_bytes(instruction)
    return found


def stored_bytes(instruction: Instruction) -> int:
    """Bytes of a lane that a wide store writes to memory."""
    match = re.match(r"STG\.E(?:\.\w+)*?\.(64|128)(?:\.|$)", instruction.name)
    return int(match.group(1)) // 8 if match else 0


def direct_value(instruction: Instruction) -> int:
    """Wide stores of whole tiles, nothing through shared memory."""
    if instruction.name.startswith(("STS", "BAR")):
        return -20000
    return _value(instruction)


def reordered_value(instruction: Instruction) -> int:
    """Everything through shared memory."""
    return 20000 if instruction.name.startswith("STS") else _value(instruction)


def _value(instruction: Instruction) -> int:
    if instruction.name in SCALAR_STORES:
        return -10000
    return -3000 if instruction.name == "LDG.E.128" else -1  # a residual


def after_loops(kernel: Kernel) -> int:
    """Where the code behind the last loop that multiplies begins."""
    ends = [loop[-1].address for loop in kernel.loops() if any(i.name.startswith("IMMA") for i in loop)]
    return next(i.address for i in kernel.instructions if i.address > max(ends))


def pipes(body: Iterable[Instruction], warps: float, shared: float = 0.0) -> Pipes:
    """Clocks of an SM that ``warps`` warps keep each pipe busy; ``shared``: those of shared memory, as they are."""
    listed = list(body)
    classes = count(listed)
    slow = sum(instruction.name.split(".")[0] in ("I2F", "F2I", "MUFU") for instruction in listed)
    return {
        "issue": len(listed) * warps / 4,
        "alu": classes["ALU"] * warps / 2,
        "fma": classes["FMA"] * warps / 2,
        "conversion": slow * warps * 2,
        "shared": shared,
    }


def ways_out(kernel: Kernel, tile: Tile, shared: float) -> tuple[Pipes, Pipes, Pipes]:
    """Clocks of a tile's direct way; of the reordered one until the first barrier; and of all that follows there.

    Args:
        kernel: a GEMM with the 8-bit products.
        tile: its tile.
        shared: clocks of shared memory of the reordered way.
    """
    graph, start = blocks(kernel), after_loops(kernel)
    warps, words = tile.threads // 32, kernel.name.startswith("gemm_kernel<real")
    lane_bytes = tile.rows * tile.tokens * (4 if words else 1) // tile.threads
    direct = best_path(graph, start, direct_value, lane_bytes)
    parts: list[list[Instruction]] = [[]]  # head, then write and read in turn, a pair a pass
    for instruction in best_path(graph, start, reordered_value, lane_bytes):
        parts[-1].append(instruction)
        if instruction.name.startswith("BAR"):
            parts.append([])
    total: Counter[str] = Counter()
    for part in parts[1:]:
        total.update(pipes(part, warps))
    return pipes(direct, warps), pipes(parts[0], warps), {**total, "shared": shared}


def staged_offset(row: int) -> int:
    """Where a row of the tile lies in a panel, in bytes: staged_offset of csrc/gemm_tiles.cuh."""
    return row // 4 * 128 + bank_quarter(row) * 32


def reorder_clocks(tile: Tile, words: bool, seed: int = 0) -> int:
    """Clocks of shared memory that a tile's reordered outputs take, bank conflicts included.

    As store_through_shared and store_staged of csrc/gemm_store.cuh access it; the rows are those of a layer whose
    groups have a quarter of their rows, at random, of each of four widths.
    """
    return sum(bank_clocks(access) for access in accesses(tile, shuffled_order(tile.rows, seed), words))


def shuffled_order(rows: int, seed: int) -> list[int]:
    """The stored order of rows of which a quarter of every group, at random, has each of four widths."""
    chance = random.Random(seed)
    rows_of = [chance.sample(range(first, first + GROUP_ROWS), GROUP_ROWS) for first in range(0, rows, GROUP_ROWS)]
    bits = (8, 6, 4, 3) * len(rows_of)
    return place_rows(RowGroups(rows, bits, GROUP_ROWS // QUARTERS, tuple(itertools.chain(*rows_of))))[0]


def accesses(tile: Tile, order: list[int], words: bool) -> Iterator[list[tuple[int, int]]]:
    """First byte and size of what each lane of a warp writes or reads, instruction after instruction of a tile."""
    token_warps = tile.threads // 32 * GROUP_ROWS // tile.rows
    tokens_of_lane = tile.tokens // token_warps // 8
    passes, size = (tokens_of_lane // 4, 16) if words else (1, tokens_of_lane)  # size: bytes that a lane writes
    panel = 32 * tile.rows
    pack = 8 if words else 4  # bytes that a lane reads back
    packs_of_panel = 32 // pack
    for _ in range(passes):
        for group, token_warp, i in itertools.product(range(tile.rows // GROUP_ROWS), range(token_warps), range(16)):
            access = []
            for lane in range(32):
                byte = (8 * token_warp + lane // 4) * size
                row = order[GROUP_ROWS * group + 16 * (lane % 4) + i]
                access.append((byte // 32 * panel + byte % 32 + staged_offset(row), size))
            yield access
        packs = 8 * token_warps * size // pack
        for block, first, i in itertools.product(range(tile.rows // 32), range(0, packs, 8), range(8)):
            access = []
            for lane in range(32):
                number = first + lane // (4 * packs_of_panel) * packs_of_panel + lane % packs_of_panel
                row = 32 * block + lane // packs_of_panel % 4 * 8 + i
                at = number // packs_of_panel * panel + number % packs_of_panel * pack
                access.append((at + staged_offset(row), pack))
            yield access


def bank_clocks(access: list[tuple[int, int]]) -> int:
    """Clocks that a warp's access to shared memory takes: words of one bank one after another, 128 bytes at a time."""
    clocks, together = 0, 32 * 4 // access[0][1]  # lanes
    for part in range(0, 32, together):
        banks: dict[int, set[int]] = {}
        for first, size in access[part : part + together]:
            for word in range(first // 4, (first + size) // 4):
                banks.setdefault(word % 32, set()).add(word)
        clocks += max(map(len, banks.values()))
    return clocks


def tile_of(kernel: Kernel) -> tuple[str, str, Tile] | None:
    """Epilogue, operands and tile of a GEMM on mma.sync, None for others and where the architecture has none."""
    match = re.match(r"gemm_kernel<(\w+), (s\d), (\d+)x(\d+)>", kernel.name)
    if match is None or (match.group(2) == "s4" and kernel.arch == "sm_90a"):
        return None
    size = int(match.group(3)), int(match.group(4))
    return match.group(1), match.group(2), next(t for t in TILES if not t.wgmma and (t.rows, t.tokens) == size)


def _jumps(instruction: Instruction) -> bool:
    return instruction.name.split(".")[0] in ("BRA", "BRX", "BRXU", "EXIT", "RET") or _calls(instruction) is not None


def _calls(instruction: Instruction) -> int | None:
    # CALL.REL.NOINC within a kernel is a jump; real calls are of the division's subroutine, before the loops.
    if not instruction.name.startswith("CALL.REL"):
        return None
    target = re.search(r"0x([0-9a-f]+)", instruction.operands)
    return int(target.group(1), 16) if target else None


def _target(instruction: Instruction) -> int | None:
    if instruction.name.startswith("BRA"):
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        return int(target.group(1), 16) if target else None
    return _calls(instruction)
