"""A static cost model of the GEMM's loops from their SASS: ``python -m benchmarks.cuda_cost_model``.

Writes ``benchmarks/results/cuda_cost_model.csv`` and ``docs/cuda_cost_model.md``: per step of 64 columns of a block the
clocks that each pipe of an SM is busy, as if nothing but it set the pace. No GPU is needed, none has confirmed it.
Rates (CUDA programming guide, throughput of native arithmetic instructions; data sheets for the tensor cores):

- tensor: 4096 int8 products an IMMA.16832, 8192 4-bit ones an IMMA.16864, at the dense peak of the architecture;
- shared: 128 bytes a clock: LDSM.x4, LDS.128 and the writes of LDGSTS.128 take 4 clocks each, LDS.64 2 and LDS 1 (no
  bank conflicts: a warp's weights lie side by side, tests/test_cuda_compile.py computes the addresses of tokens);
- ALU (LOP3, SHF, PRMT, IADD3, ...) and FMA pipe (IMAD): 64 lanes a clock each; issue: 4 warp instructions a clock;
- l2_per_clk: bytes that a step copies, a clock of the tensor cores; `tiles.py` assumes what L2 gives.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import cuda_mixed_loops, cuda_wgmma_model
from benchmarks.cuda_epilogue import reorder_clocks, tile_of, ways_out
from benchmarks.cuda_sass import ARCHITECTURES, Instruction, Kernel, count, extension_path, kernels
from vitq_kernels.ops.cuda.tiles import STEP_COLS, Tile
from vitq_kernels.spec import MAX_BITS

RESULTS = Path(__file__).parent / "results" / "cuda_cost_model.csv"
REPORT = Path(__file__).parents[1] / "docs" / "cuda_cost_model.md"
# int8 products of mma.sync a clock and SM. Data sheets for sm_80, 86, 89; half of Hopper's peak is assumed.
PRODUCTS = {"sm_80": 2048, "sm_86": 1024, "sm_89": 1024, "sm_90a": 2048}
PIPES = ("tensor", "shared", "alu", "fma", "issue")
COLUMNS = (
    *("arch", "operands", "tile", "bits", "imma", "lds", "ldsm", "ldgsts", "alu", "fma", "instructions"),
    *(f"{pipe}_clk" for pipe in PIPES),
    *("bound", "next_pipe", "next_pct", "unpack_per_weight", "l2_per_clk"),
)
HEAD = """# The GEMM's loops by their machine code

Written by `python -m benchmarks.cuda_cost_model`, which says how; all rows are in
`benchmarks/results/cuda_cost_model.csv`. Clocks of an SM for one step of 64 columns of a block. Nothing here has been
measured on a GPU, and `mma.sync` is assumed to reach half of Hopper's peak. The loops of sm_86 and sm_89 are those of
sm_80 at half the rate of the tensor cores.

| arch | operands | tile | bits | tensor | shared | ALU | FMA | issue | next, % of tensor | unpack/weight |
|---|---|---|---|---|---|---|---|---|---|---|""".splitlines()
WAYS_OUT = """## The outputs' way out, and rows of several widths

Each warp runs the loop of its own group, and the barriers keep a tile at the pace of its widest; what a loop that asks
may add is above. What reordered rows add is the way of the outputs through shared memory. In clocks
of the pipe that sets the pace, on sm_80 (a random order of the rows, whole tiles, no residual; GELU in the shorter of
its forms): the direct way; the reordered one; what it adds, of the loop's tensor clocks and the direct way together.

