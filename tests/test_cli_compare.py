"""``vitq compare``: the library's rows on folders of images, files after every row, and mistakes that end it early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_vits import small_vit

from tests.command_line import CLASSES, draw, invoke, run, write_labels
from vitq_kernels import cli_compare
from vitq_kernels.compare import compare
from vitq_kernels.compare_rows import Comparison
from vitq_kernels.images import ImageFolder, eval_transform, load_folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and images. Read only."""
    folder = tmp_path_factory.mktemp("files")
    save_file(small_vit(3).state_dict(), folder / "float.safetensors")
    for name, first, count in (("calibration", 0, 5), ("images", 50, 8)):
        (folder / name).mkdir()
        for index in range(count):
            draw(folder / name / f"{index}.png", first + index)
    write_labels(folder / "images", {f"{index}.png": index % CLASSES for index in range(8)})
    (folder / "text").write_text("no image")
    return folder


def words(work: Path) -> tuple[object, ...]:
    data = ("--checkpoint", work / "float.safetensors", "--calibration", work / "calibration")
    return ("compare", "vitq_test_tiny", *data, "--images", work / "images")


def timeless(comparison: Comparison) -> Comparison:
    return replace(
        comparison, rows=tuple(replace(row, seconds=0.0 if row.seconds else None) for row in comparison.rows)
    )


def test_writes_what_the_library_finds(work: Path, tmp_path: Path) -> None:
    options = ("--bits", "4/8", "--mean-bits", "3", "--act-bits", 6, "--methods", "lrp-qvit, uniform,repq-vit")
    chosen = ("--limit", 6, "--calibration-images", 4, "--seed", 2, "--batch", 3)
    files = ("--json", tmp_path / "c.json", "--plot", tmp_path / "c.svg")
    result = run(*words(work), *options, *chosen, *files)

    net = timm.create_model("vitq_test_tiny").eval()
    net.load_state_dict(load_file(work / "float.safetensors"))
    transform = eval_transform(net)
    calibration, _ = load_folder(work / "calibration", transform, 4, 2)
    batches = ImageFolder.scan(work / "images").sample(6, 2).batches(transform, 3)
    expected = compare(
        net,
        calibration,
        batches,
        pairs=[(4, 8)],
        means=[3.0],
        methods=["lrp-qvit", "uniform", "repq-vit"],
        activation_bits=6,
        seed=2,
        batch_size=3,
    )
    found = Comparison.from_json((tmp_path / "c.json").read_text())
    assert timeless(found) == timeless(expected)
    assert [(row.widths, row.method) for row in found.rows] == [
        ("W4A8", "uniform"),
        ("W4A8", "repq-vit (preset, simulated)"),
        ("W4A8", "lrp-qvit (preset, simulated)"),
        ("W3A6", "uniform"),
        ("W3A6", "lrp-qvit allocation"),
    ]
    assert result.out.strip() == found.table()
    assert "5 of 5: W3A6 lrp-qvit allocation" in result.err
    assert "W3A6" in (tmp_path / "c.svg").read_text()
    assert f"plot: {tmp_path / 'c.svg'}" in result.err


def test_a_run_that_is_killed_leaves_its_rows(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cli_compare.compare_methods

    def killed(*arguments: object, on_row: object, **keywords: object) -> Comparison:
        def on_second(comparison: Comparison) -> None:
            on_row(comparison)
            if len(comparison.rows) == 2:
                raise KeyboardInterrupt

        return real(*arguments, on_row=on_second, **keywords)

    monkeypatch.setattr(cli_compare, "compare_methods", killed)
    invoke(*words(work), "--bits", "8/8,4/8,2/8", "--methods", "uniform", "--json", tmp_path / "c.json")
    kept = Comparison.from_json((tmp_path / "c.json").read_text())
    assert [row.widths for row in kept.rows] == ["W8A8", "W4A8"]


def test_without_widths_it_takes_both_defaults(work: Path, tmp_path: Path) -> None:
    run(*words(work), "--methods", "uniform", "--json", tmp_path / "c.json", "--cache", tmp_path / "cache")
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(row["weight_bits"], row["activation_bits"]) for row in rows] == [(4, 8), (4, 4), (3, 8)]
    assert not (tmp_path / "cache").exists()  # no method that measures sensitivity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "4"), "--bits must be weight/activation widths in 2..8, such as 4/8,4/4,3/8, got '4'"),
        (("--bits", "4/8,9/8"), "--bits must be weight/activation widths in 2..8"),
        (("--bits", "four/8"), "--bits must be weight/activation widths in 2..8"),
        (("--mean-bits", "3;4"), "--mean-bits must be numbers separated by commas, such as 3,4, got '3;4'"),
        (("--mean-bits", "1"), "means must be in 2..8, got 1.0"),
        (("--methods", "uniform,gptq"), "methods must be among uniform, relevance,"),
        (("--methods", "adalog", "--mean-bits", "3"), "methods: 'adalog' has no row"),
        (("--plot", "c.pdf"), "plot must be a .png or .svg file, got c.pdf"),
        (("--plot", "none/c.png"), "--plot none/c.png: directory none does not exist"),
        (("--json", "none/c.json"), "--json none/c.json: directory none does not exist"),
        (("--limit", 1, "--methods", "uniform"), "batches must hold at least 2 images, got 1"),
        (("--images", "text", "--methods", "uniform"), "image folder text does not exist"),
    ],
    ids=[
        *("pair", "width", "word", "mean-word", "mean", "method", "no-row"),
        *("plot-kind", "plot-folder", "json-folder", "one-image", "images"),
    ],
)
def test_a_mistake_is_one_line(options: tuple[object, ...], message: str, work: Path) -> None:
    result = invoke(*words(work), *options)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_part_that_stays_float_is_refused(work: Path, tmp_path: Path) -> None:
    save_file(timm.create_model("vitq_test_elu").state_dict(), tmp_path / "elu.safetensors")
    command = [word if word != "vitq_test_tiny" else "vitq_test_elu" for word in words(work)]
    result = invoke(*command, "--checkpoint", tmp_path / "elu.safetensors", "--methods", "uniform")
    assert result.code == 2
    assert "blocks.1" in result.err
