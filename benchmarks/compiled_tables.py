"""What is known of the kernels' speed without a GPU: what compilers made of them, and which pipe bounds each loop."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.markdown import markdown_table

Row = dict[str, str]
LOOP_TILE, LOOP_ARCHS = "128x128", ("sm_80", "sm_90a")
NO_GPU = """\
**No GPU has run these kernels yet, so this page has no time of one.** Their numbers are proven on a CPU, in an
emulation of the CUDA execution model and in Triton's interpreter. What a GPU would be given is known from compilers; it
says what can be fast, not that it is:
"""
LOOPS = f"""\
The inner loop of the CUDA GEMM with int8 activations, tile {LOOP_TILE}, counted in its machine code: unpacking costs no
time while the busiest other pipe needs less than the tensor cores. Hopper's are assumed to give `mma.sync` half of
their peak; its own kernel on `wgmma`, and all other loops: `docs/cuda_cost_model.md`.
"""


def _read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def text(results: Path) -> str:
    """The statement and the evidence, as Markdown."""
    loops = _read(results / "cuda_cost_model.csv")
    return "\n".join([NO_GPU, resources(results, loops), LOOPS, loop_table(loops)])


def resources(results: Path, loops: list[Row]) -> str:
    """Kernels by backend and architecture: how many, how many of them spill, what they multiply with."""
    lines = []
    for arch, rows in _by(_read(results / "cuda_resources.csv"), "arch").items():
        spilled = sum(int(row["local_bytes"]) > 0 or int(row["stack_bytes"]) > 0 for row in rows)
        integer = [row for row in loops if row["arch"] == arch and int(row["imma"]) > 0]
        products = f"mma.sync {', '.join(dict.fromkeys(row['operands'] for row in integer))}"
        products += "; wgmma s8" if any(row["kernel"].startswith("wgmma") for row in rows) else ""
        lines.append(_line("CUDA", arch, rows, spilled, products))
    for cc, rows in _by(_read(results / "triton_resources.csv"), "cc").items():
        spilled = sum(int(row["spills"]) > 0 for row in rows)
        products = ", ".join(dict.fromkeys(row["mma"] for row in rows if row["mma"] != "none"))
        lines.append(_line("Triton", f"sm_{cc}", rows, spilled, products))
    head = ("backend", "architecture", "tensor cores by", "compiled kernels", "that spill", "most registers a thread")
    return markdown_table(head, lines, words=3)


def _line(backend: str, arch: str, rows: list[Row], spilled: int, products: str) -> tuple[str, ...]:
    most = max(int(row["registers"]) for row in rows)
    return (backend, arch, products, str(len(rows)), str(spilled), str(most))


def _by(rows: list[Row], name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def loop_table(loops: list[Row]) -> str:
    """By width: the busiest other pipe beside the tensor cores, and what unpacking a weight costs."""
    head = ["weight bits"]
    for arch in LOOP_ARCHS:
        head += [f"{arch}: next busiest pipe, of the tensor cores' time", "instructions to unpack a weight"]
    chosen = {(row["arch"], row["bits"]): row for row in loops if (row["tile"], row["operands"]) == (LOOP_TILE, "s8")}
    lines = []
    for bits in sorted({bits for _, bits in chosen}, key=int, reverse=True):
        rows = [chosen[arch, bits] for arch in LOOP_ARCHS]
        cells = [(f"{row['next_pipe']} {float(row['next_pct']):.0f} %", row["unpack_per_weight"]) for row in rows]
        lines.append([bits, *(cell for group in cells for cell in group)])
    return markdown_table(head, lines)
