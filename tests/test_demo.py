"""``vitq demo``: its table is true, its report is written, and a second run measures the same."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.command_line import run
from vitq_kernels.data import digits_images, load_digits_vit
from vitq_kernels.demo import DemoResult, run_demo
from vitq_kernels.report import Measurement

UNIFORM = {"uniform W8A8": 8, "uniform W4A8": 4, "uniform W2A8": 2}
MIXED = {"mixed W4A8": 4.0, "mixed W2.5A8": 2.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(folder: Path) -> tuple[DemoResult, list[str]]:
    """The result, and what was told while it was made."""
    steps: list[str] = []
    return run_demo(folder / "demo.html", progress=steps.append), steps


@pytest.fixture(scope="module")
def rows(demo: tuple[DemoResult, list[str]]) -> dict[str, Measurement]:
    return {row.label: row for row in demo[0].measurements}


def weight_counts() -> tuple[int, int, int]:
    """Weights of patch embedding and head, weights of the blocks' linears, and the rows of these."""
    model = load_digits_vit()
    linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    boundary = model.patch_embed.proj.weight.numel() + model.head.weight.numel()
    return boundary, sum(m.weight.numel() for m in linears), sum(m.out_features for m in linears)


def test_rows_are_float_and_every_plan(rows: dict[str, Measurement]) -> None:
    assert next(iter(rows)) == "float32"
    assert set(rows) == {"float32", *UNIFORM, *MIXED}
    assert list(rows)[-1] == "mixed W4A8"  # the headline of the report is about it


def test_float_accuracy_is_what_the_data_say(rows: dict[str, Measurement]) -> None:
    images, labels = digits_images("test")
    with torch.inference_mode():
        correct = int((load_digits_vit()(images).argmax(1) == labels).sum())
    assert correct == 497
    assert rows["float32"].top1 == pytest.approx(99.4)
    assert (rows["float32"].agreement, rows["float32"].kl) == (None, None)


@pytest.mark.parametrize(
    ("label", "least"), [("uniform W8A8", 99.0), ("uniform W4A8", 97.0), ("mixed W4A8", 97.0)], ids=lambda x: str(x)
)
def test_quantized_models_decide_as_the_float_model(label: str, least: float, rows: dict[str, Measurement]) -> None:
    assert rows[label].agreement >= least
    assert rows[label].top1 >= rows["float32"].top1 - (100 - least)


def test_more_bits_are_nearer_to_float(rows: dict[str, Measurement]) -> None:
    assert 0 < rows["uniform W8A8"].kl < rows["uniform W4A8"].kl < rows["uniform W2A8"].kl
    assert rows["mixed W2.5A8"].kl < rows["uniform W2A8"].kl


@pytest.mark.parametrize(("label", "bits"), UNIFORM.items(), ids=UNIFORM)
def test_uniform_bytes_are_weights_times_bits(label: str, bits: int, rows: dict[str, Measurement]) -> None:
    boundary, blocks, _ = weight_counts()
    assert rows[label].weight_bytes == boundary + blocks * bits // 8
    assert rows[label].mean_weight_bits == bits


@pytest.mark.parametrize(("label", "limit"), MIXED.items(), ids=MIXED)
def test_mixed_bytes_are_weights_times_mean_bits_and_row_orders(
    label: str, limit: float, rows: dict[str, Measurement]
) -> None:
    boundary, blocks, block_rows = weight_counts()
    row = rows[label]
    assert limit - 0.05 < row.mean_weight_bits <= limit
    order = row.weight_bytes - boundary - blocks * row.mean_weight_bits / 8
    assert 0 < order <= block_rows
    assert order == round(order)


def test_float_bytes_are_those_of_the_same_weights(rows: dict[str, Measurement]) -> None:
    boundary, blocks, _ = weight_counts()
    assert rows["float32"].weight_bytes == 4 * (boundary + blocks)


def test_table_has_a_line_for_every_row(demo: tuple[DemoResult, list[str]]) -> None:
    head, *lines = demo[0].table().splitlines()
    assert len({len(line) for line in (head, *lines)}) == 1  # columns line up
    for row, line in zip(demo[0].measurements, lines, strict=True):
        agreement = "-" if row.agreement is None else f"{row.agreement:.1f}"
        assert line.startswith(row.label)
        assert [f"{row.top1:.1f}", agreement] == line.removeprefix(row.label).split()[:2]
        assert f"{row.weight_bytes:,}" in line
    assert demo[0].images == 500


def test_progress_tells_every_step(demo: tuple[DemoResult, list[str]], rows: dict[str, Measurement]) -> None:
    steps = demo[1]
    assert steps[0].startswith("scoring")
    assert [step for step in steps if "evaluating" in step] == [
        f"quantizing and evaluating {label}" for label in list(rows)[1:]
    ]


class Words(HTMLParser):
    """The text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.mark.usefixtures("rows")
def test_report_shows_every_row(folder: Path, rows: dict[str, Measurement]) -> None:
    page = Words()
    page.feed((folder / "demo.html").read_text())
    assert {*rows, "99.40", "500 test, 128 calibration"} <= set(page.words)
    assert any("attnlrp" in word for word in page.words)


def test_a_second_run_from_the_command_line_is_the_same_but_for_speed(
    folder: Path, demo: tuple[DemoResult, list[str]]
) -> None:
    result = run("demo", "--out", folder / "again.html", "--json", folder / "again.json")
    again = json.loads((folder / "again.json").read_text())

    def without_speed(row: dict[str, object]) -> dict[str, object]:
        return {**row, "images_per_s": None}

    first = demo[0].to_dict()
    assert [without_speed(row) for row in again["measurements"]] == [*map(without_speed, first["measurements"])]
    assert again["images"] == first["images"]
    assert result.out == demo[0].table() + "\n"  # it has no speed in it
    assert result.err.splitlines() == [*demo[1], f"report: {folder / 'again.html'}"]
    assert (folder / "again.html").stat().st_size > 10_000
