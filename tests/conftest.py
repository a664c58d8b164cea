"""The backend axis, the closed list of skip reasons, and one line that says what was exercised."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# tests/ and benchmarks/ are only in the checkout. At the end: `pytest` tests the installed vitq_kernels.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.sampled_tests import spread
from tests import emulated_cuda

# Every reason to skip, and whether --require-cuda forbids it. A test that skips for another reason fails.
SKIP_REASONS = {
    "no GPU": True,
    "cuda not built": True,
    "cuda is compiled in this process": False,
    "triton is compiled in this process": False,  # TRITON_INTERPRET holds for a process: a second run interprets
    "VITQ_ASSETS is not set": False,
    "aiohttp is not installed": False,  # a machine with a GPU that has no network; the extra `test` brings it
    "transformers is not installed": False,  # the same
}


# Triton reads the variable when a kernel is defined. Without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The emulation of the CUDA kernels, built on first use (tests/emulated_cuda.py); a path here is one already built.
EMULATED = "VITQ_CUDA_EMULATION"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")  # as in launch.py


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no GPU"


def _not_built() -> str | None:
    return _no_gpu() or (None if importlib.util.find_spec("vitq_kernels._cuda") else "cuda not built")


@dataclass(frozen=True)
class BackendCase:
    """A row of the backend axis."""

    label: str
    name: str  # as use_backend knows it
    device: str
    unavailable: Callable[[], str | None]  # a key of SKIP_REASONS, or None where it runs
    reference_floats: bool  # runs the reference's own float code on the CPU: bounded ops are bit-identical too


BACKEND_CASES = (
    BackendCase("reference", "reference", "cpu", lambda: None, reference_floats=True),
    BackendCase("cpu", "cpu", "cpu", lambda: None, reference_floats=False),
    BackendCase("cuda-emulated", "cuda", "cpu", lambda: _not_emulated(), reference_floats=False),
    BackendCase("cuda", "cuda", "cuda", lambda: _cuda(), reference_floats=False),
    BackendCase(
        "triton-interpreter",
        "triton",
        "cpu",
        lambda: None if INTERPRETED else "triton is compiled in this process",
        reference_floats=False,
    ),
    BackendCase("triton", "triton", "cuda", lambda: "no GPU" if INTERPRETED else _no_gpu(), reference_floats=False),
    BackendCase("reference-on-cuda", "reference", "cuda", _no_gpu, reference_floats=False),
)


def _usable(request: pytest.FixtureRequest) -> BackendCase:
    """The row that a test is for; skips where it cannot run."""
    case: BackendCase = request.param
    request.node.user_properties.append(("backend", case.label))
    reason = case.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return _built(case)


def _not_emulated() -> str | None:
    """A process has one module: where a GPU can have it, the emulation needs a run of its own, variable set."""
    return "cuda is compiled in this process" if EMULATED not in os.environ and _not_built() is None else None


def _cuda() -> str | None:
    return "no GPU" if EMULATED in os.environ else _not_built()


def _built(case: BackendCase) -> BackendCase:
    """The row, its emulation built if it is that."""
    if case.label == "cuda-emulated" and EMULATED not in os.environ:
        os.environ[EMULATED] = str(emulated_cuda.build())
    return case


@pytest.fixture(params=BACKEND_CASES, ids=lambda case: case.label)
def backend(request: pytest.FixtureRequest) -> BackendCase:
    """Each backend in turn."""
    return _usable(request)


@pytest.fixture(params=[case for case in BACKEND_CASES if case.name == "triton"], ids=lambda case: case.label)
def triton(request: pytest.FixtureRequest) -> BackendCase:
    """The Triton backend, interpreted or on a GPU."""
    return _usable(request)


@pytest.fixture(params=[case for case in BACKEND_CASES if case.name in ("triton", "cuda")], ids=lambda case: case.label)
def kernels(request: pytest.FixtureRequest) -> BackendCase:
    """The backends of our own kernels, each without a GPU and on one."""
    return _usable(request)


@pytest.fixture(params=[case for case in BACKEND_CASES if case.name == "cuda"], ids=lambda case: case.label)
def cuda(request: pytest.FixtureRequest) -> BackendCase:
    """The CUDA backend, emulated or on a GPU."""
    return _usable(request)


@pytest.fixture
def emulated() -> BackendCase:
    """The CUDA backend, emulated; its module is ``vitq_kernels.ops.cuda.launch.module()``."""
    reason = _not_emulated()
    if reason is not None:
        pytest.skip(reason)
    return _built(next(case for case in BACKEND_CASES if case.label == "cuda-emulated"))


@pytest.fixture
def planted(emulated: BackendCase) -> Generator[Any, None, None]:
    """The emulated module, to plant faults in: ``plant(skipped_barrier=..., ...)``; taken out again afterwards."""
    from vitq_kernels.ops.cuda.extension import module

    yield module()
    module().plant()
    module().set_seed(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the real ViT-Tiny and its images."""
    if "VITQ_ASSETS" not in os.environ:
        pytest.skip("VITQ_ASSETS is not set")
    return Path(os.environ["VITQ_ASSETS"])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-cuda", action="store_true", help="fail a test that is skipped for lack of CUDA")
    parser.addoption("--at-most", type=_positive, help="run so many parameter sets of each test, evenly spread")


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors: a second thread costs more than it gives, 3 to 5 times where the cores are shared.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Not by addopts: a -m of the command line would replace that one.
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)
def pytest_keep_a_sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``--at-most``, of what ``-k`` and ``-m`` have left."""
    if config.option.at_most is not None:
        kept = {item for chosen in spread(items, config.option.at_most) for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def skip_problem(reason: str, require_cuda: bool) -> str | None:
    """Why a skip is not allowed, or None."""
    if reason not in SKIP_REASONS:
        return f"skipped for a reason that conftest.SKIP_REASONS does not list: {reason}"
    if require_cuda and SKIP_REASONS[reason]:
        return f"--require-cuda forbids to skip: {reason}"
    return None


def _skip_reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(text).removeprefix("Skipped: ")


def _judge_skip(report: Any, config: pytest.Config) -> Any:
    if report.skipped and not hasattr(report, "wasxfail"):
        problem = skip_problem(_skip_reason(report), config.getoption("--require-cuda"))
        if problem is not None:
            report.outcome, report.longrepr = "failed", problem
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    return _judge_skip((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    return _judge_skip((yield), collector.config)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    exercised: set[str] = set()
    skipped: dict[str, str] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            for key, label in getattr(report, "user_properties", ()):
                if key == "backend" and outcome == "skipped":
                    skipped[label] = _skip_reason(report)
                elif key == "backend" and report.when == "call":
                    exercised.add(label)
    labels = [case.label for case in BACKEND_CASES]
    run = [label for label in labels if label in exercised]
    left = [f"{label} ({skipped[label]})" for label in labels if label in skipped and label not in exercised]
    if run or left:
        terminalreporter.write_line(
            f"backends exercised: {', '.join(run) or 'none'}; skipped: {', '.join(left) or 'none'}"
        )
