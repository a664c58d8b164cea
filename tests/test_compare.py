"""Methods side by side: equal bytes, controls and verdicts, what rows share, rows that fail, and how it all prints."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_vits import variant_images, variant_vit
from torch import Tensor, nn

import vitq_kernels as vitq
from vitq_kernels import planning
from vitq_kernels.compare import compare, equal_bytes
from vitq_kernels.compare_jobs import METHODS, STRATEGIES, Job, plan_jobs
from vitq_kernels.compare_plot import write_plot
from vitq_kernels.compare_rows import Comparison, ComparisonRow, Verdict, image_kl, standard_error
from vitq_kernels.data import digits_images, load_digits_vit
from vitq_kernels.presets import PRESETS
from vitq_kernels.spec import DEFAULT_GROUP_ROWS, BitAllocation
from vitq_kernels.strategies import BY_ROW, BY_SENSITIVITY, WITHOUT_SCORES, rules_of

module = importlib.import_module("vitq_kernels.compare")  # the package's attribute of this name is the function

MEAN = 3.0
FAST = ("relevance", "fisher", "lrp-qvit", "sensitivity", "combined", "greedy", "random")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return variant_vit("class-token")


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return variant_images(count=6)


@pytest.fixture(scope="module")
def batches(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Ten images in uneven batches; labels are the float model's answers, but for every third image."""
    images = variant_images(count=10, seed=9)
    said = net(images).argmax(1)
    labels = torch.where(torch.arange(10) % 3 == 0, (said + 1) % 10, said)
    return list(zip(images.split(4), labels.split(4), strict=True))


