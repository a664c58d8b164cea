"""The ``cpu`` backend beyond the cases of every backend: many tiles, both ways to multiply, both ways to round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conformance import EXACT_OPS, Case, check_values
from tests.numerics import assert_bitwise_equal, integers, words
from tests.op_cases import ALL_CASES, SAMPLES
from vitq_kernels.ops import reference
from vitq_kernels.ops.cpu import linear, primitives

EXACT_CASES = [case for case in ALL_CASES if case.op in EXACT_OPS]
FUSED = torch.addcmul


def unfused(shift: Tensor, value: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.addcmul`` on a CPU without a fused multiply-add: the product is rounded too."""
    return torch.add(shift, value * factor, out=out)


def unfused_at_the_end(shift: Tensor, value: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """Fused where a whole vector is at hand, not in what is left over."""
    result = FUSED(shift, value, factor)
    result[..., -3:] = unfused(shift, value, factor)[..., -3:]
    return result if out is None else out.copy_(result)


def unfused_by_row(shift: Tensor, value: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """Fused but for factors of one number a row."""
    return (unfused if factor.shape[-1] == 1 else FUSED)(shift, value, factor, out=out)


@pytest.mark.parametrize("elements", [3000, 8000])  # 50 x 50 scores: a head, and an image and a half of two heads
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_values_from_many_tiles(case: Case, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(linear, "TILE_COLUMNS", 16)
    check_values(case, "cpu", reference_floats=False)


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_exact_ops_where_addcmul_is_not_fused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "addcmul", unfused)
    primitives.addcmul_rounds_once.cache_clear()
    try:
        check_values(case, "cpu")
    finally:
        primitives.addcmul_rounds_once.cache_clear()


@pytest.mark.parametrize("addcmul", [unfused, unfused_at_the_end, unfused_by_row])
def test_an_addcmul_that_rounds_twice_is_seen(addcmul: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "addcmul", addcmul)
    assert not primitives.addcmul_rounds_once.__wrapped__()


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("limit", [1 << 8, 1 << 24, (1 << 31) - 1], ids=["small", "2^24", "int32"])
@pytest.mark.parametrize("largest_zero_point", [0, 127, 1 << 22], ids=lambda z: f"z{z}")
def test_requantise_at_extremes(bits: int, limit: int, largest_zero_point: int) -> None:
    acc = integers(-limit, limit, (37, 211), seed=bits)
    acc[0, :4] = torch.tensor([-(1 << 31), (1 << 31) - 1, 0, -1])
    significands = torch.from_numpy((words(9, 211) % (1 << 23)).astype("int64")) + (1 << 23)
    multiplier = (significands.double() * 2.0**-23 * 2.0 ** integers(-30, 10, (211,), seed=3).double()).float()
    multiplier[::5] = 0.5  # ties
    zero_point = integers(-largest_zero_point, largest_zero_point, (211,), seed=4)
    value, out = acc.float(), torch.empty(acc.shape, dtype=torch.int8)
    primitives.requantise_into(out, value, multiplier, zero_point, bits, value)
    assert_bitwise_equal(out, reference.requantise(acc, multiplier, zero_point, bits))


@pytest.mark.parametrize("columns", [1024, 1025, 1600], ids=lambda k: f"k{k}")
def test_float_matmuls_are_exact_past_2_to_the_24(columns: int) -> None:
    a = torch.full((2, columns), -128, dtype=torch.int8)
    a[:, -1] = torch.tensor([1, -1])
    b = torch.full((columns, 3), -128, dtype=torch.int8)
    b[-1] = 1
    assert torch.equal(primitives.float_matmul(a, b).long(), a.long() @ b.long())


def test_an_exact_int8_gemm_that_is_slow_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN's on AVX2: here two hundred exact products for one."""

    def slow(a: Tensor, b: Tensor) -> Tensor:
        return [a.double() @ b.double() for _ in range(200)][-1].int()

    monkeypatch.setattr(torch, "_int_mm", slow)
    assert not primitives.int_mm_pays.__wrapped__()


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("level", [0, 127, 128, 255])
@pytest.mark.parametrize("int_mm_pays", [True, False], ids=["int8", "float"])
def test_attention_on_the_largest_sums(
    code: int, level: int, int_mm_pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primitives, "int_mm_pays", lambda: int_mm_pays)
    x = SAMPLES["attention"].arguments
    levels = torch.full_like(x["levels"], level)
    levels[:, 0] = max(1, level)
    same = {name: torch.full_like(x[name], code) for name in "qkv"}
    scores = torch.zeros(1, 1, 1, x["q"].shape[2], dtype=torch.int32)
    scores[..., ::2], scores[..., 1::2] = 1 << 29, -(1 << 29)
    for bias_q in (None, scores):
        changed = {"levels": levels, "bias_q": bias_q, "multiplier": x["multiplier"] / 4}
        check_values(replace(SAMPLES["attention"], arguments=x | same | changed), "cpu")
