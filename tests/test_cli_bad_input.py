"""What ``vitq`` says to bad input: exit code 2 and one clear line, no code of foreign files run, no good file lost."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vitq_kernels as vitq
from tests.command_line import draw, invoke, make_files


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images and files of earlier verbs. Read only."""
    return make_files(tmp_path_factory.mktemp("files"))


# Bad input: what is given, and what the one line on stderr says. {work} is the folder of make_files.
QUANTIZE = "quantize vitq_test_tiny --calibration {work}/calibration -o {tmp}/q.safetensors"
FLOAT = "--checkpoint {work}/float.safetensors"
EVAL = "eval {work}/q.safetensors --json {tmp}/e.json"
ALLOCATE = "allocate vitq_test_tiny " + FLOAT + " -o {tmp}/b.json"
BAD_INPUT: dict[str, tuple[str, str]] = {
    "model-unknown": (
        "quantize vit_tiny_patch16_225 --weight-bits 4 " + FLOAT + " --calibration {work}/calibration",
        r"MODEL must be a timm model name, got 'vit_tiny_patch16_225'; similar: vit_tiny_patch16_224",
    ),
    "bench-batch": (
        "bench {work}/q.safetensors --batch 8,0",
        r"--batch must be whole numbers of at least 1, separated by commas, got '8,0'",
    ),
    "bench-against": (
        "bench {work}/q.safetensors --against int8",
        r"--against: a candidate must be ours, .*, got 'int8'",
    ),
    "bench-no-checkpoint": ("bench {work}/float.safetensors", r"float.safetensors"),
    "model-no-vit": (
        "score resnet18 " + FLOAT + " --calibration {work}/calibration",
        r"--checkpoint \S+ does not fit resnet18: it lacks conv1.weight, \S+, \S+ and \d+ more; it has unknown",
    ),
    "model-part-has-no-integer-form": (
        "quantize vitq_test_elu --weight-bits 4 --calibration {work}/flat --checkpoint {work}/elu.safetensors",
        r"blocks.1: activation ELU has no integer form",
    ),
    "checkpoint-missing": (
        QUANTIZE + " --weight-bits 4 --checkpoint {tmp}/[bold]none.pth",
        r"--checkpoint \S+/\[bold\]none.pth is not a file",
    ),
    "checkpoint-of-a-deeper-model": (
        QUANTIZE + " --weight-bits 4 --checkpoint {work}/deep.safetensors",
        r"does not fit vitq_test_tiny: it has unknown blocks.2\S+, blocks.2\S+, blocks.2\S+ and 9 more",
    ),
    "checkpoint-of-a-shallower-model": (
        "score vitq_test_deep " + FLOAT + " --calibration {work}/calibration",
        r"does not fit vitq_test_deep: it lacks blocks.2\S+, blocks.2\S+, blocks.2\S+ and 9 more",
    ),
    "checkpoint-of-other-shapes": (
        "score vit_tiny_patch16_224 " + FLOAT + " --calibration {work}/calibration",
        r"it has cls_token \[1, 1, 32\] instead of \[1, 1, 192\]",
    ),
    "checkpoint-quantized": (
        QUANTIZE + " --weight-bits 4 --checkpoint {work}/q.safetensors",
        r"does not fit vitq_test_tiny: it lacks",
    ),
    "checkpoint-truncated-safetensors": (
        QUANTIZE + " --weight-bits 4 --checkpoint {work}/half.safetensors",
        r"--checkpoint \S+half.safetensors cannot be read as weights: SafetensorError",
    ),
    "checkpoint-truncated-pickle": (
        QUANTIZE + " --weight-bits 4 --checkpoint {work}/half.pth",
        r"--checkpoint \S+half.pth cannot be read as weights: ",
    ),
    "checkpoint-text": (QUANTIZE + " --weight-bits 4 --checkpoint {work}/text.json", r"--checkpoint \S+text.json "),
    "weights-neither": (QUANTIZE + " --weight-bits 4", r"exactly one of --checkpoint FILE and --pretrained"),
    "weights-both": (
        QUANTIZE + " --weight-bits 4 --pretrained " + FLOAT,
        r"exactly one of --checkpoint FILE and --pretrained",
    ),
    "weights-not-to-be-had": (
        QUANTIZE + " --weight-bits 4 --pretrained",
        r"MODEL vitq_test_tiny cannot be made with --pretrained weights here: \w+: No pretrained weights exist",
    ),
    "calibration-missing": (
        "quantize vitq_test_tiny --weight-bits 4 " + FLOAT + " --calibration {tmp}/none",
        r"image folder \S+none does not exist or is not a folder",
    ),
    "calibration-empty": (
        "quantize vitq_test_tiny --weight-bits 4 " + FLOAT + " --calibration {work}/empty",
        r"image folder \S+empty must hold images \(.jpg, .*\), got none",
    ),
    "images-missing": (EVAL + " --images {tmp}/none", r"image folder \S+none does not exist or is not a folder"),
    "images-a-file": (EVAL + " --images {work}/bits.json", r"image folder \S+bits.json does not exist or is not"),
    "images-empty": (EVAL + " --images {work}/empty", r"image folder \S+empty must hold images"),
    "widths-none": (QUANTIZE + " " + FLOAT, r"exactly one of --weight-bits, --bits and a budget \(--mean-weight-bits"),
    "widths-uniform-and-file": (
        QUANTIZE + " --weight-bits 4 --bits {work}/bits.json " + FLOAT,
        r"exactly one of --weight-bits, --bits and a budget",
    ),
    "widths-uniform-and-budget": (
        QUANTIZE + " --weight-bits 4 --size-mb 1 " + FLOAT,
        r"exactly one of --weight-bits, --bits and a budget",
    ),
    "widths-file-and-budget": (
        QUANTIZE + " --bits {work}/bits.json --mean-weight-bits 4 " + FLOAT,
        r"exactly one of --weight-bits, --bits and a budget",
    ),
    "weight-bits-1": (QUANTIZE + " --weight-bits 1 " + FLOAT, r"--weight-bits must be in 2..8, got 1"),
    "weight-bits-9": (QUANTIZE + " --weight-bits 9 " + FLOAT, r"--weight-bits must be in 2..8, got 9"),
    "act-bits-1": (QUANTIZE + " --mean-weight-bits 4 --act-bits 1 " + FLOAT, r"--act-bits must be in 2..8, got 1"),
    "act-bits-9": (QUANTIZE + " --weight-bits 4 --act-bits 9 " + FLOAT, r"--act-bits must be in 2..8, got 9"),
    "bits-missing": (QUANTIZE + " --bits {tmp}/none.json " + FLOAT, r"none.json is not a file"),
    "bits-no-json": (QUANTIZE + " --bits {work}/text.json " + FLOAT, r"text.json: not a bit allocation: JSONDecode"),
    "bits-a-list": (QUANTIZE + " --bits {work}/list.json " + FLOAT, r"list.json: not a bit allocation: "),
    "bits-no-text": (QUANTIZE + " --bits {work}/bytes.json " + FLOAT, r"bytes.json: .*codec can't decode"),
    "bits-scores": (QUANTIZE + " --bits {work}/scores.json " + FLOAT, r"scores.json: not a bit allocation: "),
    "bits-of-another-model": (
        "quantize vitq_test_deep --bits {work}/bits.json --calibration {work} --checkpoint {work}/deep.safetensors",
        r"bits.json: allocation does not fit the model: missing sites \['blocks.2.attn.qkv'",
    ),
    "budget-none": (
        ALLOCATE + " --scores {work}/scores.json",
        r"give a budget: one or more of --mean-weight-bits, --size-mb, --bitops",
    ),
    "budget-negative": (QUANTIZE + " --size-mb -1 " + FLOAT, r"size_mb must be a positive number, got -1.0"),
    "budget-of-bits-infeasible": (
        QUANTIZE + " --mean-weight-bits 1.5 " + FLOAT,
        r"mean_weight_bits=1.5 cannot be met: the smallest is 2.0",
    ),
    "budget-of-bytes-infeasible": (
        ALLOCATE + " --size-mb 0.001 --scores {work}/scores.json",
        r"size_mb=0.001 cannot be met: the smallest is 0.012608$",
    ),
    "budget-of-bitops-infeasible": (
        QUANTIZE + " --bitops 0.001 " + FLOAT,
        r"bitops=1000000.0 cannot be met: the smallest is \d+.0 \(bitops in ones; --bitops counts 10\^9\)",
    ),
    "allocation-unknown": (
        QUANTIZE + " --mean-weight-bits 4 --allocation luck " + FLOAT,
        r"--allocation must be one of relevance, fisher, lrp-qvit, mix-qvit, .*, random, got 'luck'",
    ),
    "scores-missing": (ALLOCATE + " --mean-weight-bits 4 --scores {tmp}/none.json", r"none.json is not a file"),
    "scores-bits": (
        ALLOCATE + " --mean-weight-bits 4 --scores {work}/bits.json",
        r"bits.json: not a relevance: KeyError: 'method'",
    ),
    "scores-of-a-shallower-model": (
        "allocate vitq_test_deep --checkpoint {work}/deep.safetensors --mean-weight-bits 4 --scores {work}/scores.json",
        r"scores.json: scores must be of this model, got no rows of blocks.2.attn.qkv instead of 96",
    ),
    "method-unknown": (
        "score vitq_test_tiny --method lime --calibration {work}/calibration " + FLOAT,
        r"--method must be one of attnlrp, chefer, fisher, got 'lime'",
    ),
    "tokens-unknown": (
        "score vitq_test_tiny --tokens some --calibration {work}/calibration " + FLOAT,
        r"--tokens must be one of all, image, class, got 'some'",
    ),
    "mean-no-numbers": (QUANTIZE + " --weight-bits 4 --mean a,b,c " + FLOAT, r"--mean must be numbers .*, got 'a,b,c'"),
    "mean-two-numbers": (QUANTIZE + " --weight-bits 4 --mean 0.5,0.5 " + FLOAT, r"mean must be 3 numbers"),
    "mean-nan": (QUANTIZE + " --weight-bits 4 --mean nan " + FLOAT, r"mean must be 3 numbers, one a channel, got"),
    "std-zero": (EVAL + " --images {work}/flat --std 0", r"std must be 3 positive numbers, one a channel, got"),
    "crop-zero": (EVAL + " --images {work}/flat --crop 0", r"crop must be a share in \(0, 1\], got 0.0"),
    "crop-two": (EVAL + " --images {work}/flat --crop 2", r"crop must be a share in \(0, 1\], got 2.0"),
    "count-zero": (QUANTIZE + " --calibration-images 0 " + FLOAT, r"--calibration-images must be at least 1, got 0"),
    "limit-zero": (EVAL + " --images {work}/flat --limit 0", r"--limit must be at least 1, got 0"),
    "batch-zero": (EVAL + " --images {work}/flat --batch 0", r"--batch must be at least 1, got 0"),
    "seed-negative": (QUANTIZE + " --weight-bits 4 --seed -1 " + FLOAT, r"--seed must be in 0..9223372036854775807"),
    "device-unknown": (EVAL + " --images {work}/flat --device abacus", r"--device abacus cannot be used here: "),
    "device-without-memory": (EVAL + " --images {work}/flat --device meta", r"--device meta cannot be used here: "),
    "out-in-no-folder": (
        "quantize vitq_test_tiny --calibration {work}/calibration -o {tmp}/none/q --weight-bits 4 " + FLOAT,
        r"--out \S+/none/q: directory \S+/none does not exist",
    ),
    "out-a-folder": (
        "report {work}/q.safetensors --out {work}/empty",
        r"--out must be a file, \S+empty is a directory",
    ),
    "json-in-no-folder": (
        "eval {work}/q.safetensors --images {work}/flat --json {tmp}/none/e.json",
        r"--json \S+/none/e.json: directory \S+/none does not exist",
    ),
    "demo-in-no-folder": ("demo --out {tmp}/none/r.html", r"--out \S+/none/r.html: directory \S+/none does not exist"),
    "eval-nothing": ("eval {tmp}/none.safetensors --images {work}/flat", r"none.safetensors does not exist"),
    "eval-float-weights": (
        "eval {work}/float.safetensors --images {work}/flat",
        r"float.safetensors is not a vitq-kernels checkpoint: it has no manifest",
    ),
    "eval-a-pickle": ("eval {work}/flat.pth --images {work}/flat", r"flat.pth is not a whole safetensors file"),
    "eval-truncated": (
        "eval {work}/half.safetensors --images {work}/flat",
        r"half.safetensors is not a whole safetensors file",
    ),
    "eval-float-model-of-other-classes": (
        EVAL + " --images {work}/flat --checkpoint {work}/seven.safetensors",
        r"same number of classes, got 7 and 10",
    ),
    "eval-both-weights": (
        EVAL + " --images {work}/flat --pretrained " + FLOAT,
        r"exactly one of --checkpoint FILE and --pretrained",
    ),
    "report-of-nothing": ("report {tmp}/none.safetensors", r"none.safetensors does not exist"),
    "report-eval-no-json": (
        "report {work}/q.safetensors --eval {work}/text.json",
        r"text.json: Expecting property name",
    ),
    "report-eval-a-list": (
        "report {work}/q.safetensors --eval {work}/list.json",
        r"evaluation list must be JSON of `vitq eval`, got list",
    ),
    "report-eval-other-json": (
        "report {work}/q.safetensors --eval {work}/bits.json",
        r"evaluation bits must be JSON of `vitq eval`, it lacks 'float_top1'",
    ),
    "report-scores-other-json": (
        "report {work}/q.safetensors --scores {work}/bits.json",
        r"bits.json: not a relevance: KeyError: 'method'",
    ),
}


