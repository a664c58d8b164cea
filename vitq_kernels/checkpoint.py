"""One safetensors file: the integer model's tensors, and a JSON manifest that says how to build it.

Loading needs neither calibration nor the float weights, executes no code, and refuses what it does not recognise.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitq_kernels.convert import Quantization
from vitq_kernels.files import replaced_file
from vitq_kernels.models import build_vit
from vitq_kernels.ops import SEMANTICS_VERSION
from vitq_kernels.skeleton import quantized_skeleton
from vitq_kernels.spec import BitAllocation, Site

FORMAT = "vitq-kernels checkpoint 1"
# Of timm's pretrained_cfg: what its data transforms read.
DATA_KEYS = ("architecture", "input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "num_classes")


class CheckpointError(ValueError):
    """The file is no checkpoint of ours, or not whole; the message names the file and what is wrong."""


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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _check_rebuilds(record, tensors)
    config = getattr(model, "pretrained_cfg", None) or {}
    manifest = {
        "format": FORMAT,
        "semantics_version": SEMANTICS_VERSION,
        "model": record.model_config,
        "data": {key: config[key] for key in DATA_KEYS if config.get(key) is not None},
        "allocation": json.loads(record.allocation.to_json()),
        "sites": [asdict(site) for site in record.sites],
    }
    text = json.dumps(manifest, sort_keys=True)
    with replaced_file(path) as temporary:
        save_file(tensors, str(temporary), {"manifest": text, "sha256": content_hash(tensors, text)})


def _check_rebuilds(record: Quantization, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless ``load`` would find every tensor where the manifest's model has it."""
    assert record.model_config is not None
    rebuilt = quantized_skeleton(build_vit(record.model_config, "meta"), record.allocation).state_dict()
    shapes, wanted = ({name: tuple(t.shape) for name, t in group.items()} for group in (tensors, rebuilt))
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise ValueError(
                f"save: timm's {record.model_config['class']} must rebuild the model from its constructor's arguments; "
                f"{name} would be {wanted.get(name, 'absent')}, is {shapes.get(name, 'absent')}"
            )


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Reads a file of ``save`` and returns the model in eval mode.

    Raises:
        CheckpointError: not a checkpoint, truncated, changed since it was written, or of another semantics version.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    manifest, tensors = _read(path)
    try:
        allocation = BitAllocation.from_json(json.dumps(manifest["allocation"]))
        sites = tuple(Site(**site) for site in manifest["sites"])
        model = quantized_skeleton(build_vit(manifest["model"], "meta"), allocation)
        model.load_state_dict(tensors, strict=True, assign=True)
        model.pretrained_cfg = manifest["data"]
        model.quantization = Quantization(manifest["model"], allocation, sites)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensors do not fit the manifest: {type(error).__name__}: {error}") from error
    return model.requires_grad_(False).to(device).eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    text = metadata.get("manifest")
    if text is None:
        raise CheckpointError(f"{path} is not a vitq-kernels checkpoint: it has no manifest")
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the manifest is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{path}: format must be {FORMAT!r}, got {got!r}")
    version = manifest.get("semantics_version")
    if version != SEMANTICS_VERSION:
        raise CheckpointError(
            f"{path}: semantics version must be {SEMANTICS_VERSION}, got {version}; "
            "quantize the float model again, or use the vitq-kernels that wrote the file"
        )
    if content_hash(tensors, text) != metadata.get("sha256"):
        raise CheckpointError(f"{path} was changed after it was written: its sha256 does not match")
    return manifest, tensors


def content_hash(tensors: dict[str, Tensor], manifest: str) -> str:
    """sha256 over the manifest and every tensor's name, dtype, shape and bytes, in order of names."""
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
