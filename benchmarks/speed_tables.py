"""README's tables of measured times: whole models, then kernels, of each device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.markdown import markdown_table
from benchmarks.result_rows import COLUMNS, Row, read_rows

KERNELS_OF, KERNEL_BATCHES, KERNEL_WIDTHS = "DeiT-B", ("8", "64"), ("8", "4", "")
ORDER = (
    *("linear_codes", "linear_gelu_codes", "linear_residual", "linear_residual_layernorm"),
    *("attention", "layernorm", "quantize"),
)


def measured(results: Path) -> dict[str, list[Row]]:
    """The rows of every results file of measured times, by its device; devices in order of their names."""
    found = {}
    for path in sorted(results.glob("*.csv")):
        with path.open(encoding="utf-8") as handle:
            header = handle.readline().strip()
        if header == ",".join(COLUMNS):
            rows = read_rows(path)
            found[rows[0]["gpu"]] = rows
    return found


def is_gpu(rows: Sequence[Row]) -> bool:
    """Whether rows are of a GPU: only those have a driver."""
    return bool(rows[0]["driver"])


def text(devices: dict[str, list[Row]]) -> str:
    """Tables of all devices as Markdown, GPUs first."""
    parts = []
    for name, rows in sorted(devices.items(), key=lambda item: not is_gpu(item[1])):
        found = [part for part in (models(rows), kernels(rows)) if part]
        parts += [f"On {_device(name, rows)}:\n", *found] if found else []
    return "\n".join(parts)


def _device(name: str, rows: Sequence[Row]) -> str:
    versions = {f"torch {row['torch']}" for row in rows}
    drivers = {f"driver {row['driver']}" for row in rows if row["driver"]}
    commits = sorted({row["git_sha"][:7] for row in rows})
    return ", ".join([f"one {name}" if is_gpu(rows) else name, *sorted(versions), *sorted(drivers), *commits])


def models(rows: Sequence[Row]) -> str:
    """Whole models: each of ours beside every baseline, as ratios; empty without rows."""
    mine = [row for row in rows if row["op"] == "model" and row["metric"] == "time"]
    baselines = list(dict.fromkeys(row["baseline"] for row in mine if row["baseline"]))
    lines = []
    for key, group in _grouped(mine, ("model", "bits_w", "bits_a", "case", "backend", "batch")).items():
        model, bits_w, bits_a, case, backend, batch = key
        one, ratios = group[0], {row["baseline"]: f"{float(row['speedup_x']):.2f}x" for row in group if row["baseline"]}
        rate = int(batch) / float(one["p50"]) * 1e6
        times = (f"{float(one['p50']) / 1e3:.2f}", f"{float(one['p95']) / 1e3:.2f}", f"{rate:,.0f}")
        name = f"{model} W{bits_w}A{bits_a}, {case} ({backend})"
        lines.append((name, batch, *times, *(ratios.get(baseline, "-") for baseline in baselines)))
    head = ("model", "batch", "ms, p50", "ms, p95", "images/s", *(f"over {baseline}" for baseline in baselines))
    return markdown_table(head, lines) if lines else ""


def kernels(rows: Sequence[Row]) -> str:
    """Kernels of one model from cold buffers (hot on a CPU), beside the fastest baseline; empty without rows."""
    cold = "cold" if any(row["cache"] == "cold" for row in rows) else "hot"
    mine = [
        row
        for row in rows
        if (row["metric"], row["model"], row["cache"]) == ("time", KERNELS_OF, cold)
        and row["op"] in ORDER
        and row["batch"] in KERNEL_BATCHES
        and row["bits_w"] in KERNEL_WIDTHS
        and (row["data"] == "uniform" or not row["bits_w"])
    ]
    mine.sort(key=lambda row: (int(row["batch"]), ORDER.index(row["op"]), row["backend"]))
    lines = []
    for key, group in _grouped(mine, ("op", "case", "bits_w", "bits_a", "backend", "batch", "data")).items():
        op, case, bits_w, bits_a, backend, batch, _ = key
        widths = f"W{bits_w}A{bits_a}" if bits_w else f"{bits_a} bits"
        fastest = min(group, key=lambda row: float(row["baseline_p50"] or "inf"))
        ratio = f"{float(fastest['speedup_x']):.2f}x {fastest['baseline']}" if fastest["baseline"] else "-"
        roofline = f"{float(fastest['pct_roofline']):.0f} %" if fastest["pct_roofline"] else "-"
        lines.append((f"{op} {case}, {widths} ({backend})", batch, f"{float(fastest['p50']):.1f}", roofline, ratio))
    head = (f"kernel of {KERNELS_OF}, {cold}", "batch", "us", "of the roofline", "over the fastest baseline")
    return markdown_table(head, lines) if lines else ""


def _grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found
