"""What is measured of our kernels: ViT-B's layers with their data, and what they compete with.

A case is plain data, so that a process that compiles can have it. Its ``build`` makes the tensors by one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.built_case import Built
from benchmarks.kernel_backend import Layer
from benchmarks.kernel_targets import (
    CUBLAS,
    CUDNN,
    EFFICIENT,
    FLASH,
    FOUR_BIT,
    INT_MM,
    TORCH_LAYERNORM,
    TORCH_QUANTIZE,
    UNFUSED,
)
from benchmarks.microbench import Work
from vitq_kernels.packing import pack_weight, unpack_weight
from vitq_kernels.spec import QuantFormat, RowGroups

SEED = 20
MIXED = (6, 3, 4)  # widths of a mixed layer's windows, in turn; the widest first
SDPA = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}
# name -> function and arguments
Baselines = dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]]


@dataclass(frozen=True)
class LinearCase:
    """A linear layer of ``m`` tokens."""

    case: str  # the layer's name
    op: str
    batch: int
    m: int
    n: int
    k: int
    widths: tuple[int, ...]  # of windows of 128 rows, in turn
    # The whole range; "gaussian": bell-shaped codes; "one_sided": activations in 64..127; "four_bit": in -8..7.
    data: str = "uniform"

    @property
    def input_bits(self) -> int:
        """Width of the activations."""
        return 4 if self.data == FOUR_BIT else 8

    @property
    def groups(self) -> RowGroups:
        """The widths of the rows."""
        count = sum(-(-min(256, self.n - tile) // 128) for tile in range(0, self.n, 256))
        return RowGroups(self.n, tuple(self.widths[i % len(self.widths)] for i in range(count)), 128)

    @property
    def layer(self) -> Layer:
        """As the choice of a tile sees it."""
        return Layer(self.m, self.k, self.groups, self.op, self.input_bits)

    @property
    def sizes(self) -> dict[str, Any]:
        """Columns of a row of results."""
        widths = "/".join(str(b) for b in sorted(self.widths))
        return {"M": self.m, "N": self.n, "K": self.k, "bits_w": widths, "data": self.data}

    @property
    def work(self) -> Work:
        """Operations of the product."""
        ops = 2.0 * self.m * self.n * self.k
        return Work(int4_ops=ops) if self.data == FOUR_BIT else Work(int8_ops=ops)

    def build(self, device: str) -> Built:
        """Arguments by seed; outputs fill their range without much saturation."""
        generator = torch.Generator(device).manual_seed(SEED)
        a = _codes(self.data, (self.m, self.k), self.input_bits, generator)
        groups, weight = self.groups, torch.empty(self.n, self.k, dtype=torch.int8, device=device)
        row_bits = torch.tensor(groups.row_bits(), device=device)
        for bits in sorted(set(groups.bits)):
            kind = "gaussian" if self.data == "gaussian" else "uniform"
            weight[row_bits == bits] = _codes(kind, (self.n, self.k), bits, generator)[row_bits == bits]
        # Of a sum: one-sided activations also have a mean, which zero-mean weights keep small.
        spread = math.sqrt(self.k) * a.float().square().mean().sqrt() * weight.float().std(1).clamp_min(0.5)
        unit = {"linear_codes": 40.0, "linear_gelu_codes": 1.0, "linear_residual": 1.0}[self.op]
        bias_q = torch.randint(-999, 1000, (self.n,), generator=generator, device=device, dtype=torch.int32)
        known: dict[str, Any] = {
            "a": a,
            "weight": pack_weight(weight, groups),
            "multiplier": unit / spread,
            "bias_q": bias_q,
        }
        zero_point = torch.full((self.n,), -3, dtype=torch.int32, device=device)
        if self.op == "linear_residual":
            known["residual"] = torch.randn(self.m, self.n, generator=generator, device=device).half()
        elif self.op == "linear_gelu_codes":
            inv_scale = torch.full((self.n,), 70.0, device=device)
            known |= {"inv_scale": inv_scale, "zero_point": zero_point - 100, "bits": 8, "approximate": "none"}
        else:
            known |= {"zero_point": zero_point, "bits": 8}
        return Built(self.op, self.case, known, self.input_bits)

    def baselines(self, built: Built) -> Baselines:
        """cuBLAS in bf16 and the two ways to cuBLASLt's int8 product, on the same codes."""
        a, weight = built.arguments["a"], unpack_weight(built.arguments["weight"])
        x, w, bias = (t.to(torch.bfloat16) / 64 for t in (a, weight, built.arguments["bias_q"]))
        multiplier, real = built.arguments["multiplier"], a.half() / 64
        return {
            CUBLAS: (F.linear, (x, w, bias)),
            INT_MM: (_int_mm, (a, weight)),
            UNFUSED: (_unfused_linear, (real, 64.0, weight, multiplier, multiplier * built.arguments["bias_q"])),
        }


