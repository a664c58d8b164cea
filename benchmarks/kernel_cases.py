"""What is measured of our kernels: the layers of a ViT with their data, and which ``baselines.py`` they compete with.

A case is plain data, so that a process that compiles can have it. Its ``build`` makes the tensors by one seed.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import (
    CUBLAS_F16,
    SDPA,
    TORCH_LINEAR_LAYERNORM,
    UNFUSED_PER_TOKEN,
    Baselines,
    int_mm,
    sdpa,
    torch_linear_layernorm,
    torchao_linear,
    unfused_linear,
    unfused_per_token,
)
from benchmarks.built_case import Built
from benchmarks.kernel_backend import Layer
from benchmarks.kernel_targets import CUBLAS, FOUR_BIT, INT_MM, UNFUSED
from benchmarks.row_cases import SEED, PatchCase, RowCase
from vitq_kernels.ops.bit_planes import WINDOW_ROWS
from vitq_kernels.packing import pack_weight, unpack_weight
from vitq_kernels.roofline import Work
from vitq_kernels.spec import DEFAULT_GROUP_ROWS, QuantFormat, RowGroups

MIXED = (6, 3, 4)  # widths of a mixed layer's groups, in turn; the widest first
GELU_LEVELS = 16  # as a 4-bit codebook has
REAL_OPS = ("linear_real", "linear_per_token")  # their outputs are float16


@dataclass(frozen=True)
class LinearCase:
    """A linear layer of ``m`` tokens."""

    case: str  # the layer's name
    op: str
    batch: int
    m: int
    n: int
    k: int
    widths: tuple[int, ...]  # of groups of 16 rows, in turn
    # The whole range; "gaussian": bell-shaped codes; "one_sided": activations in 64..127; "four_bit": in -8..7.
    data: str = "uniform"

    @property
    def input_bits(self) -> int:
        """Width of the activations."""
        return 4 if self.data == FOUR_BIT else 8

    @property
    def groups(self) -> RowGroups:
        """The widths of the rows: as ``allocate`` gives them, at random inside every 64.

        Every other 128 rows are without the widest, so that Triton's windows differ.
        """
        chance, order = random.Random(SEED), []
        for first in range(0, self.n, 4 * DEFAULT_GROUP_ROWS):
            rows = range(first, min(first + 4 * DEFAULT_GROUP_ROWS, self.n))
            order += chance.sample(rows, len(rows))
        widths: list[int] = []
        for first, given in zip(range(0, self.n, WINDOW_ROWS), itertools.cycle((self.widths, self.widths[1:]))):
            count = -(-min(WINDOW_ROWS, self.n - first) // DEFAULT_GROUP_ROWS)
            widths += itertools.islice(itertools.cycle(given or self.widths), count)
        return RowGroups(self.n, tuple(widths), DEFAULT_GROUP_ROWS, tuple(order))

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
        """Operations of the product; bytes of codes, packed weights, float16 residual and outputs, each once."""
        out_bytes = {"linear_residual": 4, "linear_residual_layernorm": 5, **dict.fromkeys(REAL_OPS, 2)}
        ops = 2.0 * self.m * self.n * self.k
        weight_bytes = sum(self.groups.row_bits()) * self.k / 8
        moved = self.m * self.k + weight_bytes + self.m * self.n * out_bytes.get(self.op, 1)
        return Work(int4_ops=ops, bytes=moved) if self.data == FOUR_BIT else Work(int8_ops=ops, bytes=moved)

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
        unit = 40.0 if self.op == "linear_codes" else 1.0
        bias_q = torch.randint(-999, 1000, (self.n,), generator=generator, device=device, dtype=torch.int32)
        known: dict[str, Any] = {
            "a": a,
            "weight": pack_weight(weight, groups),
            "multiplier": unit / spread,
            "bias_q": bias_q,
        }
        return Built(self.op, self.case, known | self.tail(known, generator), self.input_bits)

    def tail(self, known: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The arguments that only this op takes; an op without ``bias_q`` loses it here."""
        device = generator.device
        zero_point = torch.full((self.n,), -3, dtype=torch.int32, device=device)
        per_row = torch.full((self.n,), 70.0, device=device)
        if self.op.startswith("linear_residual"):
            residual = {"residual": torch.randn(self.m, self.n, generator=generator, device=device).half()}
            norm = {"gain": 0.5 * per_row, "offset": per_row / 64, "eps": 1e-6, "bits": 8}
            return residual if self.op == "linear_residual" else residual | norm
        if self.op == "linear_gelu_codes":
            return {"inv_scale": per_row, "zero_point": zero_point - 100, "bits": 8, "approximate": "none"}
        if self.op == "linear_gelu_levels":
            levels = torch.linspace(-20, 127, GELU_LEVELS, device=device).round().to(torch.int8)
            thresholds = (levels[1:].float() + levels[:-1].float()) / 2
            return {"inv_scale": per_row, "thresholds": thresholds, "levels": levels, "approximate": "none"}
        if self.op == "linear_real":
            return {"out_dtype": torch.float16}
        if self.op == "linear_per_token":
            a, weight, multiplier, bias_q = (known.pop(name) for name in ("a", "weight", "multiplier", "bias_q"))
            token_scale = torch.rand(self.m, generator=generator, device=device) + 0.5
            head = {"a": a, "token_scale": token_scale, "weight": weight, "multiplier": multiplier}
            return head | {"bias": bias_q * multiplier, "out_dtype": torch.float16}
        return {"zero_point": zero_point, "bits": 8}

    def baselines(self, built: Built) -> Baselines:
        """cuBLAS in both halves, the two ways to cuBLASLt's int8 product, and torchao, on the same codes."""
        given = built.arguments
        a, weight, multiplier = given["a"], unpack_weight(given["weight"]), given["multiplier"]
        bias = given["bias"] if self.op == "linear_per_token" else multiplier * given["bias_q"]
        x, w = (t.to(torch.bfloat16) / 64 for t in (a, weight))
        half_bias, real = bias.to(torch.bfloat16), a.half() / 64
        found: Baselines = {
            CUBLAS: (F.linear, (x, w, half_bias)),
            CUBLAS_F16: (F.linear, (x.half(), w.half(), half_bias.half())),
            INT_MM: (int_mm, (a, weight)),
        }
        if self.op == "linear_per_token":
            found[UNFUSED_PER_TOKEN] = (unfused_per_token, (real, weight, multiplier, bias))
        else:
            found[UNFUSED] = (unfused_linear, (real, 64.0, weight, multiplier, bias))
        if self.op == "linear_residual_layernorm":
            norm = (torch.ones_like(half_bias), torch.zeros_like(half_bias))
            arguments = (x, w, half_bias, given["residual"].to(x.dtype), norm, 35.0)
            found[TORCH_LINEAR_LAYERNORM] = (torch_linear_layernorm, arguments)
        return found | torchao_linear(x, w, half_bias)


