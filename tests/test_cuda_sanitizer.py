"""The sanitizer stage of ``benchmarks.device_check``, with a program in compute-sanitizer's place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import cuda_sanitizer
from benchmarks.cuda_sanitizer import RESERVE_S, TESTS, sanitize, verdict
from benchmarks.device_check import ROOT, CheckFailed, NotRun, StageRun
from tests.conftest import BackendCase

FAKE = """#!{python}
import os, subprocess, sys
tool, command = sys.argv[sys.argv.index("--tool") + 1], sys.argv[sys.argv.index({python!r}):]
print("========= COMPUTE-SANITIZER", flush=True)
subprocess.run(command)
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print("========= " + {summaries}[tool])
"""
CLEAN = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}
# The backend axis is what the sample looks at.
CONFTEST = """
import types, pytest
rows = [types.SimpleNamespace(label=label) for label in ("emulated", "gpu")]
@pytest.fixture(params=rows, ids=lambda row: row.label)
def cuda(request): return request.param
"""
PLANTED = """
import pytest
@pytest.mark.parametrize("i", range(10))
def test_a(cuda, i): assert cuda.label == "gpu"
@pytest.mark.parametrize("i", range(3))
def test_b(cuda, i): assert i < {good}
def test_c(): assert False
"""


def stage_run(tmp_path: Path, limit_s: float = 600) -> StageRun:
    return StageRun(None, limit_s, tmp_path / "result.json")


def fake_tool(tmp_path: Path, summaries: dict[str, str]) -> str:
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE.format(python=sys.executable, summaries=summaries))
    program.chmod(0o755)
    return str(program)


def planted_tests(tmp_path: Path, good: int = 3) -> list[str]:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_planted.py").write_text(PLANTED.format(good=good))
    return [str(tmp_path / "test_planted.py")]


def test_a_sample_runs_under_each_tool(tmp_path: Path) -> None:
    run, program = stage_run(tmp_path), fake_tool(tmp_path, CLEAN)
    sanitize(run, program, "gpu", 2, planted_tests(tmp_path))
    assert run.data["sanitizer"] == program
    rows = [{key: row[key] for key in row if key != "seconds"} for row in run.data["tools"]]
    assert rows == [
        {
            "tool": tool,
            "summary": CLEAN[tool].split(": ")[1],
            "tests": 4,
            "passed": 4,
            "first_finding": "",
            "problem": "",
        }
        for tool in ("memcheck", "racecheck")
    ]


def test_findings_and_failed_tests_are_named(tmp_path: Path) -> None:
    found = "Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 3 errors"
    run, program = stage_run(tmp_path), fake_tool(tmp_path, CLEAN | {"memcheck": found})
    reason = "memcheck: 3 errors: Invalid __global__ read of size 16 bytes; racecheck: 1 tests failed, 0 were skipped"
    with pytest.raises(CheckFailed, match=f"^{reason}$"):
        sanitize(run, program, "gpu", 2, planted_tests(tmp_path, good=2))


def test_time_that_runs_out_leaves_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sanitizer, "END_S", 1000.0)
    run, program = stage_run(tmp_path), fake_tool(tmp_path, CLEAN)
    with pytest.raises(CheckFailed, match=r"^memcheck: time ran out after 1 of 4 tests; racecheck: time ran out"):
        sanitize(run, program, "gpu", 2, planted_tests(tmp_path))


def test_a_tool_that_hangs_does_not_take_the_time_of_the_next(tmp_path: Path) -> None:
    run, program = stage_run(tmp_path, RESERVE_S + 5), fake_tool(tmp_path, CLEAN)
    tests = planted_tests(tmp_path)
    Path(tests[0]).write_text("import time\ntime.sleep(30)\n")
    with pytest.raises(CheckFailed, match=r"^memcheck: did not come to its end: =+ COMPUTE-SANITIZER; racecheck: did"):
        sanitize(run, program, "gpu", 2, tests)
    assert [row["seconds"] for row in run.data["tools"]] == [pytest.approx(2.5, abs=1)] * 2


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("", "did not come to its end: no output"),
        ("========= COMPUTE-SANITIZER\n========= Error: no device\n", "did not come to its end: Error: no device"),
        ("sampled tests: 1 passed, 0 failed, 0 skipped of 1\nSegmentation fault", "did not come to its end: Segmenta"),
        (
            (
                "========= Error: Race reported between Write access at a and Read access at b\n"
                "sampled tests: 1 passed, 0 failed, 0 skipped of 1\n"
                "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
            ),
            "1 hazard displayed (1 error, 0 warnings): Error: Race reported between Write access at a and Read",
        ),
        (
            "sampled tests: 0 passed, 0 failed, 0 skipped of 0\n========= ERROR SUMMARY: 0 errors\n",
            "time ran out after 0 of 0",
        ),
    ],
    ids=["nothing", "no device", "crash", "race", "no tests"],
)
def test_verdict(output: str, problem: str) -> None:
    assert verdict(output)["problem"].startswith(problem)


def test_the_real_tests_are_sampled(emulated: BackendCase, tmp_path: Path) -> None:
    files = [str(ROOT / "tests" / name) for name in TESTS]
    assert all(Path(name).exists() for name in files)
    run = stage_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_sanitizer, "TOOLS", ("memcheck",))
        sanitize(run, fake_tool(tmp_path, CLEAN), emulated.label, 1, files)
    assert run.data["tools"][0]["passed"] >= 10


def test_without_the_tool_the_stage_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sanitizer, "need_cuda_backend", lambda run: None)
    monkeypatch.setattr(cuda_sanitizer, "CUDA_BIN", str(tmp_path / "bin"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotRun, match=rf"^no compute-sanitizer in PATH or {tmp_path / 'bin'}$"):
        cuda_sanitizer.cuda_sanitizer(stage_run(tmp_path))
