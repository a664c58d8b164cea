"""Fisher scores: squared gradient times squared value of the model's own log-probability, per output row."""

from __future__ import annotations

import pytest
import torch
from small_vits import variant_images, variant_vit
from torch import Tensor, nn

from vitq_kernels.fisher import drawn_classes, log_probability_start
from vitq_kernels.models import model_parts
from vitq_kernels.relevance import relevance


def twin_rows(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean over images of sum over tokens of (y dlog p/dy)^2, by plain autograd through timm's own forward."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            out.requires_grad_(True) if out.is_leaf else out.retain_grad()
            outputs[name] = out

        return hook

    names = ["patch_embed.proj", "head"]
    names += [
        f"{b.name}.{s}" for b in model_parts(model).blocks for s in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    rows = {name: torch.zeros(()) for name in names}
    for image, label in zip(images, labels, strict=True):
        model(image[None]).log_softmax(-1)[0, label].backward()
        for name, out in outputs.items():
            squares = (out.detach() * out.grad).double().square()
            flat = squares.flatten(2).sum((0, 2)) if out.dim() == 4 else squares.flatten(0, -2).sum(0)
            rows[name] = rows[name] + flat / len(images)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("variant", ["class-token", "average-pool", "layer-scale", "tanh-gelu"])
def test_rows_are_those_of_plain_autograd(variant: str) -> None:
    model, images = variant_vit(variant).double(), variant_images(variant, 4).double()
    labels = torch.tensor([3, 0, 7, 3])
    found = relevance(model, images, method="fisher", labels=labels, batch_size=3)
    for name, rows in twin_rows(model, images, labels).items():
        torch.testing.assert_close(torch.tensor(found.row_flow[name], dtype=torch.float64), rows, rtol=1e-6, atol=1e-14)


def test_without_labels_classes_are_drawn_from_the_prediction() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]]).repeat(6000, 1)
    drawn = drawn_classes(logits)
    frequency = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(frequency, logits[0].softmax(0), rtol=0, atol=0.03)  # 4.6 standard errors
    assert torch.equal(drawn, drawn_classes(logits))


def test_the_start_is_the_gradient_of_the_log_probability() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    chosen = torch.tensor([0, 6, 3, 3, 2])
    logits.log_softmax(-1).gather(1, chosen[:, None]).sum().backward()
    torch.testing.assert_close(log_probability_start(logits, chosen), logits.grad)


def test_an_image_that_is_decided_counts_for_nothing() -> None:
    model, images = variant_vit("class-token"), variant_images(count=2)
    with torch.no_grad():
        model.head.bias[4] = 1e4
    scores = relevance(model, images, method="fisher")
    assert sum(scores.flow.values()) == 0
