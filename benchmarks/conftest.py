"""Options and the ``measured`` fixture of ``bench_*.py``.

    python -m pytest benchmarks/bench_linear.py --benchmark-enable -k "DeiT-B and b8 and w4" [--record]

Without ``--benchmark-enable`` every chosen case is checked against the reference and nothing is timed. Our timers
measure (``microbench.py``); pytest-benchmark selects, shows and keeps what they found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # `pytest` as well as `python -m pytest`

from benchmarks.bench_plan import BACKENDS_ON, Planned
from benchmarks.built_case import why_wrong
from benchmarks.measured_case import Setting, WrongKernelError, measure, setting_here
from benchmarks.microbench import geometric_mean
from benchmarks.result_rows import Row, file_of, is_recorded, line_of, origin, record, rows_of
from vitq_kernels.ops.backends import BACKENDS

RESULTS = Path(__file__).parent / "results"
CPU_GOP = 8.0  # of a case, by default: seconds of a float64 reference
MEASURED = pytest.StashKey[list[Row]]()


class VirtualClock:
    """pytest-benchmark's timer: stands still but for the times that our own timer found."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


CLOCK = VirtualClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What to do with the rows."""
    group = parser.getgroup("vitq benchmarks")
    group.addoption("--record", action="store_true", help="add the rows to the device's results file")
    group.addoption("--overwrite", action="store_true", help="with --record: replace rows that are there already")
    group.addoption("--results", type=Path, default=RESULTS, help="folder of the results files")
    group.addoption("--budget-s", type=float, default=10.0, help="seconds a case on a CPU, beyond the fewest rounds")
    group.addoption("--most-gop", type=float, help=f"skip larger cases (10^9 operations); on a CPU {CPU_GOP:g}")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses options that would do nothing."""
    config.stash[MEASURED] = []
    disabled = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    if config.getoption("--record") and disabled:
        raise pytest.UsageError("--record needs --benchmark-enable: without it nothing is timed")
    if config.getoption("--overwrite") and not config.getoption("--record"):
        raise pytest.UsageError("--overwrite needs --record")
    if not config.getoption("--results").is_dir():
        raise pytest.UsageError(f"--results must be a folder, got {config.getoption('--results')}")


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    """Where it is measured."""
    return setting_here(pytestconfig.getoption("--budget-s"))


@pytest.fixture(scope="session")
def store(setting: Setting, pytestconfig: pytest.Config) -> Path | None:
    """The results file, None where nothing is recorded."""
    return pytestconfig.getoption("--results") / file_of(setting.name) if pytestconfig.getoption("--record") else None


@pytest.fixture(scope="session")
def by(setting: Setting) -> Row:
    """The origin of this run's rows."""
    return origin(setting.driver)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The backends that compute on the device that is here."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS_ON[setting_here().device])


@pytest.fixture
def measured(
    benchmark: Any, setting: Setting, by: Row, store: Path | None, pytestconfig: pytest.Config
) -> Callable[[Planned, str], None]:
    """Checks a case on a backend and, with ``--benchmark-enable``, times it beside its baselines."""

    def run(planned: Planned, backend: str) -> None:
        _skip_what_cannot_run(planned, backend, setting, pytestconfig.getoption("--most-gop"))
        if benchmark.disabled:
            why = why_wrong(planned.case.build(setting.device), backend, setting.device)
            if why:
                raise WrongKernelError(f"{planned} on {backend}: {why}")
            benchmark.pedantic(lambda: None)  # the fixture warns where it is not used
            return
        overwrite = pytestconfig.getoption("--overwrite")
        if store is not None and not overwrite and is_recorded(store, planned.model, planned.case, backend):
            pytest.skip("is recorded already (--overwrite measures it again)")
        found = measure(planned.case, backend, setting)
        rows = rows_of(planned.model, found, setting, by)
        pytestconfig.stash[MEASURED] += rows
        if store is not None:
            record(store, rows, overwrite)  # now: what is measured survives whatever comes after it
        _show(benchmark, next(iter(next(iter(found.samples.values())).values())))
        benchmark.group = str(planned)
        benchmark.extra_info.update(rows=rows, skipped_baselines=found.skipped)

    return run


def _skip_what_cannot_run(planned: Planned, backend: str, setting: Setting, most_gop: float | None) -> None:
    reason = BACKENDS[backend].why_not(planned.case.op, setting.device)
    if reason:
        pytest.skip(f"{backend} {reason}")
    limit = most_gop if most_gop is not None else CPU_GOP if setting.device == "cpu" else None
    if limit is not None and planned.gop > limit:
        pytest.skip(f"{planned.gop:.0f} x 10^9 operations, over {limit:g} (--most-gop)")


def _show(benchmark: Any, samples_us: list[float]) -> None:
    """Gives pytest-benchmark the times as if it had taken them."""
    left = iter(samples_us)

    def advance() -> None:
        CLOCK.now_s += next(left) / 1e6

    benchmark.pedantic(advance, rounds=len(samples_us))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The clock of every benchmark here."""
    for item in items:
        if "measured" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line a case and cache, then geometric means of the ratios."""
    rows = terminalreporter.config.stash.get(MEASURED, [])
    if not rows:
        return
    terminalreporter.section(f"measured on {rows[0]['gpu']}")
    case = ("op", "backend", "model", "case", "batch", "bits_w", "bits_a", "data", "cache")
    for _, group in groupby(rows, lambda row: [row[name] for name in case]):
        terminalreporter.write_line(line_of(list(group)))
    ratios: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["baseline"]:
            ratios.setdefault((row["op"], row["backend"], row["baseline"]), []).append(float(row["speedup_x"]))
    for (op, backend, baseline), values in ratios.items():
        mean = geometric_mean(values)
        terminalreporter.write_line(f"{op} {backend} over {baseline}: {mean:.3g}x, mean of {len(values)}")
