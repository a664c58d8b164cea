"""Every verb of ``vitq`` on a tiny model: what it writes, what it prints, and that a seed repeats it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vitq_kernels as vitq
from tests.command_line import make_files, make_model, run
from tests.small_vits import small_vit, variant_images
from vitq_kernels.doctor import examine
from vitq_kernels.images import ImageFolder, eval_transform, load_folder

BUDGETS = {"mean-bits": ("--mean-weight-bits", 3), "size": ("--size-mb", 0.02), "bitops": ("--bitops", 0.03)}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images and files of earlier verbs. Read only."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def data(work: Path) -> tuple[object, ...]:
    """Weights and calibration images, as most verbs take them."""
    return ("--checkpoint", work / "float.safetensors", "--calibration", work / "calibration")


@pytest.fixture(scope="module")
def net(work: Path) -> nn.Module:
    """The float model that the files are of."""
    model = timm.create_model("vitq_test_tiny").eval()
    model.load_state_dict(load_file(work / "float.safetensors"))
    return model


def packed_bytes(path: Path) -> int:
    """Bytes of the packed codes and row orders that a quantized file really holds."""
    return sum(t.numel() for name, t in load_file(path).items() if name.endswith(("weight_packed", "row_order")))


def bytes_by_formula(net: nn.Module, allocation: dict[str, Any]) -> int:
    """Sum of N*K*b/8 over the linears and the patch embedding, and a byte a row of a layer of several widths."""
    total = 0.0
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            groups = allocation["sites"][name]["weight"]
            rows, cols = module.weight.flatten(1).shape
            if len(set(groups["bits"])) == 1:
                total += rows * cols * groups["bits"][0] / 8
            else:
                assert rows <= 256, "the formula is for layers of one tile"
                total += sum(groups["group_rows"] * cols * bits / 8 for bits in groups["bits"]) + rows
    return int(total)


def bytes_in_float32(net: nn.Module) -> int:
    """Of the same weights."""
    return 4 * sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def test_command_line_as_a_user_starts_it(work: Path, tmp_path: Path) -> None:
    package = Path(vitq.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", "from vitq_kernels.cli import main; main()", "eval", "none", "--images", str(work)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "vitq: error: checkpoint none does not exist\n"


def test_the_entry_point_is_main() -> None:
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert re.search(r'^\[project.scripts\]\nvitq = "vitq_kernels.cli:main"$', project.read_text(), re.MULTILINE)


def test_help_lists_the_verbs() -> None:
    commands = run("--help").out.split("Commands:")[1].splitlines()
    verbs = ["demo", "score", "allocate", "quantize", "eval", "compare", "bench", "tune", "report", "doctor"]
    assert [line.split()[0] for line in commands if line.strip()] == verbs
    assert not [line for line in commands if line.endswith("...")]  # no sentence is cut off


@pytest.mark.parametrize(
    "verb", ["demo", "score", "allocate", "quantize", "eval", "compare", "bench", "tune", "report", "doctor"]
)
def test_every_verb_has_help_and_json(verb: str) -> None:
    text = run(verb, "--help").out
    assert "--json" in text
    assert "--no-" not in text


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ((), {}),
        (("--method", "chefer", "--tokens", "image", "--batch", "5"), {"method": "chefer", "tokens": "image"}),
        (("--target", "feature_norm", "--batch", "5"), {"target": "feature_norm"}),
    ],
    ids=["attnlrp", "chefer", "features"],
)
def test_score_writes_the_relevance(
    options: tuple[str, ...],
    keywords: dict[str, Any],
    work: Path,
    data: tuple[object, ...],
    net: nn.Module,
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("a [bold] name " * 9).strip()
    folder.mkdir()
    out, copy = folder / "s.json", folder / "copy.json"
    result = run("score", "vitq_test_tiny", *data, "-o", out, "--json", copy, *options)
    images, _ = load_folder(work / "calibration", eval_transform(net))
    expected = vitq.relevance(net, images, batch_size=5 if options else 16, **keywords)
    assert vitq.Relevance.from_json(out.read_text()) == expected
    assert json.loads(copy.read_text()) == json.loads(out.read_text())
    assert str(expected) in result.out
    assert result.err == f"scores: {out}\n"  # in one piece and as it is


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_allocate_keeps_the_budget(
    budget: tuple[str, float], work: Path, data: tuple[object, ...], net: nn.Module, tmp_path: Path
) -> None:
    out, copy = tmp_path / "b.json", tmp_path / "copy.json"
    scores = ("--scores", work / "scores.json")
    result = run("allocate", "vitq_test_tiny", *data, *scores, *budget, "-o", out, "--json", copy)
    bits, sites = vitq.BitAllocation.from_json(out.read_text()), vitq.model_sites(net)
    name, limit = budget
    block = [(s, bits.sites[s.name].weight) for s in sites if s.in_block and s.has_weight]
    spent = {
        "--mean-weight-bits": sum(g.mean_bits * s.macs for s, g in block) / sum(s.macs for s, _ in block),
        "--size-mb": bytes_by_formula(net, json.loads(out.read_text())) / 1e6,
        "--bitops": sum(s.macs * 8 * (bits.sites[s.name].weight.mean_bits if s.has_weight else 8) for s in sites) / 1e9,
    }[name]
    assert 0.9 * limit <= spent <= limit * (1 + 1e-12)  # nearly all of it is used
    assert json.loads(copy.read_text()) == json.loads(out.read_text())
    assert f"packed weights {bits.weight_bytes(sites):,} bytes" in result.out


def test_allocate_gives_whole_layers_as_published(work: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    scores, budget = ("--scores", work / "scores.json"), ("--mean-weight-bits", 4)
    out = tmp_path / "b.json"
    run("allocate", "vitq_test_tiny", *data, *scores, *budget, "--allocation", "lrp-qvit", "-o", out)
    published = vitq.BitAllocation.from_json(out.read_text())
    rows = vitq.BitAllocation.from_json((work / "bits.json").read_text())
    assert all(len(set(s.weight.bits)) == 1 for s in published.sites.values() if s.weight)
    assert any(len(set(s.weight.bits)) > 1 for s in rows.sites.values() if s.weight)


def test_allocate_without_images_judges_by_the_weights(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    weights, scores = ("--checkpoint", work / "float.safetensors"), ("--scores", work / "scores.json")
    run("allocate", "vitq_test_tiny", *weights, *scores, "--mean-weight-bits", 4, "-o", out)
    assert json.loads(out.read_text())["sites"] != json.loads((work / "bits.json").read_text())["sites"]


@pytest.mark.parametrize(
    "widths",
    [
        ("--weight-bits", 3, "--act-bits", 6),
        ("--bits", "{work}/bits.json"),
        *BUDGETS.values(),
        ("--mean-weight-bits", 4, "--size-mb", 0.0185),
        ("--mean-weight-bits", 4, "--allocation", "lrp-qvit"),
        ("--mean-weight-bits", 4, "--allocation", "random"),
    ],
    ids=["uniform", "file", *BUDGETS, "two-budgets", "lrp-qvit", "random"],
)
def test_quantize_writes_a_model_of_these_widths(
    widths: tuple[object, ...], work: Path, data: tuple[object, ...], net: nn.Module, tmp_path: Path
) -> None:
    out, report = tmp_path / "q.safetensors", tmp_path / "q.json"
    words = [str(word).format(work=work) for word in widths]
    result = run("quantize", "vitq_test_tiny", *data, *words, "-o", out, "--json", report)
    told, plan = json.loads(report.read_text()), vitq.load(out).quantization.allocation
    assert told == {
        "model": "vitq_test_tiny",
        "out": str(out),
        "calibration_images": 12,
        "method": "vitq",
        "executes": "integers",
        "weight_bytes": packed_bytes(out),
        "float_bytes": bytes_in_float32(net),
        "mean_weight_bits": plan.mean_weight_bits(vitq.model_sites(net)),
    }
    assert told["weight_bytes"] == bytes_by_formula(net, json.loads(plan.to_json()))
    assert f"{told['weight_bytes']:,} bytes" in result.out
    if "--weight-bits" in words:
        assert plan == vitq.BitAllocation.uniform(vitq.model_sites(net), 3, 6)
    if "--bits" in words:
        assert plan == vitq.BitAllocation.from_json((work / "bits.json").read_text())
    if "--mean-weight-bits" in words:
        assert told["mean_weight_bits"] <= float(words[words.index("--mean-weight-bits") + 1])
    if "--size-mb" in words:
        assert told["weight_bytes"] <= 1e6 * float(words[words.index("--size-mb") + 1])
    if "lrp-qvit" in words:
        assert all(len(set(s.weight.bits)) == 1 for s in plan.sites.values() if s.weight)


@pytest.mark.parametrize("options", [(), ("--allocation", "random")], ids=["relevance", "random"])
def test_a_seed_makes_the_same_file_and_another_seed_another(
    options: tuple[str, ...], data: tuple[object, ...], tmp_path: Path
) -> None:
    files = []
    for index, seed in enumerate((7, 7, 8)):
        files.append(tmp_path / f"{index}.safetensors")
        few = ("--calibration-images", 6, "--mean-weight-bits", 4, "--seed", seed, *options)
        run("quantize", "vitq_test_tiny", *data, *few, "-o", files[-1])
    first, again, other = (load_file(path) for path in files)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert list(first) == list(again)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items() if name in other)


def expected_evaluation(work: Path, images: torch.Tensor, labels: torch.Tensor, net: nn.Module) -> dict[str, float]:
    """The measurements of ``vitq eval`` by their definitions."""
    with torch.inference_mode():
        exact, actual = net(images).double(), vitq.load(work / "q.safetensors")(images).double()
    p, q = exact.softmax(1), actual.softmax(1)
    return {
        "images": len(images),
        "top1": 100 * (actual.argmax(1) == labels).double().mean().item(),
        "float_top1": 100 * (exact.argmax(1) == labels).double().mean().item(),
        "agreement": 100 * (exact.argmax(1) == actual.argmax(1)).double().mean().item(),
        "kl": (p * (p.log() - q.log())).sum(1).mean().item(),
    }


@pytest.mark.parametrize("weights", ["float.safetensors", "flat.pth", "model.pth", "state_dict.pth"])
@pytest.mark.parametrize("folder", ["flat", "classes"])
def test_eval_compares_with_labels_and_float_weights(
    folder: str, weights: str, work: Path, net: nn.Module, tmp_path: Path
) -> None:
    out = tmp_path / "e.json"
    options = ("--images", work / folder, "--checkpoint", work / weights, "--batch", 5, "--json", out)
    result = run("eval", work / "q.safetensors", *options)
    told = json.loads(out.read_text())
    images, labels = load_folder(work / folder, eval_transform(net))
    expected = expected_evaluation(work, images, labels, net)
    assert 0 < expected["float_top1"] < 100
    assert {key: told[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert told["weight_bytes"] == packed_bytes(work / "q.safetensors")
    assert told["weight_bytes"] == bytes_by_formula(net, json.loads((work / "bits.json").read_text()))
    assert told["float_bytes"] == bytes_in_float32(net)
    assert told["mean_weight_bits"] == pytest.approx(4, abs=0.05)
    assert told["images_per_s"] > 0
    assert re.search(rf"^float top-1 +{expected['float_top1']:.2f} %$", result.out, re.MULTILINE)


def test_eval_without_float_weights_has_top1_alone(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    result = run("eval", work / "q.safetensors", "--images", work / "flat", "--json", out)
    told = json.loads(out.read_text())
    assert told["top1"] is not None
    assert (told["float_top1"], told["agreement"], told["kl"]) == (None, None, None)
    assert "None" not in result.out


def test_eval_without_labels_has_agreement_alone(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    options = ("--images", work / "calibration", "--checkpoint", work / "flat.pth", "--json", out)
    result = run("eval", work / "q.safetensors", *options)
    told = json.loads(out.read_text())
    assert (told["top1"], told["float_top1"]) == (None, None)
    assert told["images"] == 12
    assert 0 <= told["agreement"] <= 100
    assert told["kl"] > 0
    assert "top-1" not in result.out


def test_eval_of_features_reads_no_labels(work: Path, tmp_path: Path) -> None:
    extractor, out = small_vit(num_classes=0), tmp_path / "e.json"
    vitq.save(vitq.quantize(extractor, variant_images(count=2)), tmp_path / "features.safetensors")
    run("eval", tmp_path / "features.safetensors", "--images", work / "flat", "--json", out)
    told = json.loads(out.read_text())
    assert (told["top1"], told["agreement"], told["kl"], told["cosine"]) == (None, None, None, None)
    assert told["images"] > 0


def test_eval_takes_as_many_images_as_limit_says_by_seed(work: Path, net: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    options = ("--images", work / "flat", "--checkpoint", work / "flat.pth", "--limit", 4, "--seed", 2)
    run("eval", work / "q.safetensors", *options, "--json", out)
    chosen = ImageFolder.scan(work / "flat").sample(4, 2)
    images, labels = chosen.batches(eval_transform(net), 4)[0]
    expected = expected_evaluation(work, images, labels, net)
    told = json.loads(out.read_text())
    assert {key: told[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_normalisation_given_to_quantize_is_the_files(work: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    quantized, other = tmp_path / "q.safetensors", ("--mean", "0.1,0.2,0.3", "--std", "0.4", "--crop", "0.7")
    run("quantize", "vitq_test_tiny", *data, "--weight-bits", 8, *other, "-o", quantized)
    kept = vitq.load(quantized).pretrained_cfg
    assert (kept["mean"], kept["std"], kept["crop_pct"]) == ([0.1, 0.2, 0.3], [0.4] * 3, 0.7)
    told = []
    for options in ((), other, ("--crop", "1.0")):
        out = tmp_path / "e.json"
        images = ("--images", work / "flat", "--checkpoint", work / "flat.pth", "--json", out)
        run("eval", quantized, *images, *options)
        told.append(json.loads(out.read_text())["kl"])
    assert told[0] == told[1] != told[2]


def test_a_tag_of_the_model_name_stays_with_the_file(
    work: Path, data: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``eval --pretrained`` must fetch the weights that were quantized, not those of the default tag."""
    asked = []

    def create_model(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        asked.append((name, pretrained))
        return make_model("vitq_test_tiny", False, arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    quantized = tmp_path / "q.safetensors"
    run("quantize", "vitq_test_tiny.some_tag", *data, "--weight-bits", 8, "-o", quantized)
    run("eval", quantized, "--images", work / "flat", "--pretrained")
    assert asked == [("vitq_test_tiny.some_tag", False), ("vitq_test_tiny.some_tag", True)]


def test_report_shows_the_evaluation_and_the_relevance(work: Path, tmp_path: Path) -> None:
    evaluation, page, copy = tmp_path / "eval <1>.json", tmp_path / "r.html", tmp_path / "r.json"
    images = ("--images", work / "flat", "--checkpoint", work / "flat.pth")
    run("eval", work / "q.safetensors", *images, "--json", evaluation)
    options = ("--scores", work / "scores.json", "--eval", evaluation, "-o", page, "--json", copy)
    result = run("report", work / "q.safetensors", *options)
    text, told = page.read_text(), json.loads(evaluation.read_text())
    assert f"{told['top1']:.2f} %" in text
    assert "eval &lt;1&gt;" in text
    assert "Measured on cpu." in text
    assert "vitq_test_tiny" in text
    assert "attnlrp, all tokens" in text
    assert result.err == f"report: {page}\n"
    rows = json.loads(copy.read_text())["measurements"]
    assert [(row["label"], row["top1"]) for row in rows] == [
        ("float32", told["float_top1"]),
        ("eval <1>", told["top1"]),
    ]


def test_report_needs_no_more_than_the_model(work: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    run("report", work / "q.safetensors", "-o", page)
    assert "accuracy not compared" in page.read_text()


def test_doctor_prints_and_writes_its_findings(tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    result = run("doctor", "--json", out)
    assert json.loads(out.read_text()) == examine()
    for key, value in examine().items():
        assert re.search(rf"^{re.escape(key)} +{re.escape(value)}$", result.out, re.MULTILINE)
