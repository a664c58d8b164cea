"""The CUDA row kernels beyond every backend's cases: each way to hold a row, unaligned memory, extremes, faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import EXACT_OPS, Case, exact_reals, reference_call
from tests.conftest import BackendCase
from tests.numerics import (
    REAL_KINDS,
    assert_bitwise_equal,
    assert_codes_close,
    assert_reals_close,
    integers,
    reals,
    uniform,
)
from tests.op_cases import DTYPES
from vitq_kernels.ops import BackendUnavailableError
from vitq_kernels.ops import cuda as kernels
from vitq_kernels.ops.cuda.extension import module

OPS = ("quantize", "quantize_per_token", "layernorm", "add_layernorm", "layernorm_per_token")
# One run a lane, some, all; a block's; odd ones.
COLUMNS = (1, 3, 8, 147, 192, 256, 384, 768, 1000, 1024, 1280, 1536, 2048, 2056, 5120, 8200, 16000)


def row_case(op: str, x: Tensor, bits: int = 8) -> Case:
    k = x.shape[-1]
    gain, offset = uniform(5, 60, (k,), seed=2).float(), uniform(-20, 20, (k,), seed=3).float()
    tails: dict[str, dict[str, Any]] = {
        "quantize": {"inv_scale": gain, "zero_point": integers(-20, 20, (k,), seed=4), "bits": bits},
        "quantize_per_token": {},
        "layernorm": {"gain": gain, "offset": offset, "eps": 1e-6, "bits": bits},
        "add_layernorm": {"residual": x.flip(0), "gain": gain, "offset": offset, "eps": 1e-6, "bits": bits},
        "layernorm_per_token": {"weight": gain, "bias": offset, "eps": 1e-6},
    }
    return Case(op, f"{list(x.shape)}", {"x": x} | tails[op])


def check(case: Case, device: str) -> None:
    moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in case.arguments.items()}
    got, wanted = getattr(kernels, case.op)(**moved), reference_call(case)
    for actual, expected in zip((got,) if isinstance(got, Tensor) else got, wanted, strict=True):
        if case.op in EXACT_OPS:
            assert_bitwise_equal(actual.cpu(), expected)
        elif expected.dtype == torch.int8:
            assert_codes_close(actual.cpu(), expected)
        else:
            assert_reals_close(actual.cpu(), exact_reals(case), expected)


@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("op", OPS)
def test_every_length_of_a_row(cuda: BackendCase, op: str, cols: int) -> None:
    for number, kind in enumerate(REAL_KINDS):
        check(row_case(op, reals(kind, (33, cols), DTYPES[number % 3], seed=cols)), cuda.device)


@pytest.mark.parametrize("offset", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_memory_that_is_not_aligned(cuda: BackendCase, op: str, dtype: torch.dtype, offset: int) -> None:
    flat = reals("normal", (5 * 256 + offset,), dtype, seed=1).to(cuda.device)
    x = flat[offset:].view(5, 256)
    assert x.data_ptr() % 16
    case = row_case(op, x.cpu())
    moved = {n: t.to(cuda.device) if isinstance(t, Tensor) else t for n, t in case.arguments.items()} | {"x": x}
    got, wanted = getattr(kernels, op)(**moved), getattr(kernels, op)(**(moved | {"x": x.clone()}))
    for actual, expected in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, wanted)), strict=True):
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_rows_of_every_count(cuda: BackendCase, op: str) -> None:
    for rows in (0, 1, 4, 5, 17):
        check(row_case(op, reals("normal", (rows, 24), torch.float32, seed=rows)), cuda.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    ("shape", "patch"),
    [((2, 3, 48, 64), (16, 16)), ((1, 3, 37, 50), (14, 14)), ((1, 1, 9, 23), (9, 8)), ((2, 4, 30, 24), (7, 5))],
    ids=["aligned", "patch-14", "one-row", "odd"],
)
def test_patches(cuda: BackendCase, shape: tuple[int, ...], patch: tuple[int, int], dtype: torch.dtype) -> None:
    k = shape[1] * patch[0] * patch[1]
    arguments = {
        "image": reals("normal", shape, dtype, seed=1),
        "inv_scale": uniform(5, 60, (k,), seed=2).float(),
        "zero_point": integers(-20, 20, (k,), seed=4),
        "patch_height": patch[0],
        "patch_width": patch[1],
        "bits": 8,
    }
    check(Case("quantize_patches", "", arguments), cuda.device)


@pytest.mark.parametrize("op", ["layernorm", "quantize_per_token"])
def test_a_row_beyond_the_kernels_is_named(emulated: BackendCase, op: str) -> None:
    case = row_case(op, torch.zeros(1, 16385))
    with pytest.raises(BackendUnavailableError, match=rf"^vitq::{op} on cpu: backend cuda takes rows of up to 16384"):
        getattr(kernels, op)(**case.arguments)


@pytest.fixture
def planted(emulated: BackendCase) -> Iterator[Any]:
    yield module()
    module().plant(0, 0, False, False)
    module().set_seed(1)


def test_the_barrier_of_a_long_row_is_needed(planted: Any) -> None:
    case = row_case("layernorm_per_token", reals("outlier", (2, 4096), torch.float32, seed=1))
    planted.take_barrier_lines()
    check(case, "cpu")
    (line,) = planted.take_barrier_lines()
    planted.plant(line, 0, False, False)
    with pytest.raises(AssertionError):
        check(case, "cpu")
