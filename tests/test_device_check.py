"""The stages of ``benchmarks.device_check``: kept, bounded in time, gone on with, and reported as they were."""

from __future__ import annotations

import importlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device_check, device_stages
from benchmarks.device_check import STAGES, CheckFailed, Stage, StageRun, check, code_hash, summary
from tests.conformance import EXACT_OPS
from vitq_kernels.ops import OPS

FAKES = """
import json, os, subprocess, sys, time
from benchmarks.device_check import CheckFailed, NotRun

def mark(run, name):
    with open(os.environ["FAKE_MARKS"], "a") as marks:
        marks.write(name + "\\n")

def good(run):
    mark(run, "good")
    run.keep(answer=42, rows=[{"op": "a", "us": 1.5}, {"op": "b", "us": 2.0}])

def flaky(run):
    mark(run, "flaky")
    run.keep(before="kept")
    if not os.path.exists(os.environ["FAKE_MARKS"] + ".repaired"):
        raise ValueError("a | wrong turn")

def adding(run):
    kept = json.loads((run.path.parent / "device.json").read_text())["stages"]
    rows = kept.get("adding", {}).get("data", {}).get("rows", [])
    if os.path.exists(os.environ["FAKE_MARKS"] + ".hasty"):
        os._exit(1)
    run.keep(headline="a line", plots=["adding.png"], rows=rows + [{"dry": run.dry_run}])
    raise CheckFailed("more to do")

def wrong(run):
    run.keep(differing=3)
    raise CheckFailed("3 values differ")

def absent(run):
    raise NotRun(f"no assets: {run.assets}")

def slow(run):
    run.keep(first=1)
    program = "import os, time; open(os.environ['FAKE_MARKS'] + '.pid', 'w').write(str(os.getpid())); time.sleep(60)"
    subprocess.run([sys.executable, "-c", program])

def crash(run):
    run.keep(first=1)
    os._exit(7)
"""


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which fake stages leave their names; makes ``fake_stages`` importable by their processes."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_stages.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("FAKE_MARKS", str(tmp_path / "marks"))
    monkeypatch.setattr(device_check, "query_gpu", lambda: None)
    return tmp_path / "marks"


def fakes(*names: str, limit_s: float = 60.0) -> list[Stage]:
    return [Stage(name, f"fake_stages:{name}", limit_s) for name in names]


def rows(out: Path) -> dict[str, Any]:
    return json.loads((out / "device.json").read_text())["stages"]


