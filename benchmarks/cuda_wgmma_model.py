"""The same static model for Hopper's GEMM: its loops by their machine code, and the share of the peak that tiles reach.

A loop of gemm_sm90.cuh is a slice of 128 columns of a worker; rows are of a step of 64, as those of mma.sync. wgmma
takes N / 2 clocks for 64 rows, N tokens and 32 columns, at 4096 products a clock and SM. Shared memory moves 128 bytes
a clock: each wgmma reads its 32 N bytes of tokens, the copies write what they bring, and an LDS of any width takes 4
clocks (16 bytes apart a lane: 4 and 8 bytes meet in banks).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from benchmarks.cuda_epilogue import best_path, blocks, pipes, reordered_value
from benchmarks.cuda_sass import Instruction, Kernel, count
from vitq_kernels.ops.cuda.tiles import GROUP_ROWS, STEP_COLS, STEPS_OF_STAGE, TILES, WINDOW_ROWS, Tile

PRODUCTS = 4096  # int8 multiply-adds a clock and SM
SHARED_BYTES = 128  # a clock
LDS_CLOCKS = 4
WARPGROUP = 128  # threads, for each group of rows
IGMMAS = 2 * STEPS_OF_STAGE  # of a slice
WIDTH_BYTES = 4 * STEPS_OF_STAGE  # that a lane loads of a slice for each bit of the weights' width
DEPTHS = (768, 1024, 3072, 4096)
PIPES = ("tensor", "shared", "alu", "fma", "issue")
WAYS_HEAD = """## Hopper: wgmma

Loops of `csrc/gemm_sm90.cuh` for one step of 64 columns of a block; the way out of a tile of codes (rescaled, staged,
stored) on its fullest pipe; and what a tile reaches of the tensor cores' peak, the way out after the products. The
workers of 128 rows store alone, so that one's way out may lie under the other's products; the last column is the bound
if it all does, at K = 768. The next tile's bytes are loaded meanwhile. Waves, memory and power are not in it; power is
expected to limit int8 to about 73 % (kernels.md 5).

| tile | bits | tensor | shared | ALU | FMA | issue | way out | K = 768 | 1024 | 3072 | 4096 | 768, overlapped |
|---|---|---|---|---|---|---|---|---|---|---|---|---|""".splitlines()
MIXED_HEAD = """
Rows of several widths in the window's tile, half of a window's groups of each of two widths, beside a layer whose rows
all have the wider one, in tiles of 128x256: clocks of a step, and what the mixture adds to a tile at K = 768 (codes
also at 3072), ways out after the products. At the peak of the tensor cores, that is: where power lets them reach three
quarters of it, shared memory bounds no mixture. What 128x256 hides of its way out under products would add to that; the
window's workers store together.
""".splitlines()
MIXED_TABLE = """
| bits | step, one width | step, mixed | codes | codes, 3072 | GELU | real |
|---|---|---|---|---|---|---|""".splitlines()
EPILOGUES = ("codes", "gelu", "real")
Steps = dict[Tile, dict[int, dict[str, Any]]]  # by tile and bits, step_row
WaysOut = dict[str, dict[Tile, dict[str, float]]]  # by epilogue and tile, way_out
MIXTURES = ((8, 7), (8, 6), (8, 5), (8, 4), (8, 2), (7, 5), (6, 5), (6, 4), (4, 3), (4, 2))


def tile_of(kernel: Kernel) -> tuple[str, Tile] | None:
    """Epilogue and tile of a GEMM on wgmma, None for others."""
    match = re.match(r"wgmma_kernel<(\w+), (\d+)x(\d+)>", kernel.name)
    if match is None or kernel.arch != "sm_90a":
        return None
    size = int(match.group(2)), int(match.group(3))
    return match.group(1), next(t for t in TILES if t.wgmma and (t.rows, t.tokens) == size)


def slices(kernel: Kernel) -> list[tuple[Instruction, ...]]:
    """The loops that multiply, one for each width."""
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


def step_row(tile: Tile, body: tuple[Instruction, ...]) -> dict[str, Any]:
    """One loop in clocks of each pipe, of a step of a block."""
    classes = count(body)
    workers, warps, times = tile.rows // 64, tile.rows // 16, sum(i.name.startswith("IGMMA") for i in body) // IGMMAS
    lane_bytes = 16 * classes["LDS.128"] + 8 * classes["LDS.64"] + 4 * classes["LDS"]
    bits = lane_bytes // (WIDTH_BYTES * times)
    loads = (classes["LDS.128"] + classes["LDS.64"] + classes["LDS"]) / times
    tokens_read = workers * IGMMAS / STEPS_OF_STAGE * 32 * tile.tokens / SHARED_BYTES
    row = {
        "bits": bits,
        "tensor": tile.rows * tile.tokens * STEP_COLS / PRODUCTS,
        "shared": tokens_read + tile.step_bytes(bits) / SHARED_BYTES + loads * warps * LDS_CLOCKS / STEPS_OF_STAGE,
    }
    slice_pipes = pipes(body, warps)
    return row | {pipe: slice_pipes[pipe] / (STEPS_OF_STAGE * times) for pipe in ("alu", "fma", "issue")}


def way_out(kernel: Kernel, tile: Tile) -> dict[str, float]:
    """Clocks of each pipe from the last product of a tile to its last store; float32 where outputs are real."""
    last = max(n for n, i in enumerate(kernel.instructions) if i.name.startswith("IGMMA"))
    graph = blocks(kernel)
    start = min(address for address in graph if address > kernel.instructions[last].address)
    element = 4 if kernel.name.startswith("wgmma_kernel<real") else 1
    lane_bytes = element * tile.tokens * GROUP_ROWS // WARPGROUP
    path = best_path(graph, start, lambda i: -(10**8) if _is_of_parts(i) else reordered_value(i), lane_bytes)
    staged = 2 * element * tile.rows * tile.tokens / SHARED_BYTES
    return {**pipes(path, tile.rows / 16), "shared": staged}


def reached(row: dict[str, Any], after: dict[str, float], depth: int) -> float:
    """Share of the tensor cores' peak of a tile with ``depth`` columns, the way out after the products."""
    steps = depth / STEP_COLS
    return float(steps * row["tensor"] / (steps * max(row[pipe] for pipe in PIPES) + max(after.values())))


