"""The sections of the report that go layer by layer: widths, relevance, bytes, and every number in one table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from vitq_kernels.report_plots import bar, panel, strip
from vitq_kernels.spec import BitAllocation, RowGroups, Site

if TYPE_CHECKING:
    from vitq_kernels.relevance import Relevance

KINDS = {
    "qkv": "query, key, value",
    "qk": "attention scores",
    "av": "attention times value",
    "proj": "attention output",
    "fc1": "MLP, first",
    "fc2": "MLP, second",
    "reduction": "patch merging",
}
UNITS = {"MB": 1e6, "kB": 1e3}
NARROW, TEXT = ' class="narrow"', ' class="text"'


def unit_for(size: float) -> str:
    """The unit in which ``size`` bytes has two or more digits."""
    return "MB" if size >= 1e6 else "kB"


def size_text(size: float, unit: str) -> str:
    """Bytes in ``unit``, without the unit."""
    return f"{size / UNITS[unit]:,.{2 if unit == 'MB' else 1}f}"


def float_bytes(sites: Sequence[Site]) -> int:
    """Bytes of the sites' weights in float32."""
    return sum(4 * site.rows * site.cols for site in sites)


def table_html(head: Sequence[str], rows: Sequence[str], name: str = "") -> str:
    """A table of ready cells and rows, which scrolls by itself where it is wider than the page."""
    body = f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="{name}">{body}</table></div>'


def total_section(sites: Sequence[Site], allocation: BitAllocation, label: str) -> str:
    """Float32 and ``allocation`` as bars of one scale, the latter by width."""
    spent: dict[str, int] = {}
    for site in sites:
        for name, size in _bytes_by_width(site, allocation).items():
            spent[name] = spent.get(name, 0) + size
    whole, own = float_bytes(sites), sum(spent.values())
    unit = unit_for(own)
    parts = [(name, spent[name]) for name in _ordered(spent)]
    head = [f"<th{TEXT}>width</th>", f"<th>{unit}</th>", "<th>share</th>"]
    rows = [
        f'<tr><th scope="row"{TEXT}>{_key(name)}</th><td>{size_text(size, unit)}</td>'
        f"<td>{_percent(size / own, 1)}</td></tr>"
        for name, size in parts
    ]
    return (
        '<section><h2>Where the bytes go</h2><p class="how">Packed weights and row orders, both bars to one scale. '
        'Scales, biases and norms are not counted.</p><div class="total">'
        f"<div>float32: {size_text(whole, unit)} {unit}{bar([('bare', whole)], whole, 'float32')}</div>"
        f"<div>{escape(label)}: {size_text(own, unit)} {unit}, {_percent(own / whole, 1)} of float32"
        f"{bar(parts, whole, label)}</div></div>{table_html(head, rows, 'tight')}</section>"
    )


def bits_section(sites: Sequence[Site], allocation: BitAllocation) -> str:
    """The widths as a matrix of blocks and kinds of layer, one strip a linear."""
    bits = allocation.sites
    inside = {bits[site.name].activation for site in sites if site.in_block}
    same = len(inside) == 1  # then a sentence says it, and the matrix has room for the weights
    blocks = _blocks(sites)
    kinds = [k for k in KINDS if any(k in block and (block[k].has_weight or not same) for block in blocks.values())]

    def cell(site: Site | None) -> str:
        if site is None:
            return ""
        weight, activation = bits[site.name].weight, bits[site.name].activation
        chip = "" if same and site.in_block else f'<span class="chip b{activation}">{activation}</span>'
        if weight is None:
            return chip
        title = f"{site.name}: {_spread(weight)}; input {activation}b"
        return f'<div class="strip">{strip(weight, title)}<b>{weight.mean_bits:.2f}</b>{chip}</div>'

    head = ['<th scope="col">block</th>']
    for kind in kinds:
        own = [block[kind] for block in blocks.values() if kind in block and block[kind].has_weight]
        more = f"<br><small>mean {allocation.mean_weight_bits(own):.2f}</small>" if own else ""
        head.append(f'<th scope="col"{"" if own else NARROW}>{kind}{more}</th>')
    rows = [
        f'<tr><th scope="row">{escape(_index(prefix))}</th>'
        + "".join(f"<td{NARROW if k in ('qk', 'av') else ''}>{cell(block.get(k))}</td>" for k in kinds)
        + "</tr>"
        for prefix, block in blocks.items()
    ]
    ends = "".join(f"<div>{escape(site.name)}{cell(site)}</div>" for site in sites if not site.in_block)
    chips = "Numbered squares: bits of the input; at qk of q, k and v, at av of the attention probabilities."
    if same:
        chips = f"Activations in the blocks have {next(iter(inside))} bits; squares give the input's bits elsewhere."
    shown = [(bits[site.name].weight, bits[site.name].activation, same and site.in_block) for site in sites]
    used = {f"b{b}" for weight, _, _ in shown if weight for b in weight.bits}
    used |= {f"b{activation}" for _, activation, told in shown if not told}
    return (
        '<section><h2>Which widths went where</h2><p class="how">A bar is the output rows of one linear as they are '
        "stored, in tiles of 256 rows (gaps part them). The colour is the width of a row's weights, the number beside "
        f"it the mean. {chips}</p>{_legend([_key(name) for name in _ordered(used)])}{table_html(head, rows, 'bits')}"
        + (f'<div class="ends">{ends}</div></section>' if ends else "</section>")
    )


