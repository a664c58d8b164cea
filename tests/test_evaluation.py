"""Top-1, agreement and KL against their definitions, with and without labels and a float model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from vitq_kernels.evaluation import evaluate

Batch = tuple[Tensor, Tensor | None]


class Table(nn.Module):
    """Image i has the logits of row i; images are their indices."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images.flatten().long()]


QUANTIZED = torch.tensor([[2.0, 1, 0], [0, 3, 1], [1, 0, 5], [4, 0, 1], [0, 1, 0]])
FLOAT = torch.tensor([[2.5, 1, 0], [0, 3, 4], [1, 0, 5], [4, 0, 1], [0, 1, 3]])
LABELS = torch.tensor([0, 1, 2, 1, 2])


def batches(size: int = 2, labels: Tensor | None = LABELS) -> list[Batch]:
    images = torch.arange(5.0).view(5, 1, 1, 1)
    parts = [None] * 5 if labels is None else labels.split(size)
    return list(zip(images.split(size), parts, strict=False))


def kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """Mean of Σ p (ln p - ln q), by hand."""
    total = 0.0
    for a, b in zip(p_logits.tolist(), q_logits.tolist(), strict=True):
        pa, qb = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a, b)]
        total += sum(p * math.log(p / q) for p, q in zip(pa, qb, strict=True))
    return total / len(p_logits)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_measurements_are_those_of_the_definitions(size: int) -> None:
    result = evaluate(Table(QUANTIZED), batches(size), float_model=Table(FLOAT))
    assert result.images == 5
    assert result.top1 == pytest.approx(60)  # right on images 0, 1, 2
    assert result.float_top1 == pytest.approx(60)  # right on images 0, 2, 4
    assert result.agreement == pytest.approx(60)  # the same on images 0, 2, 3
    assert result.kl == pytest.approx(kl(FLOAT, QUANTIZED), rel=1e-5)
    assert result.kl != pytest.approx(kl(QUANTIZED, FLOAT), rel=1e-2)  # the float model's is the true distribution
    assert result.images_per_s > 0


def test_a_model_agrees_with_itself() -> None:
    result = evaluate(Table(FLOAT), batches(), float_model=Table(FLOAT))
    assert (result.agreement, result.kl, result.top1) == (100, 0, result.float_top1)


def test_without_a_float_model_there_is_nothing_compared() -> None:
    result = evaluate(Table(QUANTIZED), batches())
    assert (result.top1, result.images) == (pytest.approx(60), 5)
    assert (result.float_top1, result.agreement, result.kl) == (None, None, None)


def test_without_labels_there_is_no_top1() -> None:
    result = evaluate(Table(QUANTIZED), batches(labels=None), float_model=Table(FLOAT))
    assert (result.top1, result.float_top1) == (None, None)
    assert result.agreement == pytest.approx(60)
    assert result.kl == pytest.approx(kl(FLOAT, QUANTIZED), rel=1e-5)


def test_top1_counts_labelled_batches_alone() -> None:
    some = [(x, y if index else None) for index, (x, y) in enumerate(batches())]
    result = evaluate(Table(QUANTIZED), some, float_model=Table(FLOAT))
    assert result.top1 == pytest.approx(100 / 3)  # of images 2, 3, 4
    assert result.float_top1 == pytest.approx(200 / 3)
    assert result.agreement == pytest.approx(60)  # of all


def test_half_precision_logits_are_compared_in_float32() -> None:
    large = 40 * QUANTIZED.half()
    result = evaluate(Table(large), batches(), float_model=Table(40 * FLOAT))
    assert result.kl == pytest.approx(kl(40 * FLOAT, 40 * QUANTIZED), rel=1e-4)


def test_nothing_keeps_gradients() -> None:
    class Needs(Table):
        def forward(self, images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().forward(images)

    evaluate(Needs(QUANTIZED), batches(), float_model=Needs(FLOAT))


def test_progress_counts_images() -> None:
    seen: list[int] = []
    evaluate(Table(QUANTIZED), batches(), progress=seen.append)
    assert seen == [2, 4, 5]


def test_result_goes_into_json() -> None:
    result = evaluate(Table(QUANTIZED), batches(), float_model=Table(FLOAT))
    keys = ["images", "top1", "float_top1", "agreement", "kl", "images_per_s", "cosine"]
    assert list(json.loads(json.dumps(result.to_dict()))) == keys


@pytest.mark.parametrize("empty", [[], iter(())], ids=["list", "iterator"])
def test_no_images_are_refused(empty: object) -> None:
    with pytest.raises(ValueError, match="batches must hold at least one image, got none"):
        evaluate(Table(QUANTIZED), empty)


def test_a_label_that_is_no_class_is_refused() -> None:
    labels = torch.tensor([0, 1, 3, 1, 2])
    with pytest.raises(ValueError, match="labels must be classes below 3, got 3"):
        evaluate(Table(QUANTIZED), batches(labels=labels))


def test_a_float_model_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the same number of classes, got 2 and 3"):
        evaluate(Table(QUANTIZED), batches(), float_model=Table(FLOAT[:, :2]))


# --- feature extractors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3)], ids=["pooled", "tokens"])
def test_features_are_compared_by_their_cosine(shape: tuple[int, ...]) -> None:
    own, exact = (torch.linspace(-1, end, 30).view(shape).sin() for end in (2.0, 2.5))
    result = evaluate(Table(own), batches(2), float_model=Table(exact), features=True)
    a, b = own.flatten(1).double(), exact.flatten(1).double()
    expected = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    assert result.cosine == pytest.approx(float(expected), rel=1e-6)
    assert (result.images, result.top1, result.float_top1, result.agreement, result.kl) == (5, None, None, None, None)


def test_features_alone_have_no_cosine() -> None:
    assert evaluate(Table(QUANTIZED), batches(2), features=True).cosine is None


def test_logits_have_no_cosine() -> None:
    assert evaluate(Table(QUANTIZED), batches(2), float_model=Table(FLOAT)).cosine is None


def test_features_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features of the same shape, got \[2, 2\] and \[2, 3\]"):
        evaluate(Table(QUANTIZED), batches(2), float_model=Table(FLOAT[:, :2]), features=True)
