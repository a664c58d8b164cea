"""The report says what the data say, stands alone in one file, has equal bytes for equal data, and is written whole."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from vitq_kernels.relevance import Relevance
from vitq_kernels.report import Measurement, ReportData, render_report, write_report
from vitq_kernels.spec import BitAllocation, RowGroups, Site, SiteBits

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = '<script>alert("x")</script> & $x$ \' "y" </svg>'


def make_sites(blocks: int = 3, dim: int = 64) -> tuple[Site, ...]:
    sites = [Site("patch_embed.proj", "patch_embed", dim, 48, 1000)]
    for i in range(blocks):
        sites += [
            Site(f"blocks.{i}.attn.qkv", "qkv", 3 * dim, dim, 1000),
            Site(f"blocks.{i}.attn.qk", "qk", 0, 0, 500),
            Site(f"blocks.{i}.attn.av", "av", 0, 0, 500),
            Site(f"blocks.{i}.attn.proj", "proj", dim, dim, 1000),
            Site(f"blocks.{i}.mlp.fc1", "fc1", 4 * dim, dim, 1000),
            Site(f"blocks.{i}.mlp.fc2", "fc2", dim, 4 * dim, 1000),
        ]
    return (*sites, Site("head", "head", 10, dim, 640))


def make_allocation(sites: tuple[Site, ...]) -> BitAllocation:
    """4 bits, except block 0's fc1 (rows of 6 and 2 bits) and its av probabilities (3 bits)."""
    widths = dict(BitAllocation.uniform(sites, 4).sites)
    rows = widths["blocks.0.mlp.fc1"].weight.rows
    widths["blocks.0.mlp.fc1"] = SiteBits(8, RowGroups(rows, (6, 2, 2, 2), 64, tuple(reversed(range(rows)))))
    widths["blocks.0.attn.av"] = SiteBits(3)
    return BitAllocation(widths)


def make_relevance(sites: tuple[Site, ...]) -> Relevance:
    flow = {site.name: 0.5 + 0.125 * i for i, site in enumerate(sites)}
    rows = {}
    for site in sites:
        if site.has_weight:  # the first tenth of the rows, rounded up, carries three quarters
            few = -(-site.rows // 10)
            rows[site.name] = [
                flow[site.name] * (0.75 / few if i < few else 0.25 / (site.rows - few)) for i in range(site.rows)
            ]
    return Relevance("attnlrp", "all", 16, flow, dict.fromkeys(flow, 0.01), rows)


FLOAT = Measurement("float32", 81.25, None, None, 640_000, 32.0, 100.0, 12.5, "cpu")
UNIFORM = Measurement("uniform W4A8", 70.5, 85.125, 0.1931, 81_000, 4.0, 150.0, 8.0, "cpu")
MIXED = Measurement("mixed W4A8", 80.0, 93.75, 0.04321, 80_000, 3.987, 140.0, 8.5, "cpu")


def make_data(**changes: object) -> ReportData:
    sites = make_sites()
    data = ReportData(
        "A small test", "three blocks", sites, make_allocation(sites), make_relevance(sites), (FLOAT, UNIFORM, MIXED)
    )
    return dataclasses.replace(data, **changes)


def small_data(**changes: object) -> ReportData:
    """One block and no relevance: a third of the drawings."""
    sites = make_sites(1, 16)
    data = ReportData("t", "m", sites, BitAllocation.uniform(sites, 4), None, (FLOAT, UNIFORM, MIXED))
    return dataclasses.replace(data, **changes)


class Page(HTMLParser):
    """The text of each element, the tags with attributes, and whether every tag is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1:] != ["style"]:
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return "\n".join(self.words)


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(make_data())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text: the drawings take nearly all of the time."""
    monkeypatch.setattr("vitq_kernels.report_layers.panel", lambda *_, **__: "")
    monkeypatch.setattr("vitq_kernels.report.scatter", lambda *_, **__: "")


def table_rows(html: str, first: str) -> dict[str, list[str]]:
    """Cells by row name of the table whose first column is headed ``first``."""
    table = next(t for t in re.findall(r"<table.*?</table>", html, re.DOTALL) if f">{first}</th>" in t)
    rows = {}
    for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL):
        name, *cells = (Page(cell).text.replace("\n", " ") for cell in re.findall(r"<t[hd].*?</t[hd]>", row))
        rows[name] = cells
    return rows


