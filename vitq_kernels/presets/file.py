"""A simulated model as one safetensors file: float tensors, and a manifest that names every quantizer's class."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from vitq_kernels.models import build_model
from vitq_kernels.presets.norm import NormWithInput
from vitq_kernels.presets.preset import Simulation
from vitq_kernels.presets.quantizers import QUANTIZERS, FakeQuantizer
from vitq_kernels.simulation import simulated
from vitq_kernels.tensor_file import CheckpointError, data_config, read_tensors, write_tensors

FORMAT = "vitq-kernels simulation 1"


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a model from ``simulate``; an existing file stays good if this fails.

    Raises:
        ValueError: the model was not made by ``simulate`` or ``load``.
    """
    record = getattr(model, "simulation", None)
    if not isinstance(record, Simulation):
        raise ValueError(f"save: model must come from vitq_kernels.presets.simulate, got {type(model).__name__}")
    manifest = {
        "format": FORMAT,
        "simulation": json.loads(record.to_json()),
        "data": data_config(model),
        "quantizers": {
            name: {"class": type(module).__name__, "config": module.config()}
            for name, module in model.named_modules()
            if isinstance(module, FakeQuantizer)
        },
    }
    write_tensors(path, model.state_dict(), manifest)


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Reads a file of ``save`` and returns the simulated model in eval mode.

    Raises:
        CheckpointError: not a file of a simulated model, truncated, or changed since it was written.
        FileNotFoundError: no such file.
    """
    manifest, tensors = read_tensors(path, FORMAT)
    try:
        record = Simulation.from_json(json.dumps(manifest["simulation"]))
        model = simulated(build_model(record.model_config, "meta"))
        for name, described in manifest["quantizers"].items():
            buffers = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            _place(model, name, QUANTIZERS[described["class"]](**buffers, **described["config"]))
        for name in record.allocation.sites:
            if f"{name}.bias" in tensors:  # a method may have given a linear the bias that it lacked
                model.get_submodule(name).bias = torch.empty_like(tensors[f"{name}.bias"], device="meta")
        model.load_state_dict(tensors, strict=True, assign=True)
        model.pretrained_cfg = manifest["data"]
        model.simulation = record
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensors do not fit the manifest: {type(error).__name__}: {error}") from error
    return model.requires_grad_(False).to(device).eval()


def _place(model: nn.Module, name: str, quantizer: nn.Module) -> None:
    """Sets a quantizer; one before a norm brings its ``NormWithInput`` along."""
    owner = name.removesuffix(".input")
    module = model.get_submodule(owner)
    if owner != name and isinstance(module, nn.LayerNorm):
        model.set_submodule(owner, NormWithInput(module))
    model.set_submodule(name, quantizer)
