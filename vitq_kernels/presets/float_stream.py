"""What reaches the quantizers of a simulated model that is still float, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.presets.capture import inputs_of
from vitq_kernels.presets.preset import Widths
from vitq_kernels.simulation import SimulatedPatchEmbed

MATMUL_PARTS = ("query", "key", "value", "probability")


def parts_of(widths: Widths) -> dict[str, list[str]]:
    """Activation places by the part of the model they lie in: ``blocks.0``, ..., or the place itself outside blocks."""
    parts: dict[str, list[str]] = {}
    for place in widths.activations:
        inside = place.startswith("blocks.")
        parts.setdefault(".".join(place.split(".")[:2]) if inside else place, []).append(place)
    return parts


def linears_and_matmuls(
    model: nn.Module, widths: Widths, batches: Sequence[Tensor]
) -> Iterator[tuple[int, str, dict[str, Tensor]]]:
    """Yields (parts done, site, its tensors) for every linear and every attention, a forward of the model a part.

    A linear gives ``{"input": x}`` with x [T, K], patches unfolded; an attention ``blocks.0.attn`` gives query, key and
    value [B, H, S, D] and probability [B, H, S, S]. Quantizers that are set meanwhile are seen by later parts.
    """
    for done, places in enumerate(parts_of(widths).values(), start=1):
        seen = inputs_of(model, places, batches)
        for place in places:
            site, _, end = place.rpartition(".")
            if end == "input":
                yield done, site, {"input": tokens_of(model.get_submodule(site), seen.pop(place))}
            elif end == MATMUL_PARTS[0]:
                yield done, site, {part: seen.pop(f"{site}.{part}") for part in MATMUL_PARTS}


def tokens_of(module: nn.Module, x: Tensor) -> Tensor:
    """A linear's input [..., K] as [T, K]; the patch embedding's images as their patches."""
    if isinstance(module, SimulatedPatchEmbed):
        x = F.unfold(x, module.weight.shape[-2:], stride=module.stride).mT
    return x.flatten(0, -2)
