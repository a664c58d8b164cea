"""README shows what the committed results say, and no time of a GPU before there is one."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.bench_model import rows_of as model_rows
from benchmarks.compiled_tables import text as compiled
from benchmarks.digits_swin import RESULT as DIGITS_SWIN
from benchmarks.kernel_cases import AttentionCase, LinearCase
from benchmarks.measured_case import Measured
from benchmarks.readme_tables import README, RESULTS, tables, with_tables
from benchmarks.result_rows import Row, file_of, read_rows, rows_of, write_rows
from benchmarks.row_cases import RowCase
from benchmarks.speed_tables import is_gpu, measured
from tests.result_examples import GPU, MODELS_FOUND, ORIGIN, SETTING

NO_GPU = "No GPU has run these kernels yet"
CPU = "AMD EPYC, 2 threads"


def test_readme_shows_the_committed_rows() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text, tables()) == text, "run python -m benchmarks.readme_tables"


def test_readme_says_whether_a_gpu_has_run() -> None:
    """The sentence goes when the first GPU's file comes, and not before."""
    of_a_gpu = any(is_gpu(rows) for rows in measured(RESULTS).values())
    assert (NO_GPU in README.read_text(encoding="utf-8")) == (not of_a_gpu)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the committed results without those of a device."""
    for path in RESULTS.glob("*.csv"):
        with path.open() as handle:
            if not handle.readline().startswith("op,backend,"):
                shutil.copy(path, tmp_path)
    shutil.copy(DIGITS_SWIN, tmp_path)
    return tmp_path


def kernel_rows() -> list[Row]:
    def samples(us: float, *others: float) -> dict[str, dict[str, list[float]]]:
        names = dict(zip(("bf16 F.linear", "torch._int_mm alone"), others, strict=False))
        return {cache: {"triton": [us], **{n: [t] for n, t in names.items()}} for cache in ("cold", "hot")}

    cases = {
        LinearCase("qkv", "linear_codes", 64, 12608, 2304, 768, (4,)): samples(38.0, 80.0, 50.0),
        LinearCase("qkv", "linear_codes", 8, 1576, 2304, 768, (4,)): samples(20.0, 10.0),
        LinearCase("qkv", "linear_codes", 8, 1576, 2304, 768, (5,)): samples(1.0, 10.0),
        LinearCase("qkv", "linear_codes", 8, 1576, 2304, 768, (4,), "gaussian"): samples(2.0, 10.0),
        AttentionCase(8, 197, 12, 64): samples(30.0),
        RowCase("layernorm", 8, 1576, 768, "gaussian"): samples(3.0, 6.0),
    }
    return [
        row
        for case, found in cases.items()
        for row in rows_of("DeiT-B", Measured(case, "triton", found), SETTING, ORIGIN)
    ]


def of_models(device: str, driver: str) -> list[Row]:
    return model_rows("ViT-B", MODELS_FOUND, (8, 8), device, {**ORIGIN, "driver": driver})


def speed(results: Path, *devices: list[Row]) -> str:
    for rows in devices:
        write_rows(results / file_of(rows[0]["gpu"]), rows)
    return tables(results)["speed"]


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_a_gpu_the_evidence_is_shown(results: Path) -> None:
    text = speed(results)
    assert NO_GPU in text
    assert " us" not in text
    assert " ms" not in text
    rows = list(csv.DictReader((RESULTS / "triton_resources.csv").open()))
    of_90 = [row for row in rows if row["cc"] == "90"]
    most = max(int(row["registers"]) for row in of_90)
    assert cells(text, "Triton | sm_90 ") == ["Triton", "sm_90", "wgmma", str(len(of_90)), "0", str(most)]
    loops = list(csv.DictReader((RESULTS / "cuda_cost_model.csv").open()))
    loop = next(r for r in loops if (r["arch"], r["tile"], r["bits"], r["operands"]) == ("sm_80", "128x128", "3", "s8"))
    assert cells(text, "3 |")[1:3] == [f"shared {float(loop['next_pct']):.0f} %", loop["unpack_per_weight"]]
    assert [line.split()[1] for line in text.splitlines() if line.startswith(("| 8 ", "| 2 "))] == ["8", "2"]


@pytest.mark.parametrize(
    ("name", "column", "start"),
    [("cuda_resources.csv", "local_bytes", "CUDA | sm_80 "), ("triton_resources.csv", "spills", "Triton | sm_80 ")],
    ids=["cuda", "triton"],
)
def test_a_kernel_that_spills_shows(name: str, column: str, start: str, results: Path) -> None:
    rows = list(csv.DictReader((results / name).open()))
    next(row for row in rows if "80" in (row.get("cc"), row.get("arch", "")[3:]))[column] = "8"
    with (results / name).open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert cells(compiled(results), start)[4] == "1"


def test_a_gpu_is_named_and_ends_the_excuse(results: Path) -> None:
    text = speed(results, [*of_models(GPU, "580.1"), *kernel_rows()])
    assert NO_GPU not in text
    assert text.startswith("On one NVIDIA H200, torch 2.11.0, driver 580.1, abc1234:\n")


def test_a_cpu_alone_keeps_the_evidence(results: Path) -> None:
    text = speed(results, of_models(CPU, ""))
    assert text.startswith(f"On {CPU}, torch 2.11.0, abc1234:\n")
    assert NO_GPU in text


def test_gpus_come_first(results: Path) -> None:
    text = speed(results, of_models(CPU, ""), of_models(GPU, "580.1"))
    assert text.index("On one NVIDIA H200") < text.index(f"On {CPU}")


def test_whole_models_are_shown_with_every_baseline(results: Path) -> None:
    text = speed(results, of_models(GPU, "580.1"))
    captured = cells(text, "ViT-B W8A8, ours-captured (cuda) | 8 ")
    assert captured[1:] == ["8", "1.00", "1.00", "8,000", "4.00x"]
    eager = cells(text, "ViT-B W8A8, ours (cuda) | 8 ")
    assert eager[1:] == ["8", "2.00", "3.00", "4,000", "2.00x"]
    assert cells(text, "ViT-B W8A8, ours (cuda) | 1 ")[-1] == "-"
    assert "| over float16 |" in text


def test_kernels_are_shown_beside_their_fastest_baseline(results: Path) -> None:
    text = speed(results, kernel_rows())
    large = cells(text, "linear_codes qkv, W4A8 (triton) | 64 ")
    assert (large[2], large[4]) == ("38.0", "1.32x torch._int_mm alone")
    slower = cells(text, "linear_codes qkv, W4A8 (triton) | 8 ")
    assert slower[4] == "0.50x bf16 F.linear"  # shown all the same
    assert cells(text, "attention S=197, 8 bits (triton)")[4] == "-"
    assert cells(text, "layernorm K=768, 8 bits (triton)")[4] == "2.00x bf16 F.linear"
    assert "W5A8" not in text
    pct = next(r["pct_roofline"] for r in kernel_rows() if r["batch"] == "64" and r["cache"] == "cold")
    assert large[3] == f"{float(pct):.0f} %"


def test_every_committed_device_is_in_readme() -> None:
    text = README.read_text(encoding="utf-8")
    for path in RESULTS.glob("*.csv"):
        if path.read_text(encoding="utf-8").startswith("op,backend,"):
            assert read_rows(path)[0]["gpu"] in text


BOTH = "<!-- table:speed -->\nold\n<!-- /table:speed -->\n"


def test_parts_are_replaced_between_their_markers() -> None:
    assert with_tables(f"a\n{BOTH}b\n", {"speed": "new\n"}) == f"a\n{BOTH}b\n".replace("old", "new")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("<!-- table:speed -->\n", ""),
        lambda text: text.replace("<!-- /table:speed -->", ""),
        lambda text: text + text,
        lambda text: "<!-- /table:speed -->\n<!-- table:speed -->\n",
    ],
    ids=["no start", "no end", "twice", "backwards"],
)
def test_a_readme_without_markers_is_refused(change: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="README must have <!-- table:speed --> and then <!-- /table:speed -->"):
        with_tables(change(BOTH), {"speed": "new\n"})
