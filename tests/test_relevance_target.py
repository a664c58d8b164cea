"""Relevance of features: closed forms by a classifier of one class, conservation, and what needs a classifier."""

from __future__ import annotations

import json

import pytest
import torch
from random_vits import VARIANTS, make_images, make_vit
from torch import Tensor, nn

from vitq_kernels.compare import compare
from vitq_kernels.lrp_rules import ATTNLRP, CHEFER
from vitq_kernels.models import UnsupportedModelError, model_parts
from vitq_kernels.planning import allocate
from vitq_kernels.relevance import Relevance, relevance
from vitq_kernels.relevance_program import run_with_rules
from vitq_kernels.relevance_target import feature_gradient
from vitq_kernels.spec import Budget

FEATURES = ["class-token", "average-pool", "fc-norm", "pre-norm", "no-class-token"]


def extractor(variant: str = "class-token") -> nn.Module:
    return make_vit(num_classes=0, **VARIANTS[variant])


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(images.double()), pre_logits=True)


def with_row(model: nn.Module, row: Tensor, variant: str) -> nn.Module:
    """The same model with one class, whose logit is ``feature . row``."""
    result = make_vit(num_classes=1, **VARIANTS[variant])
    result.load_state_dict(model.state_dict(), strict=False)
    result.head.weight.data.copy_(row[None])
    result.head.bias.data.zero_()
    return result


@pytest.mark.parametrize("rules", [ATTNLRP, CHEFER], ids=lambda rules: rules.name)
@pytest.mark.parametrize("classes", [0, 10], ids=["no-classifier", "classifier"])
@pytest.mark.parametrize("variant", FEATURES)
def test_program_gives_the_models_own_features(variant: str, classes: int, rules) -> None:
    model, images = make_vit(num_classes=classes, **VARIANTS[variant]), make_images(2)
    pixels = images.double().requires_grad_()
    found = run_with_rules(model_parts(model), rules, pixels, lambda *_: None, features=True)
    torch.testing.assert_close(found.detach(), features_of(model, images), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["feature_norm", "similarity"])
@pytest.mark.parametrize("variant", FEATURES)
def test_attnlrp_is_that_of_the_logit_that_the_target_is(variant: str, target: str) -> None:
    """``|f|`` is the logit of a class whose row is ``f / |f|``, ``f . f`` that of one whose row is f."""
    model, images = extractor(variant), make_images(1)
    (feature,) = features_of(model, images)
    row = feature / feature.norm() if target == "feature_norm" else feature
    found = relevance(model, images, target=target)
    expected = relevance(with_row(model, row, variant), images)
    assert list(found.flow) == list(expected.flow)[:-1]
    for name, flow in found.flow.items():
        assert flow == pytest.approx(expected.flow[name], rel=1e-9)
        assert found.row_flow.get(name, ()) == pytest.approx(expected.row_flow.get(name, ()), rel=1e-7, abs=1e-12)


def test_references_are_the_rows_of_such_classes() -> None:
    model, images = extractor(), make_images(3)
    references, features = torch.linspace(-1, 2, 3 * 32).view(3, 32).double(), features_of(model, images)
    found = relevance(model, images, target="similarity", references=references, batch_size=2)
    expected = dict.fromkeys(found.flow, 0.0)
    for i in range(3):
        one = relevance(with_row(model, references[i], "class-token"), images[i : i + 1])
        products = features[i] * references[i]
        for name in expected:  # flows are fractions of sum |f r|, not of |sum f r|
            expected[name] += one.flow[name] * float(products.sum().abs() / products.abs().sum()) / 3
    assert found.flow == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("target", ["feature_norm", "similarity"])
