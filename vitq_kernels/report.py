"""The report: one HTML file that says what quantization cost, what it saved, and which widths went where and why.

Nothing in it is loaded from anywhere else: what compares models is made here, what goes layer by layer in
report_layers.py, drawings in report_plots.py, and all of it stands on the page data/report.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from vitq_kernels.files import write_text
from vitq_kernels.report_layers import (
    UNITS,
    bits_section,
    bytes_section,
    float_bytes,
    relevance_section,
    site_table,
    size_text,
    table_html,
    total_section,
    unit_for,
)
from vitq_kernels.report_plots import drawing, scatter
from vitq_kernels.spec import BitAllocation, Site

if TYPE_CHECKING:
    from vitq_kernels.relevance import Relevance

NOT_MEASURED = '<span title="not measured">–</span>'


@dataclass(frozen=True)
class Measurement:
    """One row of the comparison; None is what was not measured."""

    label: str  # "float32", "uniform W4A8", ...; the row of the float model starts with "float"
    top1: float | None  # percent of the images
    agreement: float | None  # percent of the images on which it decides as the float model does
    kl: float | None  # from the float model's class probabilities, mean over images, nats
    weight_bytes: int
    mean_weight_bits: float | None  # over the linears of the blocks
    images_per_s: float | None
    latency_ms: float | None
    device: str  # where it was measured; "" where that is not known

    def __post_init__(self) -> None:
        if isinstance(self.weight_bytes, bool) or not isinstance(self.weight_bytes, int) or self.weight_bytes < 1:
            raise ValueError(f"Measurement.weight_bytes must be a positive integer, got {self.weight_bytes!r}")
        for name, low, high in (
            ("top1", 0, 100),
            ("agreement", 0, 100),
            ("kl", -math.inf, math.inf),
            ("mean_weight_bits", 0, math.inf),
            ("images_per_s", 0, math.inf),
            ("latency_ms", 0, math.inf),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, float | int) or not math.isfinite(value) or not low <= value <= high:
                raise ValueError(f"Measurement.{name} must be finite and in {low}..{high}, or None, got {value!r}")

    @property
    def is_float(self) -> bool:
        """Whether this is the model before quantization."""
        return self.label.lower().startswith("float")


@dataclass(frozen=True)
class ReportData:
    """All that the report shows."""

    title: str
    model: str  # name or description
    sites: Sequence[Site]
    allocation: BitAllocation
    relevance: Relevance | None
    measurements: Sequence[Measurement]  # the last one that is not float is of ``allocation``: the headline is about it
    facts: Mapping[str, str] = field(default_factory=dict)  # versions, date, seeds, images used, commit, ...
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.allocation.check(self.sites)
        unknown = sorted(set(self.relevance.flow if self.relevance else ()) - {site.name for site in self.sites})
        if unknown:
            raise ValueError(f"ReportData.relevance must be of the model's sites, got {unknown[:3]}")

    @property
    def baseline(self) -> Measurement:
        """The first float row; without one, float32's computed size."""
        computed = Measurement("float32", None, None, None, float_bytes(self.sites), 32, None, None, "")
        return next((m for m in self.measurements if m.is_float), computed)

    @property
    def result(self) -> Measurement:
        """The last row that is not float; without one, the allocation's size."""
        size, bits = self.allocation.weight_bytes(self.sites), self.allocation.mean_weight_bits(self.sites)
        computed = Measurement("the quantized model", None, None, None, size, bits, None, None, "")
        return next((m for m in reversed(self.measurements) if not m.is_float), computed)


def render_report(data: ReportData) -> str:
    """The report as HTML text; equal data give equal text."""
    template = Template((files("vitq_kernels") / "data" / "report.html").read_text("utf-8"))
    sites, allocation = data.sites, data.allocation
    with drawing():
        return template.substitute(
            title=escape(data.title),
            model=escape(data.model),
            lead=_lead(data.result, data.baseline),
            tiles=_tiles(data.result, data.baseline),
            story=_story(data),
            comparison=_comparison(data),
            scatter=_scatter(data),
            total=total_section(sites, allocation, data.result.label),
            bits=bits_section(sites, allocation),
            relevance=relevance_section(sites, data.relevance) if data.relevance else "",
            bytes=bytes_section(sites, allocation),
            facts=_facts(data),
            count=len(sites),
            sites=site_table(sites, allocation, data.relevance),
        )


def write_report(data: ReportData, path: str | Path) -> None:
    """Writes the report to ``path`` as a whole or not at all: what stood there is replaced at the very end.

    Raises:
        ValueError: the folder does not exist.
        OSError: it cannot be written.
    """
    write_text(path, render_report(data))


def _lead(result: Measurement, base: Measurement) -> str:
    factor, name = base.weight_bytes / result.weight_bytes, escape(base.label)
    if factor >= 1.05:
        size = f"{factor:.1f} times smaller than {name}"
    elif factor <= 0.95:
        size = f"{1 / factor:.1f} times the size of {name}"
    else:
        size = f"About the size of {name}"
    change = _change(result, base)
    if change is not None:
        points = f"{abs(change):.2f}"
        told = f"{points} points {'lower' if change < 0 else 'higher'}" if float(points) else "unchanged"
        return f"{size}, top\u20111 accuracy {told}"  # a hyphen at which no line breaks
    if result.agreement is not None:
        return f"{size}, same decision on {result.agreement:.2f} % of the images"
    return f"{size}, accuracy not compared"


