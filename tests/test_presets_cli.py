"""``vitq quantize --method`` and ``vitq eval`` of what it wrote: a published method in float simulation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.command_line import invoke, make_files, run
from vitq_kernels.images import eval_transform, load_folder
from vitq_kernels.presets import file, published_widths
from vitq_kernels.spec import BitAllocation


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images and files of earlier verbs. Read only."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def data(work: Path) -> tuple[object, ...]:
    return ("--checkpoint", work / "float.safetensors", "--calibration", work / "calibration")


def quantized(data: tuple[object, ...], folder: Path, *words: object) -> dict[str, object]:
    """What quantize told of ``folder / s.safetensors``."""
    report = folder / "q.json"
    run("quantize", "vitq_test_tiny", *data, *words, "-o", folder / "s.safetensors", "--json", report)
    return json.loads(report.read_text())


def test_a_method_is_simulated_and_evaluated(work: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    told = quantized(data, tmp_path, "--method", "repq-vit", "--weight-bits", 5, "--act-bits", 6)
    assert (told["method"], told["executes"], told["calibration_images"]) == ("repq-vit", "simulated", 12)
    model = file.load(tmp_path / "s.safetensors")
    record = model.simulation
    assert (record.weight_bits, record.activation_bits, record.seed) == (5, 6, 0)
    assert record.allocation == published_widths(record.sites, 5, 6)
    assert told["weight_bytes"] == record.allocation.weight_bytes(record.sites)
    assert told["mean_weight_bits"] == 5

    out = tmp_path / "e.json"
    options = ("--images", work / "flat", "--checkpoint", work / "float.safetensors", "--json", out)
    result = run("eval", tmp_path / "s.safetensors", *options)
    seen = json.loads(out.read_text())
    assert re.search(r"^executes +simulated$", result.out, re.MULTILINE)
    assert re.search(r"^method +repq-vit$", result.out, re.MULTILINE)
    assert (seen["method"], seen["executes"]) == ("repq-vit", "simulated")
    net = timm.create_model("vitq_test_tiny").eval()
    net.load_state_dict(load_file(work / "float.safetensors"))
    images, labels = load_folder(work / "flat", eval_transform(net))
    with torch.inference_mode():
        exact, actual = net(images).argmax(1), model(images).argmax(1)
    assert seen["top1"] == pytest.approx(100 * float((actual == labels).float().mean()))
    assert seen["agreement"] == pytest.approx(100 * float((actual == exact).float().mean()))


def test_an_integer_model_says_so(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    result = run("eval", work / "q.safetensors", "--images", work / "flat", "--json", out)
    assert re.search(r"^executes +integers$", result.out, re.MULTILINE)
    assert json.loads(out.read_text())["executes"] == "integers"


@pytest.mark.parametrize(
    "widths", [("--bits", "{work}/bits.json"), ("--mean-weight-bits", 4)], ids=["allocation-file", "budget"]
)
def test_an_allocation_gives_the_widths(
    widths: tuple[object, ...], work: Path, data: tuple[object, ...], tmp_path: Path
) -> None:
    words = [str(word).format(work=work) for word in widths]
    told = quantized(data, tmp_path, "--method", "repq-vit", *words)
    record = file.load(tmp_path / "s.safetensors").simulation
    assert (record.weight_bits, record.activation_bits) == (None, None)
    assert told["mean_weight_bits"] <= 4
    if "--bits" in words:
        assert record.allocation == BitAllocation.from_json((work / "bits.json").read_text())


def test_a_simulation_keeps_tag_and_normalisation(work: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    quantized(data, tmp_path, "--method", "repq-vit", "--weight-bits", 8, "--mean", "0.1,0.2,0.3")
    kept = file.load(tmp_path / "s.safetensors").pretrained_cfg
    assert (kept["architecture"], kept["mean"]) == ("vitq_test_tiny", [0.1, 0.2, 0.3])


BAD = {
    "unknown-method": (
        (
            "quantize vitq_test_tiny --method gptq --weight-bits 4 --checkpoint {work}/float.safetensors "
            "--calibration {work}/calibration"
        ),
        r"--method must be one of .*repq-vit.*, got 'gptq'",
    ),
    "report-of-a-simulation": ("report {tmp}/s.safetensors", "format must be .*, got 'vitq-kernels simulation 1'"),
    "eval-of-half-a-file": ("eval {tmp}/half.safetensors --images {work}/flat", "is not a whole safetensors file"),
    "eval-of-no-checkpoint": ("eval {work}/float.safetensors --images {work}/flat", "it has no manifest"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, work: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    quantized(data, tmp_path, "--method", "repq-vit", "--weight-bits", 8)
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-40])
    line, message = BAD[case]
    result = invoke(*line.format(work=work, tmp=tmp_path).split())
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert re.search(message, result.err)
