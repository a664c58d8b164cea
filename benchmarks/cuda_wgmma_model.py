"""The same static model for Hopper's GEMM: its loops by their machine code, and the share of the peak that tiles reach.

A loop of gemm_sm90.cuh is a slice of 128 columns of a worker; rows are of a step of 64, as those of mma.sync. wgmma
takes N / 2 clocks for 64 rows, N tokens and 32 columns, at 4096 products a clock and SM. Shared memory moves 128 bytes
a clock: each wgmma reads its 32 N bytes of tokens, the copies write what they bring, and the warps read their weights.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import cuda_mixed_loops
from benchmarks.cuda_epilogue import (
    bank_clocks,
    best_path,
    blocks,
    pipes,
    reordered_value,
    shuffled_order,
    staged_offset,
)
from benchmarks.cuda_sass import Instruction, Kernel, count
from vitq_kernels.ops.cuda.tiles import (
    EPILOGUE_INSTRUCTIONS,
    GROUP_ROWS,
    NORM_INSTRUCTIONS,
    NORM_ONCE,
    STEP_COLS,
    STEPS_OF_STAGE,
    TILES,
    WGMMA_WORKERS,
    Tile,
)
from vitq_kernels.spec import MAX_BITS

PRODUCTS = 4096  # int8 multiply-adds a clock and SM
SHARED_BYTES = 128  # a clock
WARPGROUP = 128  # threads, for each group of rows
IGMMAS = 2 * STEPS_OF_STAGE  # of a slice
WIDTH_BYTES = 4 * STEPS_OF_STAGE  # that a lane loads of a slice for each bit of the weights' width
DEPTHS = (768, 1024, 3072, 4096)
MIXED_HEAD = """
The way out where the rows of each group have four widths, at random: they are staged where they belong, and only there
may lanes meet in a bank. On the fullest pipe, beside one width, and what that adds at K = 768 (real is float32, GELU in
the shorter of its forms).

| tile | outputs | one width | several | adds |
|---|---|---|---|---|""".splitlines()
NORM_HEAD = """
The way out with LayerNorm behind 1024 rows (`csrc/gemm_sm90_norm.cuh`), of a residual stream of 16 bits, and what
`tiles.py` counts.

| tile | outputs | clocks | fullest | instructions an output | counted |
|---|---|---|---|---|---|""".splitlines()
STORED_BYTES = 3  # of an output, then: two of the residual stream, and the code
Loop = tuple[Instruction, ...]
PIPES = ("tensor", "shared", "alu", "fma", "issue")
WAYS_HEAD = """## Hopper: wgmma

Loops of `csrc/gemm_sm90.cuh` for one step of 64 columns of a block; the way out of a tile of codes (rescaled, staged,
stored) on its fullest pipe; and what a tile reaches of the tensor cores' peak, the way out after the products. A
worker stores alone, so that its way out may lie under the other's products; the last column is the bound if it all
does, at K = 768. The next tile's bytes are loaded meanwhile. Waves, memory and power are not in it; power is
expected to limit int8 to about 73 % (kernels.md 5).

| tile | bits | tensor | shared | ALU | FMA | issue | way out | K = 768 | 1024 | 3072 | 4096 | 768, overlapped |
|---|---|---|---|---|---|---|---|---|---|---|---|---|""".splitlines()


def tile_of(kernel: Kernel) -> tuple[str, Tile] | None:
    """Epilogue and tile of a GEMM on wgmma, None for others."""
    match = re.match(r"wgmma_kernel<(\w+), (\d+)x(\d+)>", kernel.name)
    if match is None or kernel.arch != "sm_90a":
        return None
    size = int(match.group(2)), int(match.group(3))
    return match.group(1), next(t for t in TILES if t.wgmma and (t.rows, t.tokens) == size)


def slices(kernel: Kernel) -> list[Loop]:
    """The loops that multiply: one for each width, and one in which each warp asks."""
    places = {instruction.address: place for place, instruction in enumerate(kernel.instructions)}
    found = []
    for end, instruction in enumerate(kernel.instructions):
        target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name.startswith("BRA") else None
        start = places.get(int(target.group(1), 16), end) if target else end
        body = kernel.instructions[start : end + 1]
        # The loop over tiles holds those of all widths; a loop over slices may be unrolled.
        if sum(i.name.startswith("IGMMA") for i in body) in (IGMMAS, 2 * IGMMAS, 4 * IGMMAS):
            found.append(body)
    # A wait inside a loop may branch back to before it: of bodies with the same products the shortest.
    return [min((b for b in found if _last(b) == last), key=len) for last in sorted({_last(b) for b in found})]


def step_row(tile: Tile, body: Loop) -> dict[str, Any]:
    """One loop in clocks of each pipe, of a step of a block."""
    bits, warps, times = width(body), tile.rows // 16, turns(body)
    row = {
        "bits": bits,
        "tensor": tile.rows * tile.tokens * STEP_COLS / PRODUCTS,
        "shared": brought(tile, bits) + lane_bytes(body) * 32 / SHARED_BYTES * warps / (STEPS_OF_STAGE * times),
    }
    slice_pipes = pipes(body, warps)
    return row | {pipe: slice_pipes[pipe] / (STEPS_OF_STAGE * times) for pipe in ("alu", "fma", "issue")}


def turns(body: Loop) -> int:
    """Slices in a loop's body, which may be unrolled."""
    return sum(i.name.startswith("IGMMA") for i in body) // IGMMAS