def test_the_table_fits_in_ten_minutes() -> None:
    names = [stage.name for stage in STAGES]
    assert names[:3] == ["environment", "ceilings", "tests"]
    assert len(set(names)) == len(names)
    assert all(stage.limit_s > 0 for stage in STAGES)
    assert sum(stage.limit_s for stage in STAGES) <= device_check.TOTAL_S < 600


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_names_a_function(stage: Stage) -> None:
    module, name = stage.function.split(":")
    assert module.startswith("benchmarks.")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_stage_runs_whatever_the_others_do(tmp_path: Path, marks: Path) -> None:
    out = tmp_path / "out"
    stages = fakes("flaky", "crash", "wrong", "absent", "good")
    assert not check(out, stages)
    found = rows(out)
    assert {name: row["status"] for name, row in found.items()} == {
        "flaky": "failed",
        "crash": "failed",
        "wrong": "failed",
        "absent": "not run",
        "good": "ok",
    }
    assert found["flaky"]["reason"] == "ValueError: a | wrong turn"
    assert found["crash"]["reason"] == "the process ended with code 7"
    assert found["wrong"]["reason"] == "3 values differ"
    assert found["absent"]["reason"] == "no assets: None"
    assert [found[name]["data"] for name in ("flaky", "crash", "wrong")] == [
        {"before": "kept"},
        {"first": 1},
        {"differing": 3},
    ]
    assert 'raise ValueError("a | wrong turn")' in (out / "log.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["device.json", "log.txt", "summary.md"]


def test_a_later_call_goes_on(tmp_path: Path, marks: Path) -> None:
    out, stages = tmp_path / "out", fakes("good", "flaky")
    assert not check(out, stages)
    first = rows(out)["good"]
    marks.with_name("marks.repaired").touch()
    assert check(out, stages)
    assert rows(out)["good"] == first
    assert rows(out)["flaky"]["status"] == "ok"
    assert marks.read_text().split() == ["good", "flaky", "flaky"]
    assert check(out, stages, chosen=["good"], overwrite=True)
    assert marks.read_text().split() == ["good", "flaky", "flaky", "good"]
    assert rows(out)["flaky"]["status"] == "ok"


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"  # Z: dead, not reaped yet


def test_a_stage_ends_at_its_limit_with_all_it_started(tmp_path: Path, marks: Path) -> None:
    out = tmp_path / "out"
    assert not check(out, fakes("slow"), total_s=4.4)
    row = rows(out)["slow"]
    assert (row["status"], row["reason"], row["data"]) == ("timeout", "killed after 4 s", {"first": 1})
    assert row["seconds"] < 20
    started_by_it = int(marks.with_name("marks.pid").read_text())
    deadline = time.monotonic() + 10
    while alive(started_by_it) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(started_by_it)


def test_the_limit_of_a_call_leaves_the_rest_to_the_next(tmp_path: Path, marks: Path) -> None:
    out, stages = tmp_path / "out", fakes("good")
    assert not check(out, stages, total_s=0.9)
    assert rows(out)["good"]["reason"] == "the 1 s of this call were used up; the same command goes on from here"
    assert not marks.exists()
    assert check(out, stages)


def test_what_a_stage_leaves_goes_to_those_after_it(tmp_path: Path, marks: Path) -> None:
    out, stages = tmp_path / "out", fakes("good", "flaky", "absent", limit_s=20)
    check(out, stages, total_s=100)
    first, second, third = (row["limit_s"] for row in rows(out).values())
    assert 55 < first <= 60  # the others count on 40
    assert 75 < second <= 80
    assert 90 < third <= 100
    check(out, stages, total_s=100)  # good and its time are out of the way
    assert 75 < rows(out)["flaky"]["limit_s"] <= 80
    assert rows(out)["good"]["limit_s"] == first
    check(out, stages, total_s=30, overwrite=True)
    assert rows(out)["good"]["limit_s"] == 20  # what it can count on, while there is any time


def test_a_stage_goes_on_from_what_it_kept(tmp_path: Path, marks: Path) -> None:
    out, stages = tmp_path / "out", fakes("good", "adding")
    for times in (1, 2):
        check(out, stages)
        assert rows(out)["adding"]["data"]["rows"] == [{"dry": False}] * times
    hasty = marks.with_name("marks.hasty")
    hasty.touch()
    check(out, stages)  # ends before it has read what there is
    assert rows(out)["adding"]["reason"] == "the process ended with code 1"
    assert rows(out)["adding"]["data"]["rows"] == [{"dry": False}] * 2
    check(out, stages, chosen=["adding"], total_s=0.5)
    assert rows(out)["adding"]["data"]["rows"] == [{"dry": False}] * 2
    hasty.unlink()
    check(out, stages, chosen=["adding"], overwrite=True)
    assert rows(out)["adding"]["data"]["rows"] == [{"dry": False}]


def test_a_dry_run_is_one_process_and_no_measurement(tmp_path: Path, marks: Path) -> None:
    out, stages = tmp_path / "out", fakes("adding", "flaky", "good", "crash", "absent")
    assert not check(out, stages, dry_run=True)
    found = rows(out)
    assert {name: row["status"] for name, row in found.items()} == {
        "adding": "failed",  # there is no device.json yet, and it reads it
        "flaky": "failed",
        "good": "ok",
        "crash": "failed",
        "absent": "failed",  # the process was gone
    }
    assert found["adding"]["reason"].startswith("FileNotFoundError")
    assert found["absent"]["reason"] == "the process ended with code 7"
    assert not check(out, stages[:1], dry_run=True)
    assert rows(out)["adding"]["data"]["rows"] == [{"dry": True}]
    assert check(out, stages, chosen=["good"], dry_run=True)
    assert marks.read_text().split() == ["flaky", "good", "good"]  # what was ok is walked again
    with pytest.raises(ValueError, match=r"on CPU, dry run, this is code \w+ on CPU: give another"):
        check(out, stages)


def test_a_dry_run_sees_no_gpu(tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "query_gpu", lambda: ("NVIDIA H200", "580.1"))
    (tmp_path / "modules" / "seeing.py").write_text(
        "import os\ndef seen(run): run.keep(visible=os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))\n"
    )
    stages = [Stage("seen", "seeing:seen", 60)]
    assert check(tmp_path / "dry", stages, dry_run=True)
    assert json.loads((tmp_path / "dry" / "device.json").read_text())["device"] == "CPU, dry run"
    assert rows(tmp_path / "dry")["seen"]["data"] == {"visible": ""}


@pytest.mark.slow
def test_every_stage_is_walked_on_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = device_check.main(["--dry-run", "--out", str(out)])
    assert code == 0, capsys.readouterr().out + (out / "log.txt").read_text()
    found = rows(out)
    assert list(found) == [stage.name for stage in STAGES]
    assert found["ceilings"]["data"]["int8_tops"] > 0
    assert {row["candidate"] for row in found["whole_models"]["data"]["rows"]} >= {"ours", "float16", "bfloat16"}
    assert {row["model"] for row in found["kernel_profiles"]["data"]["rows"]} == {"cpu", "float32"}
    counts = {row["checked"]: row for row in found["cuda_correctness"]["data"]["counts"]}
    assert set(OPS) <= set(counts)
    assert all(row["passed"] and not row["failed"] for row in counts.values())
    assert "--tool racecheck" in found["cuda_sanitizer"]["data"]["would_run"][1]
    plots = [plot for row in found.values() for plot in row["data"].get("plots", ())]
    assert {"whole_models.png", "cuda_microbenchmarks.png", "profile-cpu-1.png"} <= set(plots)
    text = (out / "summary.md").read_text()
    assert "No number on this page counts." in text
    for plot in plots:
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
        assert f"![{plot}]({plot})" in text


def test_results_of_other_code_are_not_mixed_in(tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, stages = tmp_path / "out", fakes("good")
    assert check(out, stages)
    monkeypatch.setattr(device_check, "code_hash", lambda: "0123")
    with pytest.raises(ValueError, match=r"results of code \w{16} on CPU, this is code 0123 on CPU: give another"):
        check(out, stages)
    assert check(out, stages, overwrite=True)
    assert json.loads((out / "device.json").read_text())["code"] == "0123"


def test_the_summary_says_what_ran_and_what_did_not(tmp_path: Path, marks: Path) -> None:
    out, stages = tmp_path / "out", fakes("good", "flaky", "absent")
    check(out, stages, chosen=["good", "flaky"])
    text = (out / "summary.md").read_text()
    assert text.startswith(f"# Device check: CPU\n\nCode {code_hash()}.\n")
    assert "| good | ok | " in text
    assert "| flaky | failed | " in text
    assert "| ValueError: a \\| wrong turn |" in text
    assert "| absent | not run |  | not chosen so far |" in text
    assert "\n## good\n\n| | |\n|---|---|\n| answer | 42 |\n\nrows:\n\n| op | us |\n|---|---|\n| a | 1.5 |\n" in text
    assert "\n## flaky (failed: as far as it came)\n" in text
    assert "## absent" not in text


def test_the_summary_begins_with_what_it_comes_to(tmp_path: Path, marks: Path) -> None:
    out, stages = tmp_path / "out", fakes("good", "adding")
    check(out, stages)
    text = (out / "summary.md").read_text()
    assert "\nIn short:\n\n- adding: a line\n\n## good\n" in text
    assert text.endswith("| dry |\n|---|\n| False |\n\n![adding.png](adding.png)\n")


def test_a_summary_without_stages() -> None:
    text = summary({"device": "CPU", "code": "00", "stages": {}}, [stage.name for stage in STAGES])
    assert text.count("not chosen so far") == len(STAGES)


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch, checked: Callable[..., bool]) -> int:
    monkeypatch.delenv("VITQ_ASSETS", raising=False)
    monkeypatch.setattr(device_check, "check", checked)
    return device_check.main(arguments)


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_code(ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(["--out", str(tmp_path)], monkeypatch, lambda *_, **__: ok) == (0 if ok else 1)


def test_bad_arguments_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> bool:
        raise ValueError("the folder is taken")

    out = ["--out", str(tmp_path)]
    for arguments in ([*out, "--assets", str(tmp_path / "nowhere")], [*out, "--stage", "tset"], out, []):
        with pytest.raises(SystemExit):
            run_main(arguments, monkeypatch, refuse)
    messages = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert [message.split(": error: ")[1][:22] for message in messages] == [
        "--assets must be a fol",
        "argument --stage: inva",
        "the folder is taken",
        "--out must be given, b",
    ]


def stage_run(tmp_path: Path, limit_s: float) -> StageRun:
    return StageRun(None, limit_s, tmp_path / "result.json")


def planted_suite(tmp_path: Path, source: str) -> list[str]:
    (tmp_path / "test_planted.py").write_text(source)
    return ["-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:xdist", str(tmp_path)]


def test_the_test_stage_counts(tmp_path: Path) -> None:
    run = stage_run(tmp_path, 60)
    suite = planted_suite(tmp_path, "def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    with pytest.raises(CheckFailed, match=r"pytest ended with code 1: .*1 failed, 1 passed"):
        device_stages.check_tests(run, suite)
    assert [run.data[key] for key in ("tests", "failures", "errors", "skipped")] == [2, 1, 0, 0]
    assert run.data["failed_tests"] == [{"test": "test_planted::test_b", "why": "assert 1 == 2"}]


@pytest.fixture
def ignored_interrupts() -> Iterator[None]:
    """As in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_test_stage_keeps_its_counts_when_time_is_up(tmp_path: Path, ignored_interrupts: None) -> None:
    run = stage_run(tmp_path, device_stages.SETTLE_S + 5)
    suite = planted_suite(tmp_path, "import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    start = time.monotonic()
    with pytest.raises(CheckFailed, match="the time limit interrupted pytest"):
        device_stages.check_tests(run, suite)
    assert time.monotonic() - start < 40  # it does not sleep to its end
    assert run.data["tests"] >= 1
    assert run.data["failures"] == 0


class Codes(torch.nn.Module):
    """One exact op: codes of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[-1]
        return torch.ops.vitq.quantize(x, torch.full((channels,), 20.0), torch.zeros(channels, dtype=torch.int32), 8)


def test_backends_are_compared_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitq_kernels.ops import cpu, reference

    x = torch.linspace(-4, 4, 2 * 3 * 8).view(2, 3, 8)
    (row,) = device_stages.compare_backends(Codes(), x, "cpu")
    assert row == {
        "op": "quantize",
        "calls": 1,
        "values": 48,
        "differing": 0,
        "largest_difference": 0,
        "rule": "identical",
        "as_expected": True,
    }
    monkeypatch.setattr(cpu, "quantize", lambda *args: reference.quantize(*args).bitwise_xor(1))
    (row,) = device_stages.compare_backends(Codes(), x, "cpu")
    assert (row["differing"], row["largest_difference"], row["as_expected"]) == (48, 1, False)


def test_bounded_ops_are_those_of_the_tests() -> None:
    bounded = set(device_stages.BOUNDED_OPS)
    assert bounded <= set(OPS) - EXACT_OPS
    # The others without a bound of codes have no int8 outputs.
    assert set(OPS) - EXACT_OPS - bounded == {"linear_real", "linear_residual", "linear_per_token"}


def test_end_to_end_needs_assets(tmp_path: Path) -> None:
    with pytest.raises(device_check.NotRun, match="no assets"):
        device_stages.end_to_end(stage_run(tmp_path, 60))
