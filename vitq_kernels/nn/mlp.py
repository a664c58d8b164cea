"""The MLP of a transformer block in integers."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.nn.linear import QuantLinear


class QuantMlp(nn.Module):
    """``fc2(gelu(fc1(x))) + residual``; the activation between them never leaves 8 bits or fewer.

    Args:
        fc1: codes in, gelu codes out.
        fc2: codes in, residual out.
    """

    def __init__(self, fc1: QuantLinear, fc2: QuantLinear) -> None:
        super().__init__()
        self.fc1 = fc1
        self.fc2 = fc2

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Codes int8 [B, S, C] and the residual stream [B, S, C] to the new residual stream."""
        return self.fc2(self.fc1(x), residual)