def test_chefer_brings_all_of_the_target_to_the_pixels(target: str) -> None:
    """Without a class token and position embedding nothing else can take any."""
    model = make_vit(num_classes=0, global_pool="avg", class_token=False, pos_embed="none")
    pixels, sums = make_images(2).double().requires_grad_(), {}
    features = run_with_rules(
        model_parts(model),
        CHEFER,
        pixels,
        lambda name, relevance, _: sums.update({name: relevance.flatten(1).sum(1)}),
        features=True,
    )
    start = features.detach() * feature_gradient(features, target, None)
    (found,) = torch.autograd.grad(features, pixels, start)
    norm = features.detach().norm(dim=1)
    expected = norm if target == "feature_norm" else norm.square()
    torch.testing.assert_close(start.sum(1), expected)
    torch.testing.assert_close(sums["patch_embed.proj"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.flatten(1).sum(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["attnlrp", "chefer"])
def test_own_similarity_and_norm_differ_in_what_an_image_weighs(method: str) -> None:
    model, images = extractor("no-class-token"), make_images(3) * torch.tensor([1.0, 4.0, 0.1]).view(3, 1, 1, 1)
    norm, similarity = (relevance(model, images, method=method, target=t) for t in ("feature_norm", "similarity"))
    assert norm.flow == pytest.approx(similarity.flow, rel=1e-9)
    assert norm.mean_score != pytest.approx(similarity.mean_score, rel=1e-3)
    assert (norm.target, similarity.target) == ("feature_norm", "similarity")


def test_heads_take_no_part() -> None:
    model, images = make_vit(), make_images(2)
    found = relevance(model, images, target="feature_norm")
    assert found.flow["head"] == found.mean_score["head"] == 0
    expected = relevance(extractor_of(model), images, target="feature_norm")
    assert {name: flow for name, flow in found.flow.items() if name != "head"} == expected.flow


def extractor_of(model: nn.Module) -> nn.Module:
    result = extractor()
    result.load_state_dict(model.state_dict(), strict=False)
    return result


def test_a_zero_feature_has_no_relevance() -> None:
    model = extractor()
    model.norm.weight.data.zero_()
    model.norm.bias.data.zero_()
    assert set(relevance(model, make_images(1), target="feature_norm").flow.values()) == {0.0}


def test_scores_of_features_allocate() -> None:
    model, images = make_vit(num_classes=0, dtype=torch.float32), make_images(2)
    scores = relevance(model, images, target="feature_norm")
    allocation = allocate(model, scores, Budget(mean_weight_bits=4), images=images)
    assert set(allocation.sites) == set(scores.flow)


def test_json_and_text_name_the_target() -> None:
    found = relevance(extractor(), make_images(1), target="feature_norm")
    assert Relevance.from_json(found.to_json()) == found
    assert str(found).startswith("attnlrp relevance of feature_norm, all tokens, 1 images")
    old = json.loads(found.to_json())
    del old["target"]
    assert Relevance.from_json(json.dumps(old)).target == "logit"


def test_a_model_without_classes_names_the_option() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no classifier .* give target='feature_norm' or 'similarity'"):
        relevance(extractor(), make_images(1))


BAD = {
    "target": ({"target": "cosine"}, r"target must be one of \('logit', 'feature_norm', 'similarity'\), got 'cosine'"),
    "fisher": ({"target": "similarity", "method": "fisher"}, "target must be 'logit' with method 'fisher'"),
    "labels": ({"target": "similarity", "labels": torch.tensor([0])}, "target must be 'logit' with labels"),
    "references-of-a-norm": (
        {"target": "feature_norm", "references": torch.zeros(1, 32)},
        "references are for target 'similarity', got target 'feature_norm'",
    ),
    "references-count": (
        {"target": "similarity", "references": torch.zeros(2, 32)},
        r"references must be float \[1, C\], one an image, got torch.float32 \[2, 32\]",
    ),
    "references-width": (
        {"target": "similarity", "references": torch.zeros(1, 31)},
        r"references must be float \[n, 32\], one an image, got a batch \[1, 31\]",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relevance(make_vit(), make_images(1), **arguments)


def test_compare_says_what_compares_features() -> None:
    model, images = make_vit(num_classes=0, dtype=torch.float32), make_images(2)
    with pytest.raises(UnsupportedModelError, match=r"compare: model must have a classifier.*features=True"):
        compare(model, images, [(images, None)], pairs=[(8, 8)])
