"""The form of committed results, and that a row is added, kept or replaced only as asked."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.kernel_cases import LinearCase
from benchmarks.measured_case import Measured
from benchmarks.result_rows import (
    COLUMNS,
    Row,
    file_of,
    is_recorded,
    key_of,
    line_of,
    read_rows,
    record,
    rows_of,
    write_rows,
)
from benchmarks.row_cases import RowCase
from tests.result_examples import ORIGIN, SETTING

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CASE = LinearCase("qkv", "linear_codes", 8, 1576, 2304, 768, (6, 3, 4), "gaussian")
SAMPLES = {"cold": {"triton": [9.0, 10.0, 11.0, 10.0], "bf16 F.linear": [20.0, 25.0, 15.0, 20.0]}}
SAMPLES["hot"] = {"triton": [8.0] * 4, "bf16 F.linear": [16.0] * 4}


def rows() -> list[Row]:
    return rows_of("DeiT-B", Measured(CASE, "triton", SAMPLES), SETTING, ORIGIN)


def results_in_this_form() -> list[Path]:
    """Committed files whose header starts as ours does."""
    with_header = {path: path.read_text(encoding="utf-8").partition("\n")[0] for path in RESULTS.glob("*.csv")}
    return [path for path, header in with_header.items() if header.startswith("op,backend,")]


def test_every_committed_results_file_is_in_form() -> None:
    """Empty so far: no GPU has run the kernels."""
    for path in results_in_this_form():
        found = read_rows(path)
        assert {file_of(row["gpu"]) for row in found} == {path.name}
        assert all("with changes" not in row["git_sha"] for row in found), "measure a commit"


def test_a_case_becomes_rows() -> None:
    found = rows()
    assert [(r["metric"], r["unit"], r["cache"], r["baseline"]) for r in found] == [
        ("time", "us", "cold", "bf16 F.linear"),
        ("rate", "TOPS", "cold", ""),
        ("rate", "GB/s", "cold", ""),
        ("time", "us", "hot", "bf16 F.linear"),
        ("rate", "TOPS", "hot", ""),
        ("rate", "GB/s", "hot", ""),
    ]
    cold, tops, gbps = found[:3]
    numbers = [cold[name] for name in ("p50", "p20", "p80", "p95", "baseline_p50", "speedup_x")]
    assert numbers == ["10", "10", "10", "11", "20", "2"]
    assert float(tops["p50"]) == pytest.approx(2 * 1576 * 2304 * 768 / 10e-6 / 1e12, rel=1e-3)
    # Of 128 rows those of 6, 3 and 4 bits in turn, of the next 128 of 3 and 4.
    moved = 1576 * 768 + 2304 * 768 * ((6 + 3 + 4) / 3 + 3.5) / 2 / 8 + 1576 * 2304
    assert float(gbps["p50"]) == pytest.approx(moved / 10e-6 / 1e9, rel=1e-2)
    assert float(cold["pct_roofline"]) == pytest.approx(100 * 2 * 1576 * 2304 * 768 / 1979e12 / 10e-6, rel=1e-3)
    what = {"model": "DeiT-B", "M": "1576", "N": "2304", "K": "768", "B": "", "bits_w": "3/4/6", "bits_a": "8"}
    assert what.items() <= cold.items()
    assert ORIGIN.items() <= cold.items()


def test_a_case_without_baseline_and_roofline_has_rows_too() -> None:
    case = RowCase("layernorm", 1, 197, 192, "gaussian", 4)
    found = rows_of("DeiT-T", Measured(case, "cpu", {"hot": {"cpu": [3.0, 2.0]}}), SETTING, ORIGIN)
    assert [(r["metric"], r["unit"], r["baseline"], r["speedup_x"]) for r in found] == [
        ("time", "us", "", ""),
        ("rate", "GB/s", "", ""),
    ]
    assert (found[0]["pct_roofline"], found[0]["bits_a"]) == ("", "4")  # hot bytes have no roofline


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", rows())
    assert read_rows(tmp_path / "a.csv") == rows()
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p50": "nan"}, r"line 2: p50 is 'nan'"),
        ({"p50": "0"}, r"line 2: p50 is '0'"),
        ({"p20": ""}, r"line 2: p20 is ''"),
        ({"speedup_x": "-2"}, r"line 2: speedup_x is '-2'"),
        ({"p20": "11"}, r"p20, p50, p80 and p95 are not in order: \[11.0, 10.0, 10.0, 11.0\]"),
        ({"speedup_x": "3"}, r"speedup_x is 3, the times say 2"),
        ({"baseline": ""}, r"baseline, baseline_p50 and speedup_x go together"),
        ({"metric": "energy"}, r"metric is 'energy'"),
        ({"p95": "9"}, r"not in order: \[10.0, 10.0, 10.0, 9.0\]"),
        ({"unit": "TOPS"}, r"unit is 'TOPS'"),
        ({"backend": "cublas"}, r"backend is 'cublas'"),
        ({"cache": "warm"}, r"cache is 'warm'"),
        ({"gpu": ""}, r"gpu is ''"),
        ({"git_sha": ""}, r"git_sha is ''"),
        ({"semantics_version": "one"}, r"semantics_version is 'one'"),
        ({"pct_roofline": "all"}, r"pct_roofline is 'all'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_malformed_row_is_named(change: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "a.csv", [{**rows()[0], **change}])


def test_a_rate_that_rises_with_its_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in order"):
        write_rows(tmp_path / "a.csv", [{**rows()[1], "p20": "1", "p50": "2", "p80": "3"}])


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for text, message in (
        ("op,us\nlinear,3\n", r"columns must be op,backend,.*, got op,us"),
        ("", "columns must be"),
        (",".join(COLUMNS) + "\nlinear_codes,triton\n", r"line 2: must have \d+ columns"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(path)


def test_two_rows_of_one_measurement_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 3: measures the same as line 2"):
        write_rows(tmp_path / "a.csv", [rows()[0], {**rows()[0], "timestamp": "later"}])


def test_rows_are_added_and_never_silently_replaced(tmp_path: Path) -> None:
    path, (first, *others) = tmp_path / "a.csv", rows()
    record(path, [first], overwrite=False)
    record(path, others, overwrite=False)
    assert read_rows(path) == rows()
    faster = {**first, "p50": "5", "p20": "5", "p80": "5", "p95": "5", "speedup_x": "4"}
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"has 1 of these rows already, give --overwrite .*: linear_codes triton time"):
        record(path, [faster], overwrite=False)
    assert path.read_bytes() == before
    record(path, [faster], overwrite=True)
    assert read_rows(path) == [faster, *others]


def test_a_bad_row_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    record(path, rows()[:1], overwrite=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="p50 is 'inf'"):
        record(path, [{**rows()[1], "p50": "inf"}], overwrite=False)
    assert path.read_bytes() == before


def test_another_gpu_or_cache_is_another_measurement() -> None:
    row = rows()[0]
    assert key_of(row) == key_of({**row, "p50": "1", "torch": "2.12", "git_sha": "fff"})
    assert all(key_of(row) != key_of({**row, name: "x"}) for name in ("gpu", "cache", "data", "bits_w", "backend", "M"))


def test_recorded_cases_are_known(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert not is_recorded(path, "DeiT-B", CASE, "triton")
    record(path, rows(), overwrite=False)
    assert is_recorded(path, "DeiT-B", CASE, "triton")
    assert not is_recorded(path, "DeiT-B", CASE, "cuda")
    assert not is_recorded(path, "DeiT-S", CASE, "triton")
    uniform = LinearCase("qkv", "linear_codes", 8, 1576, 2304, 768, (6, 3, 4))
    assert not is_recorded(path, "DeiT-B", uniform, "triton")


def test_a_file_is_named_by_its_device() -> None:
    assert file_of("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.csv"
    assert file_of("AMD EPYC 9R14, 2 threads") == "AMD_EPYC_9R14_2_threads.csv"


def test_a_line_for_a_reader() -> None:
    line = line_of(rows()[:3])
    assert line.startswith("linear_codes triton DeiT-B qkv w3/4/6 gaussian batch 8 cold | 10 us | 557.7 TOPS | ")
    assert line.endswith(" GB/s | 2x bf16 F.linear | 28.18% of the roofline")


def test_the_file_is_plain_csv(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", rows())
    with (tmp_path / "a.csv").open(newline="") as handle:
        assert len(list(csv.reader(handle))) == 1 + len(rows())
