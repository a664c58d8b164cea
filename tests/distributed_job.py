"""What test_distributed.py runs in several processes: ``torchrun distributed_job.py FOLDER``."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_vits import variant_images, variant_quantized, variant_vit

from tests.command_line import draw, invoke
from vitq_kernels.checkpoint import save
from vitq_kernels.distributed import from_first, in_order, process_group, rank, world_size
from vitq_kernels.evaluation import evaluate
from vitq_kernels.relevance import relevance
from vitq_kernels.sensitivity_runs import sensitivity

IMAGES = 7  # in batches of 2 they are four, the last one short: uneven shares


def score(method: str, size: int = 2) -> Any:
    calls: list[tuple[int, int]] = []
    model, images = variant_vit("class-token"), variant_images(count=IMAGES)
    labels = torch.arange(IMAGES) if method == "chefer" else None
    keywords = {"method": method, "labels": labels, "batch_size": size}
    return relevance(model, images, **keywords, progress=lambda *done: calls.append(done)), calls


def compare(lazy: bool, size: int = 2) -> Any:
    """All numbers of an evaluation but its time."""
    calls: list[int] = []
    images = variant_images(count=IMAGES, seed=6).split(size)
    batches = list(zip(images, torch.arange(IMAGES).split(size), strict=True))
    quantized = variant_quantized("class-token", 4, 4)
    result = evaluate(
        quantized, iter(batches) if lazy else batches, float_model=variant_vit("class-token"), progress=calls.append
    )
    assert result.images_per_s > 0
    return {**result.to_dict(), "images_per_s": None}, calls


def measure(**keywords: Any) -> Any:
    """Runs of both blocks, an odd number of them."""
    calls: list[tuple[int, int]] = []
    sites = ["blocks.0.attn.qkv", "blocks.0.attn.av", "blocks.1.mlp.fc2"]
    keywords = {"part": "both", "baseline": 5, "candidates": (2, 4), "sites": sites, "batch_size": 3, **keywords}
    model, images = variant_vit("class-token"), variant_images(count=4)
    return sensitivity(model, images, progress=lambda *done: calls.append(done), **keywords), calls


def wrong_label() -> str:
    """The error of a batch that one process alone looks at."""
    labels = torch.tensor([0, 0, 99, 0])
    try:
        evaluate(variant_vit("class-token"), list(zip(variant_images(count=4).split(1), labels.split(1), strict=True)))
    except ValueError as error:
        return str(error)
    return "no error"


CASES: dict[str, Callable[[], Any]] = {
    "relevance-attnlrp": lambda: score("attnlrp"),
    "relevance-chefer-with-labels": lambda: score("chefer"),
    "relevance-fewer-batches-than-processes": lambda: score("attnlrp", IMAGES),
    "evaluation": lambda: compare(lazy=False),
    "evaluation-of-an-iterator": lambda: compare(lazy=True),
    "evaluation-fewer-batches-than-processes": lambda: compare(False, IMAGES),
    "sensitivity": lambda: measure(pairs=True, pair_candidates=(2, 4)),
    "sensitivity-fewer-runs-than-processes": lambda: measure(
        baseline=None, candidates=(2,), sites=["blocks.1.attn.qk"]
    ),
    "error": wrong_label,
}


def shares() -> list[tuple[int, int]]:
    """Each of five items and which process computed it."""
    return list(in_order(list(range(5)), lambda item: (item, rank())))


def make_files(folder: Path) -> None:
    """Weights, a quantized model and images for the command line."""
    save_file(variant_vit("class-token").state_dict(), folder / "float.safetensors")
    quantized = copy.deepcopy(variant_quantized("class-token", 4, 4))
    quantized.pretrained_cfg = {"architecture": "vitq_test_tiny"}
    save(quantized, folder / "q.safetensors")
    (folder / "images").mkdir()
    for index in range(IMAGES):
        draw(folder / "images" / f"{index}.png", index)


def commands(folder: Path, number: int) -> Iterator[tuple[object, ...]]:
    """``vitq`` under other file names in every process, so that one can see who wrote."""
    weights, batch = ("--checkpoint", folder / "float.safetensors"), ("--batch", 2)
    score = ("score", "vitq_test_tiny", *weights, *batch, "-o", folder / f"scores{number}.json", "--calibration")
    yield (*score, folder / "images")
    images = ("--images", folder / "images", *weights, *batch)
    yield ("eval", folder / "q.safetensors", *images, "--json", folder / f"evaluation{number}.json")
    yield (*score, folder / "nowhere")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group():
        found = {name: case() for name, case in CASES.items()}
        found |= {"shares": shares(), "first": from_first(rank), "size": world_size()}
        found["cached"] = [measure(cache=folder / "cache.jsonl") for _ in range(2)]
        found["commands"] = [invoke(*words) for words in commands(folder, rank())]
        (folder / f"{rank()}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
