"""Strategies, budgets and files of ``vitq allocate`` and ``vitq quantize``, and what they say about a solution."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm

import vitq_kernels as vitq
from tests.command_line import invoke, make_files, run
from vitq_kernels.latency import KernelTime, KernelTimes
from vitq_kernels.sensitivity import Sensitivity
from vitq_kernels.spec import Site

SITES = vitq.model_sites(timm.create_model("vitq_test_tiny"))
BLOCK = [site for site in SITES if site.in_block]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images, files of earlier verbs, made-up sensitivities and kernel times. Read only."""
    folder = make_files(tmp_path_factory.mktemp("files"))
    for part in ("weight", "activation", "both"):
        (folder / f"{part}.json").write_text(sensitivity(part).to_json())
    (folder / "times.json").write_text(times().to_json())
    (folder / "few_times.json").write_text(json.dumps([{"site": "head", "activation_bits": 8, "us": 1}]))
    return folder


def sensitivity(part: str) -> Sensitivity:
    """Falling numbers at 2, 3, 4, 6 bits, with pairs inside the blocks."""
    rng = np.random.default_rng(len(part))
    names = [s.name for s in BLOCK if s.has_weight or part != "weight"]
    widths = np.array([2, 3, 4, 6])
    kl = {n: tuple((np.exp(rng.standard_normal()) * 4.0**-widths).tolist()) for n in names}
    pairs: dict[str, dict[str, tuple]] = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if a.split(".")[1] == b.split(".")[1]:
                pairs.setdefault(a, {})[b] = tuple(map(tuple, (1.1 * np.add.outer(kl[a], kl[b])).tolist()))
    return Sensitivity(part, None, tuple(widths.tolist()), 8, 0.0, kl, tuple(widths.tolist()), pairs)


@functools.cache
def times() -> KernelTimes:
    """Microseconds that grow with both widths, by shape."""
    rows: dict[tuple, KernelTime] = {}
    for site in SITES:
        for activation in range(2, 9):
            if not site.has_weight:
                row = KernelTime(site.macs / 1000 * activation, activation, kind=site.kind, macs=site.macs)
                rows[row.key] = row
                continue
            for weight in range(2, 9):
                tokens = site.macs // (site.rows * site.cols)
                shape = {"rows": site.rows, "cols": site.cols, "tokens": tokens}
                row = KernelTime(site.macs / 1000 * (weight + activation), activation, weight, kind="linear", **shape)
                rows[row.key] = row
    return KernelTimes(tuple(rows.values()))


def allocate(work: Path, tmp_path: Path, *words: object) -> tuple[vitq.BitAllocation, str]:
    """The allocation that the command writes, and what it prints."""
    out = tmp_path / "b.json"
    options = ("--checkpoint", work / "float.safetensors", "--scores", work / "scores.json", "-o", out)
    result = run("allocate", "vitq_test_tiny", *options, *(str(word).format(work=work) for word in words))
    return vitq.BitAllocation.from_json(out.read_text()), result.out


def layers(bits: vitq.BitAllocation) -> bool:
    return all(len(set(s.weight.bits)) == 1 for s in bits.sites.values() if s.weight)


@pytest.mark.parametrize("strategy", ["sensitivity", "combined", "mix-qvit", "greedy"])
def test_a_strategy_with_a_measured_sensitivity(strategy: str, work: Path, tmp_path: Path) -> None:
    words = ("--mean-weight-bits", 3.4, "--allocation", strategy, "--sensitivity", "{work}/weight.json")
    bits, text = allocate(work, tmp_path, *words)
    assert layers(bits)
    assert bits.mean_weight_bits(SITES) <= 3.4
    assert {s.activation for s in bits.sites.values()} == {8}
    assert bits.solver["strategy"] == strategy
    assert ("greedy" if strategy == "greedy" else "optimal") in text


def test_tied_widths(work: Path, tmp_path: Path) -> None:
    words = ("--mean-weight-bits", 3.4, "--tied", "--allocation", "mix-qvit", "--sensitivity", "{work}/both.json")
    bits, _ = allocate(work, tmp_path, *words)
    given = [bits.sites[s.name] for s in BLOCK]
    assert all(s.weight is None or set(s.weight.bits) == {s.activation} for s in given)
    assert len({s.activation for s in given}) > 1


