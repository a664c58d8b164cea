"""Whole models against each other: who runs, in which precision, and what is made of the times."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_model import MODELS, is_recorded, parsed, rows_of, run
from benchmarks.result_rows import Row, key_of, read_rows, record
from tests.command_line import make_files
from tests.command_line import run as vitq
from tests.result_examples import MODELS_FOUND, ORIGIN
from tests.small_vits import small_vit, variant_quantized
from tests.test_fuse_layernorm import Called
from vitq_kernels import model_bench, model_candidates
from vitq_kernels.model_bench import FEWEST_ROUNDS, bench_models
from vitq_kernels.model_candidates import (
    AGAINST,
    OURS,
    OURS_FUSED,
    Candidate,
    CannotRunError,
    captured,
    with_random_weights,
)
from vitq_kernels.nn import fuse_layernorm
from vitq_kernels.stopwatch import wall_times_us

IMAGE = (3, 32, 32)
NAMES = [
    f"{precision}{way}"
    for precision in (OURS, OURS_FUSED, "float32", "bfloat16", "float16")
    for way in ("", "-compiled", "-max-autotune", "-captured")
]


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A quantized model and its float one."""
    return variant_quantized("class-token"), small_vit()


@pytest.mark.parametrize("name", NAMES)
def test_names_of_candidates_come_back(name: str) -> None:
    assert str(Candidate.parse(name)) == name


