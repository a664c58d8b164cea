"""What every integer module shares: its constants are numbers of the semantics and keep their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitq_kernels import ops


class IntegerModule(nn.Module):
    """A module whose buffers follow the device but never the dtype of ``.to()``, ``.half()`` and the like.

    A float32 multiplier rounded to float16 would be another number: the outputs would no longer be those of the
    semantics. The float tensors that flow between modules may have any dtype.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self


class QuantizeInput(IntegerModule):
    """Real activations [..., K] to int8 codes with a static scale and zero point per channel (semantics S1).

    With ``patch_size`` the activations are images [B, C, H, W]; the channels are the places in a patch.
    """

    def __init__(self, inv_scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("inv_scale", inv_scale)  # float32 [K]
        self.register_buffer("zero_point", zero_point)  # int32 [K]

    def forward(self, x: Tensor, patch_size: tuple[int, int] | None = None) -> Tensor:
        """Float [..., K] to int8 [..., K]; images to [B, H // ph, W // pw, K]."""
        if patch_size is not None:
            return ops.quantize_patches(x, self.inv_scale, self.zero_point, *patch_size, self.bits)
        return ops.quantize(x, self.inv_scale, self.zero_point, self.bits)
