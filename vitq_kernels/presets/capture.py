"""What goes into the modules of a simulated model on the calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitq_kernels.presets.preset import Progress

Fit = Callable[[Tensor], nn.Module]  # a tensor as a quantizer will see it, to the quantizer


@torch.no_grad()
def inputs_of(model: nn.Module, names: Iterable[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The first argument of each named module, all batches concatenated along their first dimension.

    Fake quantizers are modules too: ``blocks.0.attn.probability`` gives softmax's outputs [B, H, S, S].
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, arguments: seen[name].append(arguments[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in seen]
    try:
        for batch in batches:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(tensors) for name, tensors in seen.items()}


class _Fitting(nn.Module):
    """Becomes a quantizer when it first sees a tensor."""

    def __init__(self, fit: Fit, done: Callable[[], None]) -> None:
        super().__init__()
        self.fit = fit
        self.done = done
        self.fitted: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.fitted = self.fit(x)
        self.done()
        return self.fitted(x)


@torch.no_grad()
def fit_in_forward_order(
    model: nn.Module, fits: Mapping[str, Fit], batches: Sequence[Tensor], progress: Progress
) -> None:
    """Sets the quantizer ``fits[name](input)`` in place of every named module, in one forward of all images.

    Each is fitted on what reaches it through the quantizers before it, as RepQ-ViT's code calibrates.
    """
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        progress(count, len(fits))

    for name, fit in fits.items():
        model.set_submodule(name, _Fitting(fit, done))
    model(torch.cat(list(batches)))
    for name in fits:
        fitted = model.get_submodule(name).fitted
        assert fitted is not None, f"{name} was never called"
        model.set_submodule(name, fitted)
