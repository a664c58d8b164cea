"""Allocations for a model: errors measured as conversion makes them, strategies that do what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.numerics import assert_bitwise_equal
from tests.small_vits import small_vit, sqnr_db, variant_images
from vitq_kernels.calibration import input_covariances
from vitq_kernels.convert import quantize
from vitq_kernels.models import vit_sites
from vitq_kernels.planning import CANDIDATES, allocate, measure_errors
from vitq_kernels.quantizers import gptq, round_to_nearest, weight_scale
from vitq_kernels.relevance import Relevance, relevance
from vitq_kernels.spec import BitAllocation, Budget, Site

IMAGES = variant_images()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_vit()


@pytest.fixture(scope="module")
def sites(model: nn.Module) -> tuple[Site, ...]:
    return vit_sites(model)


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
        scale = weight_scale(linear.weight, row_bits)
        codes = gptq(linear.weight, scale, row_bits, input_covariances(model, IMAGES)[name])
        expected = direct_error(linear.weight, codes, scale, seen[0])
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
