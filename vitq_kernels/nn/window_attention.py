"""Self-attention inside windows of a map of tokens, with relative-position bias (Swin)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitq_kernels import ops
from vitq_kernels.nn.attention import QuantAttention
from vitq_kernels.nn.linear import QuantLinear
from vitq_kernels.nn.query_key import QueryKeyCodes
from vitq_kernels.windows import BIAS_LIMIT, Windows, relative_positions

MASKED = -BIAS_LIMIT  # of pairs that must not see each other: no distance to them has a level but 0


class QuantWindowAttention(QuantAttention):
    """``QuantAttention`` inside windows; a token map goes in and comes out.

    Index tables are made from the geometry alone and never stored, so that no file can hold one out of range.

    Args:
        qkv, proj, kappa, levels, multiplier, zero_point, out_bits: as of ``QuantAttention``.
        bias_table: int32 [(2h - 1)(2w - 1), H], in units of the score, magnitude at most ``BIAS_LIMIT``.
        padding: the codes of zero that fill maps up to whole windows: int8 [C] that enter qkv; with ``codes`` int8
            [3 * H * D] that come out. (A key of zeros has no direction; next to zero it has any.)
        windows: of a map of the model's own size; other sizes are cut in the call.
        codes: as of ``QuantAttention``.
    """

    def __init__(
        self,
        qkv: QuantLinear,
        proj: QuantLinear,
        kappa: Tensor,
        levels: Tensor,
        multiplier: Tensor,
        zero_point: Tensor,
        out_bits: int,
        bias_table: Tensor,
        padding: Tensor,
        windows: Windows,
        codes: QueryKeyCodes | None = None,
    ) -> None:
        super().__init__(qkv, proj, kappa, levels, multiplier, zero_point, out_bits, codes)
        self.windows = windows
        self.register_buffer("bias_table", bias_table)
        self.register_buffer("padding", padding)
        self.register_buffer("table", windows.table("cpu"), persistent=False)  # int32 [W, S]
        self.register_buffer("pattern", windows.pattern("cpu"), persistent=False)  # int32 [W]
        self.register_buffer("bias_q", self._bias(), persistent=False)  # int32 [P, H, S, S]
        self.register_load_state_dict_post_hook(type(self)._bias_loaded)

    def _bias(self) -> Tensor:
        table = self.bias_table.clamp(-BIAS_LIMIT, BIAS_LIMIT)
        bias = table[relative_positions(self.windows.size, table.device)].permute(2, 0, 1)
        mask = self.windows.mask(table.device)[:, None]
        return torch.where(mask, bias + MASKED, bias).contiguous()

    def _bias_loaded(self, incompatible_keys: Any) -> None:
        self.bias_q = self._bias()

    def attend(self, x: Tensor) -> Tensor:
        """Codes of a map [B, H, W, C] to the codes [B, H, W, H * D] that enter ``proj``."""
        windows = self.windows.at((x.shape[1], x.shape[2]))
        own = windows is self.windows
        table = self.table if own else windows.table(x.device)
        pattern = self.pattern if own else windows.pattern(x.device)
        if self.codes is None:
            qkv = self.qkv(windows.pad(x, self.padding))
        else:
            qkv = windows.pad(self.codes(self.qkv(x)), self.padding)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        tables = (self.kappa, self.levels, self.multiplier, self.zero_point)
        return windows.crop(ops.attention(q, k, v, *tables, self.bias_q, None, self.out_bits, table, pattern))

    def extra_repr(self) -> str:
        """Geometry of the windows."""
        return f"windows={self.windows.size}, shift={self.windows.shift}"
