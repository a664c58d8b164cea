"""Allocations for a model: errors measured as conversion makes them, strategies that do what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.numerics import assert_bitwise_equal
from tests.small_vits import small_vit, sqnr_db, variant_images
from vitq_kernels.calibration import calibrate, input_covariances
from vitq_kernels.config import QuantConfig
from vitq_kernels.convert import quantize
from vitq_kernels.latency import KernelTime, KernelTimes
from vitq_kernels.models import model_sites
from vitq_kernels.planning import CANDIDATES, allocate, measure_errors
from vitq_kernels.quantizers import affine_quantizer
from vitq_kernels.relevance import Relevance, relevance
from vitq_kernels.rounding import gptq, round_to_nearest, weight_scale
from vitq_kernels.sensitivity import Sensitivity
from vitq_kernels.spec import BitAllocation, Budget, Site

IMAGES = variant_images()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit()


@pytest.fixture(scope="module")
def sites(model: nn.Module) -> tuple[Site, ...]:
    return model_sites(model)


@pytest.fixture(scope="module")
def scores(model: nn.Module) -> Relevance:
    return relevance(model, IMAGES)


@pytest.fixture(scope="module")
def errors(model: nn.Module) -> dict[str, np.ndarray]:
    return measure_errors(model, IMAGES)


def linears_of(sites: tuple[Site, ...]) -> list[str]:
    return [site.name for site in sites if site.in_block and site.has_weight]


def cost(allocation: BitAllocation, scores: Relevance, errors: dict[str, np.ndarray]) -> float:
    """Relevance-weighted relative error that the weights of an allocation make."""
    return sum(
        scores.row_flow[name][row] * rows[row, bits - 2]
        for name, rows in errors.items()
        for row, bits in enumerate(allocation.sites[name].weight.row_bits())
    )


# --- measured errors ----------------------------------------------------------------------------------------------


def direct_error(weight: Tensor, codes: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """Relative squared error of each output over the inputs x [T, K], which a bias cannot make good."""
    exact = x @ weight.double().t()
    got = x @ (codes.double() * scale.double()[:, None]).t()
    return (got - exact - (got - exact).mean(0)).square().mean(0) / (exact - exact.mean(0)).square().mean(0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("suffix", ["attn.proj", "mlp.fc2"])
def test_errors_are_those_of_the_outputs(suffix: str, bits: int, model: nn.Module, errors: dict) -> None:
    name = f"blocks.1.{suffix}"
    linear, seen = model.get_submodule(name), []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(IMAGES)
        handle.remove()
        row_bits = torch.full((linear.out_features,), bits)
        kind = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}[suffix]
        low, high = calibrate(model, IMAGES).inputs[name].choose(8, QuantConfig())
        units = affine_quantizer(low, high, 8, QuantConfig().exponent(kind, 8)).scale  # of the columns
        folded = linear.weight * units
        scale = weight_scale(folded, row_bits)
        covariance = input_covariances(model, IMAGES)[name] / units.double() / units.double()[:, None]
        codes = gptq(folded, scale, row_bits, covariance)
        expected = direct_error(folded, codes, scale, seen[0] / units.double())
    np.testing.assert_allclose(errors[name][:, bits - 2], expected.numpy(), rtol=1e-3)


def test_errors_without_images_are_of_white_inputs_and_plain_rounding(model: nn.Module, sites: tuple) -> None:
    found = measure_errors(model, None)
    assert list(found) == linears_of(sites)
    for name in found:
        weight = model.get_submodule(name).weight.detach()
        for bits in CANDIDATES:
            row_bits = torch.full((len(weight),), bits)
            scale = weight_scale(weight, row_bits)
            wrong = round_to_nearest(weight, scale, row_bits).double() * scale.double()[:, None] - weight
            expected = wrong.square().sum(1) / weight.double().square().sum(1)
            np.testing.assert_allclose(found[name][:, bits - 2], expected.numpy(), rtol=1e-6)


def test_errors_cover_every_linear_row_and_width(model: nn.Module, sites: tuple, errors: dict) -> None:
    assert list(errors) == linears_of(sites)
    for site in sites:
        if site.name in errors:
            assert errors[site.name].shape == (site.rows, 7)
            assert (errors[site.name] >= 0).all()
            fall = errors[site.name].mean(0)
            assert (fall[1:] < 0.6 * fall[:-1]).all()  # about fourfold a bit


def test_progress_counts_linears(model: nn.Module, scores: Relevance) -> None:
    calls = []
    allocate(model, scores, Budget(mean_weight_bits=4), progress=lambda *done: calls.append(done))
    assert calls == [(i, 8) for i in range(1, 9)]


# --- strategies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [IMAGES, None], ids=["measured", "from-weights"])
@pytest.mark.parametrize("bits", [2.5, 3, 4])
def test_relevance_costs_less_than_chance_and_than_one_width(
    bits: float, images: Tensor | None, model: nn.Module, sites: tuple, scores: Relevance, errors: dict
) -> None:
    budget = Budget(mean_weight_bits=bits)
    own = cost(allocate(model, scores, budget, images=images), scores, errors)
    for seed in range(3):
        chance = allocate(model, scores, budget, images=images, strategy="random", seed=seed)
        assert own < 0.8 * cost(chance, scores, errors)  # measured .4 to .5
    uniform = BitAllocation.uniform(sites, int(bits))
    assert own < 0.8 * cost(uniform, scores, errors)


def test_measuring_pays(model: nn.Module, scores: Relevance, errors: dict) -> None:
    budget = Budget(mean_weight_bits=3)
    measured, estimated = (cost(allocate(model, scores, budget, images=x), scores, errors) for x in (IMAGES, None))
    assert measured < estimated


def test_relevant_rows_get_more_bits(model: nn.Module, scores: Relevance) -> None:
    allocation = allocate(model, scores, Budget(mean_weight_bits=4))
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"):
        bits = np.array(allocation.sites[name].weight.row_bits())
        flow = np.array(scores.row_flow[name])
        assert len(set(bits)) > 1
        assert flow[bits == bits.max()].mean() > 2 * flow[bits == bits.min()].mean()


def test_scores_matter(model: nn.Module, scores: Relevance) -> None:
    budget = Budget(mean_weight_bits=4)
    other = {name: tuple(reversed(rows)) for name, rows in scores.row_flow.items()}
    assert allocate(model, scores, budget).sites != allocate(model, replace(scores, row_flow=other), budget).sites


def test_chance_permutes_the_rows_over_the_whole_model(model: nn.Module, scores: Relevance) -> None:
    """A layer without any relevance gets bits by chance, none by relevance."""
    flow = {n: tuple(0.0 for _ in rows) if n == "blocks.0.mlp.fc1" else rows for n, rows in scores.row_flow.items()}
    dead, budget = replace(scores, row_flow=flow), Budget(mean_weight_bits=4)
    assert allocate(model, dead, budget).sites["blocks.0.mlp.fc1"].weight.mean_bits == 2
    chance = allocate(model, dead, budget, strategy="random")
    assert chance.sites["blocks.0.mlp.fc1"].weight.mean_bits > 2.5


@pytest.fixture(scope="module")
def chefer(model: nn.Module) -> Relevance:
    return relevance(model, IMAGES, method="chefer")


@pytest.mark.parametrize("bits", [2.9, 4, 5.3])
def test_lrp_qvit_gives_one_width_a_layer(bits: float, model: nn.Module, sites: tuple, chefer: Relevance) -> None:
    allocation = allocate(model, chefer, Budget(mean_weight_bits=bits), strategy="lrp-qvit", images=IMAGES)
    widths = {name: set(allocation.sites[name].weight.bits) for name in linears_of(sites)}
    assert all(len(bits) == 1 for bits in widths.values())
    assert len(set.union(*widths.values())) > 1
    assert allocation.weight_bytes(sites) == sum(
        site.rows * site.cols * allocation.sites[site.name].weight.bits[0] // 8 for site in sites if site.has_weight
    )
    # By |mean score|: of two layers of one shape the higher score has no fewer bits.
    for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        first, second = (f"blocks.{i}.{kind}" for i in (0, 1))
        if abs(chefer.mean_score[first]) < abs(chefer.mean_score[second]):
            first, second = second, first
        assert max(widths[first]) >= max(widths[second])


def test_lrp_qvit_goes_by_the_magnitude_of_the_mean_score_alone(model: nn.Module, chefer: Relevance) -> None:
    def found(scores: Relevance) -> BitAllocation:
        return allocate(model, scores, Budget(mean_weight_bits=4), strategy="lrp-qvit")

    names = list(chefer.flow)
    other_rows = {name: tuple(reversed(rows)) for name, rows in chefer.row_flow.items()}
    other_flow = dict(zip(names, reversed(chefer.flow.values()), strict=True))
    negative = {name: -score for name, score in chefer.mean_score.items()}
    other_scores = dict(zip(names, reversed(chefer.mean_score.values()), strict=True))
    expected = found(chefer).sites
    assert found(replace(chefer, flow=other_flow, row_flow=other_rows, mean_score=negative)).sites == expected
    assert found(replace(chefer, mean_score=other_scores)).sites != expected


@pytest.mark.parametrize("strategy", ["relevance", "random", "lrp-qvit"])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(mean_weight_bits=3.3),
        Budget(size_mb=0.021),
        Budget(bitops=2.4e7),
        Budget(mean_weight_bits=5, size_mb=0.017),
    ],
    ids=["mean-bits", "size", "bitops", "both"],
)
def test_budgets_hold_and_are_used(
    budget: Budget, strategy: str, model: nn.Module, sites: tuple, scores: Relevance
) -> None:
    allocation = allocate(model, scores, budget, strategy=strategy)
    allocation.check(sites)
    bitops = 0.0
    for site in sites:
        bits = allocation.sites[site.name]
        bitops += site.macs * bits.activation * (bits.weight.mean_bits if bits.weight else bits.activation)
    used = {
        "mean_weight_bits": allocation.mean_weight_bits(sites),
        "size_mb": allocation.weight_bytes(sites) / 1e6,
        "bitops": bitops,
    }
    shares = [used[name] / limit for name, limit in vars(budget).items() if limit is not None]
    assert all(share <= 1 + 1e-12 for share in shares)
    assert max(shares) > 0.93  # nothing else keeps the widths down
    assert {b for n in linears_of(sites) for b in allocation.sites[n].weight.bits} <= set(CANDIDATES)


def test_boundary_and_activation_widths_are_as_asked(model: nn.Module, scores: Relevance) -> None:
    allocation = allocate(model, scores, Budget(mean_weight_bits=3), activation_bits=5)
    assert {s.activation for n, s in allocation.sites.items() if n.startswith("blocks")} == {5}
    for name in ("patch_embed.proj", "head"):
        assert allocation.sites[name].activation == allocation.sites[name].weight.mean_bits == 8


@pytest.mark.parametrize("strategy", ["relevance", "random", "lrp-qvit"])
def test_deterministic(strategy: str, model: nn.Module, scores: Relevance) -> None:
    arguments = {"strategy": strategy, "images": IMAGES, "seed": 3}
    first, second = (allocate(model, scores, Budget(mean_weight_bits=4), **arguments) for _ in range(2))
    assert first.to_json() == second.to_json()
    other = allocate(model, scores, Budget(mean_weight_bits=4), **arguments | {"seed": 4})
    assert (other.sites != first.sites) == (strategy == "random")


def test_the_model_and_the_scores_are_left_as_they_were(model: nn.Module, scores: Relevance) -> None:
    before, kept = {n: t.clone() for n, t in model.state_dict().items()}, scores.to_json()
    for strategy in ("relevance", "random"):
        allocate(model, scores, Budget(mean_weight_bits=4), images=IMAGES, strategy=strategy)
    for name, tensor in model.state_dict().items():
        assert_bitwise_equal(tensor, before[name])
    assert scores.to_json() == kept
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_allocation_converts_and_beats_one_width(model: nn.Module, sites: tuple, scores: Relevance) -> None:
    """At a mean of 2.5 bits, against the 2 and 3 bits on either side."""
    mixed = allocate(model, scores, Budget(mean_weight_bits=2.5), images=IMAGES)
    fresh = variant_images(count=32, seed=77)
    with torch.no_grad():
        exact = model(fresh)
        quality = [
            sqnr_db(quantize(model, IMAGES, bits)(fresh), exact)
            for bits in (BitAllocation.uniform(sites, 2), mixed, BitAllocation.uniform(sites, 3))
        ]
    assert quality[1] > quality[0] + 1
    assert quality[1] > quality[2] - 3


# --- strategies of layers, and a measured sensitivity -------------------------------------------------------------


SUFFIXES = ("attn.qkv", "attn.qk", "attn.av", "attn.proj", "mlp.fc1", "mlp.fc2")
BLOCK_SITES = [f"blocks.{block}.{suffix}" for block in (0, 1) for suffix in SUFFIXES]
PAIRED = [(a, b) for a, b in itertools.combinations(BLOCK_SITES, 2) if a[:8] == b[:8]]


def sensitivity_of(
    part: str, seed: int = 0, candidates: tuple[int, ...] = (2, 3, 4, 6), pairs: bool = True
) -> Sensitivity:
    """Falling numbers for every site of the part; pairs of either sign."""
    rng = np.random.default_rng(seed)
    names = [n for n in BLOCK_SITES if part != "weight" or not n.endswith(("qk", "av"))]
    widths = np.array(candidates)
    kl = {n: tuple((np.exp(rng.standard_normal()) * 4.0**-widths).tolist()) for n in names}
    tables: dict[str, dict[str, tuple]] = {}
    for a, b in PAIRED if pairs else ():
        if a in kl and b in kl:
            both = np.add.outer(kl[a], kl[b]) + 0.2 * rng.standard_normal((len(widths),) * 2) * np.sqrt(
                np.outer(kl[a], kl[b])
            )
            tables.setdefault(a, {})[b] = tuple(map(tuple, both.tolist()))
    return Sensitivity(part, None, candidates, 8, 0.0, kl, candidates if pairs else (), tables)


def layer_widths(allocation: BitAllocation, names: list[str]) -> list[tuple[int, int]]:
    """(weight bits or 0, activation bits) of each site; a layer has one width."""
    assert all(len(set(allocation.sites[n].weight.bits)) == 1 for n in names if allocation.sites[n].weight)
    return [(s.weight.bits[0] if s.weight else 0, s.activation) for s in (allocation.sites[n] for n in names)]


def importance_of(strategy: str, scores: Relevance) -> dict[str, float]:
    """What a strategy multiplies a site's sensitivity by, by its definition."""
    if strategy in ("sensitivity", "greedy"):
        return dict.fromkeys(BLOCK_SITES, 1.0)
    if strategy == "mix-qvit":
        mean = np.mean([abs(scores.mean_score[n]) for n in BLOCK_SITES])
        return {n: abs(scores.mean_score[n]) / mean for n in BLOCK_SITES}
    other = {
        n: n.replace("blocks.0", "x").replace("blocks.1", "blocks.0").replace("x", "blocks.1") for n in BLOCK_SITES
    }
    return {n: 2 * scores.flow[n] / (scores.flow[n] + scores.flow[other[n]]) for n in BLOCK_SITES}


