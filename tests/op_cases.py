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
# (B, C, H, W, patch height, patch width): a ViT's patches cut out of more, one channel, odd everything, one patch.
IMAGE_SHAPES = ((2, 3, 37, 50, 16, 16), (3, 1, 19, 26, 4, 6), (1, 3, 23, 15, 7, 5), (1, 2, 9, 11, 9, 8))
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


def _linear_cases(
    op: str, scale: float, tail: Callable[[int, int, int], dict[str, Any]], kinds: Sequence[str] = CODE_KINDS
) -> list[Case]:
    """Every shape and kind; ``tail(M, N, number of the shape)`` gives what only this op takes."""
    names = [name for name in inspect.signature(getattr(reference, op)).parameters if name != "accumulate"]
    result = []
    for number, (m, k, n, bits) in enumerate(LINEAR_SHAPES):
        for kind in kinds:
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


def _patch_cases() -> list[Case]:
    names = inspect.signature(reference.quantize_patches).parameters
    result = []
    for number, (b, c, h, w, ph, pw) in enumerate(IMAGE_SHAPES):
        for kind in REAL_KINDS:
            dtype = DTYPES[(number + len(result)) % 3]
            image = reals(kind, (b, c, h, w), dtype, seed=h)
            tail = _quantize_tail(reference.flatten_patches(image, (ph, pw)).flatten(0, 2), number)
            known = {"image": image, "patch_height": ph, "patch_width": pw} | tail
            label = f"{b}x{c}x{h}x{w}-p{ph}x{pw}-{kind}-{str(dtype).removeprefix('torch.')}"
            result.append(Case("quantize_patches", label, {name: known[name] for name in names}))
    return result


def _norm_tail(gain: str, offset: str, with_residual: bool = False) -> Callable[[Tensor, int], dict[str, Any]]:
    def tail(x: Tensor, number: int) -> dict[str, Any]:
        residual = {"residual": reals("normal", x.shape, x.dtype, seed=5)} if with_residual else {}
        bits = 8 - 2 * (number % 3)
        spread = 1.0 if gain == "weight" else 30.0 * 2 ** (bits - 8)
        vectors = {name: uniform(-spread, spread, x.shape[-1:], seed) for name, seed in ((gain, 6), (offset, 7))}
        return residual | vectors | {"eps": 1e-6} | ({} if gain == "weight" else {"bits": bits})

    return tail


def attention_case(
    b: int, h: int, s: int, d: int, log2_bits: int, tau: float, kind: str, number: int, normalised: bool = False
) -> Case:
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
        "inv_tau": uniform(0.7, 1.3, (h,), seed=18) / tau if normalised else None,
        "bits": bits,
        "windows": None,
        "pattern": None,
    }
    form = "-normalised" if normalised else ""
    return Case("attention", f"{b}x{h}x{s}x{d}-p{log2_bits}-{kind}{form}", arguments)


