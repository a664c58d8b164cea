"""Rows of measured times: ``benchmarks/results/<device>.csv``, a row a measurement (style.md 11).

A row's *key* says what was measured on what; its *numbers* what came out; its *origin* by which code. A file has a row
a key: ``record`` adds rows, and replaces one only where that is asked for.

- ``metric`` is ``time`` (us, of a call), ``rate`` (TOPS, GB/s, images/s, of the same calls) or ``memory`` (peak
  bytes); p20, p80 and p95 are percentiles over rounds: of a rate, those of the times that it is made of.
- ``baseline`` names what a row is compared with in the same rounds, ``baseline_p50`` its number, ``speedup_x`` the
  ratio of the two. A row without a baseline has neither.
- ``pct_roofline``: part of the time that the GPU's datasheet rates allow; empty where they are not known.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_stages import commit
from benchmarks.kernel_cases import AnyCase
from benchmarks.measured_case import Measured, Setting
from vitq_kernels.files import replaced_file
from vitq_kernels.ops import SEMANTICS_VERSION
from vitq_kernels.ops.backends import BACKENDS
from vitq_kernels.roofline import Work
from vitq_kernels.stopwatch import percentile

Row = dict[str, str]
KEY = (
    *("op", "backend", "metric", "unit", "model", "case", "batch", "M", "N", "K", "B", "H", "S", "D"),
    *("bits_w", "bits_a", "data", "cache", "baseline", "gpu"),
)
NUMBERS = ("p50", "p20", "p80", "p95", "baseline_p50", "speedup_x", "pct_roofline")
ORIGIN = ("driver", "torch", "triton", "cuda", "git_sha", "semantics_version", "timestamp")
COLUMNS = (*KEY, *NUMBERS, *ORIGIN)
PARTS = {"p50": 0.5, "p20": 0.2, "p80": 0.8, "p95": 0.95}
UNITS = {"time": ("us",), "rate": ("TOPS", "GB/s", "images/s"), "memory": ("bytes",)}
CACHES = ("cold", "hot")
RATIO_TOLERANCE = 2e-3  # numbers have four digits


def origin(driver: str) -> Row:
    """By which code a row comes to be."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "",
        "git_sha": commit(),
        "semantics_version": str(SEMANTICS_VERSION),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def identity(model: str, case: AnyCase, backend: str) -> Row:
    """The part of the key that a case and a backend decide."""
    bits_a = getattr(case, "input_bits", getattr(case, "bits", 8))
    what = {"op": case.op, "backend": backend, "model": model, "case": case.case, "batch": case.batch, "bits_a": bits_a}
    return {name: _text(value) for name, value in {**what, **case.sizes}.items()}


def is_recorded(path: Path, model: str, case: AnyCase, backend: str) -> bool:
    """Whether a results file, if there is one, has rows of this case."""
    wanted = identity(model, case, backend)
    return path.exists() and any(wanted.items() <= row.items() for row in read_rows(path))


def rows_of(model: str, found: Measured, setting: Setting, by: Mapping[str, str]) -> list[Row]:
    """A case's rows: its time beside each baseline (alone where there is none), and its rates."""
    case = found.case
    what = {**identity(model, case, found.backend), "gpu": setting.name}
    rows = []
    for cache, samples in found.samples.items():
        ours, *others = samples.items()
        spread = spread_of(ours[1])
        pct = setting.peaks and case.work.pct_of_roofline(spread["p50"], setting.peaks, cache == "cold")
        head = {**what, "cache": cache, "pct_roofline": pct}
        for name, times in others or [("", [])]:
            rows.append({**head, **spread, "metric": "time", "unit": "us", **beside(name, times, spread["p50"])})
        for unit, amount in _amounts(case.work).items():
            rates = {name: amount / us for name, us in spread.items()}
            rows.append({**head, **rates, "metric": "rate", "unit": unit})
    return [as_text({**row, **by}) for row in rows]


def spread_of(samples: Sequence[float]) -> dict[str, float]:
    """Median and percentiles."""
    return {**{name: percentile(samples, part) for name, part in PARTS.items()}, "p50": statistics.median(samples)}


def beside(name: str, samples: Sequence[float], ours: float) -> dict[str, Any]:
    """The columns of a baseline; of none without samples."""
    other = statistics.median(samples) if samples else None
    return {"baseline": name, "baseline_p50": other, "speedup_x": other and other / ours}


def as_text(row: Mapping[str, Any]) -> Row:
    """A row as it is written: every column, numbers with four digits."""
    return {column: _text(row.get(column)) for column in COLUMNS}