def objective(
    allocation: BitAllocation, strategy: str, scores: Relevance, measured: Sensitivity, exponent: float
) -> float:
    omega = importance_of(strategy, scores)
    place = {n: measured.candidates.index(allocation.sites[n].weight.bits[0]) for n in measured.kl}
    total = sum(omega[n] ** exponent * measured.costs()[n][place[n]] for n in measured.kl)
    if strategy == "mix-qvit":
        total += sum(t[place[a], place[b]] for (a, b), t in measured.interactions().items())
    return total


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("strategy", ["sensitivity", "combined", "mix-qvit"])
def test_a_strategy_of_layers_costs_least_by_its_own_definition(
    strategy: str, exponent: float, model: nn.Module, sites: tuple, chefer: Relevance
) -> None:
    """Brute force over all widths of the eight linears."""
    measured = sensitivity_of("weight", seed=3, candidates=(2, 4, 6))
    found = allocate(
        model, chefer, Budget(mean_weight_bits=3.5), strategy=strategy, sensitivity=measured, exponent=exponent
    )
    names = list(measured.kl)
    size = {s.name: s.rows * s.cols for s in sites}
    omega, costs = importance_of(strategy, chefer), measured.costs()
    picks = np.indices((3,) * 8).reshape(8, -1)
    fits = sum(size[n] * np.array([2, 4, 6])[picks[i]] for i, n in enumerate(names)) <= 3.5 * sum(
        size[n] for n in names
    )
    value = sum(omega[n] ** exponent * costs[n][picks[i]] for i, n in enumerate(names))
    if strategy == "mix-qvit":
        for (a, b), table in measured.interactions().items():
            value = value + table[picks[names.index(a)], picks[names.index(b)]]
    assert objective(found, strategy, chefer, measured, exponent) == pytest.approx(value[fits].min(), rel=1e-9)
    assert found.solver["objective"] == pytest.approx(value[fits].min(), rel=1e-9)
    assert found.solver["strategy"] == strategy
    assert {w for w, _ in layer_widths(found, names)} <= {2, 4, 6}