def swin_windows(height: int, width: int, side: int, shift: int) -> tuple[Tensor, Tensor]:
    """Windows of side x side tokens after a cyclic shift, int32 [W, S], and their four kinds of mask, int32 [W].

    Kind 1: what the shift brought from the left edge lies in it, 2: from the top edge, 3: from both.
    """
    tokens = torch.arange(height * width, dtype=torch.int32).view(height, width).roll((-shift, -shift), (0, 1))
    tiles = tokens.view(height // side, side, width // side, side).transpose(1, 2)
    last_row = torch.arange(height // side) == height // side - 1
    last_column = torch.arange(width // side) == width // side - 1
    kind = (2 * last_row[:, None].int() + last_column.int()) * (shift > 0)
    return tiles.reshape(-1, side * side), kind.flatten().int()


def window_case(
    b: int,
    h: int,
    grid: tuple[int, int, int, int],
    d: int,
    bias: str,
    kind: str = "random",
    log2_bits: int = 4,
    normalised: bool = False,
) -> Case:
    """Attention inside the windows of ``grid``: height, width, side, shift; a side of 0 is any windows in any order.

    ``bias``: "none", "one" for all windows, "heads" that one shares, or "patterns", with -2^29 between parts.
    """
    height, width, side, shift = grid
    if side:
        windows, pattern = swin_windows(height, width, side, shift)
    else:
        windows = integers(0, 1 << 30, (height * width,), 50).argsort().int().view(height, width)
        pattern = integers(0, 3, (height,), 51)
    count, s = windows.shape
    plain = attention_case(b * count, h, s, d, log2_bits, 0.5, kind, 0, normalised).arguments
    q, k, v = (codes(kind, (b, h, count * s, d), seed=60 + i) for i in range(3))
    bias_q = None
    if bias != "none":
        shape = {"one": (1, h, s, s), "heads": (4, 1, s, s), "patterns": (4, h, s, s)}[bias]
        bias_q = integers(-(1 << 13), 1 << 13, shape, seed=52)
        bias_q[1:] -= (1 << 29) * (integers(0, 1, (*bias_q[1:, :1].shape[:2], s, s), seed=53))
    arguments = plain | {"q": q, "k": k, "v": v, "bias_q": bias_q, "windows": windows}
    arguments["pattern"] = pattern if bias in ("heads", "patterns") else None
    label = f"{b}x{h}x{height}x{width}x{d}-windows-{count}x{s}-shift{shift}-{bias}-{kind}"
    return Case("attention", label + ("-normalised" if normalised else ""), arguments)


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
    arguments = (zeros, zeros, v, kappa, levels, multiplier, zero_point, bias_q, None, 8, None, None)
    names = inspect.signature(reference.attention).parameters
    return Case("attention", "near-ties", dict(zip(names, arguments, strict=True)))


def near_tie_normalised_attention() -> Case:
    """The normalised form where every rounding shows, in every channel an output beside a tie.

    Levels of 0 make Z twice ``levels[0]`` (three times in head 2), so that the offset is inv_tau (log2(3) of it). In
    heads 0 and 1 product and offset in one rounding come out on the other side of a tie, in head 2 a logarithm in
    float32 does, in head 3 ties are exact.
    """
    h, s, d = 4, 6, 32
    rows = [[0] * 2 + [729004] * 4, [0] * 2 + [1262867] * 4, [0, 0, 0, 7, 7, 7], [0, 0, 1, 1, 2, 2]]
    distances = torch.tensor(rows, dtype=torch.int32)
    bias_q = -torch.stack([distances.roll(i, 1) for i in range(s)], 1).unsqueeze(0)
    kappa = torch.tensor([9895520 * 2.0**-42, 15804805 * 2.0**-42, 1.0, 1.0])
    inv_tau = torch.tensor([7212149 * 2.0**-23, 8067870 * 2.0**-23, 95267208 * 2.0**-25, 0.5])
    last_codes = ((0, 77, 50, 30, 13, 7), (33, 77, 50, 0, 13, 7), (33, 77, 50, 5, 13, 0), (0, 77, 50, 5, 13, 0))
    levels = torch.tensor([[200, 0 if i == 3 else 9, *codes] for i, codes in enumerate(last_codes)], dtype=torch.uint8)
    v = codes("random", (1, h, s, d), seed=43)
    second = torch.tensor([[0, 0, 2, 2, 2, 2], [0, 0, 6, 6, 6, 6], [5, 5, 5, 7, 7, 7], [0, 0, 2, 2, 2, 2]])
    out = reference.int_matmul(levels.gather(1, second).int().unsqueeze(1), v[0])[:, 0].double()
    multiplier = ((integers(0, 99, (h, d), seed=44) + 0.5) * 200 / out.abs().clamp_min(1)).float()
    zeros = torch.zeros(1, h, s, d, dtype=torch.int8)
    zero_point = integers(-20, 20, (h, d), seed=45)
    arguments = (zeros, zeros, v, kappa, levels, multiplier, zero_point, bias_q, inv_tau, 8, None, None)
    names = inspect.signature(reference.attention).parameters
    return Case("attention", "near-ties-normalised", dict(zip(names, arguments, strict=True)))


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


def _residual_norm(m: int, n: int, number: int) -> dict[str, Any]:
    x = torch.empty(m, n)
    return _residual(m, n, number) | _norm_tail("gain", "offset")(x, number)


def _quantize_tail(x: Tensor, number: int) -> dict[str, Any]:
    bits = (8, 4, 8, 5)[number]
    inv_scale = uniform(0.5, 40, x.shape[-1:], seed=26) * 2.0 ** (bits - 8)
    inv_scale[::2] = 1.0  # ties stay ties
    # Channels 1, 5, ...: one value lies within a float32 rounding of 2.5, so that a second rounding makes a tie of it.
    channels = torch.arange(1, x.shape[-1], 4)
    values = x[channels % len(x), channels].float().abs()
    inv_scale[channels] = torch.where(values > 0, 2.5 / values, inv_scale[channels])
    return {"inv_scale": inv_scale, "zero_point": zero_points(x.shape[-1:], bits, 27), "bits": bits}


WINDOWS = [
    window_case(2, 3, (14, 21, 7, 3), 32, "patterns"),
    window_case(2, 3, (14, 14, 7, 0), 32, "one", "extreme"),
    window_case(1, 2, (8, 16, 8, 4), 32, "patterns", "one_sided", normalised=True),
    window_case(3, 1, (9, 5, 0, 0), 16, "heads", "largest"),
    window_case(1, 2, (12, 24, 12, 6), 32, "patterns", log2_bits=3),
    window_case(2, 2, (5, 17, 0, 0), 40, "none"),
    window_case(1, 1, (6, 1, 0, 0), 32, "patterns"),
    window_case(1, 1, (2, 257, 0, 0), 32, "patterns", "extreme", 8),
]
CASES: dict[str, list[Case]] = {
    "quantize": _row_cases("quantize", _quantize_tail),
    "quantize_patches": _patch_cases(),
    "quantize_per_token": _row_cases("quantize_per_token", lambda x, number: {}),
    "layernorm": _row_cases("layernorm", _norm_tail("gain", "offset")),
    "add_layernorm": _row_cases("add_layernorm", _norm_tail("gain", "offset", with_residual=True)),
    "layernorm_per_token": _row_cases("layernorm_per_token", _norm_tail("weight", "bias")),
    "linear_codes": _linear_cases("linear_codes", 1, _codes_tail),
    "linear_gelu_codes": _linear_cases("linear_gelu_codes", 1 / 32, _gelu_tail),
    "linear_gelu_levels": _linear_cases("linear_gelu_levels", 1 / 32, _level_tail),
    "linear_real": _linear_cases("linear_real", 1 / 16, lambda m, n, number: {"out_dtype": DTYPES[number % 3]}),
    "linear_residual": _linear_cases("linear_residual", 1 / 16, _residual),
    # Two ops that have their own cases, but for one kernel, which tests/test_cuda_norm.py tries hard.
    "linear_residual_layernorm": _linear_cases(
        "linear_residual_layernorm", 1 / 16, _residual_norm, ("random", "extreme")
    ),
    "linear_per_token": _linear_cases("linear_per_token", 1 / 32, _per_token_tail),
    "attention": [
        attention_case(*shape, kind, number)
        for number, (shape, kind) in enumerate((s, k) for s in ATTENTION_SHAPES for k in CODE_KINDS)
    ]
    + [attention_case(*ATTENTION_SHAPES[i % 4], CODE_KINDS[i], i, normalised=True) for i in range(len(CODE_KINDS))]
    + [attention_case(1, 1, 577, 64, 4, 1.0, "one_sided", 0), attention_case(1, 2, 300, 80, 3, 0.5, "random", 1)]
    + [attention_case(1, 1, 130, 96, 5, 0.5, "extreme", 0), attention_case(1, 1, 321, 48, 4, 0.5, "random", 2, True)]
    + [near_tie_attention(), near_tie_normalised_attention()]
    + WINDOWS,
}
ALL_CASES = [case for cases in CASES.values() for case in cases]
# One of 17 tokens (49 for attention, 3 small images for patches) and random data an op, for everything but the values.
SAMPLES = {
    op: next(
        c
        for c in cases
        if c.label.startswith(("17x", "1x3x49", "3x1x19")) and ("random" in c.label or "normal" in c.label)
    )
    for op, cases in CASES.items()
}