def test_html_is_well_formed(page: Page) -> None:
    assert page.open == []
    assert [tag for tag, _ in page.tags if tag in ("html", "head", "body", "main", "title")].count("main") == 1


def test_headline_and_tiles_state_size_accuracy_and_speed(page: Page) -> None:
    assert "8.0 times smaller than float32, top\u20111 accuracy 1.25 points lower" in page.words
    assert {"80.0 kB", "float32: 640.0 kB", "80.00 %", "float32: 81.25 %", "93.75 %", "3.99", "140.0"} <= set(
        page.words
    )
    assert "float32: 100.0; cpu" in page.words


def test_story_compares_with_the_row_of_the_same_size(page: Page) -> None:
    assert "At nearly the same size, uniform W4A8 has 70.50 % top-1 accuracy; mixed W4A8 has 80.00." in page.words


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"top1": 81.25}, "top\u20111 accuracy unchanged"),
        ({"top1": 81.2519}, "top\u20111 accuracy unchanged"),
        ({"top1": 82.0}, "top\u20111 accuracy 0.75 points higher"),
        ({"top1": None}, "same decision on 93.75 % of the images"),
        ({"top1": None, "agreement": None}, "accuracy not compared"),
        ({"weight_bytes": 1_280_000}, "2.0 times the size of float32, "),
        ({"weight_bytes": 640_000}, "About the size of float32, "),
    ],
)
def test_headline_states_what_the_numbers_say(result: dict[str, object], expected: str) -> None:
    text = render_report(small_data(measurements=(FLOAT, dataclasses.replace(MIXED, **result))))
    assert expected in re.search(r'class="lead">(.*?)<', text)[1]


def test_comparison_formats_every_measurement(html: str) -> None:
    rows = table_rows(html, "model")
    assert rows["model"] == [
        "top-1 %",
        "change points",
        "agreement %",
        "KL nats",
        "weights kB",
        "times smaller",
        "mean bits",
        "speed images/s",
        "latency ms",
    ]
    assert rows["float32"] == ["81.25", "–", "–", "–", "640.0", "1.00", "32.00", "100.0", "12.50"]
    assert rows["uniform W4A8"] == ["70.50", "−10.75", "85.12", "0.1931", "81.0", "7.90", "4.00", "150.0", "8.00"]
    assert rows["mixed W4A8 this report"][3:6] == ["0.0432", "80.0", "8.00"]
    assert "Measured on cpu." in html


@pytest.mark.usefixtures("undrawn")
def test_devices_get_a_column_when_they_differ_and_speeds_are_then_not_compared() -> None:
    mixed = dataclasses.replace(MIXED, device="GPU <0>")
    text = render_report(small_data(measurements=(FLOAT, mixed)))
    assert table_rows(text, "model")["mixed W4A8 this report"][-1] == "GPU <0>"
    assert "Measured on" not in text
    assert "float32: 100.0" not in text
    text = render_report(small_data(measurements=(dataclasses.replace(FLOAT, device=""), MIXED)))
    assert "Measured on cpu." in text
    text = render_report(small_data(measurements=[dataclasses.replace(m, device="") for m in (FLOAT, MIXED)]))
    assert "Measured on" not in text


@pytest.mark.usefixtures("undrawn")
def test_columns_that_nobody_measured_are_left_out() -> None:
    none = {"kl": None, "agreement": None, "images_per_s": None, "latency_ms": None, "mean_weight_bits": None}
    rows = [dataclasses.replace(m, **none) for m in (FLOAT, MIXED)]
    text = render_report(small_data(measurements=rows))
    assert table_rows(text, "model")["model"] == ["top-1 %", "change points", "weights kB", "times smaller"]


def test_every_site_is_in_the_table_with_its_numbers(html: str) -> None:
    rows = table_rows(html, "site")
    data = make_data()
    assert list(rows)[1:] == [site.name for site in data.sites]
    # 64 rows of 6 bits and 192 of 2, 64 columns, and a byte a row for the order: 3072 + 3072 + 256
    assert rows["blocks.0.mlp.fc1"] == ["256", "64", "192×2b 64×6b", "3.00", "8", "6.4", "65.5", "1.125", "75 %"]
    assert rows["blocks.0.attn.av"] == ["", "", "", "", "3", "", "", "0.875", ""]
    assert rows["head"][:5] == ["10", "64", "10×8b", "8.00", "8"]


