"""What lies between fc1 and fc2 where fc1's epilogue cannot make the codes: gates, norms, other activations."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.activations import Gate, hidden_features


class HiddenCodes(nn.Module):
    """``codes(activation(x))``, or of the activation of one half of the channels times the other.

    Activation and gate are float (torch), on fc1's real outputs in float32. That costs, beside GELU in fc1's epilogue,
    a write and a read of the [..., N] float32 that fc1 puts out instead of no float at all; the products of both
    linears are integer.

    Args:
        activation: name in ``activations.ACTIVATIONS``.
        gate: half of the channels that the activation is applied to, or None without a gate.
        codes: float [..., K] to int8 codes: QuantizeInput, or a norm that writes codes.
    """

    def __init__(self, activation: str, gate: Gate | None, codes: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.gate = gate
        self.codes = codes

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., N] to int8 [..., N], gated [..., N / 2]."""
        return self.codes(hidden_features(x, self.activation, self.gate))

    def extra_repr(self) -> str:
        """Activation and gate."""
        return f"{self.activation}, gate={self.gate}"