def test_activation_widths_by_their_own_budget(work: Path, tmp_path: Path) -> None:
    files = ("--sensitivity", "{work}/weight.json", "--sensitivity", "{work}/activation.json")
    words = (
        "--mean-weight-bits",
        3.4,
        "--mean-act-bits",
        4,
        "--act-candidates",
        "2,4,6",
        "--allocation",
        "sensitivity",
    )
    bits, text = allocate(work, tmp_path, *words, *files)
    widths = {s: bits.sites[s.name].activation for s in BLOCK}
    assert set(widths.values()) <= {2, 4, 6}
    assert len(set(widths.values())) > 1
    assert sum(s.macs * a for s, a in widths.items()) <= 4 * sum(s.macs for s in widths)
    assert re.search(r"^one width activation narrower: blocks\.", text, re.MULTILINE)
    rows, _ = allocate(work, tmp_path, "--mean-weight-bits", 3, "--mean-act-bits", 5)
    assert not layers(rows)  # beside groups of rows too
    assert len({rows.sites[s.name].activation for s in BLOCK}) > 1


def microseconds(site: Site, bits: vitq.BitAllocation) -> float:
    widths = bits.sites[site.name]
    if widths.weight is None:
        return float(times().us(site, None, widths.activation))
    rows = widths.weight.row_bits()
    return sum(float(times().us(site, b, widths.activation)) for b in rows) / len(rows)


@pytest.mark.parametrize("strategy", ["relevance", "lrp-qvit"])
def test_a_budget_of_latency_by_kernel_times(strategy: str, work: Path, tmp_path: Path) -> None:
    uniform = vitq.BitAllocation.uniform(SITES, 4)
    limit = sum(microseconds(site, uniform) for site in SITES) / 1000
    words = ("--latency-ms", limit, "--kernel-times", "{work}/times.json", "--allocation", strategy)
    bits, text = allocate(work, tmp_path, *words)
    assert 0.97 * limit < sum(microseconds(site, bits) for site in SITES) / 1000 <= limit * (1 + 1e-9)
    assert f"1 % more of latency_ms ({limit:.6g}) would save about" in text


def test_groups_and_candidates(work: Path, tmp_path: Path) -> None:
    bits, _ = allocate(work, tmp_path, "--mean-weight-bits", 5, "--group-rows", 32, "--candidates", "2,4,8")
    mixed = [s.weight for s in bits.sites.values() if s.weight and len(set(s.weight.bits)) > 1]
    assert {w.group_rows for w in mixed} == {32}
    used = {b for s in BLOCK if s.has_weight for b in bits.sites[s.name].weight.bits}
    assert len(used) > 1
    assert used <= {2, 4, 8}


def test_what_it_says_about_the_solution(work: Path, tmp_path: Path) -> None:
    bits, text = allocate(work, tmp_path, "--mean-weight-bits", 3, "--allocation", "lrp-qvit")
    lines = text.splitlines()
    assert f"objective {bits.solver['objective']:.4g}: optimal" in lines
    price = bits.solver["prices"]["mean_weight_bits"]
    assert f"1 % more of mean_weight_bits (3) would save about {price * 0.03:.3g}" in lines
    moves = bits.solver["moves"]
    narrower = sorted((m["narrower"], site) for site, m in moves.items() if "narrower" in m)[:3]
    assert f"one width narrower: {', '.join(f'{site} {change:+.3g}' for change, site in narrower)}" in lines
    assert all(m.get("narrower", 0) >= 0 >= m.get("wider", 0) for m in moves.values())


