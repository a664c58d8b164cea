"""What a loop that asks for the width of each quarter costs at most: the costliest way through it, pipe by pipe.

The kernels run it where the rows of a group have several widths. Which case a branch takes is data, so the bound is
that of the case that keeps a pipe busy the longest, at every branch; a mixture lies below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.cuda_epilogue import Block, blocks
from benchmarks.cuda_sass import Instruction, Kernel, class_of

# Clocks of an SM that one warp's instruction keeps a pipe busy; cuda_cost_model.py says the rates.
SHARED_CLOCKS = {"LDS.128": 4.0, "LDS.64": 2.0, "LDS": 1.0, "LDSM.16": 4.0, "LDGSTS.128": 4.0}
WEIGHTS: dict[str, Callable[[str], float]] = {
    "shared": lambda kind: SHARED_CLOCKS.get(kind, 0.0),
    "alu": lambda kind: 0.5 * (kind == "ALU"),
    "fma": lambda kind: 0.5 * (kind == "FMA"),
    "issue": lambda kind: 0.25,
}
HEAD = """
Where the rows of a group have several widths, a warp asks at each quarter of 16. The most that one step can take, on
the costliest way through that loop for each pipe by itself, whatever the widths are; and the fullest of these pipes in
percent of the tensor cores, beside that of the loop of the widest alone.

| arch | operands | tile | tensor | shared | ALU | FMA | issue | fullest | widest alone |
|---|---|---|---|---|---|---|---|---|---|""".splitlines()


def costliest(kernel: Kernel, loop: Sequence[Instruction]) -> dict[str, float]:
    """Most clocks that one warp's turn keeps each pipe busy, on an SM that runs nothing else.

    ``loop``: all of it lies between its first and its last instruction; it unpacks every width as often.
    """
    start, end = loop[0].address, loop[-1].address
    inside = {address: block for address, block in blocks(kernel).items() if start <= address <= end}
    return {pipe: _longest(inside, weight) for pipe, weight in WEIGHTS.items()}


def row(arch: str, operands: str, tile: str, bound: dict[str, float], alone: dict[str, float]) -> str:
    """A line of the table: clocks of a step of a block, the costliest and those of the widest alone."""
    clocks = " | ".join(f"{bound[pipe]:.0f}" for pipe in ("tensor", *WEIGHTS))
    return f"| {arch} | {operands} | {tile} | {clocks} | {fullest(bound)} | {fullest(alone)} |"


def fullest(clocks: dict[str, float]) -> str:
    """The fullest pipe beside the tensor cores, in percent of them."""
    pipe = max(WEIGHTS, key=lambda pipe: clocks[pipe])
    return f"{pipe} {100 * clocks[pipe] / clocks['tensor']:.0f} %"


def _longest(graph: dict[int, Block], weight: Callable[[str], float]) -> float:
    """The heaviest way forward from the first block."""
    found: dict[int, float] = {}
    for address in sorted(graph, reverse=True):
        body = graph[address].body
        # Where an indirect branch goes is not listed: to a block further on.
        targets = found if body[-1].name.startswith("BRX") else graph[address].following
        following = max((found[target] for target in targets if target in found), default=0.0)
        found[address] = sum(weight(class_of(i.name)) for i in body) + following
    return found[min(graph)]
