"""One safetensors file of tensors and a JSON manifest, with a hash over both: what every saved model here is.

Reading executes no code and refuses what it does not recognise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitq_kernels.files import replaced_file

# Of timm's pretrained_cfg: what its data transforms read.
DATA_KEYS = ("architecture", "input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "num_classes")


class CheckpointError(ValueError):
    """The file is no checkpoint of ours, or not whole; the message names the file and what is wrong."""


def data_config(model: nn.Module) -> dict[str, Any]:
    """How the model's images are made, for its manifest: the known ones of ``DATA_KEYS``."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return {key: config[key] for key in DATA_KEYS if config.get(key) is not None}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Writes tensors and manifest; an existing file stays good if this fails."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(manifest, sort_keys=True)
    with replaced_file(path) as temporary:
        save_file(kept, str(temporary), {"manifest": text, "sha256": content_hash(kept, text)})


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest alone, its hash not checked.

    Raises:
        CheckpointError: no safetensors file, or one without a manifest.
        FileNotFoundError: no such file.
    """
    return _opened(Path(path))[0]


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a file whose manifest's format is ``form``.

    Raises:
        CheckpointError: not such a file, truncated, or changed since it was written.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    manifest, metadata = _opened(path)
    if manifest.get("format") != form:
        raise CheckpointError(f"{path}: format must be {form!r}, got {manifest.get('format')!r}")
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if content_hash(tensors, metadata["manifest"]) != metadata.get("sha256"):
        raise CheckpointError(f"{path} was changed after it was written: its sha256 does not match")
    return manifest, tensors


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    if "manifest" not in metadata:
        raise CheckpointError(f"{path} is not a vitq-kernels checkpoint: it has no manifest")
    try:
        manifest = json.loads(metadata["manifest"])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the manifest is not JSON: {error}") from error
    # JSON that is no object is shown as the format that was found.
    return manifest if isinstance(manifest, dict) else {"format": manifest}, metadata


def content_hash(tensors: Mapping[str, Tensor], manifest: str) -> str:
    """sha256 over the manifest and every tensor's name, dtype, shape and bytes, in order of names."""
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