def test_scores_are_not_needed_where_none_are_used(work: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", work / "float.safetensors", "-o", tmp_path / "b.json", "--mean-weight-bits", 3)
    result = invoke(
        "allocate", "vitq_test_tiny", *words, "--allocation", "sensitivity", "--sensitivity", work / "weight.json"
    )
    assert result.code == 0
    result = invoke("allocate", "vitq_test_tiny", *words)
    assert result.err == "vitq: error: --allocation relevance needs --scores FILE, which `vitq score` writes\n"


@pytest.mark.parametrize(
    "words",
    [
        ("--mean-weight-bits", 3, "--allocation", "sensitivity", "--candidates", "2,4"),
        ("--mean-weight-bits", 3, "--allocation", "mix-qvit", "--candidates", "2,4"),
        ("--mean-act-bits", 5, "--allocation", "sensitivity", "--candidates", "4,8", "--act-candidates", "4,6"),
        ("--mean-weight-bits", 3, "--tied", "--allocation", "combined", "--sensitivity", "{work}/both.json"),
        ("--latency-ms", 9, "--kernel-times", "{work}/times.json", "--group-rows", 16),
    ],
    ids=["sensitivity", "mix-qvit", "activations", "tied-from-a-file", "latency"],
)
def test_quantize_measures_what_a_strategy_needs(words: tuple[object, ...], work: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    data = ("--checkpoint", work / "float.safetensors", "--calibration", work / "calibration")
    run("quantize", "vitq_test_tiny", *data, *(str(w).format(work=work) for w in words), "-o", out)
    plan = vitq.load(out).quantization.allocation
    given = dict(zip(words[::2], words[1::2], strict=False))
    if "--mean-weight-bits" in given:
        assert plan.mean_weight_bits(SITES) <= 3
    if "--act-candidates" in words:
        assert {plan.sites[s.name].activation for s in BLOCK} <= {4, 6}
    if "--tied" in words:
        assert all(
            set(plan.sites[s.name].weight.bits) == {plan.sites[s.name].activation} for s in BLOCK if s.has_weight
        )
    if "--latency-ms" in given:
        assert sum(microseconds(site, plan) for site in SITES) <= 9000
    assert len({plan.sites[s.name] for s in BLOCK}) > 1


DATA = "--checkpoint {work}/float.safetensors"
ALLOCATE = f"allocate vitq_test_tiny {DATA} --scores {{work}}/scores.json -o {{tmp}}/b.json"
QUANTIZE = f"quantize vitq_test_tiny {DATA} --calibration {{work}}/calibration -o {{tmp}}/q.safetensors"
BAD: dict[str, tuple[str, str]] = {
    "no-sensitivity": (
        f"{ALLOCATE} --mean-weight-bits 3 --allocation mix-qvit",
        r"'mix-qvit' needs the weight sensitivity .* `vitq score --sensitivity` .* --sensitivity FILE gives; got none",
    ),
    "sensitivity-of-another-part": (
        f"{ALLOCATE} --mean-weight-bits 3 --allocation sensitivity --sensitivity {{work}}/both.json",
        r"needs the weight sensitivity .*; got \['both'\]",
    ),
    "sensitivity-no-json": (
        f"{ALLOCATE} --mean-weight-bits 3 --allocation sensitivity --sensitivity {{work}}/scores.json",
        r"scores.json: not a sensitivity: ",
    ),
    "latency-without-times": (f"{QUANTIZE} --latency-ms 1", r"latency_ms needs kernel times, got none"),
    "latency-time-missing": (
        f"{ALLOCATE} --latency-ms 1 --kernel-times {{work}}/few_times.json",
        r'kernel times have none for site \S+: \{"kind": "linear", "rows": \d+, .* is missing',
    ),
    "times-no-json": (f"{ALLOCATE} --latency-ms 1 --kernel-times {{work}}/text.json", r"text.json: not kernel times"),
    "latency-infeasible": (
        f"{QUANTIZE} --latency-ms 0.001 --kernel-times {{work}}/times.json",
        r"latency_ms=0.001 cannot be met: the smallest is \d",
    ),
    "act-bits-infeasible": (f"{QUANTIZE} --mean-act-bits 1.5", r"mean_activation_bits=1.5 cannot be met: .* is 2.0"),
    "tied-rows": (f"{QUANTIZE} --mean-weight-bits 3 --tied", r"tied widths need one width a layer: .* lrp-qvit"),
    "rows-and-bitops": (
        f"{QUANTIZE} --bitops 0.03 --act-candidates 4,8",
        r"activation widths chosen under bitops need one width a layer: strategy must be",
    ),
    "group-rows": (f"{QUANTIZE} --mean-weight-bits 3 --group-rows 48", r"--group-rows must be one of 16, 32, 64, got"),
    "candidates-text": (f"{QUANTIZE} --mean-weight-bits 3 --candidates 2,x", r"--candidates must be widths .* '2,x'"),
    "candidates-order": (f"{QUANTIZE} --mean-weight-bits 3 --candidates 4,2", r"--candidates must be widths .* '4,2'"),
    "candidates-wide": (f"{QUANTIZE} --mean-weight-bits 3 --act-candidates 9", r"--act-candidates must be .*'9'"),
    "no-budget": (f"{QUANTIZE} --tied", r"exactly one of --weight-bits, --bits and a budget \(.*--latency-ms\)"),
}


@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(command: str, message: str, work: Path, tmp_path: Path) -> None:
    result = invoke(*command.format(work=work, tmp=tmp_path).split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("vitq: error: ")
    assert result.err.count("\n") == 1
    assert re.search(message, result.err.rstrip("\n")), result.err
    assert list(tmp_path.iterdir()) == []
