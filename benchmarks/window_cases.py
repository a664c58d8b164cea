"""What is measured of attention inside windows: those of Swin Transformers, shifted, with biases and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.baselines import Baselines, sdpa
from benchmarks.built_case import Built
from benchmarks.kernel_cases import AttentionCase
from benchmarks.row_cases import SEED
from benchmarks.vit_shapes import SWINS, SwinShape
from tests.op_cases import swin_windows
from vitq_kernels.ops import reference
from vitq_kernels.roofline import Work

WINDOW_SDPA = "SDPA efficient fp16, masked, of partitioned windows"
PATTERNS = 4  # kinds of mask
MASKED = -(1 << 29)


@dataclass(frozen=True)
class WindowCase(AttentionCase):
    """Attention inside the shifted windows of a square of tokens; ``s`` tokens a window."""

    grid: int = 56  # tokens a side

    @property
    def windows(self) -> int:
        """Of an image."""
        return self.tokens // self.s

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.grid**2

    @property
    def case(self) -> str:
        """Its name."""
        return f"{self.windows} windows of {self.s}"

    @property
    def work(self) -> Work:
        """As of a sequence a window; and the biases, windows and patterns, once."""
        plain = AttentionCase(self.batch * self.windows, self.s, self.heads, self.head_dim).work
        moved = plain.bytes + 4.0 * (PATTERNS * self.heads * self.s**2 + self.tokens + self.windows)
        return replace(plain, bytes=moved)

    def build(self, device: str) -> Built:
        """Arguments by seed; biases of the size of the scores, and masks where Swin has them."""
        built, side = super().build(device), math.isqrt(self.s)
        windows, pattern = (t.to(device) for t in swin_windows(self.grid, self.grid, side, side // 2))
        generator = torch.Generator(device).manual_seed(SEED)
        shape = (PATTERNS, self.heads, self.s, self.s)
        bias_q = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, device=device, dtype=torch.int32)
        bias_q = bias_q.masked_fill(shift_masks(side, side // 2).to(device)[:, None], MASKED)
        return replace(built, arguments=built.arguments | {"bias_q": bias_q, "windows": windows, "pattern": pattern})

    def baselines(self, built: Built) -> Baselines:
        """The fused attention that takes a mask, on windows that lie one after another already, masks in float16."""
        given = built.arguments
        shape = (self.batch, self.windows * self.heads, self.s, self.head_dim)
        gathered = (reference.gather_windows(given[name], given["windows"]) for name in "qkv")
        q, k, v = (t.contiguous().view(shape).half() / 64 for t in gathered)
        bias = given["bias_q"][given["pattern"].long()].view(1, -1, self.s, self.s)
        mask = (bias / (1 << 15)).half().masked_fill(bias == MASKED, -math.inf).expand(self.batch, -1, -1, -1)
        return {WINDOW_SDPA: (sdpa, (SDPBackend.EFFICIENT_ATTENTION, q, k, v, mask))}


def shift_masks(side: int, shift: int) -> Tensor:
    """Which places must not see each other in a window of each kind (``swin_windows``): bool [4, S, S]."""
    edge = torch.arange(side) >= side - shift
    rows, columns = edge.repeat_interleave(side), edge.repeat(side)
    parts = torch.stack([(kind >> 1) * 2 * rows.int() + (kind & 1) * columns.int() for kind in range(PATTERNS)])
    return parts[:, :, None] != parts[:, None, :]


def window_cases(batch: int, stage: int = 0) -> list[WindowCase]:
    """One of each Swin, at a stage of it."""
    return [swin_case(swin, batch, stage) for swin in SWINS]


def swin_case(swin: SwinShape, batch: int, stage: int) -> WindowCase:
    """The attention of a stage."""
    return WindowCase(batch, swin.window**2, swin.heads(stage), swin.head_dim, grid=swin.grid(stage))
