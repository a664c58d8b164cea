"""The closed list of skip reasons, --require-cuda and the summary line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import emulated_cuda
from tests.conftest import BACKEND_CASES, EMULATED, SKIP_REASONS, skip_problem


@pytest.mark.parametrize("reason", SKIP_REASONS)
def test_listed_reasons_may_skip(reason: str) -> None:
    assert skip_problem(reason, require_cuda=False) is None


@pytest.mark.parametrize("reason", ["under experimentation", "no gpu", ""])
def test_other_reasons_may_not(reason: str) -> None:
    assert "does not list" in skip_problem(reason, require_cuda=False)


def test_require_cuda_forbids_what_concerns_cuda_only() -> None:
    assert skip_problem("no GPU", require_cuda=True) == "--require-cuda forbids to skip: no GPU"
    assert skip_problem("VITQ_ASSETS is not set", require_cuda=True) is None


def test_backend_rows_skip_for_listed_reasons() -> None:
    assert {case.unavailable() for case in BACKEND_CASES} - {None} <= set(SKIP_REASONS)


def planted_run(tmp_path: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest with this conftest on tests in a file of their own."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_planted.py").write_text(f"import pytest\n{tests}")
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_run_fails_its_skips_and_says_what_it_exercised(tmp_path: Path) -> None:
    tests = (
        "def test_on(backend): pass\n"
        "def test_whim(): pytest.skip('a whim')\n"
        "@pytest.mark.skip(reason='another whim')\n"
        "def test_marked(): pass\n"
    )
    if EMULATED not in os.environ and not any(
        case.unavailable() for case in BACKEND_CASES if case.label == "cuda-emulated"
    ):
        emulated_cuda.build()  # a minute or more, which is not of this run
    run = planted_run(tmp_path, tests, "--require-cuda")
    assert run.returncode == 1
    assert "does not list: a whim" in run.stdout
    assert "does not list: another whim" in run.stdout
    assert ("--require-cuda forbids to skip: no GPU" in run.stdout) != torch.cuda.is_available()
    assert "\nbackends exercised: reference, cpu" in run.stdout


def test_at_most_counts_what_k_leaves(tmp_path: Path) -> None:
    """Evenly spread, so that no value of a parameter with a short period is missed."""
    tests = (
        "@pytest.mark.parametrize('i', range(12))\n"
        "@pytest.mark.parametrize('kind', ['odd', 'even'])\n"
        "def test_many(i, kind): pass\n"
        "def test_one_even(): pass\n"
    )
    run = planted_run(tmp_path, tests, "--co", "-k", "even", "--at-most", "5")
    found = [line.split("::")[1] for line in run.stdout.splitlines() if "::" in line]
    assert found == [f"test_many[even-{i}]" for i in (1, 3, 6, 8, 10)] + ["test_one_even"]
