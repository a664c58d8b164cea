"""Drawings beside ``device.json``, from the rows that a stage keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.microbench import Row, select
from vitq_kernels.compare_plot import BEATS, CONTROL, METADATA, OTHER, STYLE
from vitq_kernels.files import replaced_file

ROW_HEIGHT, PANEL_MARGIN, WIDTH = 0.22, 0.6, 9.0  # inches


def candidates_plot(rows: Sequence[Row], folder: Path) -> str:
    """Whole models: a panel a model, batch and backend, a bar a candidate, as long as its images/s. The file's name."""
    panels: dict[str, dict[str, Row]] = {}
    for row in rows:  # of a candidate that was measured several times the last run counts
        panel = f"{row['model']}, batch {row['batch']}, ours on {row['backend']}"
        panels.setdefault(panel, {})[row["candidate"]] = row
    bars = {
        panel: [(name, row["images_per_s"], name.startswith("ours")) for name, row in found.items()]
        for panel, found in panels.items()
    }
    return _drawn(bars, "images/s, median", None, "whole_models.png", folder)


def speedups_plot(means: Sequence[Row], stage: str, folder: Path) -> list[str]:
    """Microbenchmarks: a panel an op and batch, a bar a baseline, as long as our mean speedup over it. Files' names."""
    panels: dict[str, list[tuple[str, float, bool]]] = {}
    for row in select(means, data="uniform"):
        if row["cold_x"]:
            panel = panels.setdefault(f"{row['op']}, batch {row['batch']}", [])
            panel.append((row["baseline"], row["cold_x"], row["cold_x"] > 1))
    return [_drawn(panels, "speedup, buffers from memory", 1.0, f"{stage}.png", folder)] if panels else []


def _drawn(
    panels: dict[str, list[tuple[str, float, bool]]], unit: str, line: float | None, name: str, folder: Path
) -> str:
    """A figure of panels of (label, length, whether dark) bars, with a vertical line."""
    heights = [len(bars) * ROW_HEIGHT + PANEL_MARGIN for bars in panels.values()]
    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for of_panel, (title, bars) in zip(axes, panels.items(), strict=True):
            _panel(of_panel, title, bars, line)
        axes[-1].set_xlabel(unit)
        with replaced_file(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata=METADATA[".png"])
    return name


def _panel(axes: Axes, title: str, bars: Sequence[tuple[str, float, bool]], line: float | None) -> None:
    places = range(len(bars))
    axes.barh(places, [length for _, length, _ in bars], color=[BEATS if dark else OTHER for *_, dark in bars])
    for place, (_, length, _) in zip(places, bars, strict=True):
        axes.text(length, place, f" {length:.4g}", va="center", fontsize=8)
    if line is not None:
        axes.axvline(line, color=CONTROL, linewidth=1, dashes=(4, 3))
    axes.set_xlim(0, 1.15 * max(length for _, length, _ in bars))
    axes.set_yticks(places, [label for label, *_ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params("y", length=0)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