def test_bytes_by_width_add_up_to_the_allocation(html: str) -> None:
    data = make_data()
    whole = sum(4 * site.rows * site.cols for site in data.sites)
    bars = re.search(r'<div class="total">(.*?)</section>', html, re.DOTALL)[1]
    full, own = (
        [float(w) for w in re.findall(r'<rect [^>]*? width="([\d.]+)"', svg)]
        for svg in re.findall(r"<svg.*?</svg>", bars)
    )
    assert full == [1000]
    assert sum(own) == pytest.approx(1000 * data.allocation.weight_bytes(data.sites) / whole, abs=0.01)
    assert set(table_rows(html, "width")) == {"width", "2 bits", "4 bits", "6 bits", "8 bits", "row order"}


def test_each_linear_is_a_strip_of_its_rows_in_stored_order(html: str) -> None:
    strips = dict(re.findall(r"<svg[^>]*><title>(blocks[^:]*|head|patch_embed.proj): .*?</title>(.*?)</svg>", html))
    data = make_data()
    assert set(strips) == {site.name for site in data.sites if site.has_weight}
    parts = re.findall(r'class="(b\d)" x="([\d.]+)" width="([\d.]+)"', strips["blocks.0.mlp.fc1"])
    assert parts == [("b6", "0.000", "250.000"), ("b2", "250.000", "750.000")]


@pytest.mark.usefixtures("undrawn")
def test_strip_shows_tiles_of_256_rows() -> None:
    sites = make_sites(1, 128)
    text = render_report(
        ReportData("t", "m", sites, BitAllocation.uniform(sites, 4), None, ())
    )  # qkv has 384 rows, fc1 512
    edges = dict(
        re.findall(r"<title>(blocks[^:<]*): [^<]*</title>(?:<rect[^>]*>)*<path class=\"tile-edge\" d=\"(.*?)\"", text)
    )
    assert edges == {"blocks.0.attn.qkv": "M666.667 0V1", "blocks.0.mlp.fc1": "M500.000 0V1"}


@pytest.mark.usefixtures("undrawn")
def test_activation_widths_are_shown_where_they_differ_and_told_where_not(html: str) -> None:
    assert '<span class="chip b3">3</span>' in html
    sites = make_sites()
    text = render_report(make_data(allocation=BitAllocation.uniform(sites, 4, 6)))
    assert "Activations in the blocks have 6 bits" in text
    assert re.findall(r'class="chip b(\d)"', text) == ["8", "8"]  # patch embedding and head


def test_relevance_has_a_panel_for_each_kind(page: Page) -> None:
    drawn = [attrs["aria-label"] for _, attrs in page.tags if (attrs.get("aria-label") or "").startswith("flow")]
    assert drawn == [f"flow, {kind}" for kind in ("qkv", "qk", "av", "proj", "fc1", "fc2", "outside the blocks")]
    assert page.words.count("75 to 75 % in the top 10 % of rows") == 5
    assert "attnlrp, all tokens, mean of 16 images" in page.text


def test_scatter_labels_every_measured_point(html: str) -> None:
    figure = next(svg for svg in re.findall(r"<svg.*?</svg>", html) if "against weights, kB" in svg)
    assert {"float32", "uniform W4A8", "mixed W4A8", "weights, kB", "top-1 accuracy, %"} <= set(Page(figure).words)


@pytest.mark.usefixtures("undrawn")
def test_scatter_falls_back_to_agreement_and_to_nothing() -> None:
    rows = [dataclasses.replace(m, top1=None) for m in (FLOAT, UNIFORM, MIXED)]
    assert "Agreement with float against size" in render_report(small_data(measurements=rows))
    assert "against size" not in render_report(small_data(measurements=rows[:2]))


@pytest.mark.usefixtures("undrawn")
def test_facts_notes_and_solver_are_listed() -> None:
    allocation = dataclasses.replace(small_data().allocation, solver={"budget": {"mean_weight_bits": 4.0}})
    data = small_data(allocation=allocation, facts={"seed": "7"}, notes=["a subset of 500 images"])
    text = Page(render_report(data)).text
    assert "seed\n7" in text
    assert "a subset of 500 images" in text
    assert "allocation: budget\nmean_weight_bits 4" in text


