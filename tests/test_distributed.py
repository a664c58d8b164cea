"""Two processes give the numbers of one, bit for bit; one process without a group is as if there were no sharding."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_job import CASES, commands, make_files, measure

from tests.command_line import Result, run
from vitq_kernels.distributed import from_first, in_order, process_group, rank, world_size

ROOT = Path(__file__).parents[1]
PROCESSES = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as torchrun gives its processes: other splits of a sum round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of distributed_job.py in two processes left what it found."""
    folder = tmp_path_factory.mktemp("job")
    make_files(folder)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    run = subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests" / "distributed_job.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    return [pickle.loads((folder / f"{number}.pickle").read_bytes()) for number in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_every_process_has_the_numbers_of_one(case: str, found: list[dict[str, Any]]) -> None:
    expected = CASES[case]()
    assert [process[case] for process in found] == [expected] * PROCESSES


def test_items_are_shared_in_turn(found: list[dict[str, Any]]) -> None:
    assert [process["size"] for process in found] == [2, 2]
    assert [process["shares"] for process in found] == [[(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]] * 2
    assert [process["first"] for process in found] == [0, 0]


def test_processes_share_a_cache(folder: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = measure(cache=tmp_path / "cache.jsonl")
    assert (folder / "cache.jsonl").read_bytes() == (tmp_path / "cache.jsonl").read_bytes()
    again = measure(cache=tmp_path / "cache.jsonl")
    assert again[1] == [(7, 7)]
    assert [process["cached"] for process in found] == [[expected, again]] * PROCESSES


def test_an_error_of_one_process_reaches_all(found: list[dict[str, Any]]) -> None:
    assert {process["error"] for process in found} == {"labels must be classes below 10, got 99"}


def test_the_first_process_alone_prints_and_writes(folder: Path, found: list[dict[str, Any]]) -> None:
    (score, evaluation, bad), (silent, silent_too, as_bad) = (process["commands"] for process in found)
    assert score.out.startswith("attnlrp relevance, all tokens, 7 images")
    assert "scores0.json" in score.err.replace("\n", "")
    assert "agreement" in evaluation.out
    assert (silent, silent_too) == (Result(0, "", ""), Result(0, "", ""))
    assert bad.code == as_bad.code == 2
    written = {path.name for path in folder.iterdir()}
    assert {"scores0.json", "evaluation0.json"} <= written
    assert not {"scores1.json", "evaluation1.json"} & written
    assert not [name for name in written if name.startswith(".")]  # nothing half written


def test_commands_write_the_numbers_of_one_process(folder: Path, found: list[dict[str, Any]]) -> None:
    score, evaluate, _ = commands(folder, 9)
    run(*score)
    run(*evaluate)
    assert (folder / "scores0.json").read_bytes() == (folder / "scores9.json").read_bytes()
    shared, alone = (json.loads((folder / f"evaluation{number}.json").read_text()) for number in (0, 9))
    assert {**shared, "images_per_s": 0} == {**alone, "images_per_s": 0}


def test_one_process_needs_no_group() -> None:
    assert (rank(), world_size()) == (0, 1)
    assert from_first(lambda: 7) == 7
    with process_group():  # no torchrun, no group
        assert not dist.is_initialized()


def test_torchruns_environment_makes_a_group_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    with process_group():
        assert dist.is_initialized()
        with process_group():  # there is one
            assert list(in_order([1, 2], str)) == ["1", "2"]
        assert dist.is_initialized()
    assert not dist.is_initialized()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_torchrun_can_start_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["vitq", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("vitq_kernels.cli", run_name="__main__")
    assert "Commands:" in capsys.readouterr().out


def test_one_process_computes_item_after_item() -> None:
    started: list[int] = []

    def compute(item: int) -> int:
        started.append(item)
        return -item

    results = in_order(iter([3, 1, 2]), compute)
    assert started == []
    assert next(results) == -3
    assert started == [3]
    assert list(results) == [-1, -2]


@pytest.mark.parametrize("items", [[], ()], ids=["list", "tuple"])
def test_nothing_gives_nothing(items: list[int]) -> None:
    assert list(in_order(items, str)) == []


def test_an_error_is_the_items_own() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order([1, 0], lambda x: 1 / x))
