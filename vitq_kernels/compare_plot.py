"""A comparison as a drawing: a panel for each pair of widths, the KL of each method, and uniform's as a line."""

from __future__ import annotations

from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from vitq_kernels.compare_rows import Comparison, ComparisonRow
from vitq_kernels.files import replaced_file

FORMATS = (".png", ".svg")
BEATS, OTHER, CONTROL = "#2a6f97", "#a9bac6", "#111827"  # dark blue: beats all its controls; pale: does not
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vitq",  # names inside the file do not change from run to run
    "text.parse_math": False,
    "font.size": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDE = 300.0  # of largest over smallest KL: then powers of ten alone are labelled
ROW_HEIGHT, PANEL_MARGIN, WIDTH = 0.24, 0.75, 8.5  # inches


def write_plot(comparison: Comparison, path: Path) -> None:
    """Draws a comparison into a file, PNG or SVG by its suffix; equal comparisons give equal files.

    Raises:
        ValueError: another suffix, or no row has a KL.
    """
    suffix = check_suffix(path)
    panels: dict[str, list[ComparisonRow]] = {}
    for row in comparison.rows:
        if row.kl is not None:
            panels.setdefault(row.widths, []).append(row)
    if not panels:
        raise ValueError("comparison must have a row that did not fail, got none: nothing to draw")
    heights = [len(rows) * ROW_HEIGHT + PANEL_MARGIN for rows in panels.values()]
    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for of_panel, (widths, rows) in zip(axes, panels.items(), strict=True):
            _panel(of_panel, widths, rows)
        if positive := [row.kl for rows in panels.values() for row in rows if row.kl is not None and row.kl > 0]:
            axes[-1].set_xscale("log", nonpositive="clip")
            wide = max(positive) > WIDE * min(positive)
            axes[-1].xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes[-1].xaxis.set_minor_locator(NullLocator())
        axes[-1].set_xlabel(
            "KL from the float model in nats ± standard error\ndark: beats its controls, hollow: simulated"
        )
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=METADATA[suffix])


def check_suffix(path: Path) -> str:
    """The suffix of a plot's file; raises ValueError for one that is not in FORMATS."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"plot must be a {' or '.join(FORMATS)} file, got {path.name}")
    return suffix


METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}  # what would name time and version


def _panel(axes: Axes, widths: str, rows: list[ComparisonRow]) -> None:
    """Methods from best to worst."""
    ranked = sorted(((row.kl, row) for row in rows if row.kl is not None), key=lambda pair: pair[0])
    for place, (kl, row) in enumerate(ranked):
        beats = bool(row.verdicts) and all(verdict.beats for verdict in row.verdicts)
        colour = CONTROL if row.method == "uniform" else BEATS if beats else OTHER
        simulated = row.executes == "simulated"
        axes.errorbar(
            kl, place, xerr=row.kl_error, fmt="o", color=colour, mfc="white" if simulated else colour, elinewidth=1
        )
        if row.method == "uniform":
            axes.axvline(kl, color=CONTROL, linewidth=1, dashes=(4, 3))
    axes.set_yticks(range(len(ranked)), [row.method for _, row in ranked])
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.tick_params("y", length=0)
    axes.set_title(widths, loc="left", fontsize=10, fontweight="bold")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
