"""The verbs on a Swin: scores, widths, a file, its accuracy, and methods side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from command_line import draw, invoke, run, write_labels
from safetensors.torch import save_file
from small_swins import realistic

import vitq_kernels as vitq

NAME = "vitq_test_swin"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of seven classes, images, and what score made of them. Read only."""
    folder = tmp_path_factory.mktemp("swin")
    save_file(realistic(timm.create_model(NAME, num_classes=7)).state_dict(), folder / "float.safetensors")
    for part, count in (("calibration", 8), ("images", 12)):
        (folder / part).mkdir()
        for index in range(count):
            draw(folder / part / f"{index:02}.png", index + 100 * count)
    write_labels(folder / "images", {f"{index:02}.png": index % 7 for index in range(12)})
    run("score", NAME, *weights(folder), *calibration(folder), "-o", folder / "scores.json")
    return folder


def weights(work: Path) -> tuple[object, ...]:
    return ("--checkpoint", work / "float.safetensors")


def calibration(work: Path) -> tuple[object, ...]:
    return ("--calibration", work / "calibration")


def test_from_scores_to_a_file_and_its_accuracy(work: Path, tmp_path: Path) -> None:
    bits, file, result = (tmp_path / name for name in ("bits.json", "swin.safetensors", "eval.json"))
    scores = ("--scores", work / "scores.json", "--mean-weight-bits", 5)
    run("allocate", NAME, *weights(work), *calibration(work), *scores, "-o", bits)
    run("quantize", NAME, *weights(work), *calibration(work), "--bits", bits, "-o", file)
    run("eval", file, "--images", work / "images", *weights(work), "--json", result)
    numbers = json.loads(result.read_text())
    assert numbers["images"] == 12
    assert numbers["mean_weight_bits"] == pytest.approx(5, abs=0.05)
    assert numbers["kl"] < 0.5
    assert "layers.1.downsample.reduction" in json.loads(bits.read_text())["sites"]
    model = vitq.load(file)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 7)


def test_methods_side_by_side(work: Path, tmp_path: Path) -> None:
    result = tmp_path / "compare.json"
    methods = ("--methods", "uniform,relevance,repq-vit", "--bits", "8/8", "--mean-bits", 4)
    run("compare", NAME, *weights(work), *calibration(work), "--images", work / "images", *methods, "--json", result)
    rows = {row["method"]: row for row in json.loads(result.read_text())["rows"]}
    assert rows["uniform"]["kl"] is not None
    assert rows["relevance allocation"]["kl"] is not None
    (preset,) = [row for name, row in rows.items() if "repq-vit" in name]
    assert "methods are for a VisionTransformer, got SwinTransformer" in preset["failure"]


def test_a_rotation_is_refused_in_one_line(work: Path, tmp_path: Path) -> None:
    words = ("--weight-bits", 8, "--rotate", "-o", tmp_path / "q.safetensors")
    result = invoke("quantize", NAME, *weights(work), *calibration(work), *words)
    assert result.code == 2
    assert result.err == (
        "vitq: error: rotate: model must have one residual stream from end to end, got a SwinTransformer\n"
    )