def _tiles(result: Measurement, base: Measurement) -> str:
    """The numbers behind the headline, each with what it is to be held against; only what was measured."""
    name = escape(base.label)
    tiles = [("weights", _bytes_text(result.weight_bytes), f"{name}: {_bytes_text(base.weight_bytes)}")]
    if result.top1 is not None:
        against = "" if base.top1 is None else f"{name}: {base.top1:.2f} %"
        tiles.append(("top-1 accuracy", f"{result.top1:.2f} %", against))
    if result.agreement is not None:
        tiles.append(("agreement", f"{result.agreement:.2f} %", "decides like the float model"))
    if result.mean_weight_bits is not None:
        tiles.append(("bits a weight", f"{result.mean_weight_bits:.2f}", "mean over the blocks"))
    if result.images_per_s is not None:
        against = escape(result.device)
        if base.images_per_s is not None and base.device == result.device:
            against = f"{name}: {base.images_per_s:,.1f}; {against}"
        tiles.append(("images per second", f"{result.images_per_s:,.1f}", against))
    return "".join(f"<div><dt>{term}</dt><dd>{value}</dd><dd>{more}</dd></div>" for term, value, more in tiles)


def _story(data: ReportData) -> str:
    """Whether mixed widths are worth it: against the other quantized row of nearly the same size, if there is one."""
    result = data.result
    near = [
        m
        for m in data.measurements
        if m is not result and not m.is_float and abs(m.weight_bytes / result.weight_bytes - 1) <= 0.1
    ]
    for name, unit, places in (("top1", "% top-1 accuracy", 2), ("kl", "nats KL", 4)):
        own = getattr(result, name)
        for other in sorted(near, key=lambda m: abs(m.weight_bytes - result.weight_bytes)):
            value = getattr(other, name)
            if own is not None and value is not None:
                return (
                    f'<p class="story">At nearly the same size, {escape(other.label)} has {value:.{places}f} {unit}; '
                    f"{escape(result.label)} has {own:.{places}f}.</p>"
                )
    return ""


def _comparison(data: ReportData) -> str:
    if not data.measurements:
        return ""
    result, base = data.result, data.baseline
    unit = unit_for(min(m.weight_bytes for m in data.measurements))
    columns: list[tuple[str, Callable[[Measurement], float | None], str]] = [
        ("top-1<br>%", lambda m: m.top1, ".2f"),
        ("change<br>points", lambda m: None if m.is_float else _change(m, base), "+.2f"),
        ("agreement<br>%", lambda m: m.agreement, ".2f"),
        ("KL<br>nats", lambda m: m.kl, ".4f"),
        (f"weights<br>{unit}", lambda m: m.weight_bytes / UNITS[unit], ".2f" if unit == "MB" else ".1f"),
        ("times<br>smaller", lambda m: base.weight_bytes / m.weight_bytes, ".2f"),
        ("mean<br>bits", lambda m: m.mean_weight_bits, ".2f"),
        ("speed<br>images/s", lambda m: m.images_per_s, ",.1f"),
        ("latency<br>ms", lambda m: m.latency_ms, ",.2f"),
    ]
    columns = [column for column in columns if any(column[1](m) is not None for m in data.measurements)]
    devices = dict.fromkeys(m.device for m in data.measurements if m.device)
    head = ['<th scope="col" class="text">model</th>', *(f'<th scope="col">{name}</th>' for name, _, _ in columns)]
    head += ['<th scope="col" class="text">device</th>'] if len(devices) > 1 else []
    rows = []
    for m in data.measurements:
        mark = ' <span class="mark">this report</span>' if m is result else ""
        cells = f'<th scope="row" class="text">{escape(m.label)}{mark}</th>'
        cells += "".join(f"<td>{_number(value(m), form)}</td>" for _, value, form in columns)
        cells += f'<td class="text">{escape(m.device)}</td>' if len(devices) > 1 else ""
        rows.append(('<tr class="this">' if m is result else "<tr>") + cells + "</tr>")
    where = f'<p class="how">Measured on {escape("".join(devices))}.</p>' if len(devices) == 1 else ""
    return f"<section><h2>Comparison</h2>{where}{table_html(head, rows)}</section>"


def _scatter(data: ReportData) -> str:
    for name, label in (("top1", "top-1 accuracy, %"), ("agreement", "agreement with float, %")):
        known = [(m, getattr(m, name)) for m in data.measurements if getattr(m, name) is not None]
        if len(known) < 2:
            continue
        unit = unit_for(min(m.weight_bytes for m, _ in known))
        points = [
            (" ".join(m.label.split()), m.weight_bytes / UNITS[unit], value, "accent" if m is data.result else "soft")
            for m, value in known
        ]
        level = next((value for m, value in known if m.is_float), None)
        return (
            f"<section><h2>{label.split(',')[0].capitalize()} against size</h2>"
            f'<p class="how">Up and to the left is better.{" Dashed: float." if level is not None else ""}</p>'
            f"<figure>{scatter(points, f'weights, {unit}', label, level)}</figure></section>"
        )
    return ""


def _facts(data: ReportData) -> str:
    # "moves" is a table of its own, a row a site: what `vitq allocate` prints of it does not fit among facts.
    told = {key: value for key, value in data.allocation.solver.items() if key != "moves"}
    solver = {f"allocation: {key}": _plain(value) for key, value in told.items()}
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    pairs = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in {**data.facts, **solver}.items()
    )
    if not notes and not pairs:
        return ""
    return (
        f"<section><h2>Facts</h2>{f'<ul class=notes>{notes}</ul>' if notes else ''}"
        f'<dl class="facts">{pairs}</dl></section>'
    )


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _change(m: Measurement, base: Measurement) -> float | None:
    return None if m.top1 is None or base.top1 is None else m.top1 - base.top1


def _bytes_text(size: float) -> str:
    unit = unit_for(size)
    return f"{size_text(size, unit)} {unit}"


def _number(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form).replace("-", "−")
