"""Argument checks of the ops: what every backend may rely on. Run on real and on fake tensors alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from vitq_kernels.ops import bit_planes, mma_fragments
from vitq_kernels.spec import check_bits

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
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


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    levels: Tensor,
    multiplier: Tensor,
    zero_point: Tensor,
    bias_q: Tensor | None,
    inv_tau: Tensor | None,
    bits: int,
    windows: Tensor | None,
    pattern: Tensor | None,
) -> list[int]:
    """Checks the arguments of attention. Returns the shape of its output, [B, L, H * D].

    What ``windows`` and ``pattern`` hold is checked on a CPU alone: of a GPU only a copy to the host could tell.
    """
    op = "attention"
    form = ("B", "H", "S", "D") if windows is None else ("B", "H", "L", "D")
    check_tensor(op, "q", q, torch.int8, form)
    b, h, tokens, d = q.shape
    if tokens == 0:
        fail(op, "q", f"int8 [{', '.join(form)}] with {form[2]} > 0", describe(q))
    for argument, tensor in (("k", k), ("v", v)):
        check_tensor(op, argument, tensor, torch.int8, (b, h, tokens, d))
    check_tensor(op, "kappa", kappa, torch.float32, (h,))
    check_tensor(op, "levels", levels, torch.uint8, (h, "L"))
    if levels.shape[1] not in (4, 8, 16, 32, 64, 128, 256):
        fail(op, "levels", "uint8 [H, 2^b] with b in 2..8", list(levels.shape))
    check_tensor(op, "multiplier", multiplier, torch.float32, (h, d))
    check_tensor(op, "zero_point", zero_point, torch.int32, (h, d))
    biases, s = _check_windows(op, b, tokens, bias_q, windows, pattern)
    if bias_q is not None:
        fits = bias_q.dim() == 4 and all(x in (1, y) for x, y in zip(bias_q.shape, (biases, h, s, s), strict=True))
        if bias_q.dtype != torch.int32 or not fits:
            fail(op, "bias_q", f"int32, broadcasting to {[biases, h, s, s]}", f"{bias_q.dtype} {list(bias_q.shape)}")
    if inv_tau is not None:
        check_tensor(op, "inv_tau", inv_tau, torch.float32, (h,))
    check_devices(op, q, k=k, v=v, kappa=kappa, levels=levels, multiplier=multiplier, zero_point=zero_point)
    check_devices(op, q, bias_q=bias_q, inv_tau=inv_tau, windows=windows, pattern=pattern)
    check_width(op, bits)
    return [b, tokens, h * d]


def _check_windows(
    op: str, images: int, tokens: int, bias_q: Tensor | None, windows: Tensor | None, pattern: Tensor | None
) -> tuple[int, int]:
    """Checks windows and patterns. Returns how many biases there may be, and the length of a sequence."""
    if windows is None:
        if pattern is not None:
            fail(op, "pattern", "None without windows", describe(pattern))
        return images, tokens
    check_tensor(op, "windows", windows, torch.int32, ("W", "S"))
    count, places = windows.shape
    if count * places != tokens:
        fail(op, "windows", f"int32 [W, S] with W * S = L = {tokens}", describe(windows))
    _check_permutation(op, "windows", windows)
    if pattern is None:
        return 1, places
    check_tensor(op, "pattern", pattern, torch.int32, (count,))
    if bias_q is None or not bias_q.dim():
        fail(op, "pattern", "None without a bias_q [P, H, S, S]", describe(pattern))
    patterns = max(1, bias_q.shape[0])
    _check_range(op, "pattern", pattern, patterns)
    return patterns, places


def _check_permutation(op: str, argument: str, values: Tensor) -> None:
    """Checks that a tensor holds each of 0..numel-1, where that needs no waiting for a GPU."""
    if values.device.type != "cpu" or is_fake(values):
        return
    _check_range(op, argument, values, values.numel())
    missing = torch.ones(values.numel(), dtype=torch.int8).index_fill_(0, values.flatten().long(), 0)
    if missing.any():
        fail(op, argument, f"a permutation of 0..{values.numel() - 1}", f"one without {int(missing.argmax())}")


def _check_range(op: str, argument: str, values: Tensor, count: int) -> None:
    """Checks that a tensor holds numbers from 0 to count - 1, where that needs no waiting for a GPU."""
    if values.device.type == "cpu" and not is_fake(values):
        low, high = (int(x) for x in values.aminmax())
        if low < 0 or high >= count:
            fail(op, argument, f"in 0..{count - 1}", f"{low}..{high}")


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


def check_linear(op: str, a: Tensor, weight: list[Tensor], layout: str, multiplier: Tensor, **rows: Tensor) -> list:
    """The checks that all linear ops share; ``rows`` are further int32 vectors [N]. Returns the output shape."""
    check_tensor(op, "multiplier", multiplier, torch.float32, ("N",))
    n = multiplier.shape[0]
    check_weight(op, a, weight, layout, n)
    for argument, tensor in rows.items():
        check_tensor(op, argument, tensor, torch.int32, (n,))
    check_devices(op, a, multiplier=multiplier, **rows)
    return [*a.shape[:-1], n]


def check_out_dtype(op: str, out_dtype: torch.dtype) -> None:
    """Checks the dtype of real outputs."""
    if out_dtype not in FLOAT_DTYPES:
        fail(op, "out_dtype", "float32, float16 or bfloat16", out_dtype)


def check_residual(op: str, a: Tensor, residual: Tensor, shape: Sequence[int]) -> None:
    """Checks what is added to outputs of a shape: it may lack leading dimensions."""
    check_tensor(op, "residual", residual, FLOAT_DTYPES, tuple(shape[-max(1, residual.dim()) :]))
    check_devices(op, a, residual=residual)


def check_norm_vectors(op: str, like: Tensor, channels: int, **vectors: Tensor) -> None:
    """Checks the vectors of a LayerNorm over so many channels."""
    for argument, tensor in vectors.items():
        check_tensor(op, argument, tensor, torch.float32, (channels,))
        check_devices(op, like, **{argument: tensor})


def check_layernorm(op: str, x: Tensor, **vectors: Tensor) -> None:
    """Checks the input of a LayerNorm and its vectors."""
    check_tensor(op, "x", x, FLOAT_DTYPES, (..., "K"))
    check_norm_vectors(op, x, x.shape[-1], **vectors)
