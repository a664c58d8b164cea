"""Ops that are two of others, for a backend or a shape without a kernel that does both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def linear_then_layernorm(
    linear_residual: Callable[..., Tensor], layernorm: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``reference.linear_residual_layernorm`` by a backend's own two ops."""

    def linear_residual_layernorm(
        a: Tensor, weight: list[Tensor], multiplier: Tensor, bias_q: Tensor, residual: Tensor, *norm: Any
    ) -> tuple[Tensor, Tensor]:
        y = linear_residual(a, weight, multiplier, bias_q, residual)
        return y, layernorm(y, *norm)

    return linear_residual_layernorm