def relevance_section(sites: Sequence[Site], relevance: Relevance) -> str:
    """Flow of each site, and how much of it the most relevant tenth of its rows carries; all panels to one scale."""
    top = 1.05 * max(relevance.flow.values(), default=0)
    figures = []
    for label, own, ticks in _panels(sites):
        flow = [relevance.flow.get(site.name, 0.0) for site in own]
        shares = [_top_share(relevance, site) for site in own]
        known = [share for share in shares if share is not None]
        told = f"{100 * min(known):.0f} to {100 * max(known):.0f} % in the top 10 % of rows" if known else ""
        first = [f * (share or 0) for f, share in zip(flow, shares, strict=True)]
        stacks = {"accent": first, "accent-soft": [f - t for f, t in zip(flow, first, strict=True)]}
        svg = panel(stacks, ticks, top, _xlabel(label), "flow", f"flow, {label}")
        figures.append(_figure(label, told, svg))
    keys = [_key("accent", "through the top 10 % of rows")]
    keys.append(_key("accent-soft", "through the other rows (qk and av: all)"))
    return (
        '<section><h2>Which layers the decision passes through</h2><p class="how">Flow: relevance through the outputs '
        f"of a layer, as a multiple of that at the decision ({escape(relevance.method)}, {escape(relevance.tokens)} "
        f"tokens, mean of {relevance.images} images). Where few rows carry much of it, several widths within one layer "
        f'pay.</p>{_legend(keys)}<div class="panels">{"".join(figures)}</div></section>'
    )


def bytes_section(sites: Sequence[Site], allocation: BitAllocation) -> str:
    """Bytes of each linear by width, those of the blocks to one scale."""
    spent = {site.name: _bytes_by_width(site, allocation) for site in sites if site.has_weight}
    unit = unit_for(max(sum(by.values()) for by in spent.values()))
    names = _ordered({name for by in spent.values() for name in by})
    # The ends are often far larger than any linear of a block: on one scale with them, the blocks could not be read.
    most = {
        inside: [sum(spent[s.name].values()) for s in sites if s.has_weight and s.in_block == inside]
        for inside in (True, False)
    }
    figures = []
    for label, own, ticks in _panels([site for site in sites if site.has_weight]):
        stacks = {name: [spent[site.name].get(name, 0) / UNITS[unit] for site in own] for name in names}
        full = dict.fromkeys(f"{size_text(float_bytes([site]), unit)} {unit}" for site in own)
        told = f"float32: {', '.join(list(full)[:3])}" + (" each" if len(full) == 1 < len(own) else "")
        top = 1.05 * max(most[own[0].in_block]) / UNITS[unit]
        axis = unit if own[0].in_block else f"{unit}, own scale"
        svg = panel(stacks, ticks, top, _xlabel(label), axis, f"bytes, {label}", width=216)
        figures.append(_figure(label, told, svg))
    return (
        '<section><h2>Bytes of each layer</h2><p class="how">By width of the rows, all blocks to one scale.</p>'
        f'{_legend([_key(name) for name in names])}<div class="panels five">{"".join(figures)}</div></section>'
    )