def refused(command: str, message: str) -> None:
    """The command ends with code 2, one line on stderr that says ``message``, and nothing on stdout."""
    result = invoke(*command.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("vitq: error: ")
    assert result.err.count("\n") == 1
    assert len(result.err) < 500
    assert re.search(message, result.err.rstrip("\n")), result.err


@pytest.mark.parametrize(("command", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(
    command: str, message: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(command.format(work=work, tmp=tmp_path), message)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("conquer", "No such command 'conquer'"),
        ("eval q.safetensors", "Missing option '--images'"),
        ("eval q.safetensors --images flat --fast", "No such option: --fast"),
        ("quantize vitq_test_tiny --calibration flat --weight-bits four", "Invalid value for '--weight-bits'"),
    ],
    ids=["verb", "missing-option", "option", "number"],
)
def test_wrong_usage_says_how_to_get_help(words: str, message: str) -> None:
    result = invoke(*words.split())
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    assert "--help" in result.err


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def save_plain(obj: object, path: Path) -> None:
    with path.open("wb") as handle:
        pickle.dump(obj, handle, protocol=2)


@pytest.mark.parametrize("save", [torch.save, save_plain], ids=["torch-save", "plain-pickle"])
@pytest.mark.parametrize("verb", ["score", "quantize", "eval"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(
    verb: str, save: Callable[[object, Path], None], work: Path, tmp_path: Path
) -> None:
    weights, exploded = tmp_path / "w.pth", tmp_path / "exploded"
    save({"head.weight": torch.zeros(10, 32), "bomb": Bomb(exploded)}, weights)
    data = f"--checkpoint {weights} --calibration {work}/calibration"
    command = {
        "score": f"score vitq_test_tiny {data}",
        "quantize": f"quantize vitq_test_tiny {data} --weight-bits 4",
        "eval": f"eval {work}/q.safetensors --images {work}/flat --checkpoint {weights}",
    }[verb]
    refused(command, r"--checkpoint \S+w.pth is no pickle of weights alone.*; nothing of it was run")
    assert not exploded.exists()
    torch.load(weights, weights_only=False) if save is torch.save else pickle.loads(weights.read_bytes())
    assert exploded.exists()  # the file is as dangerous as it should be


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (torch.zeros(3), "Tensor"),
        ({"state_dict": [1, 2]}, "'state_dict': list"),
        ({"head.weight": 3}, "'head.weight': int"),
    ],
    ids=["tensor", "list", "number"],
)
def test_a_pickle_of_other_things_is_refused(content: object, got: str, work: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    command = f"score vitq_test_tiny --checkpoint {tmp_path}/w.pth --calibration {work}/calibration"
    refused(command, f"w.pth must hold tensors by name, got {got}$")


def test_an_empty_pickle_is_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    command = f"score vitq_test_tiny --checkpoint {tmp_path}/w.pth --calibration {work}/calibration"
    refused(command, "w.pth cannot be read as weights: EOFError")


def test_an_image_that_does_not_decode_is_named(work: Path, tmp_path: Path) -> None:
    for index in range(3):
        draw(tmp_path / f"{index}.png", index)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    weights = f"--checkpoint {work}/float.safetensors"
    refused(f"score vitq_test_tiny {weights} --calibration {tmp_path}", r"image \S+/1.png does not decode: ")
    refused(f"eval {work}/q.safetensors --images {tmp_path}", r"image \S+/1.png does not decode: ")


LABELS: dict[str, tuple[str, str]] = {
    "column": ("file,class\n0.png,1\n", r"labels.csv must have columns file,label, got \['file', 'class'\]"),
    "file": ("file,label\n0.png,1\n9.png,2\n", r"labels.csv line 3: file '9.png' is not in the folder"),
    "number": ("file,label\n0.png,cat\n", r"labels.csv line 2: label must be a whole number, got 'cat'"),
    "negative": ("file,label\n0.png,-1\n", r"labels.csv line 2: label must be a whole number, got '-1'"),
    "beyond-classes": ("file,label\n0.png,10\n", r"labels must be classes below 10, got 10"),
}


@pytest.mark.parametrize(("table", "message"), LABELS.values(), ids=LABELS)
def test_bad_labels_are_one_line(table: str, message: str, work: Path, tmp_path: Path) -> None:
    draw(tmp_path / "0.png", 0)
    (tmp_path / "labels.csv").write_text(table)
    refused(f"eval {work}/q.safetensors --images {tmp_path}", message)


def test_a_file_that_names_no_timm_model_has_nothing_to_compare_with(work: Path, tmp_path: Path) -> None:
    model = vitq.load(work / "q.safetensors")
    model.pretrained_cfg = {}
    vitq.save(model, tmp_path / "q.safetensors")
    images = f"--images {work}/flat"
    refused(
        f"eval {tmp_path}/q.safetensors {images} --checkpoint {work}/flat.pth", "does not say which timm model it was"
    )
    assert invoke("eval", tmp_path / "q.safetensors", "--images", work / "flat").code == 0


@pytest.fixture
def broken_image(work: Path, tmp_path: Path) -> Path:
    """A folder of which the last image does not decode: a command that reads it fails after its work began."""
    folder = tmp_path / "broken"
    folder.mkdir()
    draw(folder / "0.png", 0)
    (folder / "1.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "score vitq_test_tiny {float} --calibration {broken} -o {out}",
        "allocate vitq_test_tiny {float} --calibration {broken} -o {out} --scores {work}/scores.json --size-mb 1",
        "quantize vitq_test_tiny {float} --calibration {broken} -o {out} --weight-bits 4",
        "eval {work}/q.safetensors --images {broken} --json {out}",
        "report {work}/q.safetensors --eval {work}/list.json -o {out}",
    ],
    ids=["score", "allocate", "quantize", "eval", "report"],
)
def test_an_existing_file_outlives_a_failing_command(
    command: str, work: Path, broken_image: Path, tmp_path: Path
) -> None:
    out = tmp_path / "precious"
    out.write_bytes(b"precious\x00bytes")
    refused(
        command.format(work=work, broken=broken_image, out=out, float=FLOAT.format(work=work)),
        "does not decode|must be JSON",
    )
    assert out.read_bytes() == b"precious\x00bytes"
    assert sorted(os.listdir(tmp_path)) == ["broken", "precious"]


@pytest.mark.parametrize("verb", ["score", "quantize"])
def test_an_existing_file_outlives_a_full_disk(
    verb: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "precious"
    out.write_bytes(b"precious")
    monkeypatch.setattr("vitq_kernels.tensor_file.save_file", fail)
    monkeypatch.setattr(Path, "write_text", fail)
    command = f"{verb} vitq_test_tiny {FLOAT.format(work=work)} --calibration {work}/flat -o {out}"
    refused(command + (" --weight-bits 8" if verb == "quantize" else ""), "No space left on device")
    assert out.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["precious"]
