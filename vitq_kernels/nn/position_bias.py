"""A bias of attention's integer score by the places of two tokens, one class token before a grid of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitq_kernels.nn.module import IntegerModule
from vitq_kernels.windows import BIAS_LIMIT, positions_with_class


class PositionBias(IntegerModule):
    """Relative-position bias of all tokens, as attention adds it (semantics S4).

    A file holds the table alone; which entry a pair of tokens takes follows from the grid. Only images of the model's
    own size have one.

    Args:
        table: int32 [(2h - 1)(2w - 1) + 3, H], in units of the score, magnitude at most ``BIAS_LIMIT``.
        grid: rows and columns (h, w) of the patches.
    """

    def __init__(self, table: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("table", table)
        self.register_buffer("bias_q", self._bias(), persistent=False)  # int32 [1, H, S, S]
        self.register_load_state_dict_post_hook(type(self)._table_loaded)

    def _bias(self) -> Tensor:
        table = self.table.clamp(-BIAS_LIMIT, BIAS_LIMIT)
        return table[positions_with_class(self.grid, table.device)].permute(2, 0, 1)[None].contiguous()

    def _table_loaded(self, incompatible_keys: Any) -> None:
        self.bias_q = self._bias()

    def extra_repr(self) -> str:
        """The grid."""
        return f"grid={self.grid}"
