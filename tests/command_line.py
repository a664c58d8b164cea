"""``vitq`` in this process on tiny registered timm models, and a folder of the files that its verbs take and make."""

from __future__ import annotations

import csv
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_vits import small_vit
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitq_kernels import cli
from vitq_kernels.images import eval_transform, load_folder

CLASSES = 10


def make_model(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return build_model_with_cfg(VisionTransformer, name, pretrained, **{**small, **arguments})


# What timm reads of a model's module when the model is registered.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": CLASSES,
            "input_size": (3, 32, 32),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name in ("vitq_test_tiny", "vitq_test_deep", "vitq_test_elu", "vitq_test_swin")
    }
)


@register_model
def vitq_test_tiny(pretrained: bool = False, **arguments: Any) -> nn.Module:
    return make_model("vitq_test_tiny", pretrained, arguments)


@register_model
def vitq_test_deep(pretrained: bool = False, **arguments: Any) -> nn.Module:
    return make_model("vitq_test_deep", pretrained, {"depth": 3, **arguments})


@register_model
def vitq_test_elu(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """One block that has no integer form, one that has."""
    model = make_model("vitq_test_elu", pretrained, arguments)
    model.blocks[1].mlp.act = nn.ELU()
    return model


@register_model
def vitq_test_swin(pretrained: bool = False, **arguments: Any) -> nn.Module:
    small = {"img_size": 28, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
    arguments = {**small, "num_classes": CLASSES, **arguments}
    return build_model_with_cfg(SwinTransformer, "vitq_test_swin", pretrained, **arguments)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def invoke(*words: object) -> Result:
    """Runs ``vitq WORDS`` in this process. What is no clean exit is an exception here, as it is a traceback there."""
    code: Any = 0
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setattr(sys, "argv", ["vitq", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def run(*words: object) -> Result:
    """``invoke`` of a command that must succeed."""
    result = invoke(*words)
    assert result.code == 0, result.err
    return result


def draw(path: Path, seed: int) -> None:
    """A smooth coloured image with some noise, 40x36."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:36, 0:40] / 40
    waves = [np.sin(6 * (a * rows + b * columns) + c) for a, b, c in generator.normal(size=(3, 3)) * 2]
    noise = generator.normal(size=(36, 40, 3)) * 12
    Image.fromarray((127 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)).save(path)


def write_labels(folder: Path, labels: dict[str, int]) -> None:
    with (folder / "labels.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([("file", "label"), *labels.items()])


def make_files(folder: Path) -> Path:
    """Weights, images, and what score, allocate and quantize make of them. Returns the folder."""
    net = small_vit(3)
    weights = net.state_dict()
    save_file(weights, folder / "float.safetensors")
    torch.save(weights, folder / "flat.pth")
    torch.save({"model": weights, "epoch": 3}, folder / "model.pth")
    torch.save({"state_dict": weights}, folder / "state_dict.pth")
    save_file(small_vit(4, depth=3).state_dict(), folder / "deep.safetensors")
    save_file(small_vit(4, num_classes=7).state_dict(), folder / "seven.safetensors")
    save_file(timm.create_model("vitq_test_elu").state_dict(), folder / "elu.safetensors")

    (folder / "calibration").mkdir()
    for index in range(12):
        draw(folder / "calibration" / f"{index}.png", index)
    # Labels: two thirds are what the float model says, so that its top-1 is neither 0 nor 100 %.
    flat = folder / "flat"
    flat.mkdir()
    for index in range(18):
        draw(flat / f"{index:02}.png", 100 + index)
    images, _ = load_folder(flat, eval_transform(timm.create_model("vitq_test_tiny")))
    said = net(images).argmax(1).tolist()
    labels = [label if index % 3 else (label + 1) % CLASSES for index, label in enumerate(said)]
    write_labels(flat, {f"{index:02}.png": label for index, label in enumerate(labels)})
    for index, label in enumerate(labels):
        (folder / "classes" / str(label)).mkdir(parents=True, exist_ok=True)
        draw(folder / "classes" / str(label) / f"{index:02}.png", 100 + index)

    (folder / "empty").mkdir()
    (folder / "text.json").write_text("{nope")
    (folder / "list.json").write_text("[1]")
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    data = ("--checkpoint", folder / "float.safetensors", "--calibration", folder / "calibration")
    run("score", "vitq_test_tiny", *data, "-o", folder / "scores.json")
    allocate = ("allocate", "vitq_test_tiny", *data, "--scores", folder / "scores.json", "--mean-weight-bits", 4)
    run(*allocate, "-o", folder / "bits.json")
    run("quantize", "vitq_test_tiny", *data, "--bits", folder / "bits.json", "-o", folder / "q.safetensors")
    (folder / "half.safetensors").write_bytes((folder / "q.safetensors").read_bytes()[:-40])
    (folder / "half.pth").write_bytes((folder / "flat.pth").read_bytes()[:5000])
    return folder