def test_greedy_is_of_the_sensitivity_and_never_better(model: nn.Module, sites: tuple) -> None:
    for seed in range(5):
        measured, budget = sensitivity_of("weight", seed), Budget(mean_weight_bits=3.4)
        exact, greedy = (
            allocate(model, None, budget, strategy=s, sensitivity=measured) for s in ("sensitivity", "greedy")
        )
        assert greedy.mean_weight_bits(sites) <= 3.4
        assert greedy.solver["status"] == "greedy"
        assert greedy.solver["objective"] >= exact.solver["objective"] * (1 - 1e-12)


@pytest.mark.parametrize("strategy", ["lrp-qvit", "sensitivity", "combined", "mix-qvit", "greedy"])
def test_tied_widths_are_those_of_weights_and_activations(
    strategy: str, model: nn.Module, sites: tuple, chefer: Relevance
) -> None:
    arguments = {"sensitivity": sensitivity_of("both"), "candidates": (2, 3, 4, 6), "tied": True}
    found = allocate(
        model, chefer, Budget(mean_weight_bits=3.6, mean_activation_bits=4), strategy=strategy, **arguments
    )
    widths = layer_widths(found, BLOCK_SITES)
    assert all(w in (0, a) for w, a in widths)
    assert len({a for _, a in widths}) > 1
    assert found.mean_weight_bits(sites) <= 3.6
    macs = {s.name: s.macs for s in sites if s.in_block}
    assert sum(macs[n] * a for n, (_, a) in zip(BLOCK_SITES, widths, strict=True)) <= 4 * sum(macs.values())


