"""``bench_*.py`` as one starts them, on the CPU: every op at a real model's shapes, and a wrong kernel is not timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.baselines import CUBLAS_F16
from benchmarks.bench_plan import BACKENDS_ON
from benchmarks.conftest import pytest_configure
from benchmarks.kernel_cases import AttentionCase, LinearCase
from benchmarks.kernel_targets import CUBLAS, CUDNN, INT_MM, UNFUSED
from benchmarks.measured_case import Setting, WrongKernelError, measure
from benchmarks.result_rows import Row, read_rows
from tests.fake_timer import FakeTimer, off
from tests.op_cases import CASES
from vitq_kernels.ops import cpu

CHECKOUT = Path(__file__).parents[1]
BENCHES = ("benchmarks/bench_linear.py", "benchmarks/bench_attention.py", "benchmarks/bench_layernorm.py")
LAYER = LinearCase("qkv", "linear_codes", 1, 17, 24, 64, (4,))
# Patches a kernel of the process that loads it as a plugin.
WRONG_KERNEL = """
from vitq_kernels.ops import cpu
right = cpu.linear_codes
cpu.linear_codes = lambda *arguments: right(*arguments).bitwise_xor(1)
"""


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the benchmarks in a process of their own, without a GPU and on one thread."""
    # Inside a worker of pytest-xdist, which these variables tell, pytest-benchmark measures nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])  # the package that is tested here
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row], Path]:
    """What DeiT-T at batch 1 prints and records, both backends, of most ops one width."""
    folder = tmp_path_factory.mktemp("results")
    chosen = "DeiT-T and b1- and (w8-uniform or w3_4_6-gaussian or a8 or a4)"
    done = bench(
        folder, *BENCHES, "--benchmark-enable", "-k", chosen, "--record", f"--results={folder}", "--budget-s=0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.csv")
    return done.stdout, read_rows(path), folder


def test_every_op_is_measured_on_every_backend_of_a_cpu(recorded: tuple[str, list[Row], Path]) -> None:
    rows = recorded[1]
    assert {(row["op"], row["backend"]) for row in rows} == {(op, name) for op in CASES for name in BACKENDS_ON["cpu"]}
    assert {row["bits_w"] for row in rows if row["op"].startswith("linear")} == {"8", "3/4/6"}
    assert {row["cache"] for row in rows} == {"hot"}
    baselines = {row["baseline"] for row in rows if row["op"] == "linear_codes" and row["metric"] == "time"}
    assert baselines >= {CUBLAS, CUBLAS_F16, INT_MM, UNFUSED}


def test_a_run_is_shown_with_its_means(recorded: tuple[str, list[Row], Path]) -> None:
    out = recorded[0]
    assert "linear_codes cpu DeiT-T qkv w8 uniform batch 1 hot | " in out
    assert f"linear_codes cpu over {INT_MM}: " in out
    row = next(row for row in recorded[1] if row["case"] == "fc2" and row["backend"] == "cpu")
    assert f"fc2 w{row['bits_w']} {row['data']} batch 1 hot | {row['p50']} us" in out
    assert "test_linear[cpu-DeiT-T-linear_codes-qkv-b1-w8-uniform]" in out  # pytest-benchmark's table


def test_what_is_recorded_is_not_measured_again(recorded: tuple[str, list[Row], Path]) -> None:
    _, rows, folder = recorded
    words = ("--benchmark-enable", "-k", "DeiT-T and b1- and quantize- and cpu", "--record", f"--results={folder}")
    done = bench(folder, BENCHES[2], *words, "--budget-s=0")
    assert "2 skipped" in done.stdout, done.stdout
    assert read_rows(next(folder.glob("*.csv"))) == rows