def lane_bytes(body: Loop) -> int:
    """Bytes of weights that a lane loads."""
    classes = count(body)
    return 16 * classes["LDS.128"] + 8 * classes["LDS.64"] + 4 * classes["LDS"]


def width(body: Loop) -> int:
    """Bits that a loop unpacks; more than 8: it unpacks in every way."""
    return lane_bytes(body) // (WIDTH_BYTES * turns(body))


def brought(tile: Tile, bits: int) -> float:
    """Clocks of shared memory of a step that are not loads of weights: tokens read, all bytes as they arrive."""
    read = tile.rows // GROUP_ROWS * STEP_COLS * tile.tokens
    return (read + tile.step_bytes(bits)) / SHARED_BYTES


def way_out(kernel: Kernel, tile: Tile, order: list[int] | None = None) -> dict[str, float]:
    """Clocks of each pipe from the last product of a tile to its last store; float32 where outputs are real.

    ``order``: model row of each of the tile's stored rows; None: the same.
    """
    graph, start = blocks(kernel), after_products(kernel)
    element = 4 if kernel.name.startswith("wgmma_kernel<real") else 1
    stored = element * tile.tokens * GROUP_ROWS // WARPGROUP
    path = best_path(graph, start, lambda i: -(10**8) if _is_of_parts(i) else reordered_value(i), stored)
    read = element * tile.rows * tile.tokens / SHARED_BYTES
    return {**pipes(path, tile.rows / 16), "shared": read + staging_clocks(tile, element, order)}


def after_products(kernel: Kernel) -> int:
    """Where the code behind the last product begins."""
    last = max(i.address for i in kernel.instructions if i.name.startswith("IGMMA"))
    return min(address for address in blocks(kernel) if address > last)


def norm_way_out(kernel: Kernel, tile: Tile) -> tuple[dict[str, float], float]:
    """``way_out`` with LayerNorm, and its instructions an output; the sums are staged as words."""
    outputs_of_lane = tile.tokens * GROUP_ROWS // WARPGROUP
    path = best_path(blocks(kernel), after_products(kernel), _norm_value, STORED_BYTES * outputs_of_lane)
    shared = 4 * tile.rows * tile.tokens / SHARED_BYTES + staging_clocks(tile, 4)
    return {**pipes(path, tile.rows / 16), "shared": shared}, len(path) / outputs_of_lane


