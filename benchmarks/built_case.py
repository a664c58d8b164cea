"""A case with its tensors: how a backend is called on it, and whether it gives the reference's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.conformance import Case, assert_outputs, exact_reals, op_arguments, op_call
from vitq_kernels.ops import prepare_weight, reference, use_backend
from vitq_kernels.packing import unpack_weight
from vitq_kernels.spec import MAX_BITS


@dataclass(frozen=True)
class Built(Case):
    """A case whose tensors are made."""

    input_bits: int = MAX_BITS  # a linear layer's weight is prepared for codes of so many


def call_arguments(built: Built, device: str) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.vitq.<op>``, weights prepared for the backend in use."""
    given = list(op_arguments(built, device))
    if built.input_bits < MAX_BITS:
        place, weight = list(built.arguments).index("weight"), built.arguments["weight"]
        moved = replace(weight, data=weight.data.to(device), row_order=weight.row_order.to(device))
        given[place], given[place + 1] = prepare_weight(moved, built.input_bits)[::-1]
    return tuple(given)


def why_wrong(built: Built, backend: str, device: str) -> str:
    """How a backend's outputs differ from the reference backend's on the same device, or an empty string.

    Of attention the first and the last image are compared: the reference keeps all scores in float64.
    """
    compared, ends = built, [0, -1]
    if built.op == "attention":
        compared = replace(built, arguments=built.arguments | {n: built.arguments[n][ends] for n in "qkv"})
    try:
        expected = op_call(compared, "reference", device)
        with use_backend(backend):
            arguments, function = call_arguments(built, device), getattr(torch.ops.vitq, built.op)
            # Freed memory is what the next output of this size gets: what a kernel leaves unwritten is 0x5A, no result.
            for output in _outputs(function(*arguments)):
                output.view(torch.uint8).fill_(0x5A)
                del output
            actual = _outputs(function(*arguments))
        ours = actual if built is compared else [output[ends] for output in actual]
        assert_outputs(built, ours, expected, exact=exact_on_device)
    except Exception as error:  # a kernel that does not compile or launch here is as wrong as one that differs
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def _outputs(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def exact_on_device(built: Case) -> Tensor:
    """The real output in float64. A linear's sums are taken exactly by the reference: float64 products are slow."""
    given = built.arguments
    if "weight" not in given or isinstance(given["weight"], Tensor):
        return exact_reals(built)
    acc = reference.accumulate(given["a"], [unpack_weight(given["weight"])], given.get("bias_q"))
    exact = acc.double() * given["multiplier"].double()
    if "token_scale" in given:
        exact = exact * given["token_scale"].double().unsqueeze(-1) + given["bias"].double()
    return exact + given["residual"].double() if "residual" in given else exact