def test_a_wrong_kernel_ends_its_benchmark_and_leaves_no_row(tmp_path: Path) -> None:
    (tmp_path / "wrong_kernel.py").write_text(WRONG_KERNEL)
    chosen = "cpu- and DeiT-T and b1- and w8-uniform and (linear_codes or linear_residual-proj)"
    words = ("-p", "wrong_kernel", BENCHES[0], "--benchmark-enable", "-k", chosen, "--record", f"--results={tmp_path}")
    done = bench(tmp_path, *words, "--budget-s=0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "linear_codes qkv on cpu is not timed, its numbers are wrong: AssertionError: " in done.stdout
    assert {row["op"] for row in read_rows(next(tmp_path.glob("*.csv")))} == {"linear_residual"}


def test_without_timing_kernels_are_checked_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "wrong_kernel.py").write_text(WRONG_KERNEL)
    chosen = "cpu- and DeiT-T and b1- and w8-uniform and (linear_codes or linear_residual-proj)"
    done = bench(tmp_path, "-p", "wrong_kernel", BENCHES[0], "-k", chosen)
    assert (done.returncode, "1 failed, 1 passed" in done.stdout) == (1, True), done.stdout + done.stderr
    assert "WrongKernelError: DeiT-T-linear_codes-qkv-b1-w8-uniform on cpu: " in done.stdout


DEFAULTS = {"--record": False, "--overwrite": False, "--results": CHECKOUT, "benchmark_enable": False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--record": True}, "--record needs --benchmark-enable: without it nothing is timed"),
        ({"--overwrite": True}, "--overwrite needs --record"),
        ({"--results": Path("/nowhere")}, "--results must be a folder, got /nowhere"),
    ],
    ids=["record", "overwrite", "results"],
)
def test_options_that_would_do_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    options = {**DEFAULTS, "benchmark_disable": True, **given}  # as pyproject.toml has it
    config = SimpleNamespace(stash=pytest.Stash(), getoption=options.__getitem__)
    with pytest.raises(pytest.UsageError, match=f"^{message}$"):
        pytest_configure(config)
    options |= {**DEFAULTS, "--record": True, "--overwrite": True, "benchmark_enable": True}
    pytest_configure(config)


def setting(timer: FakeTimer, caches: Sequence[str] = ("cold", "hot")) -> Setting:
    return Setting("cpu", "a CPU", timer, None, 1000, tuple(caches))


@pytest.mark.parametrize("op", ["linear_codes", "attention"])
def test_a_wrong_kernel_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Any = LAYER if op == "linear_codes" else AttentionCase(2, 9, 2, 8)
    right: Callable[..., torch.Tensor] = getattr(cpu, op)
    monkeypatch.setattr(cpu, op, lambda *arguments: off(right(*arguments)))
    timer = FakeTimer()
    with pytest.raises(WrongKernelError, match=rf"^{op} .* on cpu is not timed, its numbers are wrong: AssertionError"):
        measure(case, "cpu", setting(timer))
    assert timer.called == []


def test_a_right_kernel_is_timed_beside_its_baselines() -> None:
    timer = FakeTimer()
    found = measure(LAYER, "cpu", setting(timer))
    names = ["cpu", CUBLAS, CUBLAS_F16, INT_MM, UNFUSED]
    assert {cache: list(samples) for cache, samples in found.samples.items()} == {"cold": names, "hot": names}
    assert [samples[0] for samples in found.samples["cold"].values()] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert timer.called[5:] == [1] * 5
    assert min(timer.called[:5]) >= 2  # buffers rotate


def test_a_baseline_that_cannot_run_is_named_once() -> None:
    found = measure(AttentionCase(2, 9, 2, 8), "cpu", setting(FakeTimer()))
    assert list(found.skipped) == [CUDNN, "SDPA efficient fp16"]
    assert all("cpu" in samples and CUDNN not in samples for samples in found.samples.values())


def test_a_kernel_that_cannot_be_timed_is_an_error() -> None:
    class Timer(FakeTimer):
        def prepare(self, calls: Sequence[Callable[[], object]]) -> Sequence[Callable[[], object]]:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        measure(LAYER, "cpu", setting(Timer()))
