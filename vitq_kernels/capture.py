"""A whole model as CUDA graphs, one per batch bucket: a replay costs one launch where an eager call costs hundreds."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitq_kernels.buckets import Buckets
from vitq_kernels.images import image_shape

__all__ = ["CapturedModel", "capture"]

Example = Tensor | Sequence[Any] | Mapping[str, Any]


def capture(model: nn.Module, batch_sizes: Sequence[int], example: Example | None = None) -> CapturedModel:
    """Captures a model's forward in CUDA graphs; the result is called as the model is, with any batch.

    Args:
        model: in eval mode, float or quantized, on a GPU; elsewhere it runs as it is, in the same buckets.
        batch_sizes: the buckets, distinct and positive. A batch runs in the smallest that holds it, padded; one above
            the largest runs in chunks of the largest.
        example: arguments of a call: one tensor, a tuple of positional ones, or a mapping of named ones. By default
            images of the size and dtype that a timm model tells; a model that tells none is captured in its first call.

    Returns:
        The captured model. All tensors in arguments and outputs have the batch as their first dimension; both may be
        nested tuples, lists and dicts. What else is in the arguments is fixed at capture.

    Raises:
        ValueError: batch sizes or example differ from the above, or the model is in training mode.
        RuntimeError: a bucket cannot be captured, for instance because the model waits for the GPU in its forward.

    Example:
        >>> fast = vitq.capture(vitq.load("vit.safetensors", "cuda").half(), batch_sizes=(1, 8, 64))
        >>> logits = fast(images)
    """
    return CapturedModel(model, batch_sizes, example)


class CapturedModel(nn.Module):
    """What ``capture`` returns; see there.

    Calls may come from several threads and on several streams: they run one after another, each on the caller's
    current stream, and what they return is the caller's alone. Nothing is recorded for autograd.

    The graphs hold the kernels of the backend in force when they were captured, and the addresses of the weights. So
    ``.to()`` and the like are refused here, and a call after the whole model was moved, or packed weights were loaded
    into it, raises; float weights written in place take effect. After any other change capture again.
    """

    def __init__(self, model: nn.Module, batch_sizes: Sequence[int], example: Example | None = None) -> None:
        super().__init__()
        self.batch_sizes = _checked_sizes(batch_sizes)
        if training := [name or type(model).__name__ for name, module in model.named_modules() if module.training]:
            raise ValueError(f"capture: model must be in eval mode, got {training[0]} in training mode")
        self.model = model
        self.eval()
        self._signature = inspect.signature(model.forward)
        self._lock = threading.Lock()
        self._buckets: Buckets | None = None
        if example is None:
            example = _image_example(model)
        if example is not None:
            self._buckets = self._captured(self._example_arguments(example))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own arguments and outputs.

        Raises:
            TypeError: arguments that are not in the model's signature.
            ValueError: an argument has another dtype, shape, device or value than captured, or the batch is empty.
            RuntimeError: the model's weights are not where they were captured, or torch is compiling.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("a captured model cannot be compiled or exported: do that to the model")
        arguments = self._bound(args, kwargs)
        with self._lock, torch.no_grad():
            if self.model.training:
                raise ValueError("capture: model must be in eval mode, got it in training mode")
            if self._buckets is None:
                self._buckets = self._captured(arguments)
            return self._buckets(arguments)

    def train(self, mode: bool = True) -> CapturedModel:
        """Eval mode only."""
        if mode:
            raise ValueError("train: mode must be False for a captured model, got True")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        raise RuntimeError("a captured model cannot be moved or converted: do that to the model and capture it again")

    def extra_repr(self) -> str:
        """The buckets."""
        return f"batch_sizes={self.batch_sizes}"

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by their names in the model's signature, defaults filled in."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _example_arguments(self, example: Example) -> dict[str, Any]:
        if isinstance(example, Mapping):
            return self._bound((), example)
        if isinstance(example, Tensor):
            return self._bound((example,), {})
        if isinstance(example, tuple | list):
            return self._bound(example, {})
        raise ValueError(f"capture: example must be a tensor, a tuple or a mapping, got {type(example).__name__}")

    # Outside inference mode, whoever calls: a buffer made inside it could not be written to outside.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self, arguments: dict[str, Any]) -> Buckets:
        def call(arguments: dict[str, Any]) -> Any:
            bound = inspect.BoundArguments(self._signature, arguments)
            return self.model(*bound.args, **bound.kwargs)

        return Buckets(self.model, call, self.batch_sizes, arguments)


def _checked_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Ascending."""
    sizes = tuple(batch_sizes) if isinstance(batch_sizes, Sequence) else ()
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if not sizes or not whole or len(set(sizes)) < len(sizes):
        raise ValueError(f"capture: batch_sizes must be distinct positive integers, got {batch_sizes!r}")
    return tuple(sorted(sizes))


def _image_example(model: nn.Module) -> Tensor | None:
    """One image as the model tells that it takes them, or None."""
    shape = image_shape(model)
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return None if shape is None or like is None else like.new_zeros((1, *shape))
