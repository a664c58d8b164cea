"""What a model says of images as one tensor, whatever its forward returns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

# Of the outputs of Hugging Face transformers, in the order in which they are looked for.
ANSWERS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")


def answer(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, classes] of images [B, C, H, W], or features of a model without a classifier.

    Features are [B, C] or, where a model of transformers pools nothing, its tokens [B, S, C].

    Raises:
        ValueError: the model returns neither a tensor nor an output with one of ``ANSWERS``.
    """
    output = model(images)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ANSWERS:
            if output.get(name) is not None:
                return output[name]
    raise ValueError(f"model must return a tensor or an output with one of {ANSWERS}, got {type(output).__name__}")
