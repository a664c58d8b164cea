"""Argument checks of the ops: what every backend may rely on. Run on real and on fake tensors alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitq_kernels.spec import check_bits

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fail(op: str, argument: str, expected: str, got: object) -> None:
    """Raises the ValueError that every check ends in."""
    raise ValueError(f"vitq::{op}: {argument} must be {expected}, got {got}")


def describe(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_tensor(
    op: str, argument: str, tensor: Tensor, dtypes: Sequence[torch.dtype] | torch.dtype, shape: Sequence[object]
) -> None:
    """Checks dtype and shape; in ``shape`` an int is exact, a string names a free size, ``...`` any leading sizes."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    wanted = list(shape)
    sizes = list(tensor.shape)
    if wanted and wanted[0] is ...:
        wanted, sizes = wanted[1:], sizes[max(0, len(sizes) - len(wanted) + 1) :]
    fits = len(wanted) == len(sizes) and all(isinstance(w, str) or w == s for w, s in zip(wanted, sizes, strict=True))
    if tensor.dtype not in allowed or not fits:
        names = "/".join(str(d).removeprefix("torch.") for d in allowed)
        shown = ", ".join("..." if w is ... else str(w) for w in shape)
        fail(op, argument, f"{names} [{shown}]", describe(tensor))


def check_devices(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Checks that all tensors lie where the first one does."""
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            fail(op, argument, f"on {first.device}", f"{tensor.device}")


def check_width(op: str, bits: int) -> None:
    """Checks a code width."""
    check_bits(bits, f"vitq::{op}: bits")


def check_approximate(op: str, approximate: str) -> None:
    """Checks the form of GELU."""
    if approximate not in ("none", "tanh"):
        fail(op, "approximate", "'none' or 'tanh'", repr(approximate))


def check_weight(op: str, a: Tensor, weight: Sequence[Tensor], layout: str, rows: int) -> None:
    """Checks a prepared weight against input codes [..., K] and ``rows`` outputs."""
    check_tensor(op, "a", a, torch.int8, (..., "K"))
    if a.dim() < 1:
        fail(op, "a", "int8 [..., K]", describe(a))
    if layout == "int8_rows":
        if len(weight) != 1:
            fail(op, "weight", "one tensor in layout int8_rows", f"{len(weight)} tensors")
        check_tensor(op, "weight", weight[0], torch.int8, (rows, a.shape[-1]))
        check_devices(op, a, weight=weight[0])
    else:
        fail(op, "layout", "int8_rows", repr(layout))
