"""The CUDA backend for the stages. Its kernels were compiled when the package was installed."""

from __future__ import annotations

from functools import partial

from benchmarks.kernel_backend import KernelBackend, Layer
from benchmarks.kernel_targets import cuda_targets
from vitq_kernels.ops.cuda.gpus import Gpu
from vitq_kernels.ops.cuda.launch import early_starts, gpu_of
from vitq_kernels.ops.cuda.tiles import NATIVE_4BIT, Plan, Problem, asked, candidates, choose, forced, rank
from vitq_kernels.ops.mma_fragments import place_rows

CODE_OPS = ("linear_codes", "linear_gelu_codes", "linear_gelu_levels")


def problem(layer: Layer, gpu: Gpu) -> Problem:
    """As the choice of a plan sees it; 4-bit products where neither side has more bits and the GPU has them."""
    rows = layer.groups.rows
    order, widths = place_rows(layer.groups)
    widest = max(map(max, widths))
    native4 = layer.input_bits <= 4 and widest <= 4 and has_4bit_products(gpu)
    reordered, words = order[:rows] != list(range(rows)), layer.op not in CODE_OPS
    norm = layer.op == "linear_residual_layernorm"
    return Problem(layer.m, rows, layer.k, widest, reordered, native4, words, norm)


def has_4bit_products(gpu: Gpu) -> bool:
    """Whether its tensor cores multiply 4-bit codes."""
    return gpu.cc in NATIVE_4BIT


def with_norm(plan: Plan) -> bool:
    """As the plan says."""
    return plan.norm


CUDA = KernelBackend(
    name="cuda",
    gpu_of=gpu_of,
    problem=problem,
    candidates=candidates,
    rank=rank,
    choose=choose,
    forced=forced,
    asked=asked,
    targets=cuda_targets,
    shapes=("mixed", "uniform", "mixed in order", "4 bits", "mixed, 4 bits", "LayerNorm", "LayerNorm, mixed"),
    has_4bit_products=has_4bit_products,
    compiles=False,
    with_norm=with_norm,
    ways_to_launch={"no early start": partial(early_starts, False)},
)
