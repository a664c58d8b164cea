"""What is measured of the kernels that multiply no matrices: LayerNorm and quantize, of rows and of patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines import (
    TORCH_ADD_LAYERNORM,
    TORCH_LAYERNORM_PER_TOKEN,
    TORCH_PATCHES,
    TORCH_PER_TOKEN,
    Baselines,
    torch_add_layernorm,
    torch_layernorm,
    torch_layernorm_per_token,
    torch_patches,
    torch_per_token,
    torch_quantize,
)
from benchmarks.built_case import Built
from benchmarks.kernel_targets import TORCH_LAYERNORM, TORCH_QUANTIZE
from vitq_kernels.roofline import Work

SEED = 20


@dataclass(frozen=True)
class RowCase:
    """LayerNorm or quantize of [M, K] float16, of every kind."""

    op: str
    batch: int
    m: int
    k: int
    data: str = "uniform"
    bits: int = 8

    @property
    def case(self) -> str:
        """Its name."""
        return f"K={self.k}"

    @property
    def sizes(self) -> dict[str, Any]:
        """Columns of a row of results."""
        return {"M": self.m, "K": self.k, "bits_w": "", "data": self.data}

    @property
    def work(self) -> Work:
        """Bytes: float16 in, int8 out; a second input and the sum, or a scale a row, where the op has them."""
        values = self.m * self.k
        more = {"add_layernorm": 4.0 * values, "layernorm_per_token": 4.0 * self.m, "quantize_per_token": 4.0 * self.m}
        return Work(bytes=3.0 * values + more.get(self.op, 0.0))

    def build(self, device: str) -> Built:
        """Arguments by seed."""
        generator = torch.Generator(device).manual_seed(SEED)
        x = torch.randn(self.m, self.k, generator=generator, device=device).half()
        scale = torch.full((self.k,), 40.0 * 2.0 ** (self.bits - 8), device=device)
        offset = torch.full((self.k,), 0.25, device=device)
        norm = {"gain": scale, "offset": offset, "eps": 1e-6, "bits": self.bits}
        tail: dict[str, Any] = {
            "quantize": {"inv_scale": scale, "zero_point": offset.int() + 3, "bits": self.bits},
            "quantize_per_token": {},
            "layernorm": norm,
            "add_layernorm": {"residual": x.flip(0), **norm},
            "layernorm_per_token": {"weight": scale, "bias": offset, "eps": 1e-6},
        }[self.op]
        return Built(self.op, self.case, {"x": x, **tail})

    def baselines(self, built: Built) -> Baselines:
        """The same by torch's own ops."""
        x = built.arguments["x"]
        ones, zeros = torch.ones_like(x[0]), torch.zeros_like(x[0])
        found: dict[str, Baselines] = {
            "quantize": {TORCH_QUANTIZE: (torch_quantize, (x, 40.0))},
            "quantize_per_token": {TORCH_PER_TOKEN: (torch_per_token, (x,))},
            "layernorm": {TORCH_LAYERNORM: (torch_layernorm, (x, ones, zeros, 40.0))},
            "add_layernorm": {TORCH_ADD_LAYERNORM: (torch_add_layernorm, (x, x.flip(0), ones, zeros, 40.0))},
            "layernorm_per_token": {TORCH_LAYERNORM_PER_TOKEN: (torch_layernorm_per_token, (x, ones, zeros))},
        }
        return found[self.op]


@dataclass(frozen=True)
class PatchCase:
    """quantize_patches of float16 images [B, 3, size, size]."""

    batch: int
    size: int  # pixels
    patch: int
    op: str = "quantize_patches"
    data: str = "gaussian"
    bits: int = 8

    @property
    def case(self) -> str:
        """Its name."""
        return f"patch {self.patch}"

    @property
    def sizes(self) -> dict[str, Any]:
        """Columns of a row of results."""
        k = 3 * self.patch**2
        return {"M": self.batch * (self.size // self.patch) ** 2, "K": k, "bits_w": "", "data": self.data}

    @property
    def work(self) -> Work:
        """Bytes: float16 in, int8 out."""
        return Work(bytes=9.0 * self.batch * self.size**2)

    def build(self, device: str) -> Built:
        """Arguments by seed."""
        generator = torch.Generator(device).manual_seed(SEED)
        image = torch.randn(self.batch, 3, self.size, self.size, generator=generator, device=device).half()
        scale = torch.full((3 * self.patch**2,), 40.0 * 2.0 ** (self.bits - 8), device=device)
        affine = {"inv_scale": scale, "zero_point": torch.zeros_like(scale, dtype=torch.int32)}
        given = {"image": image, **affine, "patch_height": self.patch, "patch_width": self.patch, "bits": self.bits}
        return Built(self.op, self.case, given)

    def baselines(self, built: Built) -> Baselines:
        """The same by torch's own ops."""
        return {TORCH_PATCHES: (torch_patches, (built.arguments["image"], self.patch, 40.0))}
