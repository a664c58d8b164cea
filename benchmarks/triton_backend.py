"""The Triton backend for the stages."""

from __future__ import annotations

from benchmarks.kernel_backend import KernelBackend, Layer
from benchmarks.kernel_targets import triton_targets
from vitq_kernels.ops.bit_planes import place_rows
from vitq_kernels.ops.triton.launch import Device, device_of
from vitq_kernels.ops.triton.tiles import Problem, Tile, candidates, rank
from vitq_kernels.ops.triton.tuned import asked, choose, forced

EPILOGUES = {
    "linear_codes": "codes",
    "linear_gelu_codes": "gelu_codes",
    "linear_residual": "residual",
    "linear_residual_layernorm": "residual",  # LayerNorm is a kernel of its own
}


def problem(layer: Layer, gpu: Device) -> Problem:
    """As the choice of a tile sees it."""
    widths = tuple(sorted(set(place_rows(layer.groups)[1])))
    return Problem(layer.m, layer.groups.rows, layer.k, widths, EPILOGUES[layer.op])


def has_4bit_products(gpu: Device) -> bool:
    """Triton has none."""
    return False


def with_norm(tile: Tile) -> bool:
    """No tile has it."""
    return False


TRITON = KernelBackend(
    name="triton",
    gpu_of=device_of,
    problem=problem,
    candidates=candidates,
    rank=rank,
    choose=choose,
    forced=forced,
    asked=asked,
    targets=triton_targets,
    shapes=("mixed", "uniform"),
    has_4bit_products=has_4bit_products,
    compiles=True,
    with_norm=with_norm,
)
