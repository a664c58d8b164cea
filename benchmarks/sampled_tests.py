"""A sample of the tests of our CUDA kernels, for a tool under which everything is slow.

``main`` runs in a process of its own (``cuda_sanitizer.py``). Of each test function on one row of the backend axis it
takes so many parameter sets, evenly spread, and runs the first of every function, then the second, until time is over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

REPORT = "sampled tests:"  # how the line begins that says what ran


def spread(items: Sequence[Any], each: int) -> list[list[Any]]:
    """Of each test function so many parameter sets at most, as evenly spread as whole numbers are.

    A fixed stride would miss every second epilogue of six, or all but one width of seven.
    """
    functions: dict[str, list[Any]] = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    return [
        [found[(2 * i + 1) * len(found) // (2 * each)] for i in range(each)] if len(found) > each else found
        for found in functions.values()
    ]


class Sample:
    """A pytest plugin."""

    def __init__(self, label: str, each: int, seconds: float) -> None:
        self.label, self.each, self.end = label, each, time.monotonic() + seconds
        self.chosen = 0
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leaves the sample."""
        rows = [getattr(item, "callspec", None) and item.callspec.params.get("cuda") for item in items]
        own = [item for item, row in zip(items, rows, strict=True) if row and row.label == self.label]
        chosen = spread(own, self.each)
        items[:] = [item for turn in range(self.each) for found in chosen for item in found[turn : turn + 1]]
        self.chosen = len(items)

    def pytest_runtest_protocol(self, item: Any) -> None:
        """Makes a test that begins too late the last one."""
        if time.monotonic() > self.end:
            item.session.shouldstop = "time is over"

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Counts."""
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Says what ran."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        terminalreporter.write_line(f"{REPORT} {counts} of {self.chosen}")


def main(label: str, each: int, seconds: float, files: Sequence[str]) -> int:
    """Runs the sample of the tests in ``files``; pytest's exit code."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--import-mode=importlib"]
    return int(pytest.main([*options, *files], plugins=[Sample(label, each, seconds)]))