def staging_clocks(tile: Tile, element: int, order: list[int] | None = None) -> int:
    """Clocks of shared memory that the writes of a tile's outputs take: store_tile of csrc/gemm_sm90.cuh."""
    rows, clocks = order or list(range(tile.rows)), 0
    for group, warp, second in itertools.product(range(tile.rows // GROUP_ROWS), range(4), range(2)):
        access = []
        for lane in range(32):
            row = rows[GROUP_ROWS * group + lane // 8 * 16 + 4 * warp + lane // 4 % 2 + 2 * second]
            access.append((staged_offset(row) + lane % 4 * 8, 8))
        clocks += bank_clocks(access) * tile.tokens * element // 32
    return clocks


def reached(row: dict[str, Any], after: dict[str, float], depth: int) -> float:
    """Share of the tensor cores' peak of a tile with ``depth`` columns, the way out after the products."""
    steps = depth / STEP_COLS
    return float(steps * row["tensor"] / (steps * max(row[pipe] for pipe in PIPES) + max(after.values())))


def overlapped(row: dict[str, Any], after: dict[str, float], depth: int) -> float:
    """The same, the way out under the products as far as no pipe is full."""
    steps = depth / STEP_COLS
    return float(steps * row["tensor"] / max(steps * row[pipe] + after.get(pipe, 0) for pipe in PIPES))


def mixed(listing: Iterable[Kernel]) -> list[str]:
    """A line each on the loops in which each warp asks for its width (cuda_mixed_loops)."""
    lines = []
    for kernel, _, tile in plain(listing):
        loops = slices(kernel)
        every = sum(width(body) for body in loops if width(body) <= MAX_BITS)  # nothing of it lies elsewhere
        (loop,) = (body for body in loops if width(body) == every)
        alone = step_row(tile, next(body for body in loops if width(body) == MAX_BITS))
        times = tile.rows / 16 / (STEPS_OF_STAGE * turns(loop))
        bound = {pipe: clocks * times for pipe, clocks in cuda_mixed_loops.costliest(kernel, loop).items()}
        bound |= {"tensor": alone["tensor"], "shared": bound["shared"] + brought(tile, MAX_BITS)}
        lines.append(cuda_mixed_loops.row(kernel.arch, "wgmma", f"{tile.rows}x{tile.tokens}", bound, alone))
    return lines


def plain(listing: Iterable[Kernel]) -> Iterator[tuple[Kernel, dict[str, float], Tile]]:
    """The GEMMs on wgmma with the plain epilogue, their ways out and tiles; the loops of the others are the same."""
    for kernel in listing:
        epilogue, tile = tile_of(kernel) or ("", None)
        if tile is not None and epilogue == "codes":
            yield kernel, way_out(kernel, tile), tile


def report(listing: Iterable[Kernel]) -> list[str]:
    """The section of docs/cuda_cost_model.md."""
    lines, listed = [*WAYS_HEAD], list(listing)
    for kernel, after, tile in plain(listed):
        rows = [step_row(tile, body) for body in slices(kernel) if width(body) <= MAX_BITS]
        for row in sorted(rows, key=lambda row: -row["bits"]):
            shares = [f"{100 * reached(row, after, depth):.0f} %" for depth in DEPTHS]
            shares.append(f"{100 * overlapped(row, after, DEPTHS[0]):.0f} %")
            clocks = (f"{row[pipe]:.0f}" for pipe in PIPES)
            cells = (f"{tile.rows}x{tile.tokens}", row["bits"], *clocks, f"{max(after.values()):.0f}", *shares)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += MIXED_HEAD
    for kernel in listed:
        epilogue, tile = tile_of(kernel) or ("", None)
        if tile is None or epilogue == "norm":
            continue
        one, several = (
            max(way_out(kernel, tile, order).values()) for order in (None, shuffled_order(tile.rows, seed=0))
        )
        loop = DEPTHS[0] / STEP_COLS * tile.rows * tile.tokens * STEP_COLS / PRODUCTS
        added = f"{100 * (several - one) / (loop + one):.1f} %"
        lines.append(f"| {tile.rows}x{tile.tokens} | {epilogue} | {one:.0f} | {several:.0f} | {added} |")
    return [*lines, *norms(listed), ""]


def norms(listing: Iterable[Kernel]) -> list[str]:
    """The table of the kernels with LayerNorm."""
    lines = [*NORM_HEAD]
    for kernel in listing:
        epilogue, tile = tile_of(kernel) or ("", None)
        if tile is None or epilogue != "norm":
            continue
        clocks, instructions = norm_way_out(kernel, tile)
        fullest = max(clocks, key=lambda pipe: clocks[pipe])
        cells = (f"{tile.rows}x{tile.tokens}", tile.rows * tile.tokens, f"{clocks[fullest]:.0f}", fullest)
        counted = EPILOGUE_INSTRUCTIONS + NORM_INSTRUCTIONS + NORM_ONCE * WGMMA_WORKERS / (tile.rows * tile.tokens)
        lines.append(f"| {' | '.join(map(str, cells))} | {instructions:.1f} | {counted:.1f} |")
    return lines


def _is_of_parts(instruction: Instruction) -> bool:
    """The barrier at which the way out of parts of K begins: of two workers, who store alone otherwise."""
    return instruction.name.startswith("BAR") and instruction.operands.strip().endswith("0x100")


def _norm_value(instruction: Instruction) -> int:
    """Every block's moments are read."""
    return 10000 if instruction.name.split(".")[0] == "LD" else -1


def _last(body: Loop) -> int:
    return max(i.address for i in body if i.name.startswith("IGMMA"))