@dataclass(frozen=True)
class AttentionCase:
    """Attention on codes that are views of one qkv tensor, as the module has them."""

    batch: int
    s: int
    heads: int
    head_dim: int
    op: str = "attention"
    data: str = "uniform"

    @property
    def case(self) -> str:
        """Its name."""
        return f"S={self.s}"

    @property
    def sizes(self) -> dict[str, Any]:
        """Columns of a row of results."""
        return {"B": self.batch, "H": self.heads, "S": self.s, "D": self.head_dim, "bits_w": "", "data": self.data}

    @property
    def work(self) -> Work:
        """Operations of the two products; the second one runs on float16 units."""
        ops = 2.0 * self.batch * self.heads * self.s**2 * self.head_dim
        return Work(int8_ops=ops, f16_ops=ops)

    def build(self, device: str) -> Built:
        """Arguments by seed; codes of the softmax fill their range."""
        generator, (h, d) = torch.Generator(device).manual_seed(SEED), (self.heads, self.head_dim)
        qkv = _codes(self.data, (self.batch, self.s, 3, h, d), 8, generator)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        spread = 5 * math.sqrt(d) * 74.0**2  # of a row of scores; 74 is the deviation of uniform codes
        levels = [round(255 * 2 ** (-c / 2)) for c in range(15)] + [0]
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "kappa": torch.full((h,), 16 / spread, device=device),
            "levels": torch.tensor([levels] * h, dtype=torch.uint8, device=device),
            "multiplier": torch.full((h, d), 3.0, device=device),
            "zero_point": torch.full((h, d), -2, dtype=torch.int32, device=device),
            "bias_q": None,
            "inv_tau": None,
            "bits": 8,
        }
        return Built(self.op, self.case, arguments)

    def baselines(self, built: Built) -> Baselines:
        """Each fused backend of scaled_dot_product_attention on float16 views of one tensor."""
        qkv = torch.stack([built.arguments[name].transpose(1, 2) for name in "qkv"], 2).half() / 64
        views = tuple(qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return {name: (_sdpa, (backend, *views)) for name, backend in SDPA.items()}


@dataclass(frozen=True)
class RowCase:
    """LayerNorm or quantize of [M, K] float16."""

    op: str
    batch: int
    m: int
    k: int
    data: str = "uniform"

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
        """Bytes: float16 in, int8 out."""
        return Work(bytes=3.0 * self.m * self.k)

    def build(self, device: str) -> Built:
        """Arguments by seed."""
        x = torch.randn(self.m, self.k, generator=torch.Generator(device).manual_seed(SEED), device=device).half()
        scale = torch.full((self.k,), 40.0, device=device)
        zero_point = torch.full((self.k,), 3, dtype=torch.int32, device=device)
        tail: dict[str, Any] = {"inv_scale": scale, "zero_point": zero_point}
        if self.op == "layernorm":
            tail = {"gain": scale, "offset": torch.full((self.k,), 0.25, device=device), "eps": 1e-6}
        return Built(self.op, self.case, {"x": x, **tail, "bits": 8})

    def baselines(self, built: Built) -> Baselines:
        """The same by torch's own ops."""
        x = built.arguments["x"]
        if self.op == "quantize":
            return {TORCH_QUANTIZE: (_torch_quantize, (x, 40.0))}
        ones, zeros = torch.ones_like(x[0]), torch.zeros_like(x[0])
        return {TORCH_LAYERNORM: (_torch_layernorm, (x, ones, zeros, 40.0))}


AnyCase = LinearCase | AttentionCase | RowCase


def _codes(kind: str, shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    fmt, device = QuantFormat(bits), generator.device
    if kind == "gaussian":
        bell = torch.randn(shape, generator=generator, device=device) * (fmt.qmax + 1) / 4
        return bell.round_().clamp_(fmt.qmin, fmt.qmax).to(torch.int8)
    low = 64 if kind == "one_sided" else fmt.qmin
    return torch.randint(low, fmt.qmax + 1, shape, generator=generator, device=device, dtype=torch.int8)


def _torch_quantize(x: Tensor, inv_scale: float) -> Tensor:
    return (x * inv_scale).round_().clamp_(-128, 127).to(torch.int8)


def _torch_layernorm(x: Tensor, weight: Tensor, bias: Tensor, inv_scale: float) -> Tensor:
    return _torch_quantize(F.layer_norm(x, weight.shape, weight, bias, 1e-6), inv_scale)


def _int_mm(a: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(a, weight.t())


def _unfused_linear(x: Tensor, inv_scale: float, weight: Tensor, multiplier: Tensor, bias: Tensor) -> Tensor:
    acc = _int_mm(_torch_quantize(x, inv_scale), weight)
    return torch.addcmul(bias, acc, multiplier, out=x.new_empty(acc.shape))


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)
