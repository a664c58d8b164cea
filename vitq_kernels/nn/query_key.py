"""What happens to queries and keys between the qkv linear and integer attention: norms and rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitq_kernels import ops
from vitq_kernels.nn.module import IntegerModule
from vitq_kernels.rotary import rotated, with_prefix


class QueryKeyCodes(IntegerModule):
    """Real q, k and v to their codes, q and k normed per head and turned by a rotary embedding before.

    Norms and rotation are float (torch), on the qkv linear's real outputs in float32; the product before them and all
    of attention behind them (semantics S4) are integer. That costs a write and a few reads of [B, S, 3 * H * D]
    float32, where the linear's own epilogue would have written int8.

    Args:
        num_heads: H.
        inv_scale: float32 [3 * H * D], codes per real unit.
        key_centre: float32 [H * D], taken off the keys; softmax does not see it. (v is centred by the linear's bias.)
        bits: width of the codes.
        q_norm, k_norm: over D, or None.
        rope_prefix: tokens that stand first and are not turned.
        rope_half: layout of the rotation, as of ``rotary.rotated``.
    """

    def __init__(
        self,
        num_heads: int,
        inv_scale: Tensor,
        key_centre: Tensor,
        bits: int,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        rope_prefix: int = 0,
        rope_half: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.bits = bits
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.rope_prefix = rope_prefix
        self.rope_half = rope_half
        self.register_buffer("inv_scale", inv_scale)
        self.register_buffer("key_centre", key_centre)
        self.register_buffer("zero_point", torch.zeros_like(inv_scale, dtype=torch.int32))

    def forward(self, qkv: Tensor, rope: Tensor | None = None) -> Tensor:
        """Float [B, S, 3 * H * D], without ``rope`` [..., 3 * H * D], to int8 of the same shape.

        Args:
            qkv: float32.
            rope: sines and cosines [S - prefix, 2 * D], or [H, S - prefix, 2 * D]; None to turn nothing.
        """
        q, k, v = qkv.chunk(3, -1)
        table = None if rope is None else with_prefix(rope.float(), self.rope_prefix)
        q = self._prepared(q, self.q_norm, table)
        k = self._prepared(k, self.k_norm, table) - self.key_centre
        return ops.quantize(torch.cat([q, k, v], dim=-1), self.inv_scale, self.zero_point, self.bits)

    def _prepared(self, x: Tensor, norm: nn.Module | None, table: Tensor | None) -> Tensor:
        """[B, S, H * D] to the same."""
        x = x.unflatten(-1, (self.num_heads, -1))
        x = x if norm is None else norm(x)
        if table is not None:
            x = rotated(x.transpose(1, 2), table, self.rope_half).transpose(1, 2)
        return x.flatten(-2)
