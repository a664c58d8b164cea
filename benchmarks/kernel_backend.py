"""What the stages know of a backend of our own kernels: an adapter each (``triton_backend.py``, ``cuda_backend.py``).

A *tile* is what a linear layer is launched with: a ``Tile`` of Triton's, a ``Plan`` of cuda's. A backend has its own
descriptions of a GPU and of a layer; nothing but the adapter looks into them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.microbench import Row
from vitq_kernels.spec import MAX_BITS, RowGroups

Gpu, Problem, Tile = Any, Any, Any  # the backend's own


@dataclass(frozen=True)
class Layer:
    """A linear layer, for any backend."""

    m: int  # tokens
    k: int
    groups: RowGroups  # widths of the N rows
    op: str = "linear_codes"
    input_bits: int = MAX_BITS  # of the codes that come in


@dataclass(frozen=True)
class KernelBackend:
    """An adapter. Its functions are those of modules: processes that compile or check get it too."""

    name: str  # as use_backend knows it
    gpu_of: Callable[[Tensor], Gpu]
    problem: Callable[[Layer, Gpu], Problem]
    candidates: Callable[[Problem, Gpu], Sequence[Tile]]  # every legal tile
    rank: Callable[[Problem, Gpu], Sequence[tuple[Tile, float]]]  # with the model's microseconds, best first
    choose: Callable[[Problem, Gpu], Tile]
    forced: Callable[[Tile | None], AbstractContextManager[None]]
    asked: Callable[[], AbstractContextManager[list[Problem]]]
    targets: Callable[[Sequence[Row], Gpu], list[Row]]
    shapes: tuple[str, ...]  # of kernel_checks.TILE_SHAPES: every tile is tried on them
    has_4bit_products: Callable[[Gpu], bool]
    compiles: bool  # on the first launch, so that what is timed is compiled before
    with_norm: Callable[[Tile], bool]  # whether a tile has the LayerNorm behind the layer in its launch
    # What a launch's least time is measured under, beside the default: a context by what rows call it.
    ways_to_launch: Mapping[str, Callable[[], AbstractContextManager[None]]] = field(default_factory=dict)

    def gpu(self, device: str) -> Gpu:
        """The description of a device."""
        return self.gpu_of(torch.empty(0, device=device))
