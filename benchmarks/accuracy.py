"""Accuracy of a real ViT-Tiny at several widths and by several allocations, as rows of ``benchmarks/results/``.

    python -m benchmarks.accuracy --assets ../shared/assets

README's table of them is written by ``python -m benchmarks.readme_tables``.
``benchmarks/vit_tiny.py`` says what the assets are.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import vitq_kernels as vitq
from benchmarks.vit_tiny import RESULTS, SEED, VitTiny, write_rows
from vitq_kernels.sensitivity_runs import sensitivity
from vitq_kernels.strategies import BY_SENSITIVITY, WITHOUT_SCORES, rules_of

ROWS = RESULTS / "vit_tiny_accuracy.csv"
UNIFORM = ((8, 8), (6, 6), (4, 8), (4, 4), (3, 8))
PERMUTATIONS = 3
# (label, strategy of vitq.allocate, mean weight bits, seed), all at 8-bit activations.
MIXED = tuple(
    (f"{label}, mean W{mean}A8", strategy, mean, SEED)
    for mean in (4, 3)
    for label, strategy in (
        ("relevance rows", "relevance"),
        ("Fisher rows", "fisher"),
        ("LRP-QViT layers", "lrp-qvit"),
        ("sensitivity layers", "sensitivity"),
    )
) + tuple(
    (f"permuted relevance, seed {seed}, mean W{mean}A8", "random", mean, seed)
    for mean in (4, 3)
    for seed in range(PERMUTATIONS)
)
LOW = (("relevance rows, mean W2.5A8", "relevance", 2.5, SEED), ("Fisher rows, mean W2.5A8", "fisher", 2.5, SEED))
CASES = (*(f"uniform W{w}A{a}" for w, a in UNIFORM), *(label for label, *_ in MIXED + LOW))


def measure(vit: VitTiny, only: str = "", cache: Path | None = None) -> list[dict[str, Any]]:
    """One row a case; ``only`` keeps the cases whose label contains it, ``cache`` keeps measured sensitivities."""
    rows = []
    for weight_bits, activation_bits in UNIFORM:
        label = f"uniform W{weight_bits}A{activation_bits}"
        if only in label:
            plan = vitq.BitAllocation.uniform(vit.sites, weight_bits, activation_bits)
            rows.append(vit.measure({"case": label}, plan))
    scores: dict[str, vitq.Relevance] = {}
    measured: list[Any] = []
    for label, strategy, mean, seed in MIXED + LOW:
        if only not in label:
            continue
        rules = rules_of(strategy)
        if strategy not in WITHOUT_SCORES and rules not in scores:
            scores[rules] = vitq.relevance(vit.model, vit.images, method=rules)
        if strategy in BY_SENSITIVITY and not measured:
            measured.append(sensitivity(vit.model, vit.images, cache=cache))
        plan = vitq.allocate(
            vit.model,
            None if strategy in WITHOUT_SCORES else scores[rules],
            vitq.Budget(mean_weight_bits=mean),
            images=vit.images,
            strategy=strategy,
            sensitivity=measured if strategy in BY_SENSITIVITY else (),
            seed=seed,
        )
        rows.append(vit.measure({"case": label}, plan))
    return rows


def table(results: Path = ROWS) -> str:
    """The committed rows as README's Markdown table."""
    with results.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    first = rows[0]
    lines = [
        "| widths | top-1 % | agreement % | KL | packed weights | bits per weight |",
        "|---|---:|---:|---:|---:|---:|",
        f"| float32 | {float(first['float_top1']):.2f} | - | - | {int(first['float_bytes']) / 1e6:.2f} MB | 32 |",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {float(row['top1']):.2f} | {float(row['agreement']):.2f} | {float(row['kl']):.3f} "
            f"| {int(row['weight_bytes']) / 1e6:.2f} MB | {float(row['mean_weight_bits']):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with the trained weights and the images")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--only", default="", help="only the cases whose label contains this")
    parser.add_argument("--cache", type=Path, help="file of measured sensitivities, to go on where a run stopped")
    arguments = parser.parse_args()
    write_rows(arguments.out, measure(VitTiny(arguments.assets), arguments.only, arguments.cache))


if __name__ == "__main__":
    main()