| tile | outputs | direct | reordered | adds at K = 768 | at K = 3072 | fullest, direct | fullest, reordered |
|---|---|---|---|---|---|---|---|""".splitlines()
FEW_TOKENS = """
These are the tiles for few tokens. 64x64 writes its 8 KiB of a step and reads them back, 128 clocks of 128 at best;
256x32 writes 18 and reads 18, 288 of 256. 128x64 would be at 88 % as two warps of 64x64, but use half of the SM's four
tensor cores where it has one block, which is when the tile is chosen.
""".splitlines()
TAIL = """
The clocks are those of a block alone on its SM, as 256x128 is: they are added to the loop's. Where several blocks share
an SM (all others) they lie under another block's products as far as no pipe is full; the last two columns are the
fullest pipe beside the tensor cores at K = 768, 8-bit loop and way out together, in percent of its tensor clocks.
""".splitlines()
WEIGHTS_OF_LANE = 128  # of a step of a group: 64 rows x 64 columns / 32 lanes
DEPTHS = (768, 3072)
OUTPUTS = ("codes", "gelu", "real")
SHOWN = ("256x128", "128x128", "256x64")


def width(body: Counter[str]) -> int:
    """Bits that a loop unpacks: a step of b bits is 16 b bytes of each lane. More than 8: it unpacks in every way."""
    return (16 * body["LDS.128"] + 8 * body["LDS.64"] + 4 * body["LDS"]) // 16


def main_loops(kernel: Kernel) -> Iterator[tuple[Instruction, ...]]:
    """The loops that multiply: one for each width, and one that asks at each quarter."""
    for loop in kernel.loops():
        body = count(loop)
        if body["LDGSTS.128"] and any(name.startswith("IMMA") for name in body):
            yield loop


def step_row(arch: str, operands: str, tile: Tile, body: Counter[str]) -> dict[str, Any]:
    """One loop in clocks of each pipe."""
    warps, imma = tile.threads // 32, body["IMMA.16832"] + body["IMMA.16864"]
    products = PRODUCTS[arch] * (2 if operands == "s4" else 1)
    depth = 4096 if operands == "s8" else 8192
    total, ldsm = sum(body.values()), body["LDSM.16"]
    clocks = {
        "tensor": imma * warps * depth / products,
        "shared": sum(clocks * body[kind] for kind, clocks in cuda_mixed_loops.SHARED_CLOCKS.items()) * warps,
        "alu": body["ALU"] * warps / 2,
        "fma": body["FMA"] * warps / 2,
        "issue": total * warps / 4,
    }
    bound = max(clocks, key=lambda pipe: clocks[pipe])
    after = max((pipe for pipe in PIPES if pipe != "tensor"), key=lambda pipe: clocks[pipe])
    lds = body["LDS.128"] + body["LDS.64"] + body["LDS"]
    counts = (imma, lds, ldsm, body["LDGSTS.128"], body["ALU"], body["FMA"], total)
    row = (arch, operands, f"{tile.rows}x{tile.tokens}", width(body), *counts, *(round(clocks[p], 1) for p in PIPES))
    pct = round(100 * clocks[after] / clocks["tensor"], 1)
    l2_per_clk = round(tile.step_bytes(width(body)) / clocks["tensor"], 1)
    return dict(zip(COLUMNS, (*row, bound, after, pct, 0.0, l2_per_clk), strict=True))


def rows(listing: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Every loop of one width of the kernels with the plain epilogue; the loops of the others are the same source."""
    found = []
    for kernel in listing:
        epilogue, operands, tile = tile_of(kernel) or ("", "", None)
        if tile is None or epilogue != "codes":
            continue
        bodies = (count(loop) for loop in main_loops(kernel))
        steps = [step_row(kernel.arch, operands, tile, body) for body in bodies if width(body) <= MAX_BITS]
        plain = max(steps, key=lambda row: row["bits"])  # unpacks nothing
        for row in steps:
            saved = row["instructions"] - row["lds"] - (plain["instructions"] - plain["lds"])
            row["unpack_per_weight"] = round(saved / WEIGHTS_OF_LANE, 2)
        found += sorted(steps, key=lambda row: -row["bits"])
    return found


def mixed(table: list[dict[str, Any]], listing: Iterable[Kernel]) -> list[str]:
    """A line each on the loops that ask at each quarter."""
    lines = []
    for kernel in listing:
        epilogue, operands, tile = tile_of(kernel) or ("", "", None)
        if tile is None or epilogue != "codes":
            continue
        size, warps = f"{tile.rows}x{tile.tokens}", tile.threads // 32
        same = [r for r in table if (r["arch"], r["operands"], r["tile"]) == (kernel.arch, operands, size)]
        every = sum(row["bits"] for row in same)  # nothing of it lies elsewhere
        (loop,) = (loop for loop in main_loops(kernel) if width(count(loop)) == every)
        widest = max(same, key=lambda row: row["bits"])
        alone = {pipe: widest[f"{pipe}_clk"] for pipe in PIPES}
        turn = cuda_mixed_loops.costliest(kernel, loop)
        bound = {pipe: clocks * warps for pipe, clocks in turn.items()} | {"tensor": alone["tensor"]}
        lines.append(cuda_mixed_loops.row(kernel.arch, operands, size, bound, alone))
    return lines


