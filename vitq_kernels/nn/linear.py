"""Linear layers on packed integer weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitq_kernels import ops
from vitq_kernels.nn.layernorm import QuantLayerNorm
from vitq_kernels.nn.module import IntegerModule, QuantizeInput
from vitq_kernels.ops import flatten_patches
from vitq_kernels.packing import PackedWeight, groups_with_order, unpack_weight
from vitq_kernels.spec import MAX_BITS

Epilogue = Literal["codes", "gelu", "gelu levels", "real", "residual"]


class PackedLinear(IntegerModule):
    """A weight [N, K] in the canonical packed layout and, per backend, in the layout made from it on its device."""

    def __init__(self, weight: PackedWeight, input_bits: int = MAX_BITS) -> None:
        super().__init__()
        self.input_bits = input_bits
        self.in_features = weight.cols
        self.out_features = weight.groups.rows
        self.groups = weight.groups
        self.register_buffer("weight_packed", weight.data)  # uint8 [weight bytes]
        self.register_buffer("row_order", weight.row_order)  # uint8 [rows in tiles of several widths]
        self._prepared: dict[str, list[Tensor]] = {}
        self.register_load_state_dict_post_hook(type(self)._weight_loaded)

    @property
    def packed(self) -> PackedWeight:
        """The weight as the checkpoint holds it."""
        return PackedWeight(self.weight_packed, self.row_order, self.groups, self.in_features)

    def weight_codes(self) -> Tensor:
        """The weight's codes, int8 [N, K] in the model's row order."""
        return unpack_weight(self.packed)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed codes and of the row order."""
        return self.weight_packed.numel() + self.row_order.numel()

    def prepare(self) -> None:
        """Makes the layout of the backend in force; done on every load and move, so that captured code finds it.

        A backend that does not run where the weight lies now may run where it goes; if not, the first call says so.
        """
        if self.weight_packed.device.type == "meta":
            return
        with contextlib.suppress(ops.BackendUnavailableError):
            layout, tensors = ops.prepare_weight(self.packed, self.input_bits)
            self._prepared[layout] = tensors

    def prepared_weight(self) -> tuple[list[Tensor], str]:
        """The weight in the layout that the backend in force reads, and that layout's name."""
        layout = ops.weight_layout(self.weight_packed.device.type)
        if layout not in self._prepared:
            if torch.compiler.is_compiling():
                raise RuntimeError(f"weight layout {layout} is not prepared: run the model once before compiling it")
            self.prepare()
        return self._prepared[layout], layout

    def _weight_loaded(self, incompatible_keys: Any) -> None:
        self.groups = groups_with_order(self.groups, self.row_order)
        self._prepared.clear()
        self.prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.weight_packed
        super()._apply(fn, recurse)
        if self.weight_packed is not before:
            self._prepared.clear()
            self.prepare()
        return self

    def extra_repr(self) -> str:
        """Shape and widths."""
        widths = f"weight_bits={self.groups.mean_bits:.4g}, input_bits={self.input_bits}"
        return f"{self.in_features}, {self.out_features}, {widths}"


