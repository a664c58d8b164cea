"""Registers, shared memory, occupancy and kind of MMA of every shipped Triton configuration; no GPU is needed.

    python -m benchmarks.triton_resources [--every N] [--out FILE]

Compiles what the launchers would launch (``recorded_launches`` on tensors without data) for each architecture class and
writes a row a kernel. ``benchmarks/results/triton_resources.csv`` is its output; ``tests/test_triton_compile.py`` holds
the rows to what they must be. All of them take about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from benchmarks.triton_compile import Compiled, compile_launch
from benchmarks.triton_configurations import LISTS, Configuration
from vitq_kernels.ops.triton.launch import Launch

PATH = Path(__file__).parent / "results" / "triton_resources.csv"
MAX_WARPS = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}  # an SM; CUDA programming guide, compute capabilities
INTEGER_MMA = {
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    "tcgen05": r"tcgen05\.mma\S*\.kind::i8",
    "mma.sync": r"mma\.sync\.aligned\.m16n8k32\.row\.col\S*\.s32\.s8\.s8\.s32",
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    op: str
    kernel: str
    variant: str
    cc: int
    registers: int
    spills: int
    shared_bytes: int
    threads: int
    programs_per_sm: int
    occupancy_pct: int
    mma: str  # integer instruction of the PTX: wgmma, tcgen05, mma.sync, or none
    approximate: str  # instructions of the PTX that are not IEEE's
    instructions: int
    loops: str  # instructions of each loop around an integer MMA: one a width
    triton: str


def rows_of(which: tuple[str, int]) -> list[Row]:
    """Compiles a configuration, by the name of its list and its place there: they do not travel between processes."""
    c = LISTS[which[0]]()[which[1]]
    return [row(c, launch, compile_launch(launch, c.architecture.cc)) for launch in c.launches()]


def row(c: Configuration, launch: Launch, compiled: Compiled) -> Row:
    """A line of the table."""
    warps = compiled.threads // 32
    registers = -(-compiled.registers // 8) * 8  # allocated in units of 8
    programs = min(
        c.architecture.shared_per_sm // (compiled.shared_bytes + 1024),
        65536 // (registers * compiled.threads),
        MAX_WARPS[compiled.cc] // warps,
    )
    mma = next((kind for kind, pattern in INTEGER_MMA.items() if re.search(pattern, compiled.ptx)), "none")
    approximate = set(re.findall(r"\b(?:\w+\.approx\S*|div\.full\S*|\w+\S*\.ftz\S*)", compiled.ptx))
    return Row(
        c.op,
        launch.kernel.fn.__name__,
        c.variant,
        compiled.cc,
        compiled.registers,
        compiled.spills,
        compiled.shared_bytes,
        compiled.threads,
        programs,
        round(100 * programs * warps / MAX_WARPS[compiled.cc]),
        mma,
        " ".join(sorted(approximate)),
        len(compiled.opcodes),
        " ".join(map(str, compiled.loops)),
        triton.__version__,
    )


def sampled(configurations: list[Configuration], every: int) -> list[int]:
    """The places of every N-th configuration, counted by op and widths so that no group of N is left out."""
    kinds = [(c.op, c.variant.split(",")[0]) for c in configurations]
    return sorted(sorted(range(len(kinds)), key=kinds.__getitem__)[::every])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources", description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every N-th configuration, op by op")
    parser.add_argument("--edges", action="store_true", help="sizes of one and the like instead of what is shipped")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=PATH, help=f"CSV file; default: {PATH}")
    args = parser.parse_args()
    name = "edges" if args.edges else "shipped"
    chosen = [(name, index) for index in sampled(LISTS[name](), args.every)]
    with ProcessPoolExecutor(args.workers) as pool:
        found = [row for rows in pool.map(rows_of, chosen) for row in rows]
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(found[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, found))
    print(f"{args.out}: {len(found)} kernels of {len(chosen)} configurations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
