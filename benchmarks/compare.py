"""Holds a results file against an older one of the same device and names what got slower.

    python -m benchmarks.compare OLD.csv NEW.csv [--threshold 1.05] [--allow-missing]

Times and peak memory are compared, measurement by measurement; baselines are not ours to judge, but tell whether the
machine itself changed. Exit code 0: nothing got worse; 1: something did, or was measured in OLD and is not in NEW; 2:
the files do not compare.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.microbench import geometric_mean
from benchmarks.result_rows import KEY, Row, read_rows

THRESHOLD = 1.05  # of the old number; medians of 20 rounds repeat within 2 or 3 %
JUDGED = ("time", "memory")  # a rate is its time once more
CONDITIONS = ("driver", "torch", "triton", "cuda", "semantics_version")
Measurement = tuple[str, ...]  # a row's key without the baseline: the same number stands beside each of them


@dataclass(frozen=True)
class Change:
    """A measurement that both files have."""

    what: str
    unit: str
    old: float
    new: float
    apart: bool  # from p20 to p80 the two runs do not overlap

    @property
    def ratio(self) -> float:
        """New over old: above 1 is worse."""
        return self.new / self.old

    def __str__(self) -> str:
        overlap = "" if self.apart else ", within the spread of both runs"
        return f"{self.what}: {self.old:g} -> {self.new:g} {self.unit}, {self.ratio:.3g}x{overlap}"


@dataclass(frozen=True)
class Comparison:
    """What became of the measurements of the older file."""

    changes: list[Change]  # largest ratio first
    missing: list[str]
    added: int
    baselines_x: float | None  # geometric mean of the baselines' new over old times
    conditions: list[str]  # what else is not the same

    def worse(self, threshold: float) -> list[Change]:
        """Those beyond the threshold."""
        return [change for change in self.changes if change.ratio > threshold]

    def text(self, threshold: float) -> str:
        """For a reader, the worst first."""
        worse = self.worse(threshold)
        better = [change for change in self.changes if change.ratio < 1 / threshold]
        lines = [f"slower or larger: {change}" for change in worse]
        lines += [f"not measured any more: {what}" for what in self.missing]
        lines += [f"better: {change}" for change in reversed(better)]
        lines += [f"note: {condition}" for condition in self.conditions]
        if self.baselines_x is not None:
            lines.append(f"baselines took {self.baselines_x:.3g}x their old time")
        mean = geometric_mean([change.ratio for change in self.changes])
        average = "" if mean is None else f", on average {mean:.3g}x"
        counts = f"{len(worse)} worse, {len(better)} better beyond {threshold:g}x, {len(self.missing)} missing"
        return "\n".join([*lines, f"{len(self.changes)} compared{average}: {counts}, {self.added} new"])


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Matches the rows of two results files.

    Raises:
        ValueError: they are of different devices, or there is nothing to compare.
    """
    devices = [sorted({row["gpu"] for row in rows}) for rows in (old, new)]
    if devices[0] != devices[1]:
        there, here = (" and ".join(names) or "nothing" for names in devices)
        raise ValueError(f"OLD and NEW must be of the same device, got {there} and {here}")
    before, after = _judged(old), _judged(new)
    if not before:
        raise ValueError("OLD must have times to compare with, got none")
    changes = [_change(row, after[what]) for what, row in before.items() if what in after]
    missing = [_named(row) for what, row in before.items() if what not in after]
    return Comparison(
        sorted(changes, key=lambda change: -change.ratio),
        missing,
        len(after.keys() - before.keys()),
        _baselines(old, new),
        _conditions(old, new),
    )


def _judged(rows: Sequence[Row]) -> dict[Measurement, Row]:
    measured: dict[Measurement, Row] = {}
    for row in rows:
        if row["metric"] in JUDGED:
            measured.setdefault(tuple(row[name] for name in KEY if name != "baseline"), row)
    return measured


def _change(old: Row, new: Row) -> Change:
    (old_low, old_high), (new_low, new_high) = ((float(row["p20"]), float(row["p80"])) for row in (old, new))
    apart = new_low > old_high or new_high < old_low
    return Change(_named(old), old["unit"], float(old["p50"]), float(new["p50"]), apart)


def _named(row: Mapping[str, str]) -> str:
    widths = f"w{row['bits_w']}a{row['bits_a']}" if row["bits_w"] else f"a{row['bits_a']}"
    words = (row["op"], row["backend"], row["model"], row["case"], widths, row["data"], f"batch {row['batch']}")
    return f"{' '.join(words)} {row['cache']}{' memory' if row['metric'] == 'memory' else ''}"


def _baselines(old: Sequence[Row], new: Sequence[Row]) -> float | None:
    times = [
        {tuple(row[name] for name in KEY): float(row["baseline_p50"]) for row in rows if row["baseline"]}
        for rows in ([row for row in rows if row["metric"] == "time"] for rows in (old, new))
    ]
    return geometric_mean([times[1][key] / us for key, us in times[0].items() if key in times[1]])


def _conditions(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    found = []
    for name in CONDITIONS:
        there, here = (", ".join(sorted({row[name] or "none" for row in rows})) for rows in (old, new))
        found += [f"{name} was {there}, is {here}"] if there != here else []
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD.csv", type=Path)
    parser.add_argument("new", metavar="NEW.csv", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="worse is beyond this ratio, new over old")
    parser.add_argument("--allow-missing", action="store_true", help="NEW need not have everything that OLD has")
    args = parser.parse_args(arguments)
    if not 1 <= args.threshold < math.inf:
        parser.error(f"--threshold must be a ratio of at least 1, got {args.threshold}")
    try:
        comparison = compare(read_rows(args.old), read_rows(args.new))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(comparison.text(args.threshold))
    return int(bool(comparison.worse(args.threshold) or (comparison.missing and not args.allow_missing)))


if __name__ == "__main__":
    sys.exit(main())