@dataclass(frozen=True)
class AttentionCase:
    """Attention on codes that are views of one qkv tensor, as the module has them."""

    batch: int
    s: int
    heads: int
    head_dim: int
    op: str = "attention"
    data: str = "uniform"
    softmax_bits: int = 4

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.s

    @property
    def case(self) -> str:
        """Its name."""
        return f"S={self.s}" if self.softmax_bits == 4 else f"S={self.s}, softmax {self.softmax_bits} bits"

    @property
    def sizes(self) -> dict[str, Any]:
        """Columns of a row of results."""
        return {"B": self.batch, "H": self.heads, "S": self.s, "D": self.head_dim, "bits_w": "", "data": self.data}

    @property
    def work(self) -> Work:
        """Operations of the two products; the second one runs on float16 units. Bytes: q, k, v and outputs, once."""
        values = self.batch * self.heads * self.s * self.head_dim
        return Work(int8_ops=2.0 * values * self.s, f16_ops=2.0 * values * self.s, bytes=4.0 * values)

    def build(self, device: str) -> Built:
        """Arguments by seed; codes of the softmax fill their range."""
        generator, (h, d) = torch.Generator(device).manual_seed(SEED), (self.heads, self.head_dim)
        qkv = _codes(self.data, (self.batch, self.tokens, 3, h, d), 8, generator)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        spread = 5 * math.sqrt(d) * 74.0**2  # of a row of scores; 74 is the deviation of uniform codes
        count, tau = 1 << self.softmax_bits, 2.0 ** (3 - self.softmax_bits)
        levels = [round(255 * 2 ** (-tau * c)) for c in range(count - 1)] + [0]
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "kappa": torch.full((h,), count / spread, device=device),
            "levels": torch.tensor([levels] * h, dtype=torch.uint8, device=device),
            "multiplier": torch.full((h, d), 3.0, device=device),
            "zero_point": torch.full((h, d), -2, dtype=torch.int32, device=device),
            "bias_q": None,
            "inv_tau": None,
            "bits": 8,
            "windows": None,
            "pattern": None,
        }
        return Built(self.op, self.case, arguments)

    def baselines(self, built: Built) -> Baselines:
        """Each fused backend of scaled_dot_product_attention on float16 views of one tensor."""
        qkv = torch.stack([built.arguments[name].transpose(1, 2) for name in "qkv"], 2).half() / 64
        views = tuple(qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return {name: (sdpa, (backend, *views)) for name, backend in SDPA.items()}


AnyCase = LinearCase | AttentionCase | RowCase | PatchCase


def _codes(kind: str, shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    fmt, device = QuantFormat(bits), generator.device
    if kind == "gaussian":
        bell = torch.randn(shape, generator=generator, device=device) * (fmt.qmax + 1) / 4
        return bell.round_().clamp_(fmt.qmin, fmt.qmax).to(torch.int8)
    low = 64 if kind == "one_sided" else fmt.qmin
    return torch.randint(low, fmt.qmax + 1, shape, generator=generator, device=device, dtype=torch.int8)
