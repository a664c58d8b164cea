"""``benchmarks.compare`` names what got slower, and what it cannot compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.compare import compare, main
from benchmarks.kernel_cases import LinearCase
from benchmarks.measured_case import Measured
from benchmarks.result_rows import Row, rows_of, write_rows
from tests.result_examples import ORIGIN, SETTING


def rows(us: float = 10.0, baseline_us: float = 20.0, **origin: str) -> list[Row]:
    """Two layers, cold and hot, each beside two baselines: four measurements of ours."""
    found = []
    for name, factor in (("qkv", 3), ("fc1", 4)):
        case = LinearCase(name, "linear_codes", 8, 1576, factor * 768, 768, (4,))
        samples = {
            cache: {"triton": [0.99 * us, us, 1.01 * us], "bf16 F.linear": [baseline_us], "other": [2 * baseline_us]}
            for cache in ("cold", "hot")
        }
        found += rows_of("DeiT-B", Measured(case, "triton", samples), SETTING, {**ORIGIN, **origin})
    return found


def slowed(given: list[Row], factor: float, **wanted: str) -> list[Row]:
    """The rows with the times of some multiplied."""
    names = ("p50", "p20", "p80", "p95")
    return [
        {**row, **{n: f"{float(row[n]) * factor:.4g}" for n in names}, "speedup_x": _ratio(row, factor)}
        if wanted.items() <= row.items()
        else row
        for row in given
    ]


def _ratio(row: Row, factor: float) -> str:
    return f"{float(row['speedup_x']) / factor:.4g}" if row["speedup_x"] else ""


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Writes two files and compares them: exit code and output."""

    def run(old: list[Row], new: list[Row], *words: str) -> tuple[int, str]:
        for name, given in (("old", old), ("new", new)):
            write_rows(tmp_path / f"{name}.csv", given)
        try:
            code = main([str(tmp_path / "old.csv"), str(tmp_path / "new.csv"), *words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_the_same_is_not_slower(run: Run) -> None:
    code, out = run(rows(), rows())
    assert (code, out.splitlines()[-1]) == (
        0,
        "4 compared, on average 1x: 0 worse, 0 better beyond 1.05x, 0 missing, 0 new",
    )
    assert "baselines took 1x their old time" in out


def test_a_planted_slowdown_is_named_once(run: Run) -> None:
    new = slowed(rows(), 1.2, metric="time", case="fc1", cache="cold")
    code, out = run(rows(), new)
    assert code == 1
    worse = [line for line in out.splitlines() if line.startswith("slower")]
    assert worse == ["slower or larger: linear_codes triton DeiT-B fc1 w4a8 uniform batch 8 cold: 10 -> 12 us, 1.2x"]
    assert "4 compared, on average 1.05x: 1 worse, 0 better" in out


@pytest.mark.parametrize(
    ("factor", "threshold", "code"),
    [(1.04, "1.05", 0), (1.06, "1.05", 1), (1.06, "1.1", 0), (1.004, "1.001", 1), (0.5, "1.05", 0)],
    ids=["below 1.05", "above 1.05", "below a wider one", "above a narrower one", "faster"],
)
def test_the_threshold_decides(factor: float, threshold: str, code: int, run: Run) -> None:
    assert run(rows(), slowed(rows(), factor, metric="time", case="qkv"), "--threshold", threshold)[0] == code


def test_the_worst_comes_first_and_better_is_told(run: Run) -> None:
    new = slowed(rows(), 1.5, metric="time", case="qkv", cache="hot")
    new = slowed(new, 3.0, metric="time", case="fc1", cache="hot")
    lines = run(rows(), slowed(new, 0.5, metric="time", case="fc1", cache="cold"))[1].splitlines()
    assert "fc1 w4a8 uniform batch 8 hot: 10 -> 30 us, 3x" in lines[0]
    assert "qkv w4a8 uniform batch 8 hot: 10 -> 15 us, 1.5x" in lines[1]
    assert lines[2] == "better: linear_codes triton DeiT-B fc1 w4a8 uniform batch 8 cold: 10 -> 5 us, 0.5x"


def test_a_slowdown_inside_the_spread_says_so() -> None:
    noisy = [{**row, "p80": "30", "p95": "30"} if row["metric"] == "time" else row for row in rows()]
    changes = compare(noisy, slowed(rows(), 1.2, metric="time")).changes
    assert all(str(change).endswith("1.2x, within the spread of both runs") for change in changes)
    sharp = compare(rows(), slowed(rows(), 1.2, metric="time")).changes
    assert all(str(change).endswith("1.2x") for change in sharp)


def test_missing_measurements_are_named_and_fail(run: Run) -> None:
    new = [row for row in rows() if row["case"] != "fc1"]
    code, out = run(rows(), new)
    assert code == 1
    assert out.count("not measured any more: linear_codes triton DeiT-B fc1 w4a8 uniform batch 8 ") == 2
    assert run(rows(), new, "--allow-missing")[0] == 0
    code, out = run(new, rows())
    assert (code, "0 missing, 2 new" in out) == (0, True)


def test_a_missing_baseline_is_not_a_missing_measurement(run: Run) -> None:
    new = [row for row in rows() if row["baseline"] != "other"]
    assert run(rows(), new)[0] == 0


def test_slower_baselines_are_told_and_do_not_fail(run: Run) -> None:
    code, out = run(rows(), rows(baseline_us=30.0))
    assert (code, "baselines took 1.5x their old time" in out) == (0, True)


def test_a_larger_memory_is_worse(run: Run) -> None:
    def memory(size: str) -> list[Row]:
        numbers = dict.fromkeys(("p50", "p20", "p80", "p95"), size)
        bare = {"metric": "memory", "unit": "bytes", "baseline": "", "baseline_p50": "", "speedup_x": ""}
        return [*rows(), {**rows()[0], **numbers, **bare}]

    code, out = run(memory("1000"), memory("2000"))
    assert (code, "batch 8 cold memory: 1000 -> 2000 bytes, 2x" in out) == (1, True)


def test_rates_are_not_judged_twice(run: Run) -> None:
    assert run(rows(), slowed(rows(), 0.1, metric="rate"))[0] == 0


def test_another_gpu_is_refused(run: Run) -> None:
    other = [{**row, "gpu": "NVIDIA A100"} for row in rows()]
    code, out = run(rows(), other)
    assert (code, "must be of the same device, got NVIDIA H200 and NVIDIA A100" in out) == (2, True)
    assert run(rows(), [*rows(), *other])[0] == 2


def test_other_versions_are_noted(run: Run) -> None:
    code, out = run(rows(), rows(torch="2.12.0", driver="590"))
    assert code == 0
    assert "note: driver was 580.1, is 590\nnote: torch was 2.11.0, is 2.12.0\n" in out


def test_nothing_to_compare_is_an_error(run: Run) -> None:
    rates = [row for row in rows() if row["metric"] == "rate"]
    assert run(rates, rates)[0] == 2
    assert run([], [])[0] == 2


@pytest.mark.parametrize("words", [("--threshold", "0.9"), ("--threshold", "nan"), ("--threshold", "inf")])
def test_a_senseless_threshold_is_refused(words: tuple[str, str], run: Run) -> None:
    code, out = run(rows(), rows(), *words)
    assert (code, "--threshold must be a ratio of at least 1, got" in out) == (2, True)


def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    for path, message in ((tmp_path / "a.csv", "columns must be"), (tmp_path / "b.csv", "No such file")):
        with pytest.raises(SystemExit, match="2"):
            main([str(path), str(path)])
        assert message in capsys.readouterr().err
