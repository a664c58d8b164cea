"""The linear ops on the CUDA kernel: each names what follows the sums; the launch is one function.

The kernel is csrc/gemm_sm80.cuh, on Hopper gemm_sm90.cuh; what follows csrc/epilogue.cuh, the choice of the tile
``tiles.py``. Signatures and numbers are those of ``ops/reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.ops.cuda.launch import DTYPES, gpu_of, is_settled, launch, pointer
from vitq_kernels.ops.cuda.layernorm import layernorm
from vitq_kernels.ops.cuda.tiles import NATIVE_4BIT, Plan, Problem, choose
from vitq_kernels.ops.mma_fragments import MmaFragments

ALIGNMENT = 16  # bytes of a vector access: rows of ``a`` start at multiples of it
CODES, GELU, REAL, NORM = 0, 1, 2, 4  # launchers.h, Epilogue


def linear_codes(
    a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """``reference.linear_codes``."""
    return _linear(a, weight, CODES, torch.int8, multiplier, bias_q=bias_q, zero_point=zero_point, bits=bits)


def linear_gelu_codes(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    approximate: str,
) -> Tensor:
    """``reference.linear_gelu_codes``."""
    return _linear(
        *(a, weight, GELU, torch.int8, multiplier),
        bias_q=bias_q,
        inv_scale=inv_scale,
        zero_point=zero_point,
        bits=bits,
        tanh_form=approximate == "tanh",
    )


def linear_gelu_levels(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    thresholds: Tensor,
    levels: Tensor,
    approximate: str,
) -> Tensor:
    """``reference.linear_gelu_levels``."""
    return _linear(
        *(a, weight, GELU, torch.int8, multiplier),
        bias_q=bias_q,
        inv_scale=inv_scale,
        thresholds=thresholds,
        levels=levels,
        tanh_form=approximate == "tanh",
    )


def linear_real(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.linear_real``."""
    return _linear(a, weight, REAL, out_dtype, multiplier, bias_q=bias_q)


def linear_residual(a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, residual: Tensor) -> Tensor:
    """``reference.linear_residual``."""
    return _linear(a, weight, REAL, residual.dtype, multiplier, bias_q=bias_q, residual=residual)


def linear_residual_layernorm(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    residual: Tensor,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """``reference.linear_residual_layernorm``, in one launch where the model of ``tiles.py`` finds that faster."""
    layer = _Layer.of(a, weight, multiplier, words=True, norm=True)
    if not layer.plan.norm:
        y = _launch(layer, REAL, residual.dtype, multiplier, bias_q=bias_q, residual=residual)
        return y, layernorm(y, gain, offset, eps, bits)
    codes = a.new_empty((*a.shape[:-1], multiplier.shape[0]))
    vectors: dict[str, Any] = {"residual": residual, "gain": gain, "offset": offset, "codes": codes}
    return _launch(layer, NORM, residual.dtype, multiplier, bias_q=bias_q, bits=bits, eps=eps, **vectors), codes


def linear_per_token(
    a: Tensor,
    token_scale: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``reference.linear_per_token``."""
    return _linear(a, weight, REAL, out_dtype, multiplier, bias_q=bias, token_scale=token_scale)


@dataclass(frozen=True)
class _Layer:
    """A layer's weight and its codes as the kernel reads them, and how it is launched."""

    weight: MmaFragments
    a: Tensor  # int8 [M, K]
    shape: tuple[int, ...]  # of the outputs
    problem: Problem
    plan: Plan

    @classmethod
    def of(cls, a: Tensor, weight: list[Tensor], multiplier: Tensor, words: bool, norm: bool = False) -> _Layer:
        """Chooses the plan; ``words`` and ``norm`` as of ``Problem``."""
        w, a2d, n, gpu = MmaFragments.of(weight), _rows(a), multiplier.shape[0], gpu_of(a)
        widest, reordered = w.present()[-1], w.order.shape[0] > 0
        native4 = w.input_bits <= 4 and widest <= 4 and gpu.cc in NATIVE_4BIT
        problem = Problem(a2d.shape[0], n, a2d.shape[1], widest, reordered, native4, words, norm)
        return cls(w, a2d, (*a.shape[:-1], n), problem, choose(problem, gpu))


def _linear(
    a: Tensor, weight: list[Tensor], kind: int, out_dtype: torch.dtype, multiplier: Tensor, **rest: Any
) -> Tensor:
    return _launch(_Layer.of(a, weight, multiplier, words=kind == REAL), kind, out_dtype, multiplier, **rest)


def _launch(
    layer: _Layer,
    kind: int,
    out_dtype: torch.dtype,
    multiplier: Tensor,
    *,
    bits: int = 8,
    tanh_form: bool = False,
    eps: float = 0.0,
    **vectors: Tensor | None,
) -> Tensor:
    """``vectors`` are those of EpilogueArguments (csrc/launchers.h) by name."""
    a, w, problem, plan = layer.a, layer.weight, layer.problem, layer.plan
    m, n, k = problem.tokens, problem.rows, problem.cols
    out = a.new_empty(layer.shape, dtype=out_dtype)
    partial = a.new_empty((plan.parts, m, n), dtype=torch.int32) if plan.has_workspace else None

    # Held here until the launch: only their addresses are handed over.
    given = {name: None if tensor is None else _aligned(tensor) for name, tensor in vectors.items()}
    given["multiplier"] = _aligned(multiplier)
    residual, levels = given.get("residual"), given.get("levels")
    names = ("multiplier", "bias_q", "zero_point", "inv_scale", "thresholds", "levels", "residual", "token_scale")
    epilogue = module().EpilogueArguments(
        *(pointer(given.get(name)) for name in names),
        0 if levels is None else levels.numel(),
        1 if residual is None else max(1, residual.numel() // n),
        bits,
        tanh_form,
        DTYPES.get(out_dtype, 0),
        *(pointer(given.get(name)) for name in ("gain", "offset")),
        eps,
        pointer(given.get("codes")),
    )
    settled = all([is_settled(w.chunks), is_settled(w.groups)])  # both are noted
    order = w.order if problem.reordered else None
    arranged = module().LinearWeight(
        *map(pointer, (w.chunks, w.groups, order)), w.groups.shape[0], problem.steps, problem.widest, settled
    )
    how = (epilogue, kind, plan.tile, problem.native4, plan.parts, partial, out)
    launch("linear", a, a, a.stride(0), arranged, m, n, k, *how)
    return out


def _rows(a: Tensor) -> Tensor:
    """Codes [..., K] as rows that the kernel can read: at multiples of 16 bytes, padded with zeros where K is none."""
    flat = a.reshape(-1, a.shape[-1])
    if a.shape[-1] % ALIGNMENT:
        return F.pad(flat, (0, -a.shape[-1] % ALIGNMENT))
    return _aligned(flat)


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on: a view may begin anywhere."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x
