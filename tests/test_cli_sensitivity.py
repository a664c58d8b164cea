"""``vitq score --sensitivity``: the library's numbers in a file, a cache to go on from, and options that need it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_vits import small_vit
from torch import nn

from tests.command_line import draw, invoke, run
from vitq_kernels.images import eval_transform, load_folder
from vitq_kernels.sensitivity import Sensitivity
from vitq_kernels.sensitivity_runs import sensitivity


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and images. Read only."""
    folder = tmp_path_factory.mktemp("files")
    save_file(small_vit(3).state_dict(), folder / "float.safetensors")
    (folder / "images").mkdir()
    for index in range(4):
        draw(folder / "images" / f"{index}.png", index)
    return folder


@pytest.fixture(scope="module")
def net(work: Path) -> nn.Module:
    model = timm.create_model("vitq_test_tiny").eval()
    model.load_state_dict(load_file(work / "float.safetensors"))
    return model


def words(work: Path, out: Path) -> tuple[object, ...]:
    data = ("--checkpoint", work / "float.safetensors", "--calibration", work / "images")
    return ("score", "vitq_test_tiny", *data, "--batch", 3, "-o", out)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (("weight",), {"part": "weight"}),
        (("activation", "--sensitivity-baseline", "4"), {"part": "activation", "baseline": 4}),
        (("weight", "--sensitivity-baseline", "float"), {"part": "weight", "baseline": None}),
        (("weight", "--sensitivity-pairs"), {"part": "weight", "pairs": True}),
    ],
    ids=["weight", "activation-base4", "float-base", "pairs"],
)
def test_writes_what_the_library_measures(
    options: tuple[str, ...], keywords: dict[str, object], work: Path, net: nn.Module, tmp_path: Path
) -> None:
    result = run(*words(work, tmp_path / "s.json"), "--sensitivity", *options, "--json", tmp_path / "r.json")
    images, _ = load_folder(work / "images", eval_transform(net))
    expected = sensitivity(net, images, batch_size=3, **keywords)
    text = (tmp_path / "sensitivity.json").read_text()
    assert Sensitivity.from_json(text) == expected
    payload = json.loads((tmp_path / "r.json").read_text())
    assert payload.pop("sensitivity") == json.loads(text)
    assert payload == json.loads((tmp_path / "s.json").read_text())
    assert result.out.startswith("attnlrp relevance")
    assert str(expected) in result.out
    assert "sensitivity.json" in result.err


def test_the_file_can_have_another_name(work: Path, tmp_path: Path) -> None:
    command = ("--sensitivity", "weight", "--sensitivity-out", tmp_path / "other.json")
    run(*words(work, tmp_path / "s.json"), *command)
    assert {path.name for path in tmp_path.iterdir()} == {"s.json", "other.json"}


def test_without_the_option_nothing_is_measured(work: Path, tmp_path: Path) -> None:
    run(*words(work, tmp_path / "s.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_goes_on_from_a_cache(work: Path, tmp_path: Path) -> None:
    command = (*words(work, tmp_path / "s.json"), "--sensitivity", "weight", "--cache", tmp_path / "cache.jsonl")
    run(*command)
    first, cache = (tmp_path / "sensitivity.json").read_bytes(), (tmp_path / "cache.jsonl").read_bytes()
    run(*command)
    assert (tmp_path / "sensitivity.json").read_bytes() == first
    assert (tmp_path / "cache.jsonl").read_bytes() == cache
    refused = invoke(*command, "--sensitivity-baseline", 5)
    assert refused.code == 2
    assert "cache.jsonl belongs to another model, other images or other settings" in refused.err
    assert (tmp_path / "cache.jsonl").read_bytes() == cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sensitivity", "input"), "--sensitivity must be one of weight, activation, both, got 'input'"),
        (("--sensitivity", "weight", "--sensitivity-baseline", "9"), "--sensitivity-baseline must be one of 2, 3,"),
        (("--sensitivity-baseline", "8"), "--sensitivity-baseline is for --sensitivity, which is missing"),
        (("--sensitivity-pairs",), "--sensitivity-pairs is for --sensitivity, which is missing"),
        (("--sensitivity-out", "x.json"), "--sensitivity-out is for --sensitivity, which is missing"),
        (("--cache", "x.jsonl"), "--cache is for --sensitivity, which is missing"),
        (("--sensitivity", "weight", "--cache", "no/x"), "directory no does not exist"),
        (("--sensitivity", "weight", "--sensitivity-out", "no/x"), "directory no does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_named(options: tuple[str, ...], message: str, work: Path, tmp_path: Path) -> None:
    result = invoke(*words(work, tmp_path / "s.json"), *options)
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.split())
    assert list(tmp_path.iterdir()) == []
