"""The whole job on the embedded ViT: score, allocate, quantize, compare, report. Offline, seconds on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitq_kernels.convert import quantize
from vitq_kernels.data import digits_images, load_digits_vit
from vitq_kernels.evaluation import evaluate
from vitq_kernels.models import model_sites
from vitq_kernels.planning import allocate
from vitq_kernels.relevance import relevance
from vitq_kernels.report import Measurement, ReportData, write_report
from vitq_kernels.spec import BitAllocation, Budget
from vitq_kernels.summary import float_measurement, latency_ms, machine_facts, quantized_measurement

MEAN_BITS = 4
LOW_BITS = 2.5  # so small a model loses next to nothing at 4 bits; here the choice of rows shows


@dataclass(frozen=True)
class DemoResult:
    """What ``vitq demo`` prints."""

    measurements: tuple[Measurement, ...]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"images": self.images, "measurements": [asdict(m) for m in self.measurements]}

    def table(self) -> str:
        """The comparison as text."""

        def shown(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        timed = any(m.latency_ms is not None for m in self.measurements)
        lines = [f"{'':16} {'top-1 %':>8} {'agree %':>8} {'KL':>9} {'weights, B':>11} {'mean bits':>9}"]
        lines[0] += f" {'ms/64':>9}" if timed else ""
        for m in self.measurements:
            lines.append(
                f"{m.label:16} {shown(m.top1, '.1f'):>8} {shown(m.agreement, '.1f'):>8} {shown(m.kl, '.5f'):>9} "
                f"{m.weight_bytes:>11,} {shown(m.mean_weight_bits, '.2f'):>9}"
                + (f" {shown(m.latency_ms, '.2f'):>9}" if timed else "")
            )
        return "\n".join(lines)


def run_demo(out: str | Path, device: str = "cpu", *, progress: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Runs the demo and writes its report to ``out``.

    Latency of a batch of 64 is measured on a GPU only: on a CPU these modules prove numbers, not speed.
    """
    model = load_digits_vit()
    calibration, _ = digits_images("calibration")
    images, labels = digits_images("test")
    sites = model_sites(model)

    progress(f"scoring {len(calibration)} images (AttnLRP)")
    scores = relevance(model, calibration)
    progress(f"allocating means of {MEAN_BITS} and {LOW_BITS} bits")
    mixed, low = (
        allocate(model, scores, Budget(mean_weight_bits=bits), images=calibration) for bits in (MEAN_BITS, LOW_BITS)
    )
    plans = {
        "uniform W8A8": BitAllocation.uniform(sites, 8),
        "uniform W2A8": BitAllocation.uniform(sites, 2),
        f"mixed W{LOW_BITS}A8": low,
        f"uniform W{MEAN_BITS}A8": BitAllocation.uniform(sites, MEAN_BITS),
        f"mixed W{MEAN_BITS}A8": mixed,
    }

    def batches() -> Any:
        return zip(images.split(100), labels.split(100), strict=True)

    gpu = torch.device(device).type == "cuda"
    probe = images[:64].to(device)
    float_on_device = copy.deepcopy(model).to(device)
    base = evaluate(float_on_device, batches())
    float_bytes = 4 * sum(site.rows * site.cols for site in sites)
    rows = [float_measurement(base, float_bytes, device, latency_ms(float_on_device, probe) if gpu else None)]
    for label, plan in plans.items():
        progress(f"quantizing and evaluating {label}")
        qmodel = quantize(model, calibration, plan).to(device)
        result = evaluate(qmodel, batches(), float_model=float_on_device)
        latency = latency_ms(qmodel, probe) if gpu else None
        rows.append(quantized_measurement(label, result, qmodel.quantization, device, latency))
    facts = {"images": f"{len(images)} test, {len(calibration)} calibration", "seed": "0", **machine_facts()}
    write_report(
        ReportData(
            "A digits ViT on integer arithmetic",
            "the embedded ViT (4 blocks of 64 channels) on scikit-learn's handwritten digits",
            sites,
            mixed,
            scores,
            rows,
            facts,
            ("Every quantized row ran on integer modules: packed weights, int8 codes, log2-quantized softmax.",),
        ),
        out,
    )
    return DemoResult(tuple(rows), len(images))
