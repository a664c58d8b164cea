"""Static buffers for batches of fixed sizes, and the model run on them: by CUDA graphs, or without on other devices.

A batch is padded up to a bucket or cut into chunks of the largest one, copied in, run, and sliced back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

GRAPHED = ("cuda",)  # device types with graphs
WARM_UPS = 3  # calls before a capture: kernels are compiled and chosen, weights laid out, workspaces allocated
# Attributes of modules whose tensors a move or a load replaces; the last is nn.PackedLinear's.
WEIGHT_KINDS = ("_parameters", "_buffers", "_prepared")

Outputs = tuple[list[Any], pytree.TreeSpec]


class Buckets:
    """Runs ``call`` on batches of any size; not thread-safe.

    Args:
        model: what ``call`` runs; its weights must stay where they are.
        call: arguments by name to outputs.
        batch_sizes: ascending.
        arguments: of one call, any batch: every later call must have the same but for the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[dict[str, Any]], Any],
        batch_sizes: Sequence[int],
        arguments: dict[str, Any],
    ) -> None:
        paths, self._spec = pytree.tree_flatten_with_path(arguments)
        self._names = [_readable(path) for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        batch = self._batch(leaves)
        self._device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        for tensor in chain(model.parameters(), model.buffers(), filter(_is_tensor, leaves)):
            if tensor.device != self._device:
                raise ValueError(
                    f"capture: model and arguments must share a device, got {tensor.device}, {self._device}"
                )
        self._call = call
        self._sizes = batch_sizes
        rows = torch.arange(batch_sizes[-1], device=self._device) % batch
        self._static = [leaf.detach()[rows] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if self._device.type in GRAPHED:
            self._run = self._graphs()
            self._done = torch.cuda.Event()
        else:
            self._run = {size: self._eager(size) for size in batch_sizes}
            self._run[batch_sizes[0]]()  # what does not fit is told now, not by the first request
        self._weights = _first_weights(model)
        # What graphs read must outlive its replacement, in whatever attribute: a stale result, never a freed address.
        self._kept = [t.detach() for module in model.modules() for t in _tensors_in(vars(module))]

    def __call__(self, arguments: dict[str, Any]) -> Any:
        """Outputs for a batch of any size, in tensors of their own."""
        for module, kind, address in self._weights:
            if _address(vars(module)[kind]) != address:
                raise RuntimeError("capture: the model's weights must stay where they were captured; capture it again")
        leaves, spec = pytree.tree_flatten(arguments)
        if spec != self._spec:
            got = [_readable(path) for path, _ in pytree.tree_flatten_with_path(arguments)[0]]
            raise ValueError(f"capture: arguments must be {self._names}, as captured, got {got}")
        self._check(leaves)
        batch = self._batch(leaves)
        if self._device.type not in GRAPHED:
            return self._in_chunks(leaves, batch)
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # the buffers are those of the call before, maybe on another stream
            try:
                return self._in_chunks(leaves, batch)
            finally:
                self._done.record(stream)

    def _check(self, leaves: Sequence[Any]) -> None:
        """Raises ValueError unless the arguments are as captured, but for the batch."""
        for name, leaf, static in zip(self._names, leaves, self._static, strict=True):
            if isinstance(leaf, Tensor) and isinstance(static, Tensor):
                same = (
                    leaf.dtype == static.dtype and leaf.device == static.device and leaf.shape[1:] == static.shape[1:]
                )
            else:
                same = leaf is static or (type(leaf) is type(static) and bool(leaf == static))
            if not same:
                wanted, got = _described(static, "B"), _described(leaf)
                raise ValueError(f"capture: {name} must be {wanted}, as captured, got {got}")

    def _batch(self, leaves: Sequence[Any]) -> int:
        """The batch that all tensors share."""
        sizes = {name: leaf.shape[:1] for name, leaf in zip(self._names, leaves, strict=True) if _is_tensor(leaf)}
        if not sizes:
            raise ValueError("capture: arguments must hold a tensor, got none")
        batch = next(iter(sizes.values()))
        if not batch or not batch[0] or any(size != batch for size in sizes.values()):
            got = ", ".join(f"{name} of {size[0] if size else 'no dimension'}" for name, size in sizes.items())
            raise ValueError(f"capture: tensors must share a batch of at least 1 as first dimension, got {got}")
        return int(batch[0])

    def _in_chunks(self, leaves: Sequence[Any], batch: int) -> Any:
        whole: list[Any] = []
        for start in range(0, batch, self._sizes[-1]):
            count = min(self._sizes[-1], batch - start)
            size = self._sizes[bisect_left(self._sizes, count)]
            self._fill(leaves, start, count, size)
            outputs, spec = self._run[size]()
            if not whole:
                whole = [t.new_empty((batch, *t.shape[1:])) if isinstance(t, Tensor) else t for t in outputs]
            for target, output in zip(whole, outputs, strict=True):
                if isinstance(output, Tensor):
                    target[start : start + count].copy_(output[:count])
        return pytree.tree_unflatten(whole, spec)

    def _fill(self, leaves: Sequence[Any], start: int, count: int, size: int) -> None:
        """Copies ``count`` rows into the buffers; the padding repeats the first, which is valid whatever it means."""
        for static, leaf in zip(self._static, leaves, strict=True):
            if isinstance(leaf, Tensor):
                static[:count].copy_(leaf[start : start + count])
                if count < size:
                    static[count:size].copy_(leaf[start : start + 1].expand(size - count, *leaf.shape[1:]))

    def _eager(self, size: int) -> Callable[[], Outputs]:
        leaves = [static[:size] if isinstance(static, Tensor) else static for static in self._static]

        def run() -> Outputs:
            outputs, spec = pytree.tree_flatten(self._call(pytree.tree_unflatten(leaves, self._spec)))
            for output in outputs:
                if isinstance(output, Tensor) and output.shape[:1] != (size,):
                    got = _described(output)
                    raise ValueError(f"capture: outputs must have the batch, {size}, as first dimension, got {got}")
            return outputs, spec

        return run

    def _graphs(self) -> dict[int, Callable[[], Outputs]]:
        """One graph a bucket, the largest first: the others find room in its memory.

        Such a pool may be shared by replays in any order: inputs lie outside it, and outputs are held.
        """
        with torch.cuda.device(self._device):
            side, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graphs = {size: self._graph(size, side, pool) for size in reversed(self._sizes)}
            torch.cuda.current_stream().wait_stream(side)
        return graphs

    def _graph(self, size: int, side: torch.cuda.Stream, pool: Any) -> Callable[[], Outputs]:
        call, graph = self._eager(size), torch.cuda.CUDAGraph()
        try:
            for _ in range(WARM_UPS):
                call()
            # thread_local: what other threads do meanwhile, such as allocating, does not break the capture.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                outputs = call()
        except RuntimeError as error:
            raise RuntimeError(f"capture: batch size {size} cannot be captured: {error}") from error

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _described(value: Any, batch: str | None = None) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    sizes = [str(size) for size in value.shape]
    if batch is not None:
        sizes[0] = batch
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(sizes)}] on {value.device}"


def _readable(path: Any) -> str:
    """``pair[1]`` for the second part of the argument ``pair``."""
    return str(path[0].key) + pytree.keystr(path[1:])


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part)


def _address(attribute: Any) -> int | None:
    first = next(_tensors_in(attribute), None)
    return None if first is None else first.data_ptr()


def _first_weights(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Module, kind and address of the model's first tensor of each kind: a move or a load of the model changes one.

    All of them would be hundreds to look at in every call.
    """
    found: dict[str, tuple[nn.Module, str, int]] = {}
    for module in model.modules():
        for kind in WEIGHT_KINDS:
            address = _address(vars(module).get(kind))
            if address is not None:
                found.setdefault(kind, (module, kind, address))
    return list(found.values())
