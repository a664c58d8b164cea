"""Which tile a linear layer gets: legal, ranked, explained; and what ``vitq tune`` measured goes first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import invoke, make_files, run
from tests.conftest import INTERPRETED
from tests.test_triton_linear import linear_case
from vitq_kernels.ops import tuning
from vitq_kernels.ops.backends import BACKENDS, BackendUnavailableError, use_backend
from vitq_kernels.ops.triton import tuned
from vitq_kernels.ops.triton.launch import Device
from vitq_kernels.ops.triton.tiles import (
    ARCHITECTURES,
    Problem,
    Tile,
    architecture,
    candidates,
    estimate_us,
    named_device,
    rank,
    ranking,
    shared_bytes,
)
from vitq_kernels.spec import RowGroups

EACH_GPU = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
H100 = named_device("H100")
FC2 = Problem(197, 768, 3072, (4,), "residual")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="triton is compiled in this process")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No file of tiles but this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    yield tmp_path
    tuned.forget()


@EACH_GPU
@pytest.mark.parametrize("widths", [(8,), (2,), (3, 4, 6), (2, 3, 4, 5, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("epilogue", ["codes", "gelu_levels"])
@pytest.mark.parametrize("shape", [(1, 8, 5), (197, 768, 768), (50432, 5120, 1280)], ids=str)
def test_every_problem_has_a_legal_tile(arch: Any, widths: Any, epilogue: str, shape: tuple[int, int, int]) -> None:
    problem, device = Problem(*shape, widths, epilogue), named_device(arch.name)
    found = candidates(problem, device)
    assert found
    for tile in found:
        assert shared_bytes(tile, problem) <= arch.shared_bytes
        assert tile.splits == 1 or problem.steps >= 2 * tile.splits
    best = rank(problem, device)
    assert [us for _, us in best] == sorted(us for _, us in best)
    assert {tile for tile, _ in best} == set(found)


@EACH_GPU
def test_more_work_never_takes_less_time(arch: Any) -> None:
    device = named_device(arch.name)
    for tile in arch.tiles:
        times = [estimate_us(tile, Problem(m, 768, 768, (8,), "codes"), device) for m in (1, 197, 1576, 12608, 50432)]
        assert times == sorted(times)


def test_few_tokens_get_small_tiles_and_many_get_large_ones() -> None:
    small, large = (rank(Problem(m, 2304, 768, (8,), "codes"), H100)[0][0] for m in (1, 50432))
    assert small.tokens == 16
    assert (large.rows, large.tokens) == (128, 256)


def test_k_is_split_where_there_are_few_programs_and_many_steps() -> None:
    assert rank(Problem(16, 192, 3072, (8,), "codes"), H100)[0][0].splits > 1
    assert rank(Problem(12608, 768, 3072, (8,), "codes"), H100)[0][0].splits == 1


@pytest.mark.parametrize(
    ("cc", "name"),
    [
        (80, "A100"),
        (86, "RTX 3090"),
        (87, "RTX 3090"),
        (89, "RTX 4090"),
        (90, "H100"),
        (103, "B200"),
        (121, "RTX 5090"),
    ],
)
def test_a_gpu_belongs_to_the_last_class_it_reaches(cc: int, name: str) -> None:
    assert architecture(Device(cc, 1)).name == name


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^GPU must be one of A100, .*H100.*, got 'V100'$"):
        named_device("V100")


def test_the_ranking_says_what_it_is_of() -> None:
    text = ranking(FC2, H100, most=3).splitlines()
    assert text[0] == "197 tokens x 768 rows x 3072 columns, w4, residual, H100"
    assert len(text) == 4
    assert str(rank(FC2, H100)[0][0]) in text[1]


def write(content: str) -> None:
    tuned.path().parent.mkdir(exist_ok=True)
    tuned.path().write_text(content)
    tuned.forget()


def test_a_measured_tile_goes_before_the_model() -> None:
    measured = rank(FC2, H100)[-1][0]
    assert tuned.choose(FC2, H100) == rank(FC2, H100)[0][0] != measured
    write(tuned.with_tiles("H100", {tuned.key(FC2): measured}))
    assert tuned.choose(FC2, H100) == measured
    assert tuned.choose(FC2, named_device("A100")) == rank(FC2, named_device("A100"))[0][0]
    other = Problem(198, 768, 3072, (4,), "residual")
    assert tuned.choose(other, H100) == rank(other, H100)[0][0]


def test_new_tiles_join_those_of_other_gpus_and_layers() -> None:
    write(tuned.with_tiles("H100", {"a": Tile(64, 16, 4, 4)}))
    write(tuned.with_tiles("A100", {"b": Tile(64, 32, 4, 4)}))
    write(tuned.with_tiles("H100", {"c": Tile(64, 64, 4, 4, 2)}))
    expected = {"H100": {"a": [64, 16, 4, 4, 1], "c": [64, 64, 4, 4, 2]}, "A100": {"b": [64, 32, 4, 4, 1]}}
    assert json.loads(tuned.path().read_text()) == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"H100": [1]}', "1e999"])
def test_a_file_that_is_no_table_is_named_and_ignored(content: str) -> None:
    write(content)
    with pytest.warns(UserWarning, match="the table of tiles cannot be read and is ignored"):
        assert tuned.choose(FC2, H100) == rank(FC2, H100)[0][0]


@pytest.mark.parametrize("content", ["{", "[]", '{"H100": [1]}'])
def test_a_file_that_is_no_table_is_not_overwritten(content: str) -> None:
    write(content)
    with pytest.raises(ValueError, match=r"triton_tiles\.json is no table of tiles, move it away"):
        tuned.with_tiles("H100", {"a": Tile(64, 16, 4, 4)})


@pytest.mark.parametrize(
    "entry", ["tile", 3, [], [64, 64, 4], [64, 64, 4, 4, 1, 1], [1e999, 64, 4, 4, 1], "12345", None]
)
def test_an_entry_that_is_no_tile_is_named_and_costs_no_other(entry: Any) -> None:
    good = rank(FC2, H100)[-1][0]
    write(json.dumps({"H100": {"a": entry, tuned.key(FC2): list(astuple(good))}}))
    with pytest.warns(UserWarning, match="for a is no tile and is ignored"):
        assert tuned.choose(FC2, H100) == good


def test_tiles_of_a_tune_that_ended_meanwhile_stay() -> None:
    tuned.read()
    tuned.path().parent.mkdir()
    tuned.path().write_text('{"H100": {"a": [64, 16, 4, 4, 1]}}')
    assert json.loads(tuned.with_tiles("H100", {"b": Tile(64, 32, 4, 4)}))["H100"].keys() == {"a", "b"}


def test_without_a_home_directory_the_model_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(UserWarning, match="is ignored: Could not determine home directory"):
        assert tuned.choose(FC2, H100) == rank(FC2, H100)[0][0]


@pytest.mark.parametrize("tile", [[64, 16, 4, 4, 99], [1024, 16, 4, 4, 1]], ids=["splits", "rows"])
def test_a_tile_that_is_not_legal_is_named_and_ignored(tile: list[int]) -> None:
    write(json.dumps({"H100": {tuned.key(FC2): tile}}))
    with pytest.warns(UserWarning, match="is no legal tile"):
        assert tuned.choose(FC2, H100) == rank(FC2, H100)[0][0]


@pytest.fixture
def layer() -> Callable[[], torch.Tensor]:
    """A call of one linear layer."""
    from tests.conformance import op_arguments

    case = linear_case(5, 256, RowGroups.uniform(40, 4))
    with use_backend("triton"):
        arguments = op_arguments(case)
    return lambda: torch.ops.vitq.linear_codes(*arguments)


def interpreted_problem() -> Problem:
    return Problem(5, 40, 256, (4,), "codes")


def planted_timer(best: Tile) -> Callable[[Callable[[], object]], float]:
    """Times in which one tile is the fastest."""

    def timer(call: Callable[[], object]) -> float:
        call()
        return 1.0 if tuned._forced.get() == best else 2.0

    return timer


@needs_interpreter
def test_tune_keeps_the_tile_that_was_fastest(layer: Callable[[], torch.Tensor]) -> None:
    device = Device(80, 108, "interpreter")
    best = rank(interpreted_problem(), device)[3][0]
    (found,) = tuning.tune(layer, most=5, timer=planted_timer(best))
    assert found == tuning.Tuned("5x40x256-w4-codes", str(best), 1.0, str(rank(interpreted_problem(), device)[0][0]), 2)
    assert found.speedup_x == 2.0
    assert json.loads(tuned.path().read_text()).keys() == {"interpreter"}
    assert tuned.choose(interpreted_problem(), device) == best


@needs_interpreter
def test_tune_refuses_a_tile_that_computes_something_else(
    layer: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitq_kernels.ops.triton import linear

    real, calls = linear.launch, []

    def launch(kernel: Any, grid: Any, like: Any, /, **meta: Any) -> None:
        real(kernel, grid, like, **meta)
        calls.append(meta)
        if len(calls) == 3:
            meta["out"].view(torch.int8).flatten()[0] ^= 1

    monkeypatch.setattr(linear, "launch", launch)
    timed: list[str] = []

    def timer(call: Callable[[], object]) -> float:
        timed.append(str(tuned._forced.get()))
        return 1.0

    with pytest.raises(tuning.WrongNumbersError, match=r"^5x40x256-w4-codes: .* gives other numbers than ") as caught:
        tuning.tune(layer, most=4, timer=timer)
    wrong = str(caught.value).split(": ")[1].split(" gives")[0]
    assert timed
    assert wrong not in timed
    assert not tuned.path().exists()


@needs_interpreter
def test_tune_passes_over_a_tile_that_does_not_run(layer: Callable[[], torch.Tensor]) -> None:
    ranked = rank(interpreted_problem(), Device(80, 108, "interpreter"))

    def timer(call: Callable[[], object]) -> float:
        if tuned._forced.get() == ranked[0][0]:
            raise RuntimeError("out of resources")
        return 1.0

    with pytest.warns(UserWarning, match="does not run: out of resources"):
        (found,) = tuning.tune(layer, most=3, timer=timer)
    assert found.tile == found.model_tile == str(ranked[1][0])


def test_tune_without_a_linear_layer_says_so() -> None:
    with pytest.raises(ValueError, match="run must call an integer linear layer, got none"):
        tuning.tune(lambda: torch.zeros(1), timer=lambda call: 1.0)


def test_tune_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["triton"].load(), "unavailable", lambda device: "finds no GPU")
    with pytest.raises(BackendUnavailableError, match=r"^tiles are measured on a GPU: backend triton finds no GPU$"):
        tuning.tune(lambda: None)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model's file."""
    return make_files(tmp_path_factory.mktemp("files")) / "q.safetensors"


def test_the_command_explains_for_a_gpu_that_is_not_there(quantized: Path, tmp_path: Path) -> None:
    result = run("tune", quantized, "--batch", "1,8", "--dry-run", "H100", "--json", tmp_path / "t.json")
    layers = json.loads((tmp_path / "t.json").read_text())["layers"]
    assert "17 tokens x 96 rows x 32 columns" in result.out
    assert any(layer.startswith("136 tokens x 96 rows x 32 columns") for layer in layers)
    assert result.out.count("H100") == len(layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry-run", "V100"), "GPU must be one of"),
        (("--batch", "0"), "--batch must be whole numbers of at least 1"),
        (("--batch", "1,x"), "--batch must be whole numbers"),
        (("--most", "0"), "--most must be at least 1"),
    ],
)
def test_the_command_names_a_bad_argument(arguments: tuple[str, ...], message: str, quantized: Path) -> None:
    result = invoke("tune", quantized, *arguments)
    assert result.code == 2
    assert message in result.err
