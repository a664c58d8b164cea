"""The CUDA row kernels beyond every backend's cases: each way to hold a row, unaligned memory, extremes, faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import Case, assert_outputs, reference_call
from tests.conftest import BackendCase
from tests.numerics import (
    REAL_KINDS,
    assert_bitwise_equal,
    integers,
    reals,
    uniform,
)
from tests.op_cases import DTYPES
from vitq_kernels.ops import cuda as kernels
from vitq_kernels.ops.cuda.extension import module

OPS = ("quantize", "quantize_per_token", "layernorm", "add_layernorm", "layernorm_per_token")
# A lane's 1 to 8 runs, a block's 2 to 4, the last of them full or not; then what is read again: odd rows, longer ones.
COLUMNS = (8, 64, 192, 256, 384, 768, 1000, 1024, 1280, 1536, 1664, 2048, 2056, 3072, 4096, 5120, 8192)
READ_AGAIN = (1, 3, 5, 147, 2050, 8200)


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
    got = getattr(kernels, case.op)(**moved)
    assert_outputs(case, (got,) if isinstance(got, Tensor) else got, reference_call(case))


@pytest.mark.parametrize("cols", [*COLUMNS, *READ_AGAIN])
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
    [
        ((2, 3, 48, 64), (16, 16)),
        ((1, 3, 37, 50), (14, 14)),
        ((1, 1, 9, 23), (9, 8)),
        ((2, 3, 24, 29), (8, 8)),
        ((3, 3, 27, 24), (8, 8)),  # 9 patches an image: a thread's 4 reach into the next one
        ((3, 4, 21, 16), (7, 5)),
    ],
    ids=["aligned", "patch-14", "one-row", "unaligned-lines", "odd-count", "odd"],
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


# Arguments of the extension's functions, all of them right: null pointers and sizes of an op that does nothing.
CALLS: dict[str, dict[str, Any]] = {
    "quantize": {"x": 0, "dtype": 0, "inv_scale": 0, "zero_point": 0, "codes": 0, "rows": 0, "cols": 8, "bits": 8},
    "quantize_patches": {"image": 0, "dtype": 0, "inv_scale": 0, "zero_point": 0, "codes": 0}
    | {"batch": 0, "channels": 3, "height": 8, "width": 8, "patch_height": 4, "patch_width": 4, "bits": 8},
    "quantize_per_token": {"x": 0, "dtype": 0, "codes": 0, "scale": 0, "rows": 0, "cols": 8},
    "layernorm": {"x": 0, "dtype": 0, "residual": 0, "y": 0, "gain": 16, "offset": 16, "codes": 0, "scale": 0}
    | {"rows": 0, "cols": 8, "eps": 1e-6, "bits": 8},
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("quantize", {"cols": 0}, "cols must be positive, got 0"),
        ("quantize", {"bits": 9}, r"bits must be in 2\.\.8, got 9"),
        ("quantize", {"dtype": 3}, r"dtype must be in 0\.\.2, got 3"),
        ("quantize", {"rows": 1, "cols": 2**31 - 1}, "too many columns, got 2147483647"),
        ("quantize", {"rows": 1 << 35}, "too many rows, got 34359738368"),
        ("quantize_patches", {"patch_height": 9}, "a patch must fit the image"),
        ("quantize_patches", {"patch_width": 0}, "a patch must fit the image"),
        ("quantize_patches", {"batch": 1 << 29}, "too many patches"),
        ("quantize_per_token", {"cols": -1}, "cols must be positive, got -1"),
        ("quantize_per_token", {"rows": 1}, "scale must not be null"),
        ("layernorm", {"bits": 1}, r"bits must be in 2\.\.8, got 1"),
        ("layernorm", {"dtype": -1}, r"dtype must be in 0\.\.2, got -1"),
        ("layernorm", {"offset": 0}, "gain and offset must not be null"),
        ("layernorm", {"residual": 16}, "residual and y must both be null or neither"),
        ("layernorm", {"rows": 1 << 33}, "too many rows, got 8589934592"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_a_wrong_call_is_refused(emulated: BackendCase, op: str, changes: dict[str, Any], message: str) -> None:
    getattr(module(), op)(*CALLS[op].values(), None)
    with pytest.raises(ValueError, match=rf"^vitq_kernels\._cuda: {op}: {message}"):
        getattr(module(), op)(*(CALLS[op] | changes).values(), None)


@pytest.mark.parametrize("cols", [4096, 2050], ids=["held", "read-again"])
@pytest.mark.parametrize("op", ["layernorm", "layernorm_per_token", "quantize_per_token"])
def test_the_barrier_of_a_long_row_is_needed(planted: Any, op: str, cols: int) -> None:
    # One line: each sum has floats of its own, so nothing guards a second use of them.
    case = row_case(op, reals("outlier", (2, cols), torch.float32, seed=1))
    planted.take_barrier_lines()
    check(case, "cpu")
    (line,) = planted.take_barrier_lines()
    planted.plant(skipped_barrier=line)
    with pytest.raises(AssertionError):
        check(case, "cpu")


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_same(planted: Any, seed: int) -> None:
    planted.set_seed(seed)
    for op, cols in (("add_layernorm", 768), ("layernorm_per_token", 6144), ("quantize_per_token", 2049)):
        check(row_case(op, reals("outlier", (6, cols), torch.bfloat16, seed=seed)), "cpu")
