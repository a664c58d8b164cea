"""Measured sensitivities against a slow direct twin, and what a cache keeps of a run that stopped."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from small_vits import small_vit, variant_images, variant_vit
from torch import Tensor, nn

from vitq_kernels import sensitivity_runs
from vitq_kernels.config import QuantConfig
from vitq_kernels.models import UnsupportedModelError, model_sites
from vitq_kernels.sensitivity import Part, Sensitivity
from vitq_kernels.sensitivity_quantizers import SiteQuantizers
from vitq_kernels.sensitivity_runs import sensitivity
from vitq_kernels.simulation import simulated

IMAGES, BATCH = 5, 2
CANDIDATES = (2, 4, 7)
QKV, QK, FC2 = "blocks.0.attn.qkv", "blocks.1.attn.qk", "blocks.1.mlp.fc2"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return variant_vit("class-token")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return variant_images(count=IMAGES)


class Twin:
    """Every measurement is a new copy of the simulated model, run from the pixels."""

    def __init__(self, model: nn.Module, images: Tensor, part: Part, baseline: int | None) -> None:
        self.batches = list(images.split(BATCH))
        self.quantizers = SiteQuantizers(model, self.batches, part, QuantConfig())
        self.float = simulated(model)
        self.sites = model_sites(model)
        self.baseline = baseline
        self.form = functools.cache(self.quantizers.form)

    @torch.no_grad()
    def kl(self, **changed: int) -> float:
        """Mean KL with sites (``__`` stands for the dots) at these widths."""
        copied = copy.deepcopy(self.float)
        for site in self.sites:
            bits = changed.get(site.name.replace(".", "__"), self.baseline)
            if not site.in_block and self.baseline is not None:
                bits = 8
            self.form(site, bits).put(site.name, copied)
        total = 0.0
        for batch in self.batches:
            p, q = (net(batch).double().log_softmax(-1) for net in (self.float, copied))
            total += float((p.exp() * (p - q)).sum())
        return total / sum(map(len, self.batches))


def measured(model: nn.Module, images: Tensor, **keywords: Any) -> Sensitivity:
    return sensitivity(model, images, **{"candidates": CANDIDATES, "batch_size": BATCH, **keywords})


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [4, 8, None], ids=["base4", "base8", "float"])
@pytest.mark.parametrize("part", ["weight", "activation", "both"])
def test_every_site_measures_as_its_twin(part: Part, baseline: int | None, model: nn.Module, images: Tensor) -> None:
    found, twin = measured(model, images, part=part, baseline=baseline), Twin(model, images, part, baseline)
    sites = [s.name for s in model_sites(model) if s.in_block and (s.has_weight or part != "weight")]
    assert list(found.kl) == sites
    assert len(sites) == (8 if part == "weight" else 12)
    assert (found.part, found.baseline, found.candidates, found.images) == (part, baseline, CANDIDATES, IMAGES)
    assert found.base_kl == (0 if baseline is None else twin.kl())
    for name in sites:
        assert found.kl[name] == tuple(twin.kl(**{name.replace(".", "__"): bits}) for bits in CANDIDATES), name
    assert found.pairs == {}


@pytest.mark.parametrize("variant", ["distilled", "layer-scale", "average-pool", "pre-norm", "no-qkv-bias"])
def test_other_models_measure_as_their_twins(variant: str, images: Tensor) -> None:
    model = variant_vit(variant)
    sites = ("blocks.0.attn.av", "blocks.1.attn.proj")
    found = measured(model, images, part="both", baseline=6, candidates=(3,), sites=sites)
    twin = Twin(model, images, "both", 6)
    assert found.kl == {name: (twin.kl(**{name.replace(".", "__"): 3}),) for name in sites}


def test_blocks_may_be_left_out(images: Tensor) -> None:
    model, sites = small_vit(depth=5), ("blocks.2.mlp.fc1", "blocks.4.attn.proj")
    found, twin = measured(model, images, baseline=5, candidates=(3,), sites=sites), Twin(model, images, "weight", 5)
    assert found.kl == {name: (twin.kl(**{name.replace(".", "__"): 3}),) for name in sites}


@pytest.mark.parametrize("baseline", [4, None], ids=["base4", "float"])
def test_pairs_measure_as_their_twins(baseline: int | None, model: nn.Module, images: Tensor) -> None:
    keywords = {"part": "both", "baseline": baseline, "pairs": True, "pair_candidates": (2, 4)}
    some = [QKV, "blocks.0.mlp.fc1", QK, "blocks.1.attn.av", FC2]
    found, twin = measured(model, images, sites=some, **keywords), Twin(model, images, "both", baseline)
    expected: dict[str, Any] = {}
    for a, b in combinations(some, 2):
        if a.split(".")[1] == b.split(".")[1]:
            flat = [a.replace(".", "__"), b.replace(".", "__")]
            table = tuple(tuple(twin.kl(**dict(zip(flat, (i, j), strict=True))) for j in (2, 4)) for i in (2, 4))
            expected.setdefault(a, {})[b] = table
    assert found.pairs == expected
    assert sorted(map(len, expected.values())) == [1, 1, 2]
    assert found.pair_candidates == (2, 4)
    assert found.kl == measured(model, images, sites=some, part="both", baseline=baseline).kl


def test_float64_models_are_measured_in_float64(images: Tensor) -> None:
    model = variant_vit("class-token").double()
    found = measured(model, images, part="both", candidates=(3,), sites=[QKV])
    assert found.kl[QKV] == (Twin(model, images.double(), "both", 8).kl(blocks__0__attn__qkv=3),)


def test_batches_are_as_good_as_images(model: nn.Module, images: Tensor) -> None:
    parts = iter([images[:2], images[2:4], images[4:]])
    assert measured(model, parts, sites=[QKV]) == measured(model, images, sites=[QKV])


def test_config_is_used(model: nn.Module, images: Tensor) -> None:
    nearest = measured(model, images, sites=[QKV], config=QuantConfig(gptq=False))
    assert nearest.kl[QKV][0] != measured(model, images, sites=[QKV]).kl[QKV][0]


def test_the_model_is_left_as_it_is(images: Tensor) -> None:
    model = variant_vit("class-token").train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(m.training, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    found = measured(model, images, sites=[FC2], part="both")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == [(m.training, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert needs == [p.requires_grad for p in model.parameters()]
    assert found == measured(variant_vit("class-token"), images, sites=[FC2], part="both")


def test_progress_counts_runs(model: nn.Module, images: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    measured(model, images, sites=[QKV, FC2], progress=lambda *call: calls.append(call))
    assert calls == [(done, 7) for done in range(8)]  # the baseline, and two sites at three widths
    calls.clear()
    measured(model, images, sites=[QKV], baseline=4, candidates=(4,), progress=lambda *call: calls.append(call))
    assert calls == [(0, 1), (1, 1)]  # at its own width a site is the baseline


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is really run, as it happens."""
    happened: list[Any] = []
    original = sensitivity_runs._Bench.kl

    def kl(bench: Any, changes: Any) -> float:
        happened.append(changes)
        return original(bench, changes)

    monkeypatch.setattr(sensitivity_runs._Bench, "kl", kl)
    return happened


