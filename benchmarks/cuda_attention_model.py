"""Hopper's attention by its machine code: ``python -m benchmarks.cuda_attention_model``.

Writes ``benchmarks/results/cuda_attention_model.csv``: clocks of an SM for a tile of queries and keys, as if nothing
but one pipe set the pace, and what transposing the values adds to the issue slots. ``predictions.py`` reads it.

A worker warp's way through a tile of 64 queries (csrc/attention_sm90.cu): the first product, maxima, codes of a table
of 16 levels, the second product, the outputs. Of the ways that the code allows the one is counted that codes every key.
Pipes as in cuda_cost_model.py, but float32 arithmetic at its 128 lanes a clock; wgmma takes N / 2 clocks for 64 rows, N
columns and 32 bytes, and reads 32 N bytes of shared memory. Waits, memory and the begin of a block are not in it.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cuda_epilogue import Block, blocks
from benchmarks.cuda_sass import Instruction, Kernel, count, extension_path, kernels

RESULTS = Path(__file__).parent / "results" / "cuda_attention_model.csv"
PIPES = ("tensor", "shared", "alu", "fma", "issue")
COLUMNS = ("dim", "keys", "passes", *(f"{pipe}_clk" for pipe in PIPES), "values_clk")
QUERIES, ROWS = 64, 16  # of a tile, of a warp
WARPS = QUERIES // ROWS
SHARED_BYTES = 128  # a clock
FLOATS = ("FFMA", "FADD", "FMUL")
KEYS_OF_UNIT, CHANNELS_OF_UNIT, UNITS_OF_TURN = 4, 8, 2  # what a loading thread transposes; of a turn of its loop


def rows(listing: Iterable[Kernel]) -> list[dict[str, Any]]:
    """A row a shape: clocks of each pipe for one tile of queries with one tile of keys, outputs included."""
    found = []
    for kernel in listing:
        shape = re.match(r"attention_wgmma_kernel<(\d+), (\d+), (\w+)>", kernel.name)
        if shape is None or kernel.arch != "sm_90a":
            continue
        dim, keys, passes = int(shape.group(1)), int(shape.group(2)), 1 if shape.group(3) == "whole" else 2
        way = way_through(kernel, passes)
        classes, floats = count(way), sum(i.name.split(".")[0] in FLOATS for i in way)
        steps, value_steps = -(-dim // 32), -(-keys // 32)
        columns = passes * steps * keys + value_steps * dim  # N of all products
        clocks = {
            "tensor": columns / 2,
            "shared": 32 * columns / SHARED_BYTES,
            "alu": classes["ALU"] * WARPS / 2,
            "fma": (classes["FMA"] - floats) * WARPS / 2 + floats * WARPS / 4,
            "issue": len(way) * WARPS / 4,
        }
        units = keys / KEYS_OF_UNIT * dim / CHANNELS_OF_UNIT
        values = len(transposition(kernel)) * units / UNITS_OF_TURN / 32 / 4
        found.append(
            dict(zip(COLUMNS, (dim, keys, passes, *(clocks[p] for p in PIPES), round(values, 1)), strict=True))
        )
    return sorted(found, key=lambda row: (row["dim"], row["passes"], row["keys"]))


def way_through(kernel: Kernel, passes: int) -> list[Instruction]:
    """A warp's instructions for a tile of queries and, of each pass, one tile of keys."""
    listed, graph = kernel.instructions, blocks(kernel)
    scores = [i.address for i in listed if re.match(r"IGMMA\.\w+\.S8\.S8", i.name)]
    values = [i.address for i in listed if i.name.startswith("IGMMA") and i.address not in scores]
    stores = [i.address for i in listed if i.name.startswith("STG") and i.address > values[-1]]
    begins = [scores[len(scores) // passes * n] for n in range(passes)]  # of each pass
    way = []
    for here, there in zip(begins, [*begins[1:], values[-1]], strict=True):
        way += forward(graph, max(address for address in graph if address <= here), there)
    # The outputs: straight on, with the division's subroutine left out.
    return way + [i for i in listed if values[-1] < i.address <= stores[-1]]


def forward(graph: dict[int, Block], start: int, end: int) -> list[Instruction]:
    """The best way from a block to an instruction without a step back in the listing."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 4 * len(graph)))
    known: dict[int, tuple[int, list[int]] | None] = {}

    def go(at: int) -> tuple[int, list[int]] | None:
        if at not in known:
            own = sum(map(_value, graph[at].body))
            if at <= end <= graph[at].body[-1].address:
                known[at] = own, [at]
            else:
                ways = [way for f in graph[at].following if at < f <= end and (way := go(f)) is not None]
                best = max(ways, key=lambda way: way[0], default=None)
                known[at] = None if best is None else (own + best[0], [at, *best[1]])
        return known[at]

    way = go(start)
    if way is None:
        raise ValueError("no way forward")
    return [i for at in way[1] for i in graph[at].body if i.address <= end]


def _value(instruction: Instruction) -> int:
    name = instruction.name.split(".")[0]
    if instruction.name.startswith("LDS.U8"):  # a table of more than 16 levels
        return -1000
    if name in ("SEL", "ISETP"):  # a tile that is not full
        return -6
    return 10 if name in (*FLOATS, "PRMT", "IDP", "VIMNMX3") else -1


def transposition(kernel: Kernel) -> tuple[Instruction, ...]:
    """The loop that transposes values."""
    return max(
        (loop for loop in kernel.loops() if count(loop)["LDG.64"] and count(loop)["STS"] and not _multiplies(loop)),
        key=lambda loop: count(loop)["STS"],
    )


def _multiplies(loop: Iterable[Instruction]) -> bool:
    return any(i.name.startswith("IGMMA") for i in loop)


def head_clocks(made: Iterable[dict[str, Any]], tokens: int, dim: int) -> dict[str, float]:
    """Clocks of each pipe for a head, and of transposing its values (among the issue slots)."""
    shapes = [row for row in made if row["dim"] == dim]
    whole = [row for row in shapes if row["passes"] == 1 and row["keys"] >= tokens]
    tiled = [row for row in shapes if row["passes"] == 2]
    row = min(whole or tiled, key=lambda row: -(-tokens // row["keys"]) * row["keys"])
    key_tiles = -(-tokens // row["keys"])
    products = -(-tokens // QUERIES) * key_tiles
    # A warp codes 16 queries or none, and 16 keys or none.
    coded = -(-tokens // ROWS) * ROWS / QUERIES * (-(-tokens // ROWS) * ROWS / row["keys"])
    clocks = {p: row[f"{p}_clk"] * (products if p in ("tensor", "shared") else coded) for p in PIPES}
    values = row["values_clk"] * tokens / row["keys"]
    return clocks | {"issue": clocks["issue"] + values, "values": values}


def load() -> list[dict[str, Any]]:
    """The committed rows."""
    with RESULTS.open(encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def estimate_us(made: Iterable[dict[str, Any]], tokens: int, dim: int, heads: int, sms: int, ghz: float) -> float:
    """Microseconds of ``heads`` heads on a GPU by the fullest pipe, heads cut as the launcher cuts them; no launch."""
    clocks = head_clocks(made, tokens, dim)
    fullest, tiles = max(clocks[pipe] for pipe in PIPES), -(-tokens // QUERIES)
    cuts = range(1, tiles + 1)
    rounds = min(math.ceil(heads * cut / sms) * (math.ceil(tiles / cut) / tiles) for cut in cuts)
    return rounds * fullest / (1e3 * ghz)


def main() -> None:
    """Writes the rows."""
    binary = extension_path()
    if binary is None:
        sys.exit("vitq_kernels._cuda is not built")
    made = rows(kernels(binary, "sm_90a"))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    print(f"{RESULTS}: {len(made)} rows")


if __name__ == "__main__":
    main()