def test_a_tied_site_of_lrp_qvit_is_scored_once(model: nn.Module, chefer: Relevance) -> None:
    found = allocate(model, chefer, Budget(mean_weight_bits=4), strategy="lrp-qvit", tied=True)
    expected = sum(abs(chefer.mean_score[n]) * 4.0 ** -found.sites[n].activation for n in BLOCK_SITES)
    assert found.solver["objective"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("strategy", ["relevance", "random", "lrp-qvit", "sensitivity", "combined"])
def test_activation_widths_of_their_own(strategy: str, model: nn.Module, sites: tuple, scores: Relevance) -> None:
    given = [sensitivity_of("weight"), sensitivity_of("activation", 1)]
    arguments = {"strategy": strategy, "sensitivity": given, "candidates": (2, 3, 4, 6)}
    found = allocate(model, scores, Budget(mean_weight_bits=3.5, mean_activation_bits=4), **arguments)
    fixed = allocate(model, scores, Budget(mean_weight_bits=3.5), **arguments)
    assert {n: s.weight for n, s in found.sites.items()} == {n: s.weight for n, s in fixed.sites.items()}
    widths = {n: found.sites[n].activation for n in BLOCK_SITES}
    macs = {s.name: s.macs for s in sites if s.in_block}
    assert sum(macs[n] * a for n, a in widths.items()) <= 4 * sum(macs.values())
    assert len(set(widths.values())) > 1
    chosen = allocate(model, scores, Budget(mean_weight_bits=3.5), activation_candidates=(4, 6), **arguments)
    assert {chosen.sites[n].activation for n in BLOCK_SITES} == {6}  # nothing keeps them down


def test_fisher_takes_the_same_path_as_relevance(model: nn.Module, scores: Relevance) -> None:
    class Fisher:  # until vitq.relevance has the method
        method, flow, row_flow = "fisher", scores.flow, scores.row_flow

    budget = Budget(mean_weight_bits=3)
    assert allocate(model, Fisher(), budget, strategy="fisher").sites == allocate(model, scores, budget).sites
    with pytest.raises(ValueError, match='"fisher" takes scores of method "fisher", got those of \'attnlrp\''):
        allocate(model, scores, budget, strategy="fisher")


@pytest.mark.parametrize("group_rows", [16, 32, 64])
def test_groups_have_as_many_rows_as_asked(group_rows: int, model: nn.Module, scores: Relevance) -> None:
    found = allocate(model, scores, Budget(mean_weight_bits=3.3), group_rows=group_rows)
    mixed = [s.weight for s in found.sites.values() if s.weight and len(set(s.weight.bits)) > 1]
    assert mixed
    assert {w.group_rows for w in mixed} == {group_rows}


def test_only_candidates_are_used(model: nn.Module, scores: Relevance, errors: dict) -> None:
    found = allocate(model, scores, Budget(mean_weight_bits=3.3), images=IMAGES, candidates=(2, 5))
    assert {b for n in errors for b in found.sites[n].weight.bits} == {2, 5}
    every = allocate(model, scores, Budget(mean_weight_bits=3.3), images=IMAGES)
    assert cost(every, scores, errors) < cost(found, scores, errors)
    own = cost(found, scores, errors)
    assert found.solver["objective"] == pytest.approx(own, rel=1e-6)  # each width has its own errors


def test_a_budget_of_latency(model: nn.Module, sites: tuple, scores: Relevance) -> None:
    times = KernelTimes(
        tuple(
            KernelTime(s.macs / 1e5 * (w or 4), a, w, site=s.name)
            for s in sites
            for w in (range(2, 9) if s.has_weight else (None,))
            for a in (8,)
        )
    )
    total = sum(times.us(s, 4 if s.has_weight and s.in_block else 8 if s.has_weight else None, 8) for s in sites)
    for strategy in ("relevance", "lrp-qvit"):
        found = allocate(model, scores, Budget(latency_ms=float(total) / 1000), strategy=strategy, times=times)
        # Times grow by the width and the MACs: so do the mean bits, of rows that all see the same tokens.
        assert 3.5 < found.mean_weight_bits(sites) < 4.5
        assert found.solver["budget"] == {"latency_ms": float(total) / 1000}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "sensitivity"}, "'sensitivity' needs the weight sensitivity .*`vitq score --sensitivity`.* none"),
        ({"strategy": "greedy", "sensitivity": "both"}, r"needs the weight sensitivity .*; got \['both'\]"),
        ({"strategy": "combined", "tied": True, "sensitivity": "weight"}, r"needs the both sensitivity .*\['weight'\]"),
        (
            {"strategy": "sensitivity", "activation_candidates": (4, 6), "sensitivity": "weight"},
            "needs the activation sensitivity",
        ),
        ({"strategy": "mix-qvit", "sensitivity": "no pairs"}, '"mix-qvit" needs a sensitivity with pairs'),
        (
            {"strategy": "mix-qvit", "activation_candidates": (4, 6), "sensitivity": "separate"},
            "activations must be fixed or tied",
        ),
        ({"strategy": "combined", "sensitivity": "weight", "candidates": (2, 5)}, r"\(2, 3, 4, 6\), got \(2, 5\)"),
        (
            {"strategy": "sensitivity", "sensitivity": "missing"},
            "weight sensitivity must have every .* blocks.1.mlp.fc2",
        ),
        ({"strategy": "relevance", "scores": None}, "strategy 'relevance' needs scores"),
        ({"strategy": "combined", "sensitivity": "weight", "scores": None}, "strategy 'combined' needs scores"),
        ({"tied": True}, "tied widths need one width a layer: strategy must be one of lrp-qvit, .* got 'relevance'"),
        (
            {"activation_candidates": (4, 8), "budget": Budget(bitops=1e8)},
            "activation widths chosen under bitops need one width a layer",
        ),
        ({"group_rows": 48}, "group_rows must divide 256, got 48"),
        ({"candidates": (4, 2)}, r"candidates must be distinct widths, ascending, got \(4, 2\)"),
        ({"budget": Budget(latency_ms=1)}, "latency_ms needs kernel times, got none"),
    ],
)
def test_what_a_strategy_lacks_is_said_before_anything_is_measured(
    arguments: dict, message: str, model: nn.Module, scores: Relevance
) -> None:
    whole, less = sensitivity_of("weight"), sensitivity_of("weight", pairs=False)
    given = {
        "weight": [whole],
        "both": [sensitivity_of("both")],
        "no pairs": [less],
        "separate": [whole, sensitivity_of("activation")],
        "missing": [replace(less, kl={n: v for n, v in less.kl.items() if n != "blocks.1.mlp.fc2"})],
    }
    arguments = {"scores": scores, "budget": Budget(mean_weight_bits=4)} | arguments
    arguments["sensitivity"] = given.get(arguments.get("sensitivity", ""), [])

    def measured(done: int, total: int) -> None:
        raise AssertionError("something was measured")

    with pytest.raises(ValueError, match=message):
        allocate(model, progress=measured, **arguments)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["lrp", "", None], ids=repr)
