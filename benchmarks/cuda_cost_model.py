"""A static cost model of the GEMM's loops from their SASS: ``python -m benchmarks.cuda_cost_model``.

Writes ``benchmarks/results/cuda_cost_model.csv`` and ``docs/cuda_cost_model.md``: per step of 64 columns of a block the
clocks that each pipe of an SM is busy, as if nothing but it set the pace. No GPU is needed, none has confirmed it.
Rates (CUDA programming guide, throughput of native arithmetic instructions; data sheets for the tensor cores):

- tensor: 4096 int8 products an IMMA.16832, 8192 4-bit ones an IMMA.16864, at the dense peak of the architecture;
- shared: 128 bytes a clock: LDSM.x4, LDS.128 and the writes of LDGSTS.128 take 4 clocks each (no bank conflicts:
  tests/test_cuda_compile.py computes the addresses);
- ALU (LOP3, SHF, PRMT, IADD3, ...) and FMA pipe (IMAD): 64 lanes a clock each; issue: 4 warp instructions a clock.
"""

from __future__ import annotations

import csv
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cuda_sass import ARCHITECTURES, Kernel, count, extension_path, kernels
from vitq_kernels.ops.cuda.tiles import TILES, Tile

RESULTS = Path(__file__).parent / "results" / "cuda_cost_model.csv"
REPORT = Path(__file__).parents[1] / "docs" / "cuda_cost_model.md"
# int8 products of mma.sync a clock and SM. Data sheets for sm_80, 86, 89; half of Hopper's peak is assumed.
PRODUCTS = {"sm_80": 2048, "sm_86": 1024, "sm_89": 1024, "sm_90a": 2048}
PIPES = ("tensor", "shared", "alu", "fma", "issue")
COLUMNS = (
    *("arch", "operands", "tile", "bits", "imma", "lds", "ldsm", "ldgsts", "alu", "fma", "instructions"),
    *(f"{pipe}_clk" for pipe in PIPES),
    *("bound", "next_pipe", "next_pct", "unpack_per_weight"),
)
HEAD = """# The GEMM's loops by their machine code

Written by `python -m benchmarks.cuda_cost_model`, which says how; all rows are in
`benchmarks/results/cuda_cost_model.csv`. Clocks of an SM for one step of 64 columns of a block. Nothing here has been
measured on a GPU, and `mma.sync` is assumed to reach half of Hopper's peak. The loops of sm_86 and sm_89 are those of
sm_80 at half the rate of the tensor cores.

| arch | operands | tile | bits | tensor | shared | ALU | FMA | issue | next, % of tensor | unpack/weight |
|---|---|---|---|---|---|---|---|---|---|---|""".splitlines()
MIXED = """## Rows of several widths

Each warp runs the loop of its own group's width, and the barriers keep a tile at the pace of its widest: the loop costs
what the widest group alone costs. What is added is the way of the outputs through shared memory, in clocks of shared
memory, against the clocks of the tensor cores on sm_80 (a random order of the rows):

| tile | outputs | clocks | of K = 768 | of K = 3072 |
|---|---|---|---|---|""".splitlines()
TAIL = """
Where two blocks share an SM (256x64, 256x32) these clocks lie under the other block's products, as long as shared
memory does not become the bound: the loop's own share and these together stay below 100 % (256x64, 8 bits, K = 768:
88 % for codes, 98 % for floats). Where one block fills an SM (256x128) they are added: 7 % for codes, 17 % for floats
at K = 768; `vitq_kernels/ops/cuda/tiles.py` counts them so.
""".splitlines()
WEIGHTS_OF_LANE = 128  # of a step of a group: 64 rows x 64 columns / 32 lanes
SHARED_CLOCKS = 4  # of 16 bytes a lane
SHOWN = ("256x128", "128x128", "256x64")


def width(body: Counter[str]) -> int:
    """Bits that a loop unpacks: a step of b bits is b chunks of 16 bytes a lane."""
    return body["LDS.128"]


def main_loops(kernel: Kernel) -> Iterator[Counter[str]]:
    """The loops that multiply, one for each width."""
    for loop in kernel.loops():
        body = count(loop)
        if body["LDGSTS.128"] and any(name.startswith("IMMA") for name in body):
            yield body