def _amounts(work: Work) -> dict[str, float]:
    """By unit of rate: what a call does of it in a microsecond's worth."""
    ops = work.int8_ops + work.f16_ops + work.int4_ops
    return {**({"TOPS": ops / 1e6} if ops else {}), "GB/s": work.bytes / 1e3}


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """What was measured on what."""
    return tuple(row[column] for column in KEY)


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file.

    Raises:
        ValueError: it has another form; the message names file, line and column.
    """
    with path.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns must be {','.join(COLUMNS)}, got {','.join(reader.fieldnames or ())}")
        rows = list(reader)
    _check(path, rows)
    return rows


def _check(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError at the first row that is not in form, or measures what another does."""
    seen: dict[tuple[str, ...], int] = {}
    for line, row in enumerate(rows, 2):
        problem = _problem(row)
        if problem:
            raise ValueError(f"{path}, line {line}: {problem}")
        earlier = seen.setdefault(key_of(row), line)
        if earlier != line:
            raise ValueError(f"{path}, line {line}: measures the same as line {earlier}")


def _problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, or None."""
    if None in row or None in row.values():
        return f"must have {len(COLUMNS)} columns"
    wanted = {
        "backend": row["backend"] in BACKENDS,
        "metric": row["metric"] in UNITS,
        "unit": row["unit"] in UNITS.get(row["metric"], ()),
        "cache": row["cache"] in CACHES,
        "semantics_version": row["semantics_version"].isdecimal(),
    }
    wanted |= {name: bool(row[name]) for name in ("op", "model", "gpu", "torch", "git_sha", "timestamp")}
    wanted |= {name: _positive(row[name]) for name in PARTS}
    wanted |= {name: row[name] == "" or _positive(row[name]) for name in NUMBERS[4:]}
    for name, right in wanted.items():
        if not right:
            return f"{name} is {row[name]!r}"
    return _inconsistent(row)


def _inconsistent(row: Mapping[str, str]) -> str | None:
    spread = [float(row[name]) for name in ("p20", "p50", "p80", "p95")]
    if spread != sorted(spread, reverse=row["metric"] == "rate"):
        return f"p20, p50, p80 and p95 are not in order: {spread}"
    middle = spread[1]
    known = [bool(row[name]) for name in ("baseline", "baseline_p50", "speedup_x")]
    if any(known) != all(known):
        return "baseline, baseline_p50 and speedup_x go together"
    if row["baseline"]:
        ratio = float(row["baseline_p50"]) / middle
        if abs(float(row["speedup_x"]) / ratio - 1) > RATIO_TOLERANCE:
            return f"speedup_x is {row['speedup_x']}, the times say {ratio:.4g}"
    return None


def _positive(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", text) is not None and float(text) > 0


def file_of(device_name: str) -> str:
    """The name of a device's results file."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', device_name).strip('_')}.csv"


def record(path: Path, rows: Iterable[Row], overwrite: bool) -> None:
    """Adds rows to a results file; one that is there already is replaced with ``overwrite`` alone, in its place.

    Raises:
        ValueError: a row is there already and not ``overwrite``, or the file is not one of results. It stays as it was.
    """
    kept = {key_of(row): row for row in (read_rows(path) if path.exists() else [])}
    new = {key_of(row): row for row in rows}
    again = [key for key in new if key in kept]
    if again and not overwrite:
        first = " ".join(word for word in again[0] if word)
        raise ValueError(f"{path} has {len(again)} of these rows already, give --overwrite to replace them: {first}")
    write_rows(path, [*(kept | new).values()])


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A results file of these rows; ValueError, and no new file, where one is not in form."""
    _check(path, rows)
    with replaced_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def line_of(rows: Sequence[Row]) -> str:
    """A case's rows with one cache, for a reader."""
    times = [row for row in rows if row["metric"] == "time"]
    one = times[0]
    widths = f" w{one['bits_w']}" if one["bits_w"] else ""
    case = f"{one['case']}{widths} {one['data']}"
    head = f"{one['op']} {one['backend']} {one['model']} {case} batch {one['batch']} {one['cache']}"
    rates = [f"{row['p50']} {row['unit']}" for row in rows if row["metric"] == "rate"]
    ratios = [f"{row['speedup_x']}x {row['baseline']}" for row in times if row["baseline"]]
    roofline = [f"{one['pct_roofline']}% of the roofline"] if one["pct_roofline"] else []
    return " | ".join([head, f"{one['p50']} us", *rates, *ratios, *roofline])