class Stopped(Exception):
    """Somebody pressed a key."""


SETTINGS = {"part": "both", "baseline": 6, "sites": [QKV, QK, FC2], "pairs": True, "pair_candidates": (2, 4)}
ALL_RUNS = 1 + 3 * 3 + 4  # the baseline, the sites, and a pair in block 1 at two widths each


@pytest.mark.parametrize("after", [0, 1, 5, ALL_RUNS - 1])
def test_a_stopped_run_goes_on(after: int, model: nn.Module, images: Tensor, runs: list[Any], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == ALL_RUNS
        if done == after:
            raise Stopped

    cache = tmp_path / "cache.jsonl"
    with pytest.raises(Stopped):
        measured(model, images, cache=cache, progress=stop, **SETTINGS)
    assert len(runs) == after
    first = cache.read_text()
    calls: list[tuple[int, int]] = []
    found = measured(model, images, cache=cache, progress=lambda *call: calls.append(call), **SETTINGS)
    assert len(runs) == len(set(runs)) == ALL_RUNS  # nothing twice
    assert calls[0] == (after, ALL_RUNS)
    assert cache.read_text().startswith(first)  # nothing rewritten
    assert found == measured(model, images, **SETTINGS)


def test_a_full_cache_is_all_it_takes(model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: Any) -> None:
    cache = tmp_path / "cache.jsonl"
    found = measured(model, images, cache=cache, **SETTINGS)
    monkeypatch.setattr(sensitivity_runs, "_Bench", None)
    assert measured(model, images, cache=cache, **SETTINGS) == found


def test_half_a_line_is_measured_again(model: nn.Module, images: Tensor, runs: list[Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    found = measured(model, images, cache=cache, **SETTINGS)
    text = cache.read_text()
    cache.write_text(text[:-9])
    runs.clear()
    assert measured(model, images, cache=cache, **SETTINGS) == found
    assert len(runs) == 1
    assert cache.read_text() == text


@pytest.mark.parametrize("kept", [0, 10])
def test_half_a_header_is_no_cache_yet(kept: int, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    found = measured(model, images, cache=cache, sites=[QKV])
    text = cache.read_text()
    cache.write_text(text[:kept])
    assert measured(model, images, cache=cache, sites=[QKV]) == found
    assert cache.read_text() == text


def test_a_cache_grows_with_what_is_asked(model: nn.Module, images: Tensor, runs: list[Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    measured(model, images, cache=cache, sites=[FC2], candidates=(2,))
    runs.clear()
    found = measured(model, images, cache=cache, sites=[QKV, FC2], candidates=(2, 3))
    assert runs == [((QKV, 2),), ((QKV, 3),), ((FC2, 3),)]
    assert found == measured(model, images, sites=[QKV, FC2], candidates=(2, 3))


OTHERS = {
    "part": {"part": "activation"},
    "baseline": {"baseline": 7},
    "float": {"baseline": None},
    "batches": {"batch_size": 3},
    "config": {"config": QuantConfig(reparam_exponent=0.25)},
}


@pytest.mark.parametrize("other", [*OTHERS, "weights", "images", "heads"])
def test_a_cache_of_something_else_is_refused(other: str, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    measured(model, images, cache=cache, sites=[FC2], candidates=(2,))
    before = cache.read_bytes()
    if other == "weights":
        model = copy.deepcopy(model)
        model.blocks[0].norm1.bias.data[0] += 1e-6
    elif other == "heads":
        model = small_vit(num_heads=4)
    elif other == "images":
        images = images.clone()
        images[-1, -1, -1, -1] += 1e-6
    with pytest.raises(ValueError, match=r"cache \S+jsonl belongs to another model, other images or other settings"):
        measured(model, images, cache=cache, sites=[FC2], candidates=(2,), **OTHERS.get(other, {}))
    assert cache.read_bytes() == before


@pytest.mark.parametrize("text", ["{}\n", "hello\n", "[1]\n", '{"format": "vitq sensitivity cache 0"}\n'])
def test_another_file_is_no_cache(text: str, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=r"cache \S+file is not a 'vitq sensitivity cache 1' file"):
        measured(model, images, cache=tmp_path / "file")
    assert (tmp_path / "file").read_text() == text


@pytest.mark.parametrize("line", ["{nope", "{}", '{"changed": 3, "kl": 1}', '{"changed": {}, "kl": "x"}', "3"])
def test_a_damaged_cache_is_refused(line: str, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    measured(model, images, cache=cache, sites=[FC2], candidates=(2,))
    with cache.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match="is damaged in line 4"):
        measured(model, images, cache=cache)


def test_a_cache_has_a_line_a_run(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    found = measured(model, images, cache=cache, sites=[FC2], candidates=(2,))
    header, *lines = map(json.loads, cache.read_text().splitlines())
    assert list(header) == ["format", "fingerprint"]
    assert lines == [{"changed": {}, "kl": found.base_kl}, {"changed": {FC2: 2}, "kl": found.kl[FC2][0]}]


def test_a_cache_needs_its_directory(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"directory \S+nowhere does not exist"):
        measured(model, images, cache=tmp_path / "nowhere" / "cache.jsonl")


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"part": "input"}, r"sensitivity: part must be one of .*got 'input'"),
        ({"baseline": 1}, r"sensitivity: baseline must be an integer in 2\.\.8, got 1"),
        ({"candidates": ()}, "sensitivity: candidates must be rising widths, at least one"),
        ({"candidates": (4, 2)}, r"sensitivity: candidates must be rising widths, at least one, got \(4, 2\)"),
        ({"candidates": (2, 9)}, "sensitivity: candidates must be an integer"),
        ({"pairs": True, "pair_candidates": ()}, "sensitivity: pair_candidates must be rising widths, at least one"),
        ({"pairs": True, "pair_candidates": (2, 3)}, r"pair_candidates must be among candidates \(2, 4, 7\), got"),
        ({"sites": ["blocks.0.attn.qk"]}, r"sites of the blocks with a weight width, got \['blocks.0.attn.qk'\]"),
        ({"sites": ["head"]}, r"sites of the blocks with a weight width, got \['head'\]"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"images": torch.zeros(0, 3, 32, 32)}, "images must hold at least one image"),
        ({"images": torch.full((1, 3, 32, 32), torch.nan)}, "images must be finite"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(keywords: dict[str, Any], message: str, model: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        measured(model, **{"images": images, **keywords})


def test_half_precision_is_refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must have float32 or float64 weights, got torch\.bfloat16"):
        measured(copy.deepcopy(model).bfloat16(), images)


def test_a_part_without_an_integer_form_is_refused(images: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        measured(small_vit(act_layer="elu"), images)
