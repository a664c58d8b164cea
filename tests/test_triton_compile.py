"""The Triton kernels compiled for GPUs that are not there: integer MMA, no spilled register, nothing approximate.

A sample of the configurations here; all of them with ``-m exhaustive``, and in the committed table.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitq_kernels.ops.triton.tiles import ARCHITECTURES

CHECKOUT = Path(__file__).parents[1]
TABLE = CHECKOUT / "benchmarks" / "results" / "triton_resources.csv"
MIXED = (3, 4, 6)  # as benchmarks.triton_configurations has it, which a process that interprets cannot import
SAMPLE = 26  # every 26th configuration, one to three minutes; no linear op has fewer at one set of widths
EXACT = {"attention", "quantize", "quantize_patches", "quantize_per_token", "linear_codes", "linear_real"}
PROGRAM = """if True:
    import sys
    sys.path.append(sys.argv.pop(1))
    from benchmarks.triton_resources import main
    sys.exit(main())
"""

Row = dict[str, str]


def compiled(out: Path, *options: str) -> list[Row]:
    """The table by ``benchmarks.triton_resources``, from a process that does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(CHECKOUT), "--workers", "1", "--out", str(out), *options]
    run = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return read(out)


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected_mma(row: Row) -> set[str]:
    """Kinds of integer MMA that a row may have."""
    if row["op"] not in ("attention",) and row["kernel"] != "linear_kernel":
        return {"none"}
    # Triton 3.6 has mma.sync on sm_100, 3.8 the tensor memory's own.
    return {90: {"wgmma"}, 100: {"tcgen05", "mma.sync"}}.get(int(row["cc"]), {"mma.sync"})


def problems(rows: list[Row]) -> list[str]:
    """What is wrong with a table, a line each."""
    limits = {arch.cc: arch.shared_bytes for arch in ARCHITECTURES}
    found = []
    for row in rows:
        name = f"{row['kernel']} of {row['op']} ({row['variant']}) on sm_{row['cc']}"
        if int(row["spills"]):
            found.append(f"{name}: {row['spills']} spills")
        if int(row["shared_bytes"]) > limits[int(row["cc"])]:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory")
        if row["mma"] not in expected_mma(row):
            found.append(f"{name}: MMA is {row['mma']}")
        if row["op"] in EXACT and row["approximate"]:
            found.append(f"{name}: {row['approximate']}")
        # libdevice's erf and exp, inlined, do; the error is below 2^-126.
        if "ftz" in row["approximate"] and "gelu" not in row["op"]:
            found.append(f"{name}: flushes denormals, {row['approximate']}")
    return found


@pytest.mark.slow
def test_a_sample_of_all_configurations(tmp_path: Path) -> None:
    rows = compiled(tmp_path / "sample.csv", "--every", str(SAMPLE))
    assert problems(rows) == []
    assert {row["cc"] for row in rows} == {"80", "89", "90", "100", "120"}
    kernels = {
        "linear_kernel",
        "attention_kernel",
        "_layernorm_kernel",
        "_quantize_kernel",
        "_quantize_per_token_kernel",
    }
    assert {row["kernel"] for row in rows} >= kernels
    linear = [row for row in rows if row["kernel"] == "linear_kernel"]
    assert {row["variant"].split(",")[0] for row in linear} >= {f"w{bits}" for bits in range(2, 9)}
    assert {row["op"] for row in linear} == {row["op"] for row in read(TABLE) if row["kernel"] == "linear_kernel"}
    assert any(row["variant"].startswith(f"w{'/'.join(map(str, MIXED))},") for row in linear)


@pytest.mark.slow
def test_sizes_of_one_and_absent_tensors_compile(tmp_path: Path) -> None:
    rows = compiled(tmp_path / "edges.csv", "--edges")
    assert problems(rows) == []
    assert {row["kernel"] for row in rows} >= {"linear_kernel", "finish_kernel", "attention_kernel"}


@pytest.mark.exhaustive
def test_all_configurations(tmp_path: Path) -> None:
    assert problems(compiled(tmp_path / "all.csv")) == []


def test_the_committed_table_is_whole_and_right() -> None:
    rows = read(TABLE)
    assert problems(rows) == []
    assert {row["cc"] for row in rows} == {"80", "89", "90", "100", "120"}
    linear = [row for row in rows if row["kernel"] == "linear_kernel"]
    for arch in ARCHITECTURES:
        for tile in arch.tiles if arch.cc != 86 else ():
            mine = [row for row in linear if row["cc"] == str(arch.cc) and str(tile) in row["variant"]]
            assert {row["variant"].split(",")[0] for row in mine} >= {f"w{bits}" for bits in range(2, 9)}


def mixed_loops(rows: list[Row]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """For each tile on each architecture: (instructions of a width's loop in a mixed layer, of that width alone)."""
    loops: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if ", residual float32, " in row["variant"]:
            widths, _, tile = row["variant"].split(", ", 2)
            loops.setdefault((row["cc"], tile, widths), [int(n) for n in row["loops"].split()])
    return {
        (cc, tile): [(mixed, *loops[cc, tile, f"w{b}"]) for mixed, b in zip(found, MIXED, strict=True)]
        for (cc, tile, widths), found in loops.items()
        if widths == f"w{'/'.join(map(str, MIXED))}" and "splits" not in tile
    }


def test_a_mixed_layer_runs_at_most_5_percent_more_instructions_than_each_width_alone() -> None:
    # Of the loop; outside it there is one branch on the window's width.
    compared = mixed_loops(read(TABLE))
    assert {cc for cc, _ in compared} == {"80", "89", "90", "100", "120"}
    worse = {key: pairs for key, pairs in compared.items() if any(mixed > 1.05 * alone for mixed, alone in pairs)}
    assert worse == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": "2"}, "2 spills"),
        ({"shared_bytes": "999999"}, "999999 bytes of shared memory"),
        ({"mma": "none"}, "MMA is none"),
        ({"approximate": "div.full.f32"}, "div.full.f32"),
        ({"op": "linear_residual", "approximate": "fma.rn.ftz.f32"}, "flushes denormals"),
    ],
)
def test_what_is_wrong_is_found(change: Row, message: str) -> None:
    good = {
        "op": "linear_codes",
        "kernel": "linear_kernel",
        "variant": "w8",
        "cc": "90",
        "spills": "0",
        "shared_bytes": "4096",
        "mma": "wgmma",
        "approximate": "",
    }
    assert problems([good]) == []
    (problem,) = problems([good | change])
    assert message in problem
