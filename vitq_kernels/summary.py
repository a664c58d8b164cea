"""Results in the form the report shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitq_kernels.convert import Quantization
from vitq_kernels.doctor import examine
from vitq_kernels.evaluation import Evaluation
from vitq_kernels.relevance import Relevance
from vitq_kernels.report import Measurement, ReportData
from vitq_kernels.stopwatch import waiter, wall_times_us

# Of `vitq eval --json`, in the order of Measurement's fields.
EVALUATION_KEYS = ("top1", "agreement", "kl", "weight_bytes", "mean_weight_bits", "images_per_s")
FACTS = ("vitq-kernels", "torch", "timm", "python", "semantics version", "machine", "GPU", "GPU 0")


def float_measurement(
    evaluation: Evaluation, float_bytes: int, device: str, latency_ms: float | None = None
) -> Measurement:
    """The float model's row; an evaluation of itself has top-1 only."""
    return Measurement(
        "float32", evaluation.top1, None, None, float_bytes, 32.0, evaluation.images_per_s, latency_ms, device
    )


def quantized_measurement(
    label: str, evaluation: Evaluation, record: Quantization, device: str, latency_ms: float | None = None
) -> Measurement:
    """A quantized model's row; its bytes are the packed weights with their row orders."""
    return Measurement(
        label,
        evaluation.top1,
        evaluation.agreement,
        evaluation.kl,
        record.allocation.weight_bytes(record.sites),
        record.allocation.mean_weight_bits(record.sites),
        evaluation.images_per_s,
        latency_ms,
        device,
    )


def report_of(
    model: nn.Module, name: str, relevance: Relevance | None, results: Mapping[str, Mapping[str, Any]]
) -> ReportData:
    """A report of a model from ``quantize`` or ``load`` and of the JSON that ``vitq eval`` wrote of it.

    Raises:
        ValueError: a result lacks the keys of ``vitq eval --json``.
    """
    record: Quantization = model.quantization
    rows: list[Measurement] = []
    for label, result in results.items():
        if not isinstance(result, Mapping):
            raise ValueError(f"evaluation {label} must be JSON of `vitq eval`, got {type(result).__name__}")
        try:
            device = result.get("device", "")
            if result["float_top1"] is not None and not rows:
                size = result["float_bytes"]
                rows.append(Measurement("float32", result["float_top1"], None, None, size, 32.0, None, None, device))
            rows.append(Measurement(label, *(result[key] for key in EVALUATION_KEYS), None, device))
        except KeyError as error:
            raise ValueError(f"evaluation {label} must be JSON of `vitq eval`, it lacks {error}") from error
    architecture = model.pretrained_cfg.get("architecture", "VisionTransformer")
    return ReportData(
        f"{architecture}, quantized", name, record.sites, record.allocation, relevance, rows, machine_facts()
    )


def machine_facts() -> dict[str, str]:
    """Versions and devices, for the foot of a report."""
    found = examine()
    return {key: found[key] for key in FACTS if key in found}


@torch.inference_mode()
def latency_ms(model: nn.Module, images: Tensor, repeats: int = 20) -> float:
    """Median wall time of a forward in milliseconds, after three that do not count."""
    for _ in range(3):
        model(images)
    (samples,) = wall_times_us([lambda: model(images)], repeats, waiter(str(images.device)))
    return statistics.median(samples) / 1e3