@pytest.fixture(scope="module")
def full(net: nn.Module, calibration: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Comparison:
    """Every allocation but mix-qvit at a mean of 3 bits, and two presets."""
    return compare(net, calibration, batches, pairs=[(3, 8)], means=[MEAN], methods=[*FAST, "fq-vit", "repq-vit"])


@pytest.fixture
def rounded_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of conversion, which takes the time of these tests: each row of a weight rounded to its width."""

    def quantize(model: nn.Module, images: Tensor, allocation: BitAllocation, **_: Any) -> nn.Module:
        result = copy.deepcopy(model)
        for name, site in allocation.sites.items():
            if site.weight is not None:
                weight = result.get_submodule(name).weight
                top = 2.0 ** (torch.tensor(site.weight.row_bits()) - 1) - 1
                scale = (weight.flatten(1).abs().amax(1) / top).view(-1, *[1] * (weight.dim() - 1))
                weight.data = (weight / scale).round() * scale
        return result

    monkeypatch.setattr(module, "quantize", quantize)


def row_of(comparison: Comparison, method: str) -> ComparisonRow:
    return next(row for row in comparison.rows if row.method == method)


# Which models are made.


def test_all_methods_at_a_pair_and_a_mean() -> None:
    jobs = plan_jobs(None, [(4, 4)], [3], 8, 5)
    assert [job.label for job in jobs if job.widths == (4, 4)] == [
        "uniform",
        *(f"{name} (preset, {preset.executes})" for name, preset in PRESETS.items()),
    ]
    of_mean = [job for job in jobs if job.widths == (3, 8)]
    assert [job.label for job in of_mean[:4]] == [
        "uniform",
        *(f"random allocation, seed {seed}" for seed in (5, 6, 7)),
    ]
    assert {job.label for job in of_mean[4:]} == {f"{name} allocation" for name in STRATEGIES if name != "random"}
    assert len({(job.label, job.widths) for job in jobs}) == len(jobs) == 1 + len(PRESETS) + 4 + len(STRATEGIES) - 1


@pytest.mark.parametrize(
    ("methods", "labels"),
    [
        (["sensitivity"], ["uniform", "sensitivity allocation"]),
        (["lrp-qvit"], ["uniform", "lrp-qvit allocation", "lrp-qvit (preset, simulated)"]),
        (["fisher"], ["uniform", *(f"random allocation, seed {i}" for i in range(3)), "fisher allocation"]),
        (["uniform"], ["uniform"]),
    ],
    ids=["by-layer", "both-kinds", "by-row", "uniform"],
)
def test_controls_come_along_once_and_first(methods: list[str], labels: list[str]) -> None:
    assert [job.label for job in plan_jobs(methods, [(3, 8)], [3], 8, 0)] == labels


def test_a_mean_between_widths_has_no_uniform_model() -> None:
    assert [job.label for job in plan_jobs(["greedy"], [], [2.5], 8, 0)] == ["greedy allocation"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_row_where_it_has_widths(method: str) -> None:
    kinds = {job.kind for job in plan_jobs([method], [(4, 8)], [3], 8, 0) if job.method == method}
    expected = {"allocation"} if method in STRATEGIES else set()
    expected |= {"preset"} if method in PRESETS else set()
    assert kinds == (expected or {"uniform"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["nonsense"], [(4, 8)], [], 8, 0), "methods must be among uniform, .*, got 'nonsense'"),
        ((["adalog"], [], [3], 8, 0), "'adalog' has no row"),
        ((["greedy"], [(4, 8)], [], 8, 0), "'greedy' has no row"),
        ((None, [], [], 8, 0), "methods have no row"),
        (([], [], [], 8, 0), "methods have no row"),
        ((None, [(9, 8)], [], 8, 0), r"weight bits must be an integer in 2\.\.8, got 9"),
        ((None, [(4, 1)], [], 8, 0), r"activation bits must be an integer in 2\.\.8, got 1"),
        ((None, [], [1.9], 8, 0), r"means must be in 2\.\.8, got 1.9"),
        ((None, [], [math.nan], 8, 0), r"means must be in 2\.\.8, got nan"),
        ((None, [], [3], 9, 0), r"activation_bits must be an integer in 2\.\.8, got 9"),
    ],
    ids=["unknown", "preset", "allocation", "nothing", "none", "weight", "activation", "mean", "nan", "act-bits"],
)
def test_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_jobs(*arguments)


# Bytes.


@pytest.mark.parametrize("mean", [2.0, 2.5, 3.0, 4.0, 8.0])
def test_equal_bytes_are_those_of_uniform_models(net: nn.Module, mean: float) -> None:
    sites = vitq.model_sites(net)
    low, high = (BitAllocation.uniform(sites, bits).weight_bytes(sites) for bits in (int(mean), math.ceil(mean)))
    assert equal_bytes(sites, mean) == (low + high) // 2 if mean == 2.5 else low


@pytest.mark.parametrize("method", [name for name in FAST if name != "random"])
def test_allocations_take_the_bytes_of_uniform_and_no_more(net: nn.Module, full: Comparison, method: str) -> None:
    """They may be below by what the widening of the largest group and the row orders of tiles left whole would take."""
    sites = vitq.model_sites(net)
    budget = BitAllocation.uniform(sites, int(MEAN)).weight_bytes(sites)
    used = row_of(full, f"{method} allocation").weight_bytes
    assert used is not None
    blocks = [site for site in sites if site.in_block and site.has_weight]
    group = max((DEFAULT_GROUP_ROWS if method in BY_ROW else site.rows) * site.cols for site in blocks) // 8
    orders = sum(site.rows for site in blocks) if method in BY_ROW else 0
    assert budget - group - orders < used <= budget
    assert row_of(full, "uniform").weight_bytes == budget


@pytest.fixture(scope="module")
def bench(net: nn.Module, calibration: Tensor, batches: list[Any]) -> Any:
    return module._Bench(net, calibration, batches, 16, None)


@pytest.mark.parametrize("method", STRATEGIES)
def test_allocations_are_those_of_allocate(
    method: Any, net: nn.Module, calibration: Tensor, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bench.allocation(Job("allocation", method, 2.75, 6, 4))
    # The same measurements: others of the same images may round otherwise.
    monkeypatch.setattr(planning, "measure_errors", lambda *_, **__: bench._kept["errors at A6"][0])
    expected = vitq.allocate(
        net,
        None if method in WITHOUT_SCORES else bench._kept[rules_of(method)][0],
        vitq.Budget(size_mb=equal_bytes(vitq.model_sites(net), 2.75) / 1e6),
        images=calibration,
        strategy=method,
        sensitivity=[bench._sensitivity(pairs=True)] if method in BY_SENSITIVITY else (),
        activation_bits=6,
        seed=4,
    )
    assert found.sites == expected.sites
    assert found.solver == expected.solver  # also how it was searched


def test_presets_take_the_bytes_of_uniform(full: Comparison) -> None:
    presets = [row for row in full.rows if "preset" in row.method]
    assert [row.method.split(" ")[0] for row in presets] == ["fq-vit", "repq-vit", "lrp-qvit"]
    assert {row.weight_bytes for row in presets} == {row_of(full, "uniform").weight_bytes}
    assert {row.executes for row in presets} == {"simulated"}


# Numbers.


@pytest.mark.parametrize("method", ["uniform", "relevance"])
def test_numbers_are_those_of_evaluate(
    method: str, net: nn.Module, calibration: Tensor, batches: list[tuple[Tensor, Tensor]], full: Comparison
) -> None:
    sites = vitq.model_sites(net)
    widths = BitAllocation.uniform(sites, 3)
    if method == "relevance":
        budget = vitq.Budget(size_mb=widths.weight_bytes(sites) / 1e6)
        widths = vitq.allocate(net, vitq.relevance(net, calibration), budget, images=calibration)
    expected = vitq.evaluate(vitq.quantize(net, calibration, widths), batches, float_model=net)
    row = row_of(full, method if method == "uniform" else f"{method} allocation")
    assert (row.top1, row.agreement) == (expected.top1, expected.agreement)
    assert row.kl == pytest.approx(expected.kl, rel=1e-4)  # float64 here, float32 there
    assert row.drop == pytest.approx(expected.float_top1 - expected.top1)
    assert full.float_top1 == expected.float_top1 == pytest.approx(60)
    assert (row.weight_bytes, row.mean_weight_bits) == (widths.weight_bytes(sites), widths.mean_weight_bits(sites))


def test_drop_and_agreement_of_a_model_that_suffers() -> None:
    digits, calibration = load_digits_vit(), digits_images("calibration")[0][:8]
    images, labels = (each[:60] for each in digits_images("test"))
    labels[:3] = (labels[:3] + 1) % 10  # the float model has errors too
    batches = [(images, labels)]
    row = compare(digits, calibration, batches, pairs=[(2, 2)], methods=["uniform"]).rows[0]
    qmodel = vitq.quantize(digits, calibration, BitAllocation.uniform(vitq.model_sites(digits), 2, 2))
    expected = vitq.evaluate(qmodel, batches, float_model=digits)
    assert (row.top1, row.agreement) == (expected.top1, expected.agreement)
    assert row.drop == pytest.approx(expected.float_top1 - expected.top1)
    assert row.drop > 0
    assert row.top1 < row.agreement < 100


def test_permutations_differ_and_so_do_their_answers(full: Comparison) -> None:
    rows = [row_of(full, f"random allocation, seed {seed}") for seed in range(3)]
    assert len({row.kl for row in rows}) == 3
    mean = row_of(full, "random allocation, mean of 3")
    for name in ("top1", "drop", "agreement", "kl", "mean_weight_bits", "seconds"):
        assert getattr(mean, name) == pytest.approx(sum(getattr(row, name) for row in rows) / 3)
    assert mean.verdicts[0].difference == pytest.approx(sum(row.verdicts[0].difference for row in rows) / 3)


@pytest.mark.usefixtures("rounded_only")
def test_permutations_of_two_means_are_not_mixed(net: nn.Module, calibration: Tensor, batches: list[Any]) -> None:
    """Without a uniform row between them."""
    rows = compare(net, calibration, batches, means=[3.5, 2.5], methods=["random"]).rows
    assert [(row.weight_bits, "mean of 3" in row.method) for row in rows] == [
        (bits, mean) for bits in (3.5, 2.5) for mean in (False, False, False, True)
    ]
    for *each, mean in (rows[:4], rows[4:]):
        assert mean.kl == pytest.approx(sum(row.kl for row in each) / 3)
        assert {row.judgement for row in (*each, mean)} == {"no control"}


def test_rows_are_judged_against_their_controls(full: Comparison) -> None:
    uniform, permuted = row_of(full, "uniform"), row_of(full, "random allocation, mean of 3")
    for row in full.rows:
        controls = [uniform, permuted] if row.method.startswith(("relevance", "fisher")) else [uniform]
        controls = [] if row is uniform else controls
        assert [verdict.control for verdict in row.verdicts] == ["uniform", "random"][: len(controls)]
        for verdict, control in zip(row.verdicts, controls, strict=True):
            assert verdict.difference == pytest.approx(row.kl - control.kl, abs=1e-12)


def test_a_second_run_gives_the_same(
    net: nn.Module, calibration: Tensor, batches: list[tuple[Tensor, Tensor]], full: Comparison
) -> None:
    again = compare(net, calibration, batches, pairs=[(3, 8)], means=[MEAN], methods=["fisher", "repq-vit"])
    for row in again.rows:
        before = row_of(full, row.method)
        assert (row.kl, row.weight_bytes, row.verdicts) == (before.kl, before.weight_bytes, before.verdicts)


def test_without_labels_there_is_no_top1(net: nn.Module, calibration: Tensor, batches: list[Any]) -> None:
    unlabelled = [(images, None) for images, _ in batches]
    result = compare(net, calibration, unlabelled, pairs=[(4, 8)], methods=["uniform"])
    row = result.rows[0]
    assert (result.float_top1, row.top1, row.drop) == (None, None, None)
    assert row.kl is not None
    assert "top-1 " not in result.table().splitlines()[-2]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one image", "at least 2 images, got 1"),
        ("label", "labels must be classes below 10, got 10"),
        ("nan", "the model answers NaN or Inf"),
    ],
)
def test_refuses_images(case: str, message: str, net: nn.Module, calibration: Tensor) -> None:
    images, labels = variant_images(count=2), torch.tensor([3, 10 if case == "label" else 9])
    if case == "nan":
        images[1, 0, 0, 0] = math.nan
    count = 1 if case == "one image" else 2
    with pytest.raises(ValueError, match=message):
        compare(net, calibration, [(images[:count], labels[:count])], pairs=[(4, 8)], methods=["uniform"])


# What rows share, and rows that fail.


@pytest.mark.usefixtures("rounded_only")
def test_what_rows_share_is_measured_once(
    net: nn.Module, calibration: Tensor, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("calibrate", "relevance", "measure_errors", "sensitivity"):
        real = getattr(module, name)

        def counted(*arguments: Any, real: Any = real, name: str = name, **keywords: Any) -> Any:
            calls.append(f"{name} {keywords.get('method', '')}{'pairs' if keywords.get('pairs') else ''}".strip())
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, name, counted)
    methods = ["relevance", "combined", "sensitivity", "mix-qvit", "fisher"]
    seen: list[str] = []
    result = compare(net, calibration, batches, means=[3, 2.5], methods=methods, progress=seen.append)
    assert not [row.failure for row in result.rows if row.failure]
    assert sorted(calls) == [
        "calibrate",
        "measure_errors",
        "relevance attnlrp",
        "relevance chefer",
        "relevance fisher",
        "sensitivity",
        "sensitivity pairs",
    ]
    assert seen[0] == "float answers"
    assert seen[1:] == [
        f"{i} of 17: {row.widths} {row.method}"
        for i, row in enumerate((row for row in result.rows if "mean of" not in row.method), start=1)
    ]


def test_seconds_count_what_was_ready(net: nn.Module, calibration: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row costs as much as it would alone: what an earlier row measured counts in full."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    real = {name: getattr(module, name) for name in ("calibrate", "quantize")}

    def slow(name: str, seconds: float) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            clock[0] += seconds
            return real[name](*arguments, **keywords)

        return call

    monkeypatch.setattr(module, "calibrate", slow("calibrate", 100.0))
    monkeypatch.setattr(module, "quantize", slow("quantize", 1.0))
    result = compare(net, calibration, [(calibration, None)], pairs=[(4, 8), (3, 8)], methods=["uniform"])
    assert [row.seconds for row in result.rows] == [101.0, 101.0]


@pytest.mark.parametrize("failing", ["fisher", "uniform", "random"])
@pytest.mark.usefixtures("rounded_only")
def test_a_method_that_fails_does_not_end_the_run(
    failing: str, net: nn.Module, calibration: Tensor, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._Bench.allocation

    def allocation(bench: Any, job: Job) -> BitAllocation:
        if job.method == failing and job.seed != 1:
            raise RuntimeError("no such luck\n  today | here")
        return real(bench, job)

    monkeypatch.setattr(module._Bench, "allocation", allocation)
    kept: list[Comparison] = []
    result = compare(net, calibration, batches, means=[3], methods=["relevance", "fisher"], on_row=kept.append)
    failed = [row for row in result.rows if row.failure is not None]
    assert {row.failure for row in failed} == {"RuntimeError: no such luck today | here"}
    assert [row.method.split(" ")[0] for row in failed] == [failing] * (2 if failing == "random" else 1)
    assert all(row.kl is None and not row.verdicts for row in failed)
    controls = {"uniform": ["random"], "random": ["uniform", "random"], "fisher": ["uniform", "random"]}[failing]
    assert [verdict.control for verdict in row_of(result, "relevance allocation").verdicts] == controls
    averaged = [row.method for row in result.rows if "mean of" in row.method]
    assert averaged == [f"random allocation, mean of {1 if failing == 'random' else 3}"]
    assert "failed: RuntimeError: no such luck today | here" in result.table()
    assert r"failed: RuntimeError: no such luck today \| here" in result.markdown()
    assert Comparison.from_json(result.to_json()) == result
    assert [len(each.rows) for each in kept] == sorted(len(each.rows) for each in kept)
    assert kept[-1] == result
    assert len(kept) == 6


@pytest.mark.usefixtures("rounded_only")
def test_no_permutation_is_left(net: nn.Module, calibration: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no relevance")

    monkeypatch.setattr(module, "relevance", broken)
    result = compare(net, calibration, [(calibration, None)], means=[3], methods=["random", "greedy"])
    assert [row.method for row in result.rows if row.failure] == [f"random allocation, seed {i}" for i in range(3)]
    assert [row.method for row in result.rows if not row.failure] == ["uniform", "greedy allocation"]


@pytest.mark.usefixtures("rounded_only")
def test_a_sensitivity_cache_is_used(net: nn.Module, calibration: Tensor, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    arguments: Any = (net, calibration, [(calibration, None)])
    first = compare(*arguments, means=[3], methods=["sensitivity"], cache=cache)
    text = cache.read_text()
    assert len(text.splitlines()) > 10
    second = compare(*arguments, means=[3], methods=["sensitivity"], cache=cache)
    assert cache.read_text() == text
    assert first.rows[1].kl == second.rows[1].kl


# Verdicts, by hand.


@pytest.mark.parametrize(
    ("kl", "control", "word"),
    [
        ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], "beats"),
        ([0.5, 0.6, 0.7], [0.1, 0.2, 0.3], "loses to"),
        ([0.1, 0.9, 0.1], [0.2, 0.1, 0.2], "does not beat"),
        ([0.2, 0.1, 0.2], [0.1, 0.9, 0.1], "does not beat"),  # better on average, by one image alone
        ([0.1, 5.0, 0.3], [0.11, 5.01, 0.31], "beats"),  # images differ much, models by the same on each
        ([0.4, 0.4, 0.4], [0.4, 0.4, 0.4], "does not beat"),
    ],
    ids=["better", "worse", "noise", "one-image", "paired", "equal"],
)
def test_verdicts(kl: list[float], control: list[float], word: str) -> None:
    verdict = Verdict.of(torch.tensor(kl).double(), torch.tensor(control).double(), "uniform")
    assert str(verdict).startswith(f"{word} uniform (")
    assert (verdict.beats, verdict.loses) == (word == "beats", word == "loses to")


@pytest.mark.parametrize(
    ("difference", "word"),
    [(-0.41, "beats"), (-0.4, "does not beat"), (0.4, "does not beat"), (0.41, "loses to")],
)
def test_a_difference_counts_beyond_two_standard_errors(difference: float, word: str) -> None:
    assert str(Verdict("uniform", difference, 0.2)) == f"{word} uniform ({difference:+.2g} ± 0.2)"


def test_the_error_of_a_difference() -> None:
    """Differences 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3, over 4 images."""
    verdict = Verdict.of(torch.tensor([1.0, 2.0, 3.0, 6.0]).double(), torch.zeros(4).double(), "random")
    assert verdict.difference == 3
    assert verdict.error == pytest.approx(math.sqrt(14 / 3 / 4), rel=1e-15)
    assert standard_error(torch.tensor([1.0, 3.0]).double()) == 1


def test_image_kl_by_its_definition() -> None:
    logits, reference = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 4
    for row, answer, truth in zip(image_kl(logits, reference), logits.tolist(), reference.tolist(), strict=True):
        p, q = ([math.exp(v) / sum(map(math.exp, values)) for v in values] for values in (truth, answer))
        assert float(row) == pytest.approx(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert torch.equal(image_kl(reference, reference), torch.zeros(5).double())
    assert bool(torch.isfinite(image_kl(torch.tensor([[0.0, 900.0]]), torch.tensor([[900.0, 0.0]]))).all())


# Text, JSON and drawing.


def test_json_round_trip(full: Comparison) -> None:
    assert Comparison.from_json(full.to_json()) == full
    assert json.loads(full.to_json())["rows"][0]["method"] == "uniform"


@pytest.mark.parametrize("text", ["{nope", "[]", "{}", '{"rows": [{"verdicts": [{}]}]}', '{"rows": [{}]}', "3"])
def test_refuses_json(text: str) -> None:
    with pytest.raises(ValueError, match="not a comparison: "):
        Comparison.from_json(text)


def test_table_and_markdown_have_a_line_a_row(full: Comparison) -> None:
    lines = full.table().splitlines()
    assert len(lines) == 1 + len(full.rows) + 3
    head = lines[0]
    for line, row in zip(lines[1:], full.rows, strict=False):
        assert line[: len("widths")].strip() == "W3A8"
        assert line[head.index("method") : head.index("executes")].strip() == row.method
        assert line[head.index("against") :].strip() == row.judgement
    cells = [line.split(" | ") for line in full.markdown().splitlines()[: 2 + len(full.rows)]]
    assert {len(line) for line in cells} == {11}
    assert str(full) == full.table()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_the_same_twice(full: Comparison, suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_plot(full, tmp_path / f"{name}{suffix}")
    first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    if suffix == ".png":
        assert first.startswith(b"\x89PNG")
    else:
        text = first.decode()
        assert all(row.method in text for row in full.rows)
        assert "W3A8" in text


def test_plot_leaves_out_what_failed(tmp_path: Path) -> None:
    good, bad = ComparisonRow("uniform", 4, 8, "integers", kl=0.0, kl_error=0.0), ComparisonRow("x", 4, 8, "integers")
    write_plot(Comparison(2, 2, 0, None, 4, (good, bad)), tmp_path / "a.svg")
    assert ">x<" not in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match="nothing to draw"):
        write_plot(Comparison(2, 2, 0, None, 4, (bad,)), tmp_path / "b.svg")
    with pytest.raises(ValueError, match=r"plot must be a \.png or \.svg file, got b\.pdf"):
        write_plot(Comparison(2, 2, 0, None, 4, (good,)), tmp_path / "b.pdf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
