"""The drawings of the report, as SVG to stand inside HTML.

Colours are classes and CSS variables of data/report.html, so that drawings follow the reader's dark or light setting
like the text around them.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from vitq_kernels.spec import MAX_BITS, MIN_BITS, TILE_ROWS, RowGroups

# matplotlib cannot draw in CSS variables: it draws in these colours, which nothing else has, and they are replaced.
COLOURS = {name: f"#0a0b{i:02x}" for i, name in enumerate(("ink", "soft", "line", "card", "accent", "accent-soft"))}
COLOURS |= {f"b{bits}": f"#0a0c{bits:02x}" for bits in range(MIN_BITS, MAX_BITS + 1)}
STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, in the font of the page
    "text.parse_math": False,  # a label may hold a dollar sign
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Where a label may stand beside its point, best first: offset in pixels and alignment.
PLACES = [(11, 0, "left"), (-11, 0, "right"), (0, 15, "center"), (0, -15, "center")]
PLACES += [(x, y, side) for y in (15, -15, 28, -28, 42, -42) for x, side in ((11, "left"), (-11, "right"))]
LETTER_WIDTH, LINE_HEIGHT = 6.4, 14.0  # pixels of 11-pixel text, on the wide side


@contextmanager
def drawing() -> Iterator[None]:
    """The style of every drawing: matplotlib's own, whatever the user's matplotlibrc says, and ours on it."""
    with style.context(STYLE, after_reset=True), warnings.catch_warnings():
        # A label may have letters that matplotlib's font lacks; the reader's browser draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def bar(parts: Sequence[tuple[str, float]], total: float, title: str, edges: Sequence[int] = ()) -> str:
    """A horizontal bar of (CSS class, length) parts, the whole width being ``total``, with gaps at ``edges``."""
    scale = 1000 / total  # a width of millions of units would overflow the browser's fixed-point layout
    start, shapes = 0.0, ""
    for name, length in parts:
        shapes += f'<rect class="{name}" x="{start * scale:.3f}" width="{length * scale:.3f}" height="1"/>'
        start += length
    if edges:
        shapes += f'<path class="tile-edge" d="{"".join(f"M{edge * scale:.3f} 0V1" for edge in edges)}"/>'
    return (
        '<svg viewBox="0 0 1000 1" preserveAspectRatio="none" shape-rendering="crispEdges" role="img">'
        f"<title>{escape(title)}</title>{shapes}</svg>"
    )


def strip(groups: RowGroups, title: str) -> str:
    """The rows of a weight in stored order, coloured by width, with gaps between tiles."""
    parts: list[tuple[str, float]] = []
    for start, stop, bits in groups.groups():
        before = parts.pop()[1] if parts and parts[-1][0] == f"b{bits}" else 0
        parts.append((f"b{bits}", before + stop - start))
    return bar(parts, groups.rows, title, range(TILE_ROWS, groups.rows, TILE_ROWS))


def panel(
    stacks: Mapping[str, Sequence[float]],
    ticks: Sequence[str],
    top: float,
    xlabel: str,
    ylabel: str,
    title: str,
    width: int = 264,
) -> str:
    """Vertical bars, one a tick, stacked in the order of ``stacks`` (colour to heights), on an axis up to ``top``.

    Panels of one ``top`` can be compared by eye: their axes lie at the same places.
    """
    figure, axes = _axes(width, 158, 44, 38 if xlabel else 24)
    base = [0.0] * len(ticks)
    for colour, heights in stacks.items():
        axes.bar(range(len(ticks)), heights, 0.78, bottom=base, color=COLOURS[colour])
        base = [low + height for low, height in zip(base, heights, strict=True)]
    step = -(-len(ticks) // (width // 24))
    axes.set_xticks(range(0, len(ticks), step), ticks[::step])
    axes.tick_params("x", length=0)
    axes.set(xlim=(-0.6, max(len(ticks), 2) - 0.4), ylim=(0, top or 1), xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    return _svg(figure, title)


def scatter(points: Sequence[tuple[str, float, float, str]], xlabel: str, ylabel: str, level: float | None) -> str:
    """Labelled points (label, x, y, colour) on a logarithmic x axis, and a dashed line across at ``level``."""
    figure, axes = _axes(500, 350, 50, 44, 20)
    xs, ys = [x for _, x, _, _ in points], [y for _, _, y, _ in points]
    axes.set_xscale("log")
    nice = [m * 10.0**e for e in range(-9, 13) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
    low, high = max(x for x in nice if x < min(xs)), min(x for x in nice if x > max(xs))
    shown = [x for x in nice if low <= x <= high]
    shown = shown[:: -(-len(shown) // 10)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{x:g}" for x in shown])
    room = max(0.15 * (max(ys) - min(ys)), 0.5)  # never a whole axis for a difference of noise
    axes.set(xlim=(low, high), ylim=(min(ys) - room, max(ys) + room), xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(color=COLOURS["line"], linewidth=0.8)
    spots = [tuple(axes.transData.transform((x, y))) for x, y in zip(xs, ys, strict=True)]
    frame = axes.bbox
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    if level is not None:
        axes.axhline(level, color=COLOURS["soft"], linewidth=1, dashes=(4, 3))
        height = float(axes.transData.transform((low, level))[1])
        taken.append((frame.x0, height - 1, frame.x1, height + 1))
    for (label, x, y, colour), (px, py) in zip(points, spots, strict=True):
        axes.plot([x], [y], "o", markersize=9, color=COLOURS[colour], markeredgecolor=COLOURS["card"], clip_on=False)
        text = label if len(label) <= 32 else label[:31] + "…"
        width = len(text) * LETTER_WIDTH
        options = []
        for dx, dy, side in PLACES:
            left = px + dx - {"left": 0, "right": width, "center": width / 2}[side]
            box = (left, py + dy - LINE_HEIGHT / 2, left + width, py + dy + LINE_HEIGHT / 2)
            hits = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
            options.append((hits + 2 * outside, dx, dy, side, box))
        _, dx, dy, side, box = min(options, key=lambda option: option[0])  # the first of the best
        taken.append(box)
        axes.annotate(
            text,
            (x, y),
            (dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            annotation_clip=False,
            fontweight="bold" if colour == "accent" else "normal",
            arrowprops={"arrowstyle": "-", "color": COLOURS["soft"], "linewidth": 0.7} if abs(dy) > 20 else None,
        )
    return _svg(figure, f"{ylabel} against {xlabel}")


def _axes(width: float, height: float, left: float, bottom: float, right: float = 8) -> tuple[Figure, Axes]:
    """Margins are in pixels and fixed: the text beside the axes must not move them."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # 72: a point, the unit of the SVG, is a pixel
    figure.patch.set_alpha(0)
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + 10) / height))
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The figure without what HTML does not need: prolog, metadata, namespaces, and names that would not be unique."""
    buffer = io.StringIO()
    # The salt is the title's: clip paths and markers are named by a hash, and two figures must not share one name.
    with style.context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Only inside tags: a label may say anything.
    text = re.sub(r"<[^>]+>", lambda tag: _clean(tag[0]), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).replace("\n", "")


def _clean(tag: str) -> str:
    tag = re.sub(r' (?:id="[\w.]*_\d+"|xmlns(?::xlink)?="[^"]*"|version="[^"]*")', "", tag)
    tag = re.sub(r' (?:width|height)="[\d.]+pt"', "", tag)
    tag = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", re.sub(r"font-family: [^;\"]*;? ?", "", tag))
    for name, colour in COLOURS.items():
        tag = tag.replace(colour, f"var(--{name})")
    return "" if tag.startswith("<!--") else tag.replace("xlink:href", "href")