def step_row(arch: str, operands: str, tile: Tile, body: Counter[str]) -> dict[str, Any]:
    """One loop in clocks of each pipe."""
    warps, imma = tile.threads // 32, body["IMMA.16832"] + body["IMMA.16864"]
    products = PRODUCTS[arch] * (2 if operands == "s4" else 1)
    depth = 4096 if operands == "s8" else 8192
    total, ldsm = sum(body.values()), body["LDSM.16"]
    moved = body["LDS.128"] + ldsm + body["LDGSTS.128"]
    clocks = {
        "tensor": imma * warps * depth / products,
        "shared": moved * warps * SHARED_CLOCKS,
        "alu": body["ALU"] * warps / 2,
        "fma": body["FMA"] * warps / 2,
        "issue": total * warps / 4,
    }
    bound = max(clocks, key=lambda pipe: clocks[pipe])
    after = max((pipe for pipe in PIPES if pipe != "tensor"), key=lambda pipe: clocks[pipe])
    counts = (imma, body["LDS.128"], ldsm, body["LDGSTS.128"], body["ALU"], body["FMA"], total)
    row = (arch, operands, f"{tile.rows}x{tile.tokens}", width(body), *counts, *(round(clocks[p], 1) for p in PIPES))
    pct = round(100 * clocks[after] / clocks["tensor"], 1)
    return dict(zip(COLUMNS, (*row, bound, after, pct, 0.0), strict=True))


def rows(listing: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Every loop of the kernels with the plain epilogue; the loops of the others are the same source."""
    found = []
    for kernel in listing:
        match = re.match(r"gemm_kernel<codes, (s\d), (\d+)x(\d+)>", kernel.name)
        if match is None or (match.group(1) == "s4" and kernel.arch == "sm_90a"):
            continue
        tile = next(t for t in TILES if (t.rows, t.tokens) == (int(match.group(2)), int(match.group(3))))
        steps = [step_row(kernel.arch, match.group(1), tile, body) for body in main_loops(kernel)]
        plain = max(steps, key=lambda row: row["bits"])  # unpacks nothing
        for row in steps:
            saved = row["instructions"] - row["lds"] - (plain["instructions"] - plain["lds"])
            row["unpack_per_weight"] = round(saved / WEIGHTS_OF_LANE, 2)
        found += sorted(steps, key=lambda row: -row["bits"])
    return found


def reorder_clocks(tile: Tile, words: bool, seed: int = 0) -> float:
    """Clocks of shared memory that a tile's reordered outputs take, bank conflicts of a random order included.

    As store_through_shared and store_staged of csrc/gemm_store.cuh access it: for 4 tokens of a row a write of 4 or 16
    bytes, and as many reads back.
    """
    stride = 9 if not words else 36  # words of a staged row, staged_stride
    size = 4 if words else 1  # words of an access
    order = random.Random(seed).sample(range(256), 256)
    clocks = 0
    for warp in range(4):
        for i in range(16):
            banks: dict[int, set[int]] = {}
            for lane in range(32):
                first = order[64 * warp + 16 * (lane % 4) + i] * stride + lane // 4 * size
                for word in range(first, first + size):
                    banks.setdefault(word % 32, set()).add(word)
            clocks += max(map(len, banks.values()))
    passes = tile.tokens // 32
    reads = 256 * 32 * (4 if words else 1) // 128
    return passes * (clocks + reads)


def report(table: list[dict[str, Any]]) -> str:
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
    lines += ["", f"W8A8 loops in which another pipe exceeds 90 % of the tensor cores: {named}.", ""]
    bound = [r for r in table if r["bound"] != "tensor" and r["tile"] in SHOWN]
    named = ", ".join(f"{r['operands']} {r['tile']} w{r['bits']} on {r['arch']} ({r['bound']})" for r in bound)
    lines += [f"Loops of these tiles that the tensor cores do not bound: {named or 'none'}.", "", *MIXED]
    for tile in TILES:
        if tile.rows != 256:
            continue
        for words in (False, True):
            clocks, step = reorder_clocks(tile, words), tile.rows * tile.tokens * 64 / PRODUCTS["sm_80"]
            part = [f"{100 * clocks / (k / 64 * step):.1f} %" for k in (768, 3072)]
            name = "float or int32" if words else "codes"
            lines.append(f"| {tile.rows}x{tile.tokens} | {name} | {clocks:g} | {part[0]} | {part[1]} |")
    return "\n".join([*lines, *TAIL, ""])


def main() -> None:
    """Writes the table and the page."""
    binary = extension_path()
    if binary is None:
        sys.exit("vitq_kernels._cuda is not built")
    table = [row for arch in ARCHITECTURES for row in rows(kernels(binary, arch))]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    REPORT.write_text(report(table), encoding="utf-8")
    print(f"{RESULTS}: {len(table)} rows; {REPORT}")


if __name__ == "__main__":
    main()
