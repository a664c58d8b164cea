"""How far a quantized model is from its labels and from the float model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.distributed import in_order, world_size
from vitq_kernels.models import answer


@dataclass(frozen=True)
class Evaluation:
    """Percentages are of images; KL(float, quantized) is a mean in nats."""

    images: int
    top1: float | None  # percent, None without labels
    float_top1: float | None  # the three below need the float model
    agreement: float | None  # percent of images with the same first class
    kl: float | None
    images_per_s: float  # of the evaluated model alone; of all processes together, by the slowest one's seconds
    cosine: float | None = None  # of feature extractors with a float model: mean cosine of the features of an image

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class _Counts:
    """Sums over images."""

    images: int = 0
    labelled: int = 0
    correct: int = 0
    float_correct: int = 0
    agreed: int = 0
    divergence: float = 0.0
    cosine: float = 0.0

    def add(self, other: _Counts) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    float_model: nn.Module | None = None,
    features: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Runs a model, and the float one beside it, over (images, labels) batches on the model's device.

    In an initialised process group the batches, the same ones on every process, are shared between the processes
    (distributed.py), and every process returns the whole evaluation.

    Args:
        model: images [b, C, H, W] to logits [b, classes].
        batches: labels int64 [b], or None where there are none. Of a sequence a process reads its own batches alone.
        float_model: to compare with.
        features: the models answer with features instead of logits, [b, C] or [b, S, C]. Then labels are ignored, and
            their cosine is what there is to compare.
        progress: called with the number of images done.

    Raises:
        ValueError: no images, a label that is no class of the model, or a float model of other classes.
    """
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))

    def measure(batch: tuple[Tensor, Tensor | None]) -> tuple[_Counts, float]:
        x = batch[0].to(device)
        start = time.perf_counter()
        logits = answer(model, x).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        reference = None if float_model is None else answer(float_model, x).float()
        counts = _feature_counts(logits, reference) if features else _counts(logits, reference, batch[1])
        return counts, seconds

    total = _Counts()
    seconds = [0.0] * world_size()
    for index, (counts, spent) in enumerate(in_order(batches, measure)):
        total.add(counts)
        seconds[index % len(seconds)] += spent
        if progress:
            progress(total.images)
    if not total.images:
        raise ValueError("evaluate: batches must hold at least one image, got none")

    def percent(count: int, of: int, known: bool = True) -> float | None:
        return 100.0 * count / of if known and of else None

    compared = float_model is not None and not features
    return Evaluation(
        total.images,
        percent(total.correct, total.labelled),
        percent(total.float_correct, total.labelled, compared),
        percent(total.agreed, total.images, compared),
        total.divergence / total.images if compared else None,
        total.images / max(seconds),
        total.cosine / total.images if features and float_model is not None else None,
    )


def _feature_counts(found: Tensor, reference: Tensor | None) -> _Counts:
    """Of one batch of features, float32 [b, ...]."""
    counts = _Counts(images=len(found))
    if reference is not None:
        if reference.shape != found.shape:
            shapes = f"{list(reference.shape)} and {list(found.shape)}"
            raise ValueError(f"float_model and model must have features of the same shape, got {shapes}")
        counts.cosine = float(F.cosine_similarity(found.flatten(1), reference.flatten(1)).sum())
    return counts


def _counts(logits: Tensor, reference: Tensor | None, labels: Tensor | None) -> _Counts:
    """Of one batch: logits and, of the float model, reference float32 [b, classes]; labels int64 [b]."""
    counts = _Counts(images=len(logits))
    predicted = logits.argmax(-1)
    if labels is not None:
        if int(labels.max()) >= logits.shape[-1]:
            raise ValueError(f"labels must be classes below {logits.shape[-1]}, got {int(labels.max())}")
        labels = labels.to(logits.device)
        counts.labelled = len(logits)
        counts.correct = int((predicted == labels).sum())
    if reference is not None:
        if reference.shape != logits.shape:
            classes = f"{reference.shape[-1]} and {logits.shape[-1]}"
            raise ValueError(f"float_model and model must have the same number of classes, got {classes}")
        if labels is not None:
            counts.float_correct = int((reference.argmax(-1) == labels).sum())
        counts.agreed = int((reference.argmax(-1) == predicted).sum())
        # In float64: terms of either sign nearly cancel, and float32 leaves 1e-7 of error in a KL of 1e-3.
        ours, theirs = (t.double().log_softmax(-1) for t in (logits, reference))
        counts.divergence = float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
    return counts