def site_table(sites: Sequence[Site], allocation: BitAllocation, relevance: Relevance | None) -> str:
    """Every number of the drawings, a row a site."""
    names = ["site", "rows", "inputs", "rows×width", "mean bits", "input bits", "kB", "float32 kB"]
    names += ["flow", "in top 10 % of rows"] if relevance else []
    rows = []
    for site in sites:
        bits = allocation.sites[site.name]
        cells = ["", "", "", "", str(bits.activation), "", ""]
        if bits.weight is not None:
            own = sum(_bytes_by_width(site, allocation).values())
            cells[:4] = [str(site.rows), str(site.cols), _spread(bits.weight), f"{bits.weight.mean_bits:.2f}"]
            cells[5:] = [size_text(own, "kB"), size_text(float_bytes([site]), "kB")]
        if relevance is not None:
            flow, share = relevance.flow.get(site.name), _top_share(relevance, site)
            cells += ["" if flow is None else f"{flow:.3f}", "" if share is None else _percent(share)]
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row" class="text">{escape(site.name)}</th>{values}</tr>')
    head = [f'<th scope="col"{"" if i else TEXT}>{name}</th>' for i, name in enumerate(names)]
    return table_html(head, rows)


def _blocks(sites: Sequence[Site]) -> dict[str, dict[str, Site]]:
    """Sites of the blocks by name of the block ("blocks.3" of "blocks.3.attn.qkv") and kind, in the order given."""
    blocks: dict[str, dict[str, Site]] = {}
    for site in sites:
        if site.in_block:
            blocks.setdefault(site.name.rsplit(".", 2)[0], {})[site.kind] = site
    return blocks


def _index(prefix: str) -> str:
    """ "3" of "blocks.3", "1.0" of "layers.1.blocks.0"."""
    return ".".join(re.findall(r"\d+", prefix)) or prefix


def _panels(sites: Sequence[Site]) -> list[tuple[str, list[Site], list[str]]]:
    """Label, sites and tick of each site, for each kind and for what lies outside the blocks."""
    blocks = _blocks(sites)
    panels = []
    for kind in KINDS:
        own = {prefix: block[kind] for prefix, block in blocks.items() if kind in block}
        panels.append((kind, list(own.values()), [_index(prefix) for prefix in own]))
    ends = [site for site in sites if not site.in_block]
    panels.append(("outside the blocks", ends, [site.name.split(".")[0] for site in ends]))
    return [entry for entry in panels if entry[1]]


def _xlabel(label: str) -> str:
    return "block" if label in KINDS else ""


def _figure(label: str, told: str, svg: str) -> str:
    caption = f'<h3>{label} <small>{KINDS.get(label, "")}</small></h3><small class="told">{told}</small>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _bytes_by_width(site: Site, allocation: BitAllocation) -> dict[str, int]:
    """Bytes by colour name: "b2".."b8", and "soft" for the row order."""
    groups = allocation.sites[site.name].weight
    if groups is None:
        return {}
    spent = {"soft": groups.order_bytes} if groups.order_bytes else {}
    for start, stop, bits in groups.groups():
        size = RowGroups.uniform(stop - start, bits).weight_bytes(site.cols)
        spent[f"b{bits}"] = spent.get(f"b{bits}", 0) + size
    return spent


def _ordered(names: Mapping[str, int] | set[str]) -> list[str]:
    return sorted(names, key=lambda name: (len(name), name))


def _key(name: str, words: str = "") -> str:
    words = words or ("row order" if name == "soft" else f"{name[1:]} bits")
    return f'<span class="key {name}"></span>{words}'


def _legend(entries: Sequence[str]) -> str:
    return f'<ul class="legend">{"".join(f"<li>{entry}</li>" for entry in entries)}</ul>'


def _spread(groups: RowGroups) -> str:
    """ "128×2b 64×4b": rows of each width."""
    rows: dict[int, int] = {}
    for start, stop, bits in groups.groups():
        rows[bits] = rows.get(bits, 0) + stop - start
    return " ".join(f"{count}×{bits}b" for bits, count in sorted(rows.items()))


def _top_share(relevance: Relevance, site: Site) -> float | None:
    """Share of a site's flow that the most relevant tenth of its rows carries."""
    rows = sorted(relevance.row_flow.get(site.name, ()), reverse=True)
    total = sum(rows)
    return sum(rows[: -(-len(rows) // 10)]) / total if total else None


def _percent(share: float, places: int = 0) -> str:
    return f"{100 * share:.{places}f} %"
