"""How far a quantized model is from its labels and from the float model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """Percentages are of images; KL(float, quantized) is a mean in nats."""

    images: int
    top1: float | None  # percent, None without labels
    float_top1: float | None  # the three below need the float model
    agreement: float | None  # percent of images with the same first class
    kl: float | None
    images_per_s: float  # of the evaluated model alone

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    float_model: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Runs a model, and the float one beside it, over (images, labels) batches on the model's device.

    Args:
        model: images [b, C, H, W] to logits [b, classes].
        batches: labels int64 [b], or None where there are none.
        float_model: to compare with.
        progress: called with the number of images done.

    Raises:
        ValueError: no images, a label that is no class of the model, or a float model of other classes.
    """
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    images = correct = float_correct = labelled = agreed = 0
    divergence = seconds = 0.0
    for x, labels in batches:
        x = x.to(device)
        start = time.perf_counter()
        logits = model(x).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
        predicted = logits.argmax(-1)
        images += len(x)
        if labels is not None:
            if int(labels.max()) >= logits.shape[-1]:
                raise ValueError(f"labels must be classes below {logits.shape[-1]}, got {int(labels.max())}")
            labels = labels.to(device)
            labelled += len(x)
            correct += int((predicted == labels).sum())
        if float_model is not None:
            reference = float_model(x).float()
            if reference.shape != logits.shape:
                classes = f"{reference.shape[-1]} and {logits.shape[-1]}"
                raise ValueError(f"float_model and model must have the same number of classes, got {classes}")
            if labels is not None:
                float_correct += int((reference.argmax(-1) == labels).sum())
            agreed += int((reference.argmax(-1) == predicted).sum())
            kl = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum")
            divergence += float(kl)
        if progress:
            progress(images)
    if not images:
        raise ValueError("evaluate: batches must hold at least one image, got none")

    def percent(count: int, of: int, known: bool = True) -> float | None:
        return 100.0 * count / of if known and of else None

    compared = float_model is not None
    return Evaluation(
        images,
        percent(correct, labelled),
        percent(float_correct, labelled, compared),
        percent(agreed, images, compared),
        divergence / images if compared else None,
        images / seconds,
    )
