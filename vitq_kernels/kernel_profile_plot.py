"""A profile as a drawing: a bar an op, as long as its time, and dark as far as the roofline asks for."""

from __future__ import annotations

from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

from vitq_kernels.compare_plot import BEATS, METADATA, OTHER, STYLE, check_suffix
from vitq_kernels.files import replaced_file
from vitq_kernels.kernel_profile import KernelProfile

ROW_HEIGHT, MARGIN, WIDTH = 0.28, 1.5, 9.0  # inches


def write_profile_plot(profile: KernelProfile, path: Path) -> None:
    """Draws a profile into a file, PNG or SVG by its suffix; equal profiles give equal files.

    Raises:
        ValueError: another suffix.
    """
    suffix = check_suffix(path)
    ops = profile.shown()
    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, len(ops) * ROW_HEIGHT + MARGIN), layout="constrained")
        axes, places = figure.subplots(), range(len(ops))
        axes.barh(places, [op.us for op in ops], color=OTHER, label="measured")
        within = [min(op.floor_us, op.us) for op in ops]
        axes.barh(places, within, height=0.4, color=BEATS, label="of it the roofline asks for")
        for place, op in zip(places, ops, strict=True):
            text = f" {profile.share(op):.1f} %, {op.pct_of_roofline:.0f} % of the roofline"
            axes.text(op.us, place, text, va="center", fontsize=8)
        axes.set_yticks(places, [f"{op.op} ({op.calls}x)" for op in ops])
        axes.set_ylim(len(ops) - 0.5, -0.5)
        axes.set_xlim(0, 1.45 * max((op.us for op in ops), default=1.0))  # room for the text
        axes.tick_params("y", length=0)
        axes.set_xlabel("us of a forward pass")
        axes.set_title(
            f"{profile.model}, batch {profile.batch}, {profile.device}: "
            f"{profile.busy_us:.0f} us in ops of {profile.wall_us:.0f} us, eager",
            loc="left",
            fontsize=10,
        )
        axes.legend(loc="lower right", frameon=False)
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=METADATA[suffix])
