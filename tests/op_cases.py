"""Cases of every op: arguments on adversarial data, in odd shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.conformance import Case
from tests.numerics import (
    CODE_KINDS,
    REAL_KINDS,
    codes,
    integers,
    reals,
    uniform,
)
from tests.twins import level_table
from vitq_kernels.ops import reference
from vitq_kernels.packing import pack_weight
from vitq_kernels.spec import RowGroups

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (M, K, N, weight bits): one token, odd everything, tails of every tile size, a ViT row count, ViT-B's fc2 depth.
LINEAR_SHAPES = ((1, 32, 8, 8), (3, 5, 10, 2), (17, 147, 72, 3), (197, 65, 1000, 6), (4, 3072, 9, 8))
LINEAR_BITS = (8, 4, 8, 6, 8)  # of the outputs, shape by shape
ROW_SHAPES = ((1, 192), (3, 5), (17, 147), (197, 384))  # (M, K)
# (B, H, S, D, log2 bits, tau): tau = 0.5 and 3 bits keep the last levels far from 0; S = 577 passes 2^24 in o.
ATTENTION_SHAPES = (
    (2, 1, 1, 64, 4, 1.0),
    (1, 3, 49, 32, 3, 0.5),
    (2, 2, 50, 64, 4, 0.5),
    (1, 2, 197, 64, 8, 0.25),
    (1, 1, 257, 32, 2, 1.0),
)


def some_groups(rows: int, bits: int) -> RowGroups:
    """One width for a layer of fewer than 64 rows, else groups of mixed widths up to ``bits`` in a shuffled order."""
    if rows < 64:
        return RowGroups.uniform(rows, bits)
    groups = -(-rows // 16)
    order = [
        tile + int(i)
        for tile in range(0, rows, 256)
        for i in integers(0, 10**6, (min(256, rows - tile),), rows).argsort()
    ]
    return RowGroups(rows, tuple(max(2, bits - i % 3) for i in range(groups)), 16, tuple(order))


def weight_codes(kind: str, groups: RowGroups, cols: int, seed: int) -> Tensor:
    """A weight of the groups' widths, int8 [N, K] in the model's row order."""
    widths = torch.tensor(groups.row_bits())
    result = torch.empty(groups.rows, cols, dtype=torch.int8)
    for bits in set(groups.bits):
        result[widths == bits] = codes(kind, (groups.rows, cols), bits, seed)[widths == bits]
    return result


def zero_points(shape: Sequence[int], bits: int, seed: int) -> Tensor:
    """int32 that leave room in ``bits`` bits, but for the first two: -128 and 127."""
    result = integers(-(1 << (bits - 2)), 1 << (bits - 2), shape, seed)
    result.view(-1)[:2] = torch.tensor([-128, 127][: result.numel()])
    return result


def _linear(m: int, k: int, n: int, bits: int, kind: str, scale: float) -> dict[str, Any]:
    """What the linear ops share; ``f32(acc) * multiplier`` reaches about 160 * scale.

    Channels 0, 3, ...: the bias cancels one token's sum to a few units at half a code each, so that one unit lost in a
    large sum shows, and ties abound. Channels 1, 4, ...: the bias cancels the mean. Channels 2, 5, ...: a small bias.
    The last: sums of 2^24 + 3, which float32 rounds up, at a multiplier that makes a code of the difference. The one
    before: a product of 0.5 + 2^-47, which one rounding too many turns into a tie.
    """
    groups = some_groups(n, bits)
    a, w = codes(kind, (m, k), seed=m), weight_codes(kind, groups, k, seed=n)
    acc = reference.accumulate(a, [w], None)
    bias_q = integers(-60, 60, (n,), seed=k)
    bias_q[::3] -= acc[torch.arange(n) % m, torch.arange(n)][::3]
    bias_q[1::3] -= acc.double().mean(0).int()[1::3]
    bias_q[-1] = (1 << 24) + 3 - acc[0, -1]
    bias_q[-2] = 8384513 - acc[0, -2]
    multiplier = 160 * uniform(0.5, 1.5, (n,), seed=3) / (acc + bias_q).abs().amax(0).clamp_min(1)
    multiplier[::3] = 0.5
    multiplier[-1] = ((1 << 24) - 3) * 2.0**-49
    multiplier[-2] = 8392705 * 2.0**-47
    return {"a": a, "weight": pack_weight(w, groups), "multiplier": multiplier * scale, "bias_q": bias_q}


def _linear_cases(op: str, scale: float, tail: Callable[[int, int, int], dict[str, Any]]) -> list[Case]:
    """Every shape and kind; ``tail(M, N, number of the shape)`` gives what only this op takes."""
    names = [name for name in inspect.signature(getattr(reference, op)).parameters if name != "accumulate"]
    result = []
    for number, (m, k, n, bits) in enumerate(LINEAR_SHAPES):
        for kind in CODE_KINDS:
            known = _linear(m, k, n, bits, kind, scale) | tail(m, n, number)
            result.append(Case(op, f"{m}x{k}x{n}-w{bits}-{kind}", {name: known[name] for name in names}))
    return result


def _row_cases(op: str, tail: Callable[[Tensor, int], dict[str, Any]], kinds: Sequence[str] = REAL_KINDS) -> list[Case]:
    result = []
    for number, (m, k) in enumerate(ROW_SHAPES):
        for kind in kinds:
            dtype = DTYPES[(number + len(result)) % 3]
            x = reals(kind, (m, k), dtype, seed=m)
            result.append(Case(op, f"{m}x{k}-{kind}-{str(dtype).removeprefix('torch.')}", {"x": x} | tail(x, number)))
    return result


def _norm_tail(gain: str, offset: str, with_residual: bool = False) -> Callable[[Tensor, int], dict[str, Any]]:
    def tail(x: Tensor, number: int) -> dict[str, Any]:
        residual = {"residual": reals("normal", x.shape, x.dtype, seed=5)} if with_residual else {}
        bits = 8 - 2 * (number % 3)
        spread = 1.0 if gain == "weight" else 30.0 * 2 ** (bits - 8)
        vectors = {name: uniform(-spread, spread, x.shape[-1:], seed) for name, seed in ((gain, 6), (offset, 7))}
        return residual | vectors | {"eps": 1e-6} | ({} if gain == "weight" else {"bits": bits})

    return tail


def attention_case(b: int, h: int, s: int, d: int, log2_bits: int, tau: float, kind: str, number: int) -> Case:
    """Attention whose log2 codes fill their range; bias: none, per head, or a mask with -2^29 in it."""
    q, k, v = (codes(kind, (b, h, s, d), seed=10 + i) for i in range(3))
    bias_q: Tensor | None = None
    if (number + number // len(CODE_KINDS)) % 3 == 1:
        bias_q = integers(-(1 << 14), 1 << 14, (1, h, s, s), seed=13)
    elif (number + number // len(CODE_KINDS)) % 3 == 2:
        bias_q = -(1 << 29) * integers(0, 1, (b, 1, 1, s), seed=14)
    acc = reference.int_matmul(q, k.transpose(-2, -1))
    spread = (acc.amax(-1) - acc.amin(-1)).amax((0, 2)).clamp_min(1)
    kappa = (uniform(0.6, 1.2, (h,), seed=15) * (1 << log2_bits) / spread).float()
    kappa[0] = torch.exp2(kappa[0].log2().floor())  # ties
    bits = (8, 8, 8, 5)[number % 4]
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "kappa": kappa,
        "levels": torch.tensor([level_table(log2_bits, tau)] * h, dtype=torch.uint8),
        "multiplier": uniform(0.5, 2.0, (h, d), seed=16) * 2.0 ** (bits - 8),
        "zero_point": zero_points((h, d), bits, 17),
        "bias_q": bias_q,
        "bits": bits,
    }
    return Case("attention", f"{b}x{h}x{s}x{d}-p{log2_bits}-{kind}", arguments)


def near_tie_attention() -> Case:
    """Distances past 2^24 and at ties, and in every channel an output beside a tie."""
    h, s, d = 3, 6, 32
    distances = torch.tensor([0, 1, 3, 5, (1 << 24) + 1, (1 << 24) + 3], dtype=torch.int32)
    bias_q = -torch.stack([distances.roll(i) for i in range(s)]).expand(1, h, s, s)
    kappa = torch.tensor([2.0**-25, ((1 << 24) - 3) * 2.0**-49, 0.5])
    levels = torch.tensor([level_table(3, 0.5)] * h, dtype=torch.uint8)
    v = codes("random", (1, h, s, d), seed=40)
    probability = levels.int()[torch.arange(h).view(1, h, 1, 1), reference.attention_codes(-bias_q, kappa, 8)]
    out, total = reference.int_matmul(probability, v)[0, :, 0].double(), probability[0, :, 0].sum(-1, keepdim=True)
    tie = integers(0, 99, (h, d), seed=41) + 0.5
    multiplier = (tie * total / out.abs().clamp_min(1)).float()
    zeros = torch.zeros(1, h, s, d, dtype=torch.int8)
    zero_point = integers(-20, 20, (h, d), seed=42)
    arguments = (zeros, zeros, v, kappa, levels, multiplier, zero_point, bias_q, 8)
    names = inspect.signature(reference.attention).parameters
    return Case("attention", "near-ties", dict(zip(names, arguments, strict=True)))


def _per_token_tail(m: int, n: int, number: int) -> dict[str, Any]:
    bias = None if number % 2 else uniform(-1, 1, (n,), seed=8)
    return {"token_scale": uniform(0.01, 1, (m,), seed=7), "bias": bias, "out_dtype": DTYPES[number % 3]}


def _codes_tail(m: int, n: int, number: int) -> dict[str, Any]:
    bits = LINEAR_BITS[number]
    zero_point = zero_points((n,), bits, 30)
    zero_point[-2] = 100 if bits == 8 else 0
    return {"zero_point": zero_point, "bits": bits}


def _gelu_tail(m: int, n: int, number: int) -> dict[str, Any]:
    inv_scale = uniform(10, 40, (n,), seed=20)
    inv_scale[::2] = 32.0
    bits = LINEAR_BITS[number]
    return {"inv_scale": inv_scale, "zero_point": zero_points((n,), bits, 21), "bits": bits} | _approximate(number)


def _level_tail(m: int, n: int, number: int) -> dict[str, Any]:
    size = 1 << (2 + number % 3)
    thresholds = uniform(-0.2, 4, (size - 1,), seed=22).sort().values
    levels = integers(-128, 127, (size,), seed=23, dtype=torch.int8)
    inv_scale = uniform(0.5, 2, (n,), seed=24)
    return {"inv_scale": inv_scale, "thresholds": thresholds, "levels": levels} | _approximate(number)


def _approximate(number: int) -> dict[str, str]:
    return {"approximate": ("none", "tanh")[number % 2]}


def _residual(m: int, n: int, number: int) -> dict[str, Any]:
    shape = (m, n) if number % 2 else (n,)
    return {"residual": reals("outlier", shape, DTYPES[number % 3], seed=25)}


def _quantize_tail(x: Tensor, number: int) -> dict[str, Any]:
    bits = (8, 4, 8, 5)[number]
    inv_scale = uniform(0.5, 40, x.shape[-1:], seed=26) * 2.0 ** (bits - 8)
    inv_scale[::2] = 1.0  # ties stay ties
    return {"inv_scale": inv_scale, "zero_point": zero_points(x.shape[-1:], bits, 27), "bits": bits}


CASES: dict[str, list[Case]] = {
    "quantize": _row_cases("quantize", _quantize_tail),
    "quantize_per_token": _row_cases("quantize_per_token", lambda x, number: {}),
    "layernorm": _row_cases("layernorm", _norm_tail("gain", "offset")),
    "add_layernorm": _row_cases("add_layernorm", _norm_tail("gain", "offset", with_residual=True)),
    "layernorm_per_token": _row_cases("layernorm_per_token", _norm_tail("weight", "bias")),
    "linear_codes": _linear_cases("linear_codes", 1, _codes_tail),
    "linear_gelu_codes": _linear_cases("linear_gelu_codes", 1 / 32, _gelu_tail),
    "linear_gelu_levels": _linear_cases("linear_gelu_levels", 1 / 32, _level_tail),
    "linear_real": _linear_cases("linear_real", 1 / 16, lambda m, n, number: {"out_dtype": DTYPES[number % 3]}),
    "linear_residual": _linear_cases("linear_residual", 1 / 16, _residual),
    "linear_per_token": _linear_cases("linear_per_token", 1 / 32, _per_token_tail),
    "attention": [
        attention_case(*shape, kind, number)
        for number, (shape, kind) in enumerate((s, k) for s in ATTENTION_SHAPES for k in CODE_KINDS)
    ]
    + [attention_case(1, 1, 577, 64, 4, 1.0, "one_sided", 0), near_tie_attention()],
}
ALL_CASES = [case for cases in CASES.values() for case in cases]
# One of 17 tokens (49 for attention) and random data an op, for everything but the values.
SAMPLES = {
    op: next(c for c in cases if c.label.startswith(("17x", "1x3x49")) and ("random" in c.label or "normal" in c.label))
    for op, cases in CASES.items()
}