def test_an_unknown_strategy_is_refused(strategy: object, model: nn.Module, scores: Relevance) -> None:
    with pytest.raises(ValueError, match=r"strategy must be one of \('relevance', 'fisher', 'lrp-qvit', 'mix"):
        allocate(model, scores, Budget(mean_weight_bits=4), strategy=strategy)


@pytest.mark.parametrize("strategy", ["relevance", "random", "lrp-qvit"])
def test_scores_of_a_smaller_model_are_refused(strategy: str, scores: Relevance) -> None:
    with pytest.raises(ValueError, match=r"must have every linear of the blocks, got none for blocks\.2"):
        allocate(small_vit(depth=3), scores, Budget(mean_weight_bits=4), strategy=strategy)


@pytest.mark.parametrize("strategy", ["relevance", "random"])
def test_scores_of_a_wider_model_are_refused(strategy: str, scores: Relevance) -> None:
    with pytest.raises(ValueError, match=r"row_flow\['blocks\.0\.attn\.proj'\] must have shape \(48,\), got \(32,\)"):
        allocate(small_vit(embed_dim=48), scores, Budget(mean_weight_bits=4), strategy=strategy)


@pytest.mark.parametrize("strategy", ["relevance", "lrp-qvit"])
def test_a_budget_that_nothing_meets_says_what_would(strategy: str, model: nn.Module, scores: Relevance) -> None:
    with pytest.raises(ValueError, match=r"mean_weight_bits=1.5 cannot be met: the smallest is 2"):
        allocate(model, scores, Budget(mean_weight_bits=1.5), strategy=strategy)


def test_bad_images_are_named(model: nn.Module, scores: Relevance) -> None:
    images = IMAGES.clone()
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="images must be finite, got NaN or Inf in image 3"):
        allocate(model, scores, Budget(mean_weight_bits=4), images=images)
