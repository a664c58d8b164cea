"""How a kernel of the extension is started: on the current stream of the tensors' device, from raw pointers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vitq_kernels.ops.backends import BackendUnavailableError
from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.ops.cuda.gpus import MOST_BLOCKS, Gpu, architecture

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # semantics.cuh, Real


def gpu_of(tensor: Tensor) -> Gpu:
    """The GPU that a tensor lies on. The emulation stands for an A100."""
    return _gpu(tensor.device.index) if tensor.is_cuda else Gpu(80, 108, "emulation")


@cache
def _gpu(index: int) -> Gpu:
    properties, has_wgmma = torch.cuda.get_device_properties(index), module().has_wgmma
    cc = 10 * properties.major + properties.minor
    clusters: tuple[int, ...] = ()
    if architecture(Gpu(cc, 0)).wgmma_products and has_wgmma:
        with torch.cuda.device(index):
            clusters = tuple(module().clusters_at_once(blocks) for blocks in range(1, MOST_BLOCKS + 1))
    return Gpu(cc, properties.multi_processor_count, properties.name, has_wgmma, clusters)


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements begin; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


_launched = WeakTensorKeyDictionary()  # tensors that a launch was given, at which version


def is_settled(tensor: Tensor) -> bool:
    """Whether an earlier launch was given a tensor as it is now; this one is noted.

    A kernel may then read it while the kernel in front still runs (csrc/launch.cuh): what wrote the tensor came before
    the earlier launch, which waited for it. Writes that torch does not count, to ``tensor.data``, are not seen.
    """
    if tensor.is_inference():  # counts no writes
        return False
    known = _launched.get(tensor) == tensor._version
    _launched[tensor] = tensor._version
    return known


@contextlib.contextmanager
def early_starts(allowed: bool) -> Iterator[None]:
    """Whether kernels launched inside the ``with`` block may start while the one in front ends, where the GPU can."""
    before = module().set_early_starts(allowed)
    try:
        yield
    finally:
        module().set_early_starts(before)


def refuse(op: str, like: Tensor, why: str) -> NoReturn:
    """Raises the error of an op whose sizes the kernels do not take."""
    raise BackendUnavailableError(f"vitq::{op} on {like.device.type}: backend cuda {why}; can: reference")


def launch(name: str, like: Tensor, *arguments: object) -> None:
    """Calls the launcher of that name (csrc/launchers.h) with tensors as pointers, on the stream in force."""
    given = [pointer(a) if isinstance(a, Tensor) else a for a in arguments]
    if not like.is_cuda:
        getattr(module(), name)(*given, None)
        return
    elsewhere = like.device.index != torch.cuda.current_device()
    with torch.cuda.device(like.device) if elsewhere else contextlib.nullcontext():
        getattr(module(), name)(*given, torch.cuda.current_stream(like.device).cuda_stream)
