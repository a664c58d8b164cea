"""A comparison as a drawing: a panel for each pair of widths, a bar of KL for each method, its control as a line."""

from __future__ import annotations

from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitq_kernels.compare_rows import Comparison, ComparisonRow
from vitq_kernels.files import replaced_file

FORMATS = (".png", ".svg")
BEATS, OTHER, CONTROL = "#2a6f97", "#b9c7d1", "#6b7280"  # filled: beats all its controls; pale: does not
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vitq",  # names inside the file do not change from run to run
    "text.parse_math": False,
    "font.size": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
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
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for of_panel, (widths, rows) in zip(axes, panels.items(), strict=True):
            _panel(of_panel, widths, rows)
        axes[-1].set_xlabel("KL from the float model in nats, ± standard error (dark: beats its controls)")
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=_METADATA[suffix])


def check_suffix(path: Path) -> str:
    """The suffix of a plot's file; raises ValueError for one that is not in FORMATS."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"plot must be a {' or '.join(FORMATS)} file, got {path.name}")
    return suffix


_METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}  # what would name time and version


def _panel(axes: Axes, widths: str, rows: list[ComparisonRow]) -> None:
    """Methods from best to worst; bars of simulations are hatched."""
    ranked = sorted(((row.kl, row) for row in rows if row.kl is not None), key=lambda pair: pair[0])
    for place, (kl, row) in enumerate(ranked):
        beats = bool(row.verdicts) and all(verdict.beats for verdict in row.verdicts)
        axes.barh(
            place,
            kl,
            0.7,
            color=CONTROL if row.method == "uniform" else BEATS if beats else OTHER,
            edgecolor="white",
            hatch="//" if row.executes == "simulated" else None,
            xerr=row.kl_error,
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )
        if row.method == "uniform":
            axes.axvline(kl, color=CONTROL, linewidth=1, dashes=(4, 3))
    axes.set_yticks(range(len(ranked)), [row.method for _, row in ranked])
    axes.invert_yaxis()
    axes.tick_params("y", length=0)
    axes.set_title(widths, loc="left", fontsize=10, fontweight="bold")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
