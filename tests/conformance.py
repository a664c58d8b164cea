"""A backend compared with the reference on a case.

A linear weight stands in a case's arguments as a PackedWeight; a backend gets it in its own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vitq_kernels.ops as ops
from tests.numerics import assert_bitwise_equal, assert_codes_close, assert_reals_close
from vitq_kernels.ops import reference
from vitq_kernels.packing import PackedWeight, unpack_weight

EXACT_OPS = {"quantize", "quantize_patches", "quantize_per_token", "linear_codes", "attention"}  # docs/semantics.md


@dataclass(frozen=True)
class Case:
    """An op's arguments by name, in order, without the layout."""

    op: str
    label: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


def reference_call(case: Case) -> tuple[Tensor, ...]:
    """What ``ops/reference.py`` gives, on the CPU."""
    weights = {k: [unpack_weight(v)] for k, v in case.arguments.items() if isinstance(v, PackedWeight)}
    return _as_tuple(getattr(reference, case.op)(**{**case.arguments, **weights}))


def op_arguments(case: Case, device: str = "cpu") -> tuple[Any, ...]:
    """The arguments of ``torch.ops.vitq.<op>``, weights prepared for the backend in use."""
    result: list[Any] = []
    for value in case.arguments.values():
        if isinstance(value, PackedWeight):
            moved = PackedWeight(value.data.to(device), value.row_order.to(device), value.groups, value.cols)
            layout, tensors = ops.prepare_weight(moved)
            result += [tensors, layout]
        else:
            result.append(value.to(device) if isinstance(value, Tensor) else value)
    return tuple(result)


def op_call(case: Case, backend: str, device: str = "cpu") -> tuple[Tensor, ...]:
    """What the registered op gives on a backend."""
    with ops.use_backend(backend):
        return _as_tuple(getattr(torch.ops.vitq, case.op)(*op_arguments(case, device)))


def check_values(
    case: Case, backend: str, device: str = "cpu", reference_floats: bool = True, like: Case | None = None
) -> None:
    """Asserts that a backend gives the reference's numbers; those of ``like``, where another layout of it is run.

    ``reference_floats``: the backend runs the reference's own float code, so that bounded outputs agree in every bit.
    """
    assert_outputs(case, op_call(case, backend, device), reference_call(like or case), reference_floats)


def assert_outputs(
    case: Case,
    actual: Sequence[Tensor],
    reference_outputs: Sequence[Tensor],
    reference_floats: bool = False,
    exact: Callable[[Case], Tensor] | None = None,
) -> None:
    """Asserts that outputs are the reference's, by the rule of the op, where the reference's lie.

    A norm's codes behind bounded real numbers are held against the norm of these numbers. ``reference_floats`` as of
    ``check_values``; ``exact``: the real output in float64, ``exact_reals`` unless given.
    """
    assert len(actual) == len(reference_outputs)
    moved = [got.to(wanted.device) for got, wanted in zip(actual, reference_outputs, strict=True)]
    expected = list(reference_outputs)
    if case.op == "linear_residual_layernorm":
        expected[1] = reference.layernorm(
            moved[0], *(case.arguments[name] for name in ("gain", "offset", "eps", "bits"))
        )
    for got, wanted in zip(moved, expected, strict=True):
        if case.op in EXACT_OPS or reference_floats:
            assert_bitwise_equal(got, wanted)
        elif wanted.dtype == torch.int8:
            assert_codes_close(got, wanted)
        else:
            assert_reals_close(got, (exact or exact_reals)(case), wanted)


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def exact_reals(case: Case) -> Tensor:
    """The real output of a bounded op in float64."""
    x = case.arguments
    if case.op == "add_layernorm":
        return x["x"].double() + x["residual"].double()
    if case.op == "layernorm_per_token":
        row = torch.nn.functional.layer_norm(
            x["x"].double(), x["weight"].shape, x["weight"].double(), x["bias"].double(), x["eps"]
        )
        return row.abs().amax(-1) / 127
    w = unpack_weight(x["weight"])
    acc = (x["a"].double() @ w.double().t() + x.get("bias_q", torch.zeros(()))) * x["multiplier"].double()
    if case.op == "linear_per_token":
        y = acc * x["token_scale"].double().unsqueeze(-1)
        return y if x["bias"] is None else y + x["bias"].double()
    return acc + x["residual"].double() if "residual" in x else acc
