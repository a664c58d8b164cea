"""Accuracy of a real ViT-Tiny at several widths, as rows of ``benchmarks/results/``.

    python -m benchmarks.accuracy --assets ../shared/assets
    python -m benchmarks.accuracy --table        # README's table from the rows that are there

Needs the trained weights and labelled images (they are not part of the repository): a folder with
``vit_tiny_patch16_224*.safetensors``, ``calibration/`` and ``evaluation/``, each with a ``labels.csv``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

import vitq_kernels as vitq
from vitq_kernels.files import replaced_file, write_text
from vitq_kernels.images import ImageFolder, eval_transform, load_folder

RESULTS = Path(__file__).parent / "results" / "vit_tiny_accuracy.csv"
MODEL = "vit_tiny_patch16_224"
CALIBRATION_IMAGES, SEED, ACTIVATION_BITS = 64, 0, 8
# (label, kind, bits): uniform widths, or a mean under a strategy of vitq.allocate.
CASES = (
    ("uniform W8A8", "uniform", 8),
    ("uniform W4A8", "uniform", 4),
    ("relevance rows, mean W4A8", "relevance", 4),
    ("LRP-QViT layers, mean W4A8", "lrp-qvit", 4),
    ("permuted relevance, mean W4A8", "random", 4),
    ("uniform W3A8", "uniform", 3),
    ("relevance rows, mean W3A8", "relevance", 3),
    ("permuted relevance, mean W3A8", "random", 3),
)


def load_model(assets: Path) -> torch.nn.Module:
    """The trained ViT-Tiny in float32."""
    model = timm.create_model(MODEL).eval()
    (weights,) = assets.glob(f"{MODEL}*.safetensors")
    model.load_state_dict(load_file(str(weights)), strict=True)
    return model


def measure(assets: Path, only: str = "") -> list[dict[str, Any]]:
    """One row a case; ``only`` keeps the cases whose label contains it."""
    model = load_model(assets)
    sites = vitq.vit_sites(model)
    transform = eval_transform(model)
    images, _ = load_folder(assets / "calibration", transform, CALIBRATION_IMAGES, SEED)
    folder = ImageFolder.scan(assets / "evaluation")
    batches = list(folder.batches(transform, 20))
    stats = vitq.calibrate(model, images)
    scores: dict[str, vitq.Relevance] = {}
    rows = []
    for label, kind, bits in CASES:
        if only not in label:
            continue
        start = time.perf_counter()
        if kind == "uniform":
            plan = vitq.BitAllocation.uniform(sites, bits, ACTIVATION_BITS)
        else:
            method = "chefer" if kind == "lrp-qvit" else "attnlrp"
            if method not in scores:
                scores[method] = vitq.relevance(model, images, method=method)
            budget = vitq.Budget(mean_weight_bits=bits)
            plan = vitq.allocate(model, scores[method], budget, images=images, strategy=kind, seed=SEED)
        qmodel = vitq.quantize(model, images, plan, stats=stats)
        seconds = time.perf_counter() - start
        result = vitq.evaluate(qmodel, batches, float_model=model)
        rows.append(
            {
                "model": MODEL,
                "case": label,
                "top1": round(result.top1, 2),
                "float_top1": round(result.float_top1, 2),
                "agreement": round(result.agreement, 2),
                "kl": round(result.kl, 4),
                "weight_bytes": plan.weight_bytes(sites),
                "float_bytes": qmodel.quantization.float_bytes,
                "mean_weight_bits": round(plan.mean_weight_bits(sites), 4),
                "images": result.images,
                "calibration_images": len(images),
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def provenance() -> dict[str, str]:
    """What every row says of its origin."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "device": f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "semantics_version": str(vitq.SEMANTICS_VERSION),
        "git_sha": commit.stdout.strip(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def table(results: Path = RESULTS) -> str:
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


def with_table(readme: str, text: str) -> str:
    """README's text with the table between its markers replaced."""
    start, end = "<!-- table:accuracy -->\n", "<!-- /table:accuracy -->"
    head, rest = readme.split(start)
    return head + start + text + end + rest.split(end)[1]


def main() -> None:
    """Writes the rows to a CSV file, or README's table from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="folder with the trained weights and the images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="only the cases whose label contains this")
    parser.add_argument("--table", action="store_true", help="no measurement: write README's table")
    arguments = parser.parse_args()
    if arguments.table:
        readme = Path("README.md")
        write_text(readme, with_table(readme.read_text(encoding="utf-8"), table(arguments.out)))
        return
    if arguments.assets is None:
        parser.error("--assets is needed to measure")
    origin = provenance()
    rows = [{**row, **origin} for row in measure(arguments.assets, arguments.only)]
    with replaced_file(arguments.out) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
