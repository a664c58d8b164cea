"""Argument checks of the ops: what every backend may rely on. Run on real and on fake tensors alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitq_kernels.ops import bit_planes, mma_fragments
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
    """Checks dtype and shape; in ``shape`` an int is exact, a string names a free size, ``...`` any leading sizes.

    Channels, K and D, must not be none.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    wanted = list(shape)
    sizes = list(tensor.shape)
    if wanted and wanted[0] is ...:
        wanted, sizes = wanted[1:], sizes[max(0, len(sizes) - len(wanted) + 1) :]
    fits = len(wanted) == len(sizes) and all(
        (s > 0 if w in ("K", "D") else True) if isinstance(w, str) else w == s
        for w, s in zip(wanted, sizes, strict=True)
    )
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


def check_affine(op: str, x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int, channels: int) -> None:
    """Checks the scales, zero points and width of codes, per channel."""
    check_tensor(op, "inv_scale", inv_scale, torch.float32, (channels,))
    check_tensor(op, "zero_point", zero_point, torch.int32, (channels,))
    check_devices(op, x, inv_scale=inv_scale, zero_point=zero_point)
    check_width(op, bits)


def check_patches(op: str, image: Tensor, patch_height: int, patch_width: int) -> list[int]:
    """Checks images and the size of their patches. Returns the shape of the patches, [B, H // ph, W // pw, K]."""
    check_tensor(op, "image", image, FLOAT_DTYPES, ("B", "C", "H", "W"))
    b, c, height, width = image.shape
    if not 1 <= patch_height <= height:
        fail(op, "patch_height", f"in 1..{height}, the image's height", patch_height)
    if not 1 <= patch_width <= width:
        fail(op, "patch_width", f"in 1..{width}, the image's width", patch_width)
    return [b, height // patch_height, width // patch_width, c * patch_height * patch_width]


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
    elif layout == bit_planes.WEIGHT_LAYOUT:
        _check_forms(op, weight, layout, bit_planes.forms(rows, a.shape[-1]))
        # What the tensors hold is trusted: only a copy to the host could tell.
        planes = bit_planes.BitPlanes.of(list(weight))
        if not planes.is_plausible():
            sizes = [plane.shape[0] for plane in planes.planes]
            fail(op, "weight", f"as prepare_weight makes it for {rows} rows", f"planes of {sizes} rows")
    elif layout == mma_fragments.WEIGHT_LAYOUT:
        _check_forms(op, weight, layout, mma_fragments.forms(rows, a.shape[-1]))
        fragments = mma_fragments.MmaFragments.of(list(weight))
        if not fragments.is_plausible(rows, a.shape[-1]):
            got = f"{fragments.chunks.shape[0]} chunks, an order of {fragments.order.shape[0]} rows"
            fail(op, "weight", f"as prepare_weight makes it for {rows} rows", got)
    else:
        layouts = f"int8_rows, {bit_planes.WEIGHT_LAYOUT} or {mma_fragments.WEIGHT_LAYOUT}"
        fail(op, "layout", layouts, repr(layout))
    for tensor in weight:
        check_devices(op, a, weight=tensor)


def _check_forms(
    op: str, weight: Sequence[Tensor], layout: str, forms: Sequence[tuple[str, torch.dtype, Sequence[object]]]
) -> None:
    """Checks number, names, dtypes and shapes of a prepared weight's tensors."""
    if len(weight) != len(forms):
        fail(op, "weight", f"{len(forms)} tensors in layout {layout}", f"{len(weight)} tensors")
    for (name, dtype, shape), tensor in zip(forms, weight, strict=True):
        check_tensor(op, f"weight {name}", tensor, dtype, shape)
        if not tensor.is_contiguous():
            fail(op, f"weight {name}", "contiguous", f"strides {tensor.stride()}")