@pytest.mark.parametrize("measurements", [(), (FLOAT,), (MIXED,), (dataclasses.replace(MIXED, top1=None, kl=None),)])
@pytest.mark.parametrize("with_relevance", [True, False], ids=["relevance", "no-relevance"])
def test_what_was_not_measured_is_not_shown(measurements: tuple[Measurement, ...], with_relevance: bool) -> None:
    data = small_data(measurements=measurements)
    text = render_report(dataclasses.replace(data, relevance=make_relevance(data.sites)) if with_relevance else data)
    page = Page(text)
    assert page.open == []
    assert ("Which layers the decision passes through" in text) == with_relevance
    assert not {"None", "nan", "NaN"} & set(re.findall(r"\w+", page.text))
    assert re.search("smaller than float32|the size of float32", page.text)


@pytest.mark.parametrize("blocks", [4, 24])
def test_depth_of_the_model_is_free(blocks: int) -> None:
    sites = make_sites(blocks, 16)
    text = render_report(ReportData("t", "m", sites, BitAllocation.uniform(sites, 3), make_relevance(sites), (MIXED,)))
    assert set(table_rows(text, "block")) == {"block", *map(str, range(blocks))}


def test_hostile_text_stays_text() -> None:
    sites = tuple(dataclasses.replace(s, name=s.name.replace("blocks.0", f"blocks.0{HOSTILE}")) for s in make_sites(2))
    rows = [dataclasses.replace(m, label=m.label + HOSTILE, device=HOSTILE) for m in (FLOAT, MIXED)]
    rows.append(dataclasses.replace(UNIFORM, label=' id="figure_1" #0a0b00 <!-- ' + "é漢" * 30))
    allocation = dataclasses.replace(BitAllocation.uniform(sites, 4), solver={HOSTILE: HOSTILE})
    text = render_report(
        ReportData(HOSTILE, HOSTILE, sites, allocation, make_relevance(sites), rows, {HOSTILE: HOSTILE}, [HOSTILE])
    )
    page = Page(text)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.text.count(HOSTILE) >= 10
    assert ' id="figure_1" #0a0b00 <!-- é漢'.strip() in page.text


def test_nothing_is_loaded_from_elsewhere(html: str, page: Page) -> None:
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _ in page.tags}
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in page.tags)
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "srcset" in attrs]


def test_names_inside_the_page_are_unique_and_found(html: str, page: Page) -> None:
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', html))
    assert len(names) == len(set(names))
    assert used <= set(names)


def test_drawings_have_only_colours_of_the_theme(html: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", html))
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawings.replace('href="#', "").replace("url(#", ""))
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= defined


def test_equal_data_give_equal_bytes_under_any_matplotlib_settings(html: str) -> None:
    with matplotlib.rc_context({"font.size": 23, "svg.fonttype": "path", "axes.grid": True, "svg.hashsalt": "z"}):
        before = dict(matplotlib.rcParams)
        assert render_report(make_data()) == html
        assert dict(matplotlib.rcParams) == before


@pytest.mark.usefixtures("undrawn")
def test_write_report_writes_what_render_report_says(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    write_report(small_data(title="é"), str(path))
    assert path.read_bytes() == render_report(small_data(title="é")).encode()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.usefixtures("undrawn")
def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "target.html")
    write_report(small_data(), tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "target.html").stat().st_size > 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def write_half(self: Path, text: str, **_: object) -> int:
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError("disk full")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    if failing == "write":
        monkeypatch.setattr(Path, "write_text", write_half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(small_data(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.usefixtures("undrawn")
def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none"))):
        write_report(small_data(), tmp_path / "none" / "report.html")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_bytes", 0),
        ("weight_bytes", True),
        ("weight_bytes", 1.5),
        ("top1", 100.1),
        ("top1", float("nan")),
        ("agreement", -1),
        ("kl", float("inf")),
        ("images_per_s", -2.0),
        ("latency_ms", "3"),
    ],
)
def test_measurement_refuses_bad_values(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"Measurement\.{name} must be .*, got "):
        dataclasses.replace(MIXED, **{name: value})


def test_report_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="allocation does not fit the model"):
        make_data(sites=make_sites(2))
    with pytest.raises(ValueError, match=r"ReportData.relevance must be of the model's sites, got \['blocks.3"):
        make_data(relevance=make_relevance(make_sites(4)))