@pytest.mark.parametrize("name", ["", "fp16", "float16-", "float16-graph", "ours-float16", "float16 compiled", "int8"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^a candidate must be ours, ours_fused, float32, .*, got '{name}'$"):
        Candidate.parse(name)


@pytest.mark.parametrize("given_fused", [False, True])
def test_a_fused_candidate_runs_the_op_and_ours_does_not(
    given_fused: bool, models: tuple[nn.Module, nn.Module]
) -> None:
    """Whatever the model that is given does."""
    qmodel = copy.deepcopy(models[0])
    fuse_layernorm(qmodel, given_fused)
    for name, fused in ((OURS, False), (OURS_FUSED, True)):
        forward = Candidate.parse(name).build(qmodel, models[1], torch.randn(1, *IMAGE))
        with Called() as called:
            forward()
        assert ("linear_residual_layernorm" in called.counts) == fused


def test_a_model_without_the_norm_has_no_fused_candidate() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CannotRunError, match=r"^the model has no LayerNorm behind a projection"):
        Candidate.parse(OURS_FUSED).build(model, model, torch.randn(1, 4))


def test_what_a_device_compares_with_are_candidates() -> None:
    for names in AGAINST.values():
        assert [str(Candidate.parse(name)) for name in names] == list(names)
    assert {"float16-max-autotune", "float16-captured", "ours-captured"} <= set(AGAINST["cuda"])


class Seen(nn.Module):
    """Remembers what it is called with."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.log = log

    def __deepcopy__(self, memo: Any) -> Seen:
        return Seen(self.log)

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((x.dtype, self.weight.dtype, self.training, torch.is_inference_mode_enabled()))
        return x.sum()


@pytest.mark.parametrize("name", ["ours", "float32", "bfloat16", "float16"])
def test_a_candidate_runs_in_its_precision_and_leaves_the_model_alone(name: str) -> None:
    ours: list[Any] = []
    others: list[Any] = []
    qmodel, model = Seen(ours), Seen(others)
    Candidate.parse(name).build(qmodel, model, torch.ones(2, *IMAGE))()
    dtype = torch.float32 if name == OURS else getattr(torch, name)
    assert {*ours, *others} == {(dtype, dtype, False, True)}
    assert bool(ours) == (name == OURS)
    assert len(ours or others) == 4  # three to warm up
    assert qmodel.weight.dtype == model.weight.dtype == torch.float32


@pytest.mark.parametrize(("name", "mode"), [("float32-compiled", "default"), ("ours-max-autotune", "max-autotune")])
def test_a_candidate_is_compiled_whole_for_its_batch(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def compile(model: nn.Module, **options: Any) -> nn.Module:
        given.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    Candidate.parse(name).build(Seen([]), Seen([]), torch.ones(2, *IMAGE))
    assert given == [{"fullgraph": True, "dynamic": False, "mode": mode}]


def test_a_compiler_that_fails_is_a_candidate_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("no C++ compiler\nin /usr")

    def compile_late(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: compile(model)(x)

    for broken in (compile, compile_late):
        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(CannotRunError, match=r"^no C\+\+ compiler$"):
            Candidate.parse("float32-compiled").build(Seen([]), Seen([]), torch.ones(2, *IMAGE))


def test_captured_needs_a_gpu() -> None:
    with pytest.raises(CannotRunError, match=r"^CUDA graphs need a GPU$"):
        captured(nn.Identity(), 8, "cpu")


def test_capture_is_asked_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def capture(model: nn.Module, batch_sizes: Sequence[int]) -> nn.Module:
        asked.append(batch_sizes)
        return model

    monkeypatch.setattr(model_candidates, "capture", capture)
    model = nn.Identity()
    assert captured(model, 8, "cuda") is model
    assert asked == [(8,)]


def test_random_weights_are_finite_and_repeat() -> None:
    with torch.no_grad():
        spoilt = small_vit().apply(lambda m: [p.fill_(torch.nan) for p in m.parameters(recurse=False)])
    first = with_random_weights(spoilt, 3)
    logits = first(torch.ones(1, *IMAGE))
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert torch.equal(with_random_weights(small_vit(4), 3)(torch.ones(1, *IMAGE)), logits)


def test_a_run_measures_every_candidate_at_every_batch(models: tuple[nn.Module, nn.Module]) -> None:
    told: list[tuple[int, int]] = []
    names = ["bfloat16", "float16-captured", "ours", "bfloat16"]
    found = bench_models(*models, [1, 3], IMAGE, against=names, rounds=7, progress=lambda *state: told.append(state))
    assert [(row.candidate, row.batch, len(row.samples_us)) for row in found.rows] == [
        ("ours", 1, 7),
        ("bfloat16", 1, 7),
        ("ours", 3, 7),
        ("bfloat16", 3, 7),
    ]
    assert found.backend == "cpu"
    assert found.skipped == {"float16-captured": "CUDA graphs need a GPU"}
    assert told == [(0, 2), (1, 2)]
    weights = sum(p.numel() for p in models[1].parameters())
    of_bfloat16 = [row.peak_bytes for row in found.rows if row.candidate == "bfloat16"]
    assert 2 * weights < of_bfloat16[0] < of_bfloat16[1]
    assert all(row.peak_bytes > weights for row in found.rows)


def test_rounds_are_as_many_as_there_is_time_for(
    models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def slow(calls: Sequence[Callable[[], object]], rounds: int, *rest: Any) -> list[list[float]]:
        asked.append(rounds)
        return [[5e5] * rounds for _ in wall_times_us(calls, 1, *rest)]

    monkeypatch.setattr(model_bench, "wall_times_us", slow)
    for budget_s, rounds in ((8.0, 8), (1.0, FEWEST_ROUNDS), (1e9, 20)):
        asked.clear()
        bench_models(*models, [1], IMAGE, against=["float32"], rounds=20, budget_s=budget_s)
        assert asked == [1, rounds]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": []}, r"batches and rounds must be at least 1, got \[\] and 100"),
        ({"batches": [8, 0]}, r"must be at least 1, got \[8, 0\]"),
        ({"rounds": 0}, r"got \[1\] and 0"),
        ({"against": ["int8"]}, r"got 'int8'"),
    ],
    ids=["no batch", "batch 0", "no round", "no candidate"],
)
def test_bad_input_is_refused(given: dict[str, Any], message: str, models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(ValueError, match=message):
        bench_models(*models, **{"batches": [1], "image": IMAGE, **given})


def test_our_own_model_must_run(models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(CannotRunError, match="size of tensor"):
        bench_models(Broken(), models[1], [1], IMAGE)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(2) + torch.ones(3)


def test_numbers_follow_from_the_samples() -> None:
    row = MODELS_FOUND.to_dict()["rows"][2]
    assert row == {
        "candidate": "float16",
        "batch": 8,
        "p50_ms": 4.0,
        "p95_ms": 9.0,
        "images_per_s": 2000.0,
        "peak_bytes": 80_000_000,
        "rounds": 5,
        "over_x": {"ours": 2.0, "ours-captured": 4.0},
    }
    assert MODELS_FOUND.to_dict()["rows"][3]["over_x"] == {"ours": 1.0, "ours-captured": None}  # of another batch


def test_the_table_has_a_line_a_candidate() -> None:
    lines = MODELS_FOUND.table().splitlines()
    assert lines[0] == "NVIDIA H200, ours on cuda"
    assert lines[1].split()[-5:] == ["MB", "x", "ours", "x", "ours-captured"]
    assert lines[4].split() == ["8", "float16", "4.000", "9.000", "2000.0", "80.0", "2.00", "4.00"]
    assert lines[5].split()[-1] == "-"
    assert lines[6] == "not run: float16-compiled: no compiler"


def test_model_rows_are_results_rows(tmp_path: Any) -> None:
    rows = rows_of("ViT-B", MODELS_FOUND, (4, 8), MODELS_FOUND.device, ORIGIN)
    record(tmp_path / "a.csv", rows, overwrite=False)  # which checks them
    times = [(r["case"], r["baseline"], r["p50"], r["p95"], r["speedup_x"]) for r in rows if r["metric"] == "time"]
    assert times == [
        ("ours", "float16", "2000", "3000", "2"),
        ("ours-captured", "float16", "1000", "1000", "4"),
        ("ours", "", "1000", "1000", ""),
    ]
    memory = [(r["p50"], r["baseline_p50"], r["speedup_x"]) for r in rows if r["metric"] == "memory"]
    assert memory == [("40000000", "80000000", "2"), ("50000000", "80000000", "1.6"), ("30000000", "", "")]
    assert [r["p50"] for r in rows if r["metric"] == "rate"] == ["4000", "8000", "1000"]
    assert len({key_of(row) for row in rows}) == len(rows)
    assert is_recorded(tmp_path / "a.csv", "ViT-B", 8, (4, 8))
    assert not is_recorded(tmp_path / "a.csv", "ViT-B", 64, (4, 8))
    assert not is_recorded(tmp_path / "a.csv", "ViT-B", 8, (8, 8))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """``bench_model`` knows a model of this test."""
    monkeypatch.setitem(MODELS, "tiny", "vitq_test_tiny")


@pytest.mark.usefixtures("tiny")
def test_bench_model_records_once(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--models", "tiny", "--batch", "2", "--rounds", "1", "--record", "--results", str(tmp_path)]
    run(parsed([*words, "--against", "float32"]))
    assert "\n    2  float32 " in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    before: list[Row] = read_rows(path)
    assert {(row["model"], row["batch"], row["bits_w"], row["metric"]) for row in before} == {
        ("tiny", "2", "8", metric) for metric in ("time", "rate", "memory")
    }
    run(parsed([*words, "--against", "float32"]))
    assert capsys.readouterr().out == "tiny: recorded already, --overwrite measures it again\n"
    run(parsed([*words, "--against", "float32", "--overwrite"]))
    assert [key_of(row) for row in read_rows(path)] == [key_of(row) for row in before]
    assert read_rows(path) != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "ViT-X"], "--models must be of ViT-T, ViT-S, ViT-B, ViT-L, got ViT-X"),
        (["--batch", "8,0"], "--batch must be whole numbers of at least 1, got 8,0"),
        (["--batch", "8,-1"], "--batch must be whole numbers of at least 1, got 8,-1"),
        (["--overwrite"], "--overwrite needs --record"),
        (["--results", "/nowhere"], "--results must be a folder, got /nowhere"),
        (["--against", "int8"], "--against: a candidate must be ours"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bench_model_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(words)
    assert message in capsys.readouterr().err


def test_vitq_bench(tmp_path: Any) -> None:
    work = make_files(tmp_path)
    done = vitq(
        *("bench", work / "q.safetensors", "--batch", "1, 3", "--against", "float32,bfloat16", "--rounds", 2),
        *("--json", tmp_path / "b.json"),
    )
    found = json.loads((tmp_path / "b.json").read_text())
    kinds = [(row["candidate"], row["batch"], row["rounds"]) for row in found["rows"]]
    assert kinds == [(name, batch, 2) for batch in (1, 3) for name in ("ours", "float32", "bfloat16")]
    assert all(row["p95_ms"] >= row["p50_ms"] > 0 and row["peak_bytes"] > 0 for row in found["rows"])
    assert len(done.out.splitlines()) == 2 + len(kinds)
    assert "ours on cpu" in done.out
    assert "profiler" not in done.err
    assert model_candidates.AGAINST["cpu"] == ("float32", "bfloat16")
