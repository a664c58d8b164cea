"""One safetensors file: the integer model's tensors, and a JSON manifest that says how to build it.

Loading needs neither calibration nor the float weights, executes no code, and refuses what it does not recognise.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from vitq_kernels.convert import Quantization
from vitq_kernels.models import build_model
from vitq_kernels.ops import SEMANTICS_VERSION
from vitq_kernels.skeleton import quantized_skeleton
from vitq_kernels.spec import BitAllocation, Site
from vitq_kernels.tensor_file import CheckpointError, content_hash, data_config, read_tensors, write_tensors

__all__ = ["FORMAT", "CheckpointError", "content_hash", "load", "save"]

FORMAT = "vitq-kernels checkpoint 1"


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a model from ``quantize`` to one safetensors file; an existing file stays good if this fails.

    Raises:
        ValueError: the model was not made by ``quantize``, a part of it stayed in float, or ``load`` could not
            rebuild it.
    """
    record = getattr(model, "quantization", None)
    if not isinstance(record, Quantization):
        raise ValueError(f"save: model must come from vitq_kernels.quantize or load, got {type(model).__name__}")
    if record.model_config is None:
        raise ValueError("save: every part of the model must be integer, got one with parts left in float")
    tensors = model.state_dict()
    _check_rebuilds(record, tensors)
    manifest = {
        "format": FORMAT,
        "semantics_version": SEMANTICS_VERSION,
        "model": record.model_config,
        "data": data_config(model),
        "allocation": json.loads(record.allocation.to_json()),
        "sites": [asdict(site) for site in record.sites],
    }
    write_tensors(path, tensors, manifest)


def _check_rebuilds(record: Quantization, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless ``load`` would find every tensor where the manifest's model has it."""
    assert record.model_config is not None
    rebuilt = quantized_skeleton(build_model(record.model_config, "meta"), record.allocation, tensors).state_dict()
    shapes, wanted = ({name: tuple(t.shape) for name, t in group.items()} for group in (tensors, rebuilt))
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise ValueError(
                f"save: {record.model_config['class']} must rebuild the model from its constructor's arguments; "
                f"{name} would be {wanted.get(name, 'absent')}, is {shapes.get(name, 'absent')}"
            )


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Reads a file of ``save`` and returns the model in eval mode.

    Raises:
        CheckpointError: not a checkpoint, truncated, changed since it was written, or of another semantics version.
        FileNotFoundError: no such file.
    """
    manifest, tensors = read_tensors(path, FORMAT)
    version = manifest.get("semantics_version")
    if version != SEMANTICS_VERSION:
        raise CheckpointError(
            f"{path}: semantics version must be {SEMANTICS_VERSION}, got {version}; "
            "quantize the float model again, or use the vitq-kernels that wrote the file"
        )
    try:
        allocation = BitAllocation.from_json(json.dumps(manifest["allocation"]))
        sites = tuple(Site(**site) for site in manifest["sites"])
        model = quantized_skeleton(build_model(manifest["model"], "meta"), allocation, tensors)
        model.load_state_dict(tensors, strict=True, assign=True)
        model.pretrained_cfg = manifest["data"]
        model.quantization = Quantization(manifest["model"], allocation, sites)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensors do not fit the manifest: {type(error).__name__}: {error}") from error
    return model.requires_grad_(False).to(device).eval()
