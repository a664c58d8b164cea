"""The real ViT-Tiny and its images, what every measured row says of its origin, and the files that rows go to.

Trained weights and labelled images are not part of the repository: a folder with
``vit_tiny_patch16_224*.safetensors``, ``calibration/`` and ``evaluation/``, each with a ``labels.csv``.
"""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import vitq_kernels as vitq
from vitq_kernels.files import replaced_file
from vitq_kernels.images import ImageFolder, eval_transform, load_folder

RESULTS = Path(__file__).parent / "results"
MODEL = "vit_tiny_patch16_224"
CALIBRATION_IMAGES, SEED = 64, 0


class VitTiny:
    """Model, calibration images and statistics, evaluation batches: read once, shared by the cases of a benchmark."""

    def __init__(self, assets: Path) -> None:
        self.model = load_model(assets)
        self.sites = vitq.model_sites(self.model)
        transform = eval_transform(self.model)
        self.images: Tensor = load_folder(assets / "calibration", transform, CALIBRATION_IMAGES, SEED)[0]
        self.batches = list(ImageFolder.scan(assets / "evaluation").batches(transform, 20))
        self.stats = vitq.calibrate(self.model, self.images)
        with torch.inference_mode():
            self._answers = {images.data_ptr(): self.model(images) for images, _ in self.batches}

    def measure(
        self, case: Mapping[str, Any], plan: vitq.BitAllocation, config: vitq.QuantConfig | None = None
    ) -> dict[str, Any]:
        """One row: ``case``, then accuracy and size of the model quantized by ``plan`` on integer modules."""
        start = time.perf_counter()
        qmodel = vitq.quantize(self.model, self.images, plan, stats=self.stats, config=config)
        seconds = time.perf_counter() - start
        result = vitq.evaluate(qmodel, self.batches, float_model=lambda images: self._answers[images.data_ptr()])
        row = {
            "model": MODEL,
            **case,
            "top1": round(result.top1, 2),
            "float_top1": round(result.float_top1, 2),
            "agreement": round(result.agreement, 2),
            "kl": round(result.kl, 4),
            "weight_bytes": plan.weight_bytes(self.sites),
            "float_bytes": qmodel.quantization.float_bytes,
            "mean_weight_bits": round(plan.mean_weight_bits(self.sites), 4),
            "images": result.images,
            "calibration_images": len(self.images),
            "seconds": round(seconds, 1),
        }
        print(row, flush=True)
        return row


def load_model(assets: Path) -> torch.nn.Module:
    """The trained ViT-Tiny in float32."""
    model = timm.create_model(MODEL).eval()
    (weights,) = assets.glob(f"{MODEL}*.safetensors")
    model.load_state_dict(load_file(str(weights)), strict=True)
    return model


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


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a CSV file by these rows, each with its origin."""
    origin = provenance()
    with replaced_file(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, [*rows[0], *origin])
        writer.writeheader()
        writer.writerows({**row, **origin} for row in rows)
