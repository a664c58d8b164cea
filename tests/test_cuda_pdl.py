"""Programmatic dependent launch: no kernel touches what the kernel in front of it writes, or still reads, too early.

Here in the emulation, where all that a launch is given is garbage until it has waited; test_cuda_compile.py looks at
the machine's code, where no way from a kernel's begin to an access of memory may avoid the wait.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import Case, op_arguments, reference_call
from tests.numerics import assert_bitwise_equal, assert_codes_close
from tests.op_cases import CASES
from tests.test_cuda_attention import arguments
from tests.test_cuda_linear import MIXED, linear_case, tile_id
from tests.test_cuda_norm import NORM_TILES, norm_case, stream
from vitq_kernels.ops import OPS, reference, use_backend
from vitq_kernels.ops.cuda.attention_sm90 import attention_sm90
from vitq_kernels.ops.cuda.launch import early_starts, is_settled
from vitq_kernels.ops.cuda.launch import launch as plain_launch
from vitq_kernels.ops.cuda.tiles import TILES, Plan, forced
from vitq_kernels.ops.mma_fragments import MmaFragments
from vitq_kernels.spec import RowGroups

Withhold = Callable[[Sequence[Tensor]], None]
# Each kernel of the linear ops: every tile, and mma.sync's parts with the kernel that adds them.
PLANS = [
    pytest.param(Plan(number, parts), id=f"{tile_id(number)}-{parts}")
    for number, tile in enumerate(TILES)
    for parts in ((1, 2) if 2 in tile.parts() and (tile.wgmma or number == 0) else (1,))
]


def memory(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Addresses and bytes of their storages, each once."""
    return list({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.items())


@pytest.fixture
def withhold(planted: Any, monkeypatch: pytest.MonkeyPatch) -> Withhold:
    """From its call on every launch finds its tensors, and those given, in the hands of a kernel that still runs."""

    def start(also: Sequence[Tensor]) -> None:
        def launch(name: str, like: Tensor, *arguments: object) -> None:
            planted.withhold(memory([*also, *(a for a in arguments if isinstance(a, Tensor))]))
            try:
                plain_launch(name, like, *arguments)
            finally:
                planted.withhold([])

        for ops in ("attention", "attention_sm90", "layernorm", "linear", "quantize"):
            monkeypatch.setattr(importlib.import_module(f"vitq_kernels.ops.cuda.{ops}"), "launch", launch)

    return start


def gives_the_reference(case: Case, arguments: tuple[Any, ...]) -> bool:
    """Whether the op does, on arguments made before; False also where the emulation finds a fault."""
    with use_backend("cuda"):
        try:
            got = getattr(torch.ops.vitq, case.op)(*arguments)
        except RuntimeError as error:
            if "kernel in front" not in str(error):
                raise
            return False
    for actual, wanted in zip((got,) if isinstance(got, Tensor) else got, reference_call(case), strict=True):
        try:
            if actual.dtype == torch.int8:
                assert_codes_close(actual, wanted)
            else:
                torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
        except AssertionError:
            return False
    return True


def inputs(case: Case) -> list[Tensor]:
    """What kernels in front of it have written."""
    names = ("a", "x", "image", "q", "k", "v", "residual", "token_scale")
    return [case.arguments[name] for name in names if name in case.arguments]


def made(case: Case) -> tuple[Any, ...]:
    with use_backend("cuda"):
        return op_arguments(case)


@pytest.mark.parametrize("op", OPS)
def test_every_op_waits_for_the_kernel_in_front(planted: Any, withhold: Withhold, op: str) -> None:
    case = CASES[op][0]
    arguments = made(case)
    withhold(inputs(case))
    assert gives_the_reference(case, arguments)
    planted.plant(no_following=True)
    assert not gives_the_reference(case, arguments)


@pytest.mark.parametrize("groups", [RowGroups.uniform(72, 4), MIXED], ids=["uniform", "mixed"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_linear_kernel_waits(planted: Any, withhold: Withhold, plan: Plan, groups: RowGroups) -> None:
    """The weights too belong to the kernel in front at first; later they are settled, and may be loaded before."""
    case = linear_case(groups, 70, 272)
    arguments = made(case)
    weights = [t for t in arguments[1] if t.numel()]
    with forced(plan):
        withhold([*inputs(case), *weights])
        assert gives_the_reference(case, arguments)
        withhold(inputs(case))
        assert gives_the_reference(case, arguments)
        planted.plant(no_following=True)
        assert not gives_the_reference(case, arguments)


@pytest.mark.parametrize("tile", NORM_TILES, ids=tile_id)
def test_a_launch_with_layernorm_waits(planted: Any, withhold: Withhold, tile: int) -> None:
    """Of blocks with rows and without, whose loading threads wait too."""
    case = norm_case(RowGroups.uniform(264, 4), 70, 272, stream(70, 264))
    arguments = made(case)
    with forced(Plan(tile, norm=True)):
        for _ in range(2):  # the second time the weights are settled
            withhold(inputs(case))
            assert gives_the_reference(case, arguments)
        planted.plant(no_following=True)
        assert not gives_the_reference(case, arguments)


@pytest.mark.parametrize("plan", [p for p in PLANS if TILES[p.values[0].tile].wgmma])
def test_weights_that_are_not_settled_would_be_read_too_early(planted: Any, withhold: Withhold, plan: Plan) -> None:
    """Without the rule of is_settled; so the stages are really filled before the wait."""
    case = linear_case(RowGroups.uniform(72, 4), 70, 272)
    arguments = made(case)
    with forced(plan):
        assert gives_the_reference(case, arguments)
        withhold([MmaFragments.of(arguments[1]).chunks])
        assert not gives_the_reference(case, arguments)


def test_hoppers_attention_waits(planted: Any, withhold: Withhold) -> None:
    given = arguments(70, 64, 16)
    mine = {name: value for name, value in given.items() if name not in ("bias_q", "inv_tau")}
    withhold([given[name] for name in "qkv"])
    wanted = reference.attention(**given)
    assert_bitwise_equal(attention_sm90(**mine), wanted)
    planted.plant(no_following=True)
    with pytest.raises(RuntimeError, match="kernel in front"):
        attention_sm90(**mine)


def test_what_a_launch_was_given_before_is_settled() -> None:
    tensor = torch.zeros(4)
    assert [is_settled(tensor) for _ in range(3)] == [False, True, True]
    tensor[1] = 1
    assert [is_settled(tensor) for _ in range(2)] == [False, True]
    assert not is_settled(tensor.clone())
    with torch.inference_mode():
        untracked = torch.zeros(4)
    assert [is_settled(untracked) for _ in range(2)] == [False, False]


def test_early_starts_are_restored(planted: Any) -> None:
    with contextlib.suppress(KeyError), early_starts(False):
        assert planted.set_early_starts(False) is False
        raise KeyError
    assert planted.set_early_starts(True) is True


def test_a_write_before_the_wait_is_an_error(planted: Any, withhold: Withhold) -> None:
    """Of outputs alone: the kernel in front may still read what lay there."""
    case = CASES["quantize"][0]
    arguments, (wanted,) = made(case), reference_call(case)
    withhold([])
    with use_backend("cuda"):
        assert_bitwise_equal(torch.ops.vitq.quantize(*arguments), wanted)
        planted.plant(no_following=True)
        with pytest.raises(RuntimeError, match=r"^emulation: no thread waited for the kernel in front$"):
            torch.ops.vitq.quantize(*arguments)
