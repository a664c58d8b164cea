"""What the command line names, as objects: models, weights, images, budgets. Errors name the option."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitq_kernels.images import eval_transform, load_folder
from vitq_kernels.spec import Budget


def float_model(name: str, checkpoint: Path | None, pretrained: bool) -> nn.Module:
    """A timm model with its float weights, in eval mode."""
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        raise ValueError(
            f"MODEL must be a timm model name, got {name!r}" + (f"; similar: {similar}" if similar else "")
        )
    if (checkpoint is None) == (not pretrained):
        raise ValueError("give the float weights with exactly one of --checkpoint FILE and --pretrained")
    if checkpoint is None:
        return timm.create_model(name, pretrained=True).eval()
    state = float_weights(checkpoint)
    head = state.get("head.weight")
    classes = {} if head is None else {"num_classes": head.shape[0]}
    net = timm.create_model(name, **classes).eval()
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"checkpoint {checkpoint} does not fit {name}: {' '.join(lines[1:2]).strip()}") from error
    return net


def float_weights(checkpoint: Path) -> dict[str, Any]:
    """Tensors of a safetensors file or a pickle; never executes code."""
    if not checkpoint.is_file():
        raise ValueError(f"--checkpoint {checkpoint} does not exist")
    try:
        if checkpoint.suffix == ".safetensors":
            return load_file(str(checkpoint))
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"--checkpoint {checkpoint} cannot be read: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):  # where training scripts put the weights
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            return dict(state[key])
    return state if isinstance(state, dict) else {}


def calibration_images(
    net: nn.Module, folder: Path, count: int, mean: str | None, std: str | None, crop: float | None, seed: int
) -> Tensor:
    """Images of --calibration under the model's transform, [n, C, H, W]."""
    transform = eval_transform(net, mean=numbers("mean", mean), std=numbers("std", std), crop=crop)
    return load_folder(folder, transform, count, seed)[0]


def overrides(mean: str | None, std: str | None, crop: float | None) -> dict[str, Any]:
    """The given parts of timm's data config."""
    given = {"mean": numbers("mean", mean), "std": numbers("std", std), "crop_pct": crop}
    return {key: value for key, value in given.items() if value is not None}


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """One number a channel, or one for all."""
    if text is None:
        return None
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--{name} must be numbers separated by commas, got {text!r}") from None
    return values * 3 if len(values) == 1 else values


def budget(mean_weight_bits: float | None, size_mb: float | None, bitops: float | None) -> Budget:
    """The limits that were given; --bitops counts 10^9."""
    return Budget(mean_weight_bits, size_mb, None if bitops is None else bitops * 1e9)


def sizes(qmodel: Any) -> dict[str, Any]:
    """Bytes of the packed weights with their row orders, of the float model, and mean widths."""
    record = qmodel.quantization
    return {
        "weight_bytes": record.allocation.weight_bytes(record.sites),
        "float_bytes": record.float_bytes,
        "mean_weight_bits": record.allocation.mean_weight_bits(record.sites),
    }


def read_text(path: Path) -> str:
    """A file that must exist."""
    if not path.is_file():
        raise ValueError(f"file {path} does not exist")
    return path.read_text(encoding="utf-8")