def ways(table: list[dict[str, Any]], listing: Iterable[Kernel]) -> list[dict[str, Any]]:
    """What the outputs' way out costs: by epilogue, direct and reordered, beside 8-bit loops."""
    found = []
    for kernel in listing:
        epilogue, operands, tile = tile_of(kernel) or ("", "", None)
        if tile is None or epilogue not in OUTPUTS or operands != "s8":
            continue
        size = f"{tile.rows}x{tile.tokens}"
        wanted = (kernel.arch, "s8", size, 8)
        step = next(r for r in table if (r["arch"], r["operands"], r["tile"], r["bits"]) == wanted)
        straight, head, passes = ways_out(kernel, tile, reorder_clocks(tile, words=epilogue == "real"))
        direct, reordered = max(straight.values()), max(head.values()) + max(passes.values())
        way = {"tile": size, "outputs": epilogue, "direct": direct, "reordered": reordered}
        for depth in DEPTHS:
            loop = depth // STEP_COLS * step["tensor_clk"]
            way[f"adds_{depth}_pct"] = round(100 * (reordered - direct) / (loop + direct), 1)
            for name, parts in (("direct", (straight,)), ("reordered", (head, passes))):
                busy = {
                    pipe: depth // STEP_COLS * step.get(f"{pipe}_clk", 0) + sum(part[pipe] for part in parts)
                    for pipe in straight
                }
                fullest = max(busy, key=lambda pipe: busy[pipe])
                way[f"{name}_{depth}"] = f"{fullest} {100 * busy[fullest] / loop:.0f} %"
        found.append(way)
    return sorted(found, key=lambda way: (way["outputs"], *(-int(n) for n in way["tile"].split("x"))))


def report(
    table: list[dict[str, Any]], mixed_lines: list[str], way_rows: list[dict[str, Any]], hopper: list[str]
) -> str:
    """The page of docs/."""
    lines = [*HEAD]
    for row in table:
        shown = row["tile"] in SHOWN and row["arch"] in ("sm_80", "sm_90a")
        if shown and (row["operands"] == "s4" or row["bits"] in (8, 7, 4, 3, 2)):
            clocks = " | ".join(f"{row[f'{pipe}_clk']:g}" for pipe in PIPES)
            after = f"{row['next_pipe']} {row['next_pct']:g}"
            head = f"{row['arch']} | {row['operands']} | {row['tile']} | {row['bits']}"
            lines.append(f"| {head} | {clocks} | {after} | {row['unpack_per_weight']:g} |")
    over = [r for r in table if r["operands"] == "s8" and r["bits"] == 8 and r["next_pct"] > 90]
    named = ", ".join(f"{r['tile']} on {r['arch']} ({r['next_pipe']} {r['next_pct']:g} %)" for r in over) or "none"
    lines += ["", f"W8A8 loops in which another pipe exceeds 90 % of the tensor cores: {named}.", *FEW_TOKENS]
    bound = [r for r in table if r["bound"] != "tensor" and r["tile"] in SHOWN]
    named = ", ".join(f"{r['operands']} {r['tile']} w{r['bits']} on {r['arch']} ({r['bound']})" for r in bound)
    lines += ["", f"Loops of the table that the tensor cores do not bound: {named or 'none'}."]
    lines += [*cuda_mixed_loops.HEAD, *mixed_lines, "", *WAYS_OUT]
    for way in way_rows:
        adds = [f"{way[f'adds_{depth}_pct']:g} %" for depth in DEPTHS]
        cells = (way["tile"], way["outputs"], f"{way['direct']:g}", f"{way['reordered']:g}", *adds)
        full = (way[f"{name}_{DEPTHS[0]}"] for name in ("direct", "reordered"))
        lines.append(f"| {' | '.join((*cells, *full))} |")
    return "\n".join([*lines, *TAIL, "", *hopper])


def page(table: list[dict[str, Any]], listings: Mapping[str, list[Kernel]]) -> str:
    """The page of docs/, of the kernels of each architecture."""
    asking = [line for arch in ("sm_80", "sm_90a") for line in mixed(table, listings[arch])]
    asking += cuda_wgmma_model.mixed(listings["sm_90a"])
    return report(table, asking, ways(table, listings["sm_80"]), cuda_wgmma_model.report(listings["sm_90a"]))


def main() -> None:
    """Writes the table and the page."""
    binary = extension_path()
    if binary is None:
        sys.exit("vitq_kernels._cuda is not built")
    listings = {arch: list(kernels(binary, arch)) for arch in ARCHITECTURES}
    table = [row for arch in ARCHITECTURES for row in rows(listings[arch])]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    text = page(table, listings)
    REPORT.write_text(text, encoding="utf-8")
    print(f"{RESULTS}: {len(table)} rows; {REPORT}")


if __name__ == "__main__":
    main()