def overlapped(row: dict[str, Any], after: dict[str, float], tile: Tile, depth: int) -> float:
    """The same, the way out under the products as far as no pipe is full; workers that store together cannot."""
    if tile.rows == WINDOW_ROWS:
        return reached(row, after, depth)
    steps = depth / STEP_COLS
    return float(steps * row["tensor"] / max(steps * row[pipe] + after.get(pipe, 0) for pipe in PIPES))


def mixed_rows(steps: Steps, ways: WaysOut) -> list[str]:
    """Lines on rows of several widths: the ways out, and the table."""
    window = next(tile for tile in steps if tile.rows == WINDOW_ROWS)
    plain = max(steps, key=lambda tile: (tile.rows < WINDOW_ROWS, tile.tokens))
    leaving = {name: [max(ways[name][tile].values()) for tile in (plain, window)] for name in EPILOGUES}
    named = ", ".join(f"{name} {direct:.0f} and {reordered:.0f}" for name, (direct, reordered) in leaving.items())
    lines = [f"Ways out on their fullest pipe, one width and mixed (the shorter GELU; real is float32): {named}."]
    lines += MIXED_TABLE
    for widest, others in MIXTURES:
        # Each pipe's clocks, like the bytes and loads of the groups, are the mean of both widths'.
        mixed = max(sum(steps[window][bits][pipe] for bits in (widest, others)) / 2 for pipe in PIPES)
        alone = max(steps[plain][widest][pipe] for pipe in PIPES)
        cells = [f"{widest}, {others}", f"{alone:.0f}", f"{mixed:.0f}"]
        for name, depth in (("codes", 768), ("codes", 3072), ("gelu", 768), ("real", 768)):
            direct, reordered = leaving[name]
            loops = depth // STEP_COLS
            cells.append(f"{100 * ((loops * mixed + reordered) / (loops * alone + direct) - 1):.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(listing: Iterable[Kernel]) -> list[str]:
    """The section of docs/cuda_cost_model.md."""
    lines = [*WAYS_HEAD]
    steps: Steps = {}
    ways: WaysOut = {epilogue: {} for epilogue in EPILOGUES}
    for kernel in listing:
        found = tile_of(kernel)
        if found is None:
            continue
        epilogue, tile = found
        after = ways[epilogue][tile] = way_out(kernel, tile)
        if epilogue != "codes":
            continue
        steps[tile] = {row["bits"]: row for row in (step_row(tile, body) for body in slices(kernel))}
        for bits, row in sorted(steps[tile].items(), reverse=True):
            shares = [f"{100 * reached(row, after, depth):.0f} %" for depth in DEPTHS]
            shares.append(f"{100 * overlapped(row, after, tile, DEPTHS[0]):.0f} %")
            clocks = (f"{row[pipe]:.0f}" for pipe in PIPES)
            cells = (f"{tile.rows}x{tile.tokens}", bits, *clocks, f"{max(after.values()):.0f}", *shares)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, *MIXED_HEAD, *mixed_rows(steps, ways), ""]


def _is_of_parts(instruction: Instruction) -> bool:
    """The barrier at which the way out of parts of K begins: of two workers, who store alone otherwise."""
    return instruction.name.startswith("BAR") and instruction.operands.strip().endswith("0x100")


def _last(body: tuple[Instruction, ...]) -> int:
    return max(i.address for i in body if i.name.startswith("IGMMA"))
