"""What a caller of relevance() sees: scores as defined, samples independent, the model untouched, bad input named."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from random_vits import VARIANTS, make_images, make_vit
from torch import Tensor, nn

from vitq_kernels.models import UnsupportedModelError, model_sites
from vitq_kernels.relevance import Relevance, relevance

METHODS = ("attnlrp", "chefer")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share: two threads of a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(actual: Relevance, expected: Relevance, rel: float) -> None:
    assert actual.flow == pytest.approx(expected.flow, rel=rel)
    assert actual.mean_score == pytest.approx(expected.mean_score, rel=rel, abs=rel)
    for name, rows in expected.row_flow.items():
        assert actual.row_flow[name] == pytest.approx(rows, rel=rel, abs=rel * expected.flow[name])


# --- relevance() --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["class-token", "average-pool", "distilled"])
def test_an_image_does_not_feel_its_batch(variant: str, method: str) -> None:
    model, images = make_vit(**VARIANTS[variant]), make_images(3) * torch.tensor([1.0, 4.0, 0.1]).view(3, 1, 1, 1)
    together = relevance(model, images, method=method)
    assert_same(relevance(model, images, method=method, batch_size=1), together, rel=1e-6)
    alone = [relevance(model, image[None], method=method) for image in images]
    for name, flow in together.flow.items():
        assert flow == pytest.approx(sum(r.flow[name] for r in alone) / 3, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["class-token", "registers", "distilled"])
def test_sites_rows_and_tokens_add_up(variant: str, method: str) -> None:
    model, images = make_vit(**VARIANTS[variant]), make_images(2)
    every, image, cls = (relevance(model, images, method=method, tokens=t) for t in ("all", "image", "class"))
    sites = {site.name: site for site in model_sites(model)}
    assert list(every.flow) == list(every.mean_score) == list(sites)
    assert {name: len(rows) for name, rows in every.row_flow.items()} == {
        name: site.rows for name, site in sites.items() if site.has_weight
    }
    assert sum(abs(score) for score in every.mean_score.values()) == pytest.approx(1.0)
    for name, site in sites.items():
        if site.kind != "head":  # which always counts
            assert image.flow[name] + cls.flow[name] == pytest.approx(every.flow[name], rel=1e-9)
        if site.has_weight:
            assert sum(every.row_flow[name]) == pytest.approx(every.flow[name], rel=1e-9)
    assert cls.flow["patch_embed.proj"] == cls.mean_score["patch_embed.proj"] == 0
    assert 0 < cls.flow["blocks.0.attn.qk"] < every.flow["blocks.0.attn.qk"]


def test_labels_choose_the_logit() -> None:
    model, images = make_vit(), make_images(3)
    own = model(images.double()).argmax(1)
    assert relevance(model, images, labels=own, batch_size=2) == relevance(model, images, batch_size=2)
    given = torch.tensor([0, 1, 2])
    assert_same(relevance(model, images, labels=given, batch_size=2), relevance(model, images, labels=given), rel=1e-6)
    assert relevance(model, images, labels=given).flow != relevance(model, images, labels=given.flip(0)).flow


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_and_the_same_from_batches(method: str) -> None:
    model, images, calls = make_vit(), make_images(5), []
    first = relevance(model, images, method=method, batch_size=2, progress=lambda *done: calls.append(done))
    assert first == relevance(model, iter([images[:2], images[2:4], images[4:]]), method=method)
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert first.images == 5


CONTEXTS = {
    "no-grad": torch.no_grad,
    "inference-mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_the_callers_context_does_not_reach_the_pass(context) -> None:
    model, images = make_vit(dtype=torch.float32), make_images(2)
    expected = relevance(model, images)
    with context():
        assert relevance(model, images.clone()) == expected


@pytest.mark.parametrize("method", METHODS)
def test_model_comes_back_untouched(method: str) -> None:
    model, images = (
        make_vit(pos_drop_rate=0.5, patch_drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5),
        make_images(2),
    )
    expected = relevance(model, images, method=method)
    model.train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m._backward_hooks), len(vars(m))) for m in model.modules()]
    grads = {name: (p.requires_grad, p.grad, p._backward_hooks) for name, p in model.named_parameters()}
    assert relevance(model, images, method=method) == expected  # dropout was off
    assert flags == [(m.training, len(m._forward_hooks), len(m._backward_hooks), len(vars(m))) for m in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert grads[name][0] == p.requires_grad
        assert grads[name][1] is p.grad
        assert grads[name][2] is p._backward_hooks


def test_training_flags_come_back_after_an_error() -> None:
    model = make_vit().train()

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relevance(model, make_images(1), progress=fail)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_released_without_the_garbage_collector(method: str) -> None:
    model, images = make_vit(), make_images(2)
    relevance(model, images, method=method)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        relevance(model, images, method=method)
        assert sum(issubclass(type(x), Tensor) for x in gc.get_objects()) == before
    finally:
        gc.enable()


BAD_INPUTS = {
    "nan": ({"images": torch.full((1, 3, 32, 32), float("nan"))}, "images must be finite"),
    "inf": ({"images": [make_images(1), make_images(1) / 0]}, r"images\[1\] must be finite"),
    "empty": ({"images": make_images(0)}, "images must hold at least one image"),
    "no-batches": ({"images": []}, "images must hold at least one image"),
    "one-image-3d": (
        {"images": make_images(1)[0]},
        r"images must be a float tensor \[n, 3, H, W\], got .*\[3, 32, 32\]",
    ),
    "channels": ({"images": make_images(1, 4)}, r"images must be a float tensor \[n, 3, H, W\]"),
    "integers": (
        {"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)},
        r"images must be a float tensor .*, got torch\.uint8",
    ),
    "not-a-tensor": ({"images": [(make_images(1), 0)]}, r"images\[0\] must be a float tensor .* got tuple"),
    "image-size": ({"images": make_images(1, 3, (40, 40))}, r"images must be \(32, 32\) pixels"),
    "method": ({"method": "grad"}, "method must be one of .*, got 'grad'"),
    "tokens": ({"tokens": "cls"}, "tokens must be one of .*, got 'cls'"),
    "batch-size": ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    "labels-shape": ({"labels": torch.tensor([1])}, r"labels must be integers \[2\]"),
    "labels-float": ({"labels": torch.ones(2)}, r"labels must be integers \[2\]"),
    "labels-range": ({"labels": torch.tensor([0, 10])}, r"labels must be in 0\.\.9, got 0\.\.10"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relevance(make_vit(), **{"images": make_images(2), **arguments})


BAD_MODELS = {
    "elu": ({"act_layer": "elu"}, UnsupportedModelError, r"blocks\.0: activation ELU"),
    "no-classifier": ({"num_classes": 0}, UnsupportedModelError, "head: the model has no classifier"),
    "no-pooling": ({"global_pool": ""}, UnsupportedModelError, "global_pool"),
    "map-pooling": ({"global_pool": "map"}, UnsupportedModelError, "attn_pool"),
    "odd-norm": ({"embed_norm_layer": "batchnorm1d"}, UnsupportedModelError, r"patch_embed\.norm: BatchNorm1d"),
    "half": ({"dtype": torch.float16}, ValueError, "float32 or float64 weights, got torch.float16"),
    "no-class-token": (
        {"class_token": False, "global_pool": "avg", "tokens": "class"},
        ValueError,
        "tokens must be 'image' or 'all'",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_unsupported_model_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    arguments = dict(arguments)
    tokens = arguments.pop("tokens", "all")
    with pytest.raises(error, match=message):
        relevance(make_vit(**arguments), make_images(1), tokens=tokens)


def test_an_image_of_broken_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have sides divisible by \(8, 8\), got \(29, 32\)"):
        relevance(make_vit(dynamic_img_size=True), make_images(1, 3, (29, 32)))


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="must be a timm VisionTransformer"):
        relevance(nn.Linear(3, 3), make_images(1))


# --- the result ---------------------------------------------------------------------------------------------------

BY_HAND = Relevance("attnlrp", "all", 4, {"fc": 1.5, "qk": 0.1}, {"fc": -0.75, "qk": 0.25}, {"fc": (1.0, 0.5)})


def test_json_round_trip() -> None:
    result = relevance(make_vit(), make_images(2))
    assert Relevance.from_json(result.to_json()) == result
    assert Relevance.from_json(BY_HAND.to_json()) == BY_HAND


def test_print_names_every_site() -> None:
    result = relevance(make_vit(), make_images(2))
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(result.flow)
    assert all(len(line) <= 100 for line in lines)


BAD_TEXTS = {
    "empty": ("", "JSONDecodeError"),
    "truncated": (BY_HAND.to_json()[:-20], "JSONDecodeError"),
    "list": ("[]", "not a relevance"),
    "missing": (json.dumps({"method": "attnlrp"}), "KeyError: 'tokens'"),
    "flow-is-list": (BY_HAND.to_json().replace('"flow": {', '"flow": [], "other": {', 1), "same sites"),
    "nan": (BY_HAND.to_json().replace("0.1,", "NaN,").replace("0.1\n", "NaN\n"), "flow of qk must be a finite number"),
    "text": (BY_HAND.to_json().replace("1.5", '"1.5"'), "flow of fc must be a finite number >= 0, got '1.5'"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_json_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Relevance.from_json(text)


BAD_FIELDS = {
    "method": ({"method": "lrp"}, "method must be one of"),
    "tokens": ({"tokens": "cls"}, "tokens must be one of"),
    "images": ({"images": 0}, "images must be a positive integer"),
    "other-sites": ({"mean_score": {"fc": 1.0}}, "same sites"),
    "unknown-rows": ({"row_flow": {"fc9": (1.0,)}}, "same sites"),
    "negative": ({"row_flow": {"fc": (1.0, -0.5)}}, "row_flow of fc must be a finite number >= 0, got -0.5"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_fields_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BY_HAND, **changes)
