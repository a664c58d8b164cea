"""Quantized models of both kinds for the verbs: executed on integers, or a published method simulated in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import vitq_kernels as vitq
from vitq_kernels.presets import file as simulations
from vitq_kernels.tensor_file import read_manifest


def is_simulated(model: nn.Module) -> bool:
    """Whether the model is a simulation, not integers."""
    return hasattr(model, "simulation")


def read_quantized(path: Path, device: str) -> nn.Module:
    """What ``vitq quantize`` wrote, of either kind."""
    simulation = read_manifest(path).get("format") == simulations.FORMAT
    return simulations.load(path, device) if simulation else vitq.load(path, device)


def write_quantized(model: nn.Module, path: Path) -> None:
    """What ``read_quantized`` reads."""
    (simulations.save if is_simulated(model) else vitq.save)(model, path)


def classifies(qmodel: Any) -> bool:
    """Whether the model has a classifier."""
    record = qmodel.simulation if is_simulated(qmodel) else qmodel.quantization
    return any(site.kind == "head" for site in record.sites)


def facts(qmodel: Any) -> dict[str, Any]:
    """What the model is and executes; bytes of its packed weights with their row orders, of the same in float32; bits.

    The bytes of a simulation are those that its codes would take, packed; scales and zero points are never counted. It
    knows its calibration images: its method takes no more than the paper did.
    """
    simulated = is_simulated(qmodel)
    record = qmodel.simulation if simulated else qmodel.quantization
    return {
        "method": record.method if simulated else "vitq",
        "executes": record.executes if simulated else "integers",
        **({"calibration_images": record.calibration_images} if simulated else {}),
        "weight_bytes": record.allocation.weight_bytes(record.sites),
        "float_bytes": record.float_bytes,
        "mean_weight_bits": record.allocation.mean_weight_bits(record.sites),
    }