class QuantLinear(PackedLinear):
    """An integer linear with static activation scales: int8 codes in; codes, gelu codes, real or residual out.

    The input's scale lives in the weight's columns, its zero point and the bias in ``bias_q`` (semantics S2). With
    ``quantize_input`` the module also takes float activations and is a drop-in for ``nn.Linear``.

    Args:
        weight: packed codes [N, K].
        multiplier: float32 [N], real units (or output codes, for epilogue "codes") per accumulator unit.
        bias_q: int32 [N], bias and input zero point in accumulator units.
        epilogue: what comes out.
        zero_point: int32 [N], of the output codes; for "codes" and "gelu".
        inv_scale: float32 [N], output codes or units of the levels per real unit; for "gelu" and "gelu levels".
        levels: int8 [2^b], ascending; for "gelu levels". Codes are levels of 8 bits then.
        out_bits: width of the output codes; for "codes" and "gelu".
        gelu: "none" (erf) or "tanh"; for "gelu" and "gelu levels".
        input_bits: width of the codes that come in, which none may exceed: 4 or less let a GPU that has 4-bit products
            use them.
        quantize_input: quantizer of float inputs, or None if only int8 codes come in.
    """

    def __init__(
        self,
        weight: PackedWeight,
        multiplier: Tensor,
        bias_q: Tensor,
        epilogue: Epilogue,
        *,
        zero_point: Tensor | None = None,
        inv_scale: Tensor | None = None,
        levels: Tensor | None = None,
        out_bits: int = 8,
        gelu: str = "none",
        input_bits: int = MAX_BITS,
        quantize_input: QuantizeInput | None = None,
    ) -> None:
        super().__init__(weight, input_bits)
        self.epilogue = epilogue
        self.out_bits = out_bits
        self.gelu = gelu
        self.quantize_input = quantize_input
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("bias_q", bias_q)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("inv_scale", inv_scale)
        self.register_buffer("levels", levels)
        # A value takes the nearest level: it changes half way between two.
        middles = None if levels is None else (levels[1:].float() + levels[:-1].float()) / 2
        self.register_buffer("thresholds", middles)
        self.prepare()

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        next_norm: QuantLayerNorm | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Codes int8 [..., K] (or float, with ``quantize_input``) to [..., N]; ``residual`` for that epilogue.

        ``out_dtype`` of a real output: where it is not given, that of a float ``x``, float32 for codes. With
        ``next_norm`` the new residual stream and the codes that this norm makes of it, in one op.

        Raises:
            ValueError: ``next_norm`` with an epilogue other than "residual".
        """
        if next_norm is not None and self.epilogue != "residual":
            raise ValueError(f"QuantLinear: next_norm needs the epilogue 'residual', got {self.epilogue!r}")
        is_float = x.dtype.is_floating_point
        codes = self.quantize_input(x) if is_float and self.quantize_input is not None else x
        weight, layout = self.prepared_weight()
        shared = (codes, weight, layout, self.multiplier, self.bias_q)
        if self.epilogue == "codes":
            return ops.linear_codes(*shared, self.zero_point, self.out_bits)
        if self.epilogue == "gelu":
            return ops.linear_gelu_codes(*shared, self.inv_scale, self.zero_point, self.out_bits, self.gelu)
        if self.epilogue == "gelu levels":
            return ops.linear_gelu_levels(*shared, self.inv_scale, self.thresholds, self.levels, self.gelu)
        if next_norm is not None:
            norm = (next_norm.gain, next_norm.offset, next_norm.eps, next_norm.bits)
            return ops.linear_residual_layernorm(*shared, residual, *norm)
        if self.epilogue == "residual":
            return ops.linear_residual(*shared, residual)
        return ops.linear_real(*shared, out_dtype or (x.dtype if is_float else torch.float32))


class DynamicQuantLinear(PackedLinear):
    """Drop-in for ``nn.Linear`` without calibration: symmetric 8-bit scales per token, computed in the call (S5)."""

    def __init__(self, weight: PackedWeight, multiplier: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight)
        self.register_buffer("multiplier", multiplier)  # float32 [N], the weight's scale
        self.register_buffer("bias", bias)  # float32 [N] or None
        self.prepare()

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to [..., N] in the same dtype."""
        codes, scale = ops.quantize_per_token(x)
        weight, layout = self.prepared_weight()
        return ops.linear_per_token(codes, scale, weight, layout, self.multiplier, self.bias, x.dtype)


class QuantPatchEmbed(nn.Module):
    """The patch convolution as an integer linear over flattened patches; a drop-in for timm's ``patch_embed.proj``."""

    def __init__(self, linear: QuantLinear, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.linear = linear  # float patches in, real out
        self.patch_size = patch_size
        self.in_channels = linear.in_features // math.prod(patch_size)  # as the convolution has it
        # Empty. Models of transformers read the dtype of the convolution's weight to bring images to it.
        self.register_buffer("weight", torch.empty(0, device="cpu"), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Float [B, C, H, W] to float [B, N, H // ph, W // pw]; rows and columns short of a patch are dropped."""
        quantize_input = self.linear.quantize_input
        if quantize_input is None:
            return self.linear(flatten_patches(image, self.patch_size)).permute(0, 3, 1, 2)
        codes = quantize_input(image, patch_size=self.patch_size)
        return self.linear(codes, out_dtype=image.dtype).permute(0, 3, 1, 2)
