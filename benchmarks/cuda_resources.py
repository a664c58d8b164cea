"""Registers, shared memory and theoretical occupancy of every compiled CUDA kernel.

``python -m benchmarks.cuda_resources`` writes ``benchmarks/results/cuda_resources.csv`` from the built extension; no
GPU is needed. Occupancy is what registers, shared memory and threads leave room for.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.cuda_sass import ARCHITECTURES, extension_path, resources
from vitq_kernels.ops.cuda.tiles import TILES, Tile

RESULTS = Path(__file__).parent / "results" / "cuda_resources.csv"
COLUMNS = (
    *("kernel", "arch", "threads", "registers", "stack_bytes", "local_bytes"),
    *("shared_bytes", "blocks_per_sm", "warps_per_sm", "limited_by"),
)
# Bytes of shared memory of an SM, warps and blocks it holds (CUDA programming guide, specifications per capability).
LIMITS = {
    "sm_80": (164 << 10, 64, 32),
    "sm_86": (100 << 10, 48, 16),
    "sm_89": (100 << 10, 48, 24),
    "sm_90a": (228 << 10, 64, 32),
}
PARTITIONS = 4  # of an SM
REGISTERS, RESERVED_BYTES = 65536, 1024  # of an SM; of a block, taken by the system
ROW_THREADS = 256  # csrc/layernorm.cu, kBlockRow


def launch_of(kernel: str) -> tuple[int, int]:
    """Threads and bytes of dynamic shared memory of a block; of a GEMM at 8 bits, in order."""
    tile = re.match(r"(gemm|wgmma)_kernel<\w+, (?:(s\d), )?(\d+)x(\d+)>", kernel)
    if tile:
        size, wgmma = (int(tile.group(3)), int(tile.group(4))), tile.group(1) == "wgmma"
        found: Tile = next(t for t in TILES if (t.rows, t.tokens, t.wgmma) == (*size, wgmma))
        return found.threads, found.shared_bytes(4 if tile.group(2) == "s4" else 8)
    attention = re.match(r"(?:window_)?attention_kernel<(\d), (\d)>", kernel)
    if attention:
        return 128, 3 * 64 * 32 * int(attention.group(1)) + 256  # two stages of keys, one of values, the levels
    hopper = re.match(r"attention_wgmma_kernel<(\d+), (\d+), (\w+)>", kernel)
    if hopper:
        dim, keys, tiles = int(hopper.group(1)), int(hopper.group(2)), 1 if hopper.group(3) == "whole" else 2
        # Two stages of keys, values and levels of the shortest sequence that the shape is for.
        of_keys = -(-tiles * keys * (-(-dim // 32) * 32) // 1024) * 1024
        return 384, 1024 + 2 * (1024 + of_keys + tiles * -(-keys // 128) * 128 * dim)
    rows = re.match(r"(?:any_)?row_kernel<(\d+)", kernel)
    if rows and int(rows.group(1)) > 32:
        return ROW_THREADS, 4 * (ROW_THREADS // 32) * 4
    return 128, 0


def occupancy(threads: int, registers: int, shared: int, arch: str) -> tuple[int, str]:
    """Blocks that an SM holds at a time, and what limits them."""
    shared_of_sm, warps_of_sm, most_blocks = LIMITS[arch]
    warps = threads // 32
    # Allocated by 256 a warp, in each of four sub-partitions, among which a block's warps are dealt out.
    of_partition = REGISTERS // PARTITIONS // (-(-registers * 32 // 256) * 256)
    limits = {
        "registers": of_partition // -(-warps // PARTITIONS),
        "shared memory": shared_of_sm // (shared + RESERVED_BYTES),
        "warps": warps_of_sm // warps,
        "blocks": most_blocks,
    }
    least = min(limits, key=lambda name: limits[name])
    return limits[least], least


def rows(binary: Path) -> list[dict[str, Any]]:
    """A row a kernel and architecture."""
    found = []
    for arch in ARCHITECTURES:
        for kernel, (registers, stack, static, local) in sorted(resources(binary, arch).items()):
            # Empty, and launched by nobody: Hopper has no 4-bit products, others no wgmma.
            if ("s4" if arch == "sm_90a" else "wgmma") in kernel:
                continue
            threads, dynamic = launch_of(kernel)
            if arch == "sm_90a" and static:
                static -= RESERVED_BYTES  # ptxas counts the system's KB there, where a kernel has dynamic shared memory
            blocks, limit = occupancy(threads, registers, static + dynamic, arch)
            shared, warps = static + dynamic, blocks * threads // 32
            row = (kernel, arch, threads, registers, stack, local, shared, blocks, warps, limit)
            found.append(dict(zip(COLUMNS, row, strict=True)))
    return found


def main() -> None:
    """Writes the table."""
    binary = extension_path()
    if binary is None:
        sys.exit("vitq_kernels._cuda is not built")
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(binary))
    print(f"{RESULTS}: {len(rows(binary))} rows")


if __name__ == "__main__":
    main()
