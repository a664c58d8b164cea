"""The CUDA attention kernel beyond every backend's cases: head dims, lengths, biases, tables, faults."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import Case
from tests.conftest import BackendCase
from tests.numerics import assert_bitwise_equal, codes, integers, uniform
from tests.op_cases import window_case
from vitq_kernels.ops import BackendUnavailableError, reference
from vitq_kernels.ops.cuda.attention import attention
from vitq_kernels.ops.cuda.extension import module

DIMS = (32, 48, 64, 72, 80, 96, 128, 1, 5, 33, 112)
LENGTHS = (1, 15, 16, 17, 49, 64, 65, 128, 197, 208, 209, 256, 257, 321)
LEVELS = (16, 4, 8, 32, 256, 11)
KINDS = ("random", "extreme", "one_sided", "largest")
# Of the bias: leading sizes that broadcast, and how large it is.
BIASES: dict[str, Any] = {
    "none": None,
    "largest": lambda b, h, s: integers(-(2**29), 2**29, (1, h, s, s), 4),
    "mask": lambda b, h, s: integers(-3000, 3000, (b, 1, 1, s), 4),
    "rows": lambda b, h, s: integers(-3000, 3000, (1, h, s, 1), 4),
}


def arguments(
    s: int, d: int, levels: int = 16, bias: str = "none", normalised: bool = False, kind: str = "random", seed: int = 0
) -> dict[str, Any]:
    """Views of a fused qkv; codes of the softmax fill their range."""
    b, h = 1 + seed % 2, 1 + seed // 2 % 2
    qkv = codes(kind, (b, s, 3, h, d), seed=seed)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    spread = max(1.0, float((q.int() @ k.int().transpose(-1, -2)).double().std(correction=0)))
    table = [round(255 * 2 ** (-16 * c / levels / (1 if levels <= 16 else 2))) for c in range(levels - 1)]
    return {
        "q": q,
        "k": k,
        "v": v,
        "kappa": (uniform(0.5, 1.5, (h,), seed + 1) * levels / (4 * spread)).float(),
        "levels": torch.tensor([[*table, 0] if levels > 1 else [255]] * h, dtype=torch.uint8),
        "multiplier": uniform(0.5, 2, (h, d), seed + 2).float(),
        "zero_point": integers(-20, 20, (h, d), seed + 3),
        "bias_q": None if BIASES[bias] is None else BIASES[bias](b, h, s),
        "inv_tau": uniform(0.5, 2, (h,), seed + 5).float() if normalised else None,
        "bits": 8,
    }


def check(given: dict[str, Any], device: str) -> None:
    moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in given.items()}
    assert_bitwise_equal(attention(**moved).cpu(), reference.attention(**given))


# Every dim with every length; the rest in turn, so that each meets each.
GRID = [
    (d, s, LEVELS[i % 6], tuple(BIASES)[i // 3 % 4], i % 3 == 0, KINDS[i % 4], i)
    for i, (d, s) in enumerate(itertools.product(DIMS, LENGTHS))
]


@pytest.mark.parametrize("d", DIMS)
def test_every_length_of_a_head_dim(cuda: BackendCase, d: int) -> None:
    for dim, s, levels, bias, normalised, kind, seed in GRID:
        if dim == d:
            check(arguments(s, d, levels, bias, normalised, kind, seed), cuda.device)


@pytest.mark.parametrize("normalised", [False, True], ids=["row-maximum", "normalised"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("levels", [*LEVELS, 1])
def test_every_table_and_bias(cuda: BackendCase, levels: int, bias: str, normalised: bool) -> None:
    for s in (50, 300):
        check(arguments(s, 64, levels, bias, normalised, seed=levels), cuda.device)


def test_levels_need_not_fall(cuda: BackendCase) -> None:
    for count in (8, 16, 100):
        given = arguments(70, 32, count)
        given["levels"] = integers(1, 256, given["levels"].shape, count).to(torch.uint8)
        check(given, cuda.device)


def test_ties_round_to_even(cuda: BackendCase) -> None:
    given = arguments(40, 32, 256, kind="random")
    given["kappa"] = torch.full_like(given["kappa"], 2.0**-9)  # distances that are odd multiples of 256 are ties
    given["q"], given["k"] = given["q"] & -16, given["k"] & -16
    check(given, cuda.device)


@pytest.mark.parametrize(("s", "d", "message"), [(2, 129, "head dims up to 128, got 129"), (4097, 16, "4096 tokens")])
def test_sizes_beyond_the_kernel_are_named(emulated: BackendCase, s: int, d: int, message: str) -> None:
    refused(s, d, message)


@pytest.mark.parametrize(
    ("s", "d", "message"), [(2, 65, "head dims up to 64 inside windows, got 65"), (4097, 16, "4096 tokens")]
)
def test_windows_beyond_the_kernel_are_named(emulated: BackendCase, s: int, d: int, message: str) -> None:
    refused(s, d, message, torch.arange(s, dtype=torch.int32).view(1, s))


def refused(s: int, d: int, message: str, windows: Tensor | None = None) -> None:
    q = torch.zeros(1, 1, s, d, dtype=torch.int8)
    vectors = (torch.ones(1), torch.full((1, 4), 255, dtype=torch.uint8), torch.ones(1, d))
    with pytest.raises(BackendUnavailableError, match=rf"^vitq::attention on cpu: backend cuda takes .*{message}"):
        attention(q, q, q, *vectors, torch.zeros(1, d, dtype=torch.int32), None, None, 8, windows)


# Swin's windows and more: one tile of keys to several, every way through the kernel, whole and ragged tiles.
WINDOWED = [
    window_case(2, 3, (14, 14, 7, 3), 32, "patterns"),
    window_case(1, 2, (16, 8, 8, 4), 32, "heads", "extreme", normalised=True),
    window_case(1, 1, (12, 24, 12, 6), 32, "patterns", "one_sided"),
    window_case(1, 1, (16, 16, 16, 0), 32, "one", "largest", 8),
    window_case(1, 1, (2, 576, 0, 0), 32, "patterns", normalised=True),
    window_case(1, 2, (3, 129, 0, 0), 24, "none", "counting"),
    window_case(2, 1, (5, 50, 0, 0), 64, "patterns", log2_bits=3),
    window_case(1, 1, (3, 90, 0, 0), 48, "one", normalised=True),
    window_case(1, 1, (2, 300, 0, 0), 64, "none", "extreme"),
    window_case(2, 1, (70, 1, 0, 0), 5, "patterns"),
]


@pytest.mark.parametrize("case", WINDOWED, ids=lambda case: case.label)
def test_windows(cuda: BackendCase, case: Case) -> None:
    check(case.arguments, cuda.device)


def test_windows_of_views_of_a_fused_qkv(cuda: BackendCase) -> None:
    given = dict(WINDOWED[0].arguments)
    fused = torch.stack([given[name].transpose(1, 2) for name in "qkv"], 2).to(cuda.device)
    q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
    assert q.stride() == (196 * 9 * 32, 32, 9 * 32, 1)  # read where it lies
    moved = {name: t.to(cuda.device) if isinstance(t, Tensor) else t for name, t in given.items()}
    assert_bitwise_equal(attention(**moved | {"q": q, "k": k, "v": v}).cpu(), reference.attention(**given))


def fails_under_some_seed(given: dict[str, Any], seeds: int = 12) -> bool:
    for seed in range(seeds):
        module().set_seed(seed)
        try:
            check(given, "cpu")
        except (AssertionError, RuntimeError):
            return True
    return False


@pytest.mark.parametrize("s", [200, 300], ids=["one-pass", "two-passes"])
def test_every_barrier_is_needed(planted: Any, s: int) -> None:
    given = arguments(s, 64, 256, normalised=True)
    planted.take_barrier_lines()
    check(given, "cpu")
    lines = planted.take_barrier_lines()
    assert len(lines) == {200: 4, 300: 3}[s]
    for line in lines:
        planted.plant(skipped_barrier=line)
        assert fails_under_some_seed(given), f"without the barrier of line {line} the numbers are the same"


@pytest.mark.parametrize(
    "fault", [{"extra_pending": 1}, {"swapped_fragment": True}], ids=lambda fault: next(iter(fault))
)
def test_a_fault_of_the_pipeline_is_caught(planted: Any, fault: dict[str, Any]) -> None:
    planted.plant(**fault)
    assert fails_under_some_seed(arguments(100, 64), seeds=1)


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_same(planted: Any, seed: int) -> None:
    planted.set_seed(seed)
    for s in (130, 290):
        check(arguments(s, 80, normalised=seed % 2 == 0, kind="extreme"), "cpu")
    for case in WINDOWED[:2]:
        check(case.arguments, "cpu")
