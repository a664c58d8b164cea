"""The MLP of a transformer block in integers."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.nn.hidden import HiddenCodes
from vitq_kernels.nn.linear import QuantLinear


class QuantMlp(nn.Module):
    """``fc2(hidden(fc1(x)))``, plus the residual; with GELU alone what is between them never leaves 8 bits or fewer.

    Args:
        fc1: codes in; gelu codes out, or real with ``hidden``.
        fc2: codes in, residual out; real where a norm stands between it and the residual stream.
        hidden: from fc1's real outputs to fc2's codes, where GELU alone does not make them.
    """

    def __init__(self, fc1: QuantLinear, fc2: QuantLinear, hidden: HiddenCodes | None = None) -> None:
        super().__init__()
        self.fc1 = fc1
        self.hidden = hidden
        self.fc2 = fc2

    def codes(self, x: Tensor) -> Tensor:
        """Codes int8 [B, S, C] to the codes [B, S, K] that enter ``fc2``."""
        x = self.fc1(x)
        return x if self.hidden is None else self.hidden(x)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Codes int8 [B, S, C] and the residual stream [B, S, C] to the new residual stream, or to real numbers."""
        return self.fc2(self.codes(x), residual)
