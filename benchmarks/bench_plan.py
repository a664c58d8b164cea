"""Every op at every shape of ``vit_shapes.py``: the parameters of ``bench_*.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.kernel_cases import MIXED, AnyCase, AttentionCase, LinearCase
from benchmarks.row_cases import PatchCase, RowCase
from benchmarks.vit_shapes import BATCHES, CHANNELS_IN, CLASSES, MLP_RATIO, STAGES, SWINS, VITS, ViTShape
from benchmarks.window_cases import swin_case
from vitq_kernels.spec import MAX_BITS, MIN_BITS

WIDTHS = (*((bits,) for bits in range(MAX_BITS, MIN_BITS - 1, -1)), MIXED)  # of weights
SOFTMAX_BITS = (4, 3, 8)
DATA = ("uniform", "gaussian")  # of codes
BACKENDS_ON = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda")}  # none interpreted or emulated


@dataclass(frozen=True)
class Planned:
    """A case of a model."""

    model: str
    case: AnyCase

    def __str__(self) -> str:
        case = self.case
        widths = f"w{case.sizes['bits_w'].replace('/', '_')}" if case.sizes["bits_w"] else f"a{_bits(case)}"
        return f"{self.model}-{case.op}-{case.case}-b{case.batch}-{widths}-{case.data}".replace(" ", "_")

    @property
    def gop(self) -> float:
        """What the work costs on a CPU, in 10^9 operations."""
        work = self.case.work
        return (work.int8_ops + work.f16_ops + work.int4_ops + work.bytes) / 1e9


def _bits(case: AnyCase) -> int:
    return case.softmax_bits if isinstance(case, AttentionCase) else getattr(case, "bits", MAX_BITS)


def linear_layers(vit: ViTShape, batch: int) -> tuple[tuple[str, str, int, int, int], ...]:
    """(name, op, M, N, K) of every kind of linear layer, with every epilogue that the library gives it."""
    c, m = vit.channels, batch * vit.tokens
    return (
        ("qkv", "linear_codes", m, 3 * c, c),
        ("proj", "linear_residual", m, c, c),
        ("proj", "linear_residual_layernorm", m, c, c),
        ("fc1", "linear_gelu_codes", m, MLP_RATIO * c, c),
        ("fc1", "linear_gelu_levels", m, MLP_RATIO * c, c),
        ("fc1", "linear_per_token", m, MLP_RATIO * c, c),
        ("fc2", "linear_residual", m, c, MLP_RATIO * c),
        ("patch_embed", "linear_residual", batch * (vit.tokens - 1), c, CHANNELS_IN * vit.patch**2),
        ("head", "linear_real", batch, CLASSES, c),
    )


def linear_plan() -> Iterator[Planned]:
    """Every layer, batch, width and kind of codes."""
    for vit in VITS:
        for batch in BATCHES:
            for name, op, m, n, k in linear_layers(vit, batch):
                for widths in WIDTHS:
                    for data in DATA:
                        yield Planned(vit.name, LinearCase(name, op, batch, m, n, k, widths, data))


def attention_plan() -> Iterator[Planned]:
    """Every model's attention, with softmax codes of several widths, and Swins' inside windows."""
    for vit in VITS:
        for batch in BATCHES:
            for bits in SOFTMAX_BITS:
                for data in DATA:
                    case = AttentionCase(batch, vit.tokens, vit.heads, vit.head_dim, data=data, softmax_bits=bits)
                    yield Planned(vit.name, case)
    for swin in SWINS:
        for batch in BATCHES:
            for stage in STAGES:
                yield Planned(swin.name, swin_case(swin, batch, stage))


def row_plan() -> Iterator[Planned]:
    """LayerNorm and quantize of the residual stream, and of patches; real numbers are bell-shaped."""
    for vit in VITS:
        for batch in BATCHES:
            for op in ("layernorm", "add_layernorm", "quantize"):
                for bits in (8, 4):
                    yield Planned(vit.name, RowCase(op, batch, batch * vit.tokens, vit.channels, "gaussian", bits))
            for op in ("layernorm_per_token", "quantize_per_token"):
                yield Planned(vit.name, RowCase(op, batch, batch * vit.tokens, vit.channels, "gaussian"))
            yield Planned(vit.name, PatchCase(batch, vit.image, vit.patch))
