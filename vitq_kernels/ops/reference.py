"""THE integer semantics: slow, exact, obviously right. Every other backend must produce these numbers.

``f32(i)`` below is an int32 rounded to float32. Products inside a rounding are exact and rounded once, half to even.
Each function has the name of its op. Outputs are *exact* (bit-identical on every backend) unless the docstring says
*bounded*. Shapes: M tokens, N output rows, K input columns; B, H, S, D batch, heads, sequence, head dim.

Changing a number here is changing the semantics: raise SEMANTICS_VERSION, and the golden hashes with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.packing import PackedWeight, unpack_weight
from vitq_kernels.spec import MAX_BITS, QuantFormat

SEMANTICS_VERSION = 1

# 1.5 * 2^52: adding it to a double with |x| < 2^51 rounds x to an integer, half to even, in one rounding. The GPU does
# the same in float32 with 12582912 = 1.5 * 2^23 inside one fused multiply-add.
_ROUND_TO_INTEGER = 6755399441055744.0
# Smallest absolute maximum of a token: keeps 127/absmax finite; an all-zero token gets codes 0.
TOKEN_ABSMAX_FLOOR = 1e-30
TWO_OVER_LN2 = 2.8853900817779268
LOG2_TERMS = 12  # of atanh's series

Accumulate = Callable[[Tensor, list[Tensor], "Tensor | None"], Tensor]
WEIGHT_LAYOUT = "int8_rows"  # what prepare_weight makes: int8 [N, K] in the model's row order


def prepare_weight(weight: PackedWeight, input_bits: int = MAX_BITS) -> list[Tensor]:
    """The canonical packed weight in this backend's layout: [int8 [N, K]]."""
    return [unpack_weight(weight)]


def requantise(value: Tensor, multiplier: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """S1: ``clamp(rint(value * multiplier + zero_point), -2^(bits-1), 2^(bits-1) - 1)`` as int8.

    Args:
        value: float32, or int32 which is rounded to float32 first.
        multiplier: float32, broadcasts against value.
        zero_point: int32, broadcasts against value, magnitude at most 2^22.
        bits: 2..8.
    """
    fmt = QuantFormat(bits)
    # float32 * float32 is exact in float64 (48 bits), so the addition is the only rounding.
    shifted = value.float().double() * multiplier.double() + (zero_point.double() + _ROUND_TO_INTEGER)
    return (shifted - _ROUND_TO_INTEGER).clamp_(fmt.qmin, fmt.qmax).to(torch.int8)


def quantize(x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Real activations [..., K] to codes: S1 with ``1/scale`` as the multiplier, per channel [K]."""
    return requantise(x.float(), inv_scale, zero_point, bits)


def quantize_patches(
    image: Tensor, inv_scale: Tensor, zero_point: Tensor, patch_height: int, patch_width: int, bits: int
) -> Tensor:
    """``quantize`` of the patches of images [B, C, H, W]: int8 [B, H // ph, W // pw, C * ph * pw]."""
    return quantize(flatten_patches(image, (patch_height, patch_width)), inv_scale, zero_point, bits)


def flatten_patches(image: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] to patches [B, h, w, C * ph * pw], each in the order of a convolution's weight.

    Rows and columns short of a patch are dropped.
    """
    (ph, pw), (b, c, height, width) = patch_size, image.shape
    h, w = height // ph, width // pw
    tiles = image[:, :, : h * ph, : w * pw].reshape(b, c, h, ph, w, pw)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, h, w, c * ph * pw)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """S5: symmetric 8-bit codes of [..., K] and one scale a token, float32 [...].

    ``a = max(absmax, 1e-30)``, ``scale = f32(a/127)``, ``code = clamp(rint(x * f32(127/a)), -127, 127)``.
    """
    x = x.float()
    absmax = x.abs().amax(-1).clamp_min(TOKEN_ABSMAX_FLOOR)
    limit = torch.full_like(absmax, 127.0)
    codes = requantise(x, (limit / absmax).unsqueeze(-1), torch.zeros((), dtype=torch.int32, device=x.device), 8)
    return codes.clamp_(-127, 127), absmax / limit


def layernorm(x: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int) -> Tensor:
    """S3: ``clamp(rint((x - mean) * rstd * gain[c] + offset[c]))`` over the last dim. Bounded: codes within 1.

    ``gain = gamma / scale`` and ``offset = beta / scale + zero_point`` are float32 [K].
    """
    fmt = QuantFormat(bits)
    y = _normalise(x, eps) * gain.double() + offset.double()
    return y.round_().clamp_(fmt.qmin, fmt.qmax).to(torch.int8)


def layernorm_per_token(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """S3 with S5: LayerNorm, then ``quantize_per_token`` of its float32 result. Bounded: codes within 1."""
    return quantize_per_token((_normalise(x, eps) * weight.double() + bias.double()).float())


def add_layernorm(
    x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    """``y = x + residual`` in float32, rounded to x's dtype, and ``layernorm(y)``: (y, codes)."""
    y = (x.float() + residual.float()).to(x.dtype)
    return y, layernorm(y, gain, offset, eps, bits)


def _normalise(x: Tensor, eps: float) -> Tensor:
    """(x - mean) * rstd in float64, the number that float32 kernels approximate; deterministic over batch shapes."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Integer ``a @ b`` as int32, exact."""
    if a.device.type == "cpu":
        return a.int() @ b.int()
    # No int32 GEMM in torch on other devices. float64 is exact: every partial sum is an integer below 2^53.
    return (a.double() @ b.double()).int()


def accumulate(a: Tensor, weight: list[Tensor], bias_q: Tensor | None) -> Tensor:
    """The accumulator of S2, which every linear op below rescales in its own way.

    ``acc[t, n] = sum_k a[t, k] * w[n, k] + bias_q[n]``, int8 [..., K] and int8 [N, K] to int32 [..., N]."""
    acc = int_matmul(a, weight[0].t())
    return acc if bias_q is None else acc + bias_q


def linear_codes(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    zero_point: Tensor,
    bits: int,
    accumulate: Accumulate = accumulate,
) -> Tensor:
    """S2 codes: ``requantise(acc, multiplier[n], zero_point[n], bits)``, int8 [..., N]."""
    return requantise(accumulate(a, weight, bias_q), multiplier, zero_point, bits)


def linear_gelu_codes(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    approximate: str,
    accumulate: Accumulate = accumulate,
) -> Tensor:
    """S2 gelu codes: ``requantise(gelu(f32(acc) * multiplier[n]), inv_scale[n], zero_point[n])``. Bounded: within 1."""
    y = real(accumulate(a, weight, bias_q), multiplier)
    return requantise(gelu(y, approximate), inv_scale, zero_point, bits)


def linear_gelu_levels(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    inv_scale: Tensor,
    thresholds: Tensor,
    levels: Tensor,
    approximate: str,
    accumulate: Accumulate = accumulate,
) -> Tensor:
    """S2 gelu levels: ``levels[#{j : t >= thresholds[j]}]``, ``t = f32(gelu(y) * inv_scale[n])``. Bounded.

    ``thresholds`` is float32 [2^b - 1], ascending; ``levels`` int8 [2^b]. The next GEMM multiplies levels.
    """
    t = gelu(real(accumulate(a, weight, bias_q), multiplier), approximate) * inv_scale
    return levels[torch.searchsorted(thresholds.contiguous(), t, right=True)]


def linear_real(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    out_dtype: torch.dtype,
    accumulate: Accumulate = accumulate,
) -> Tensor:
    """S2 real: ``f32(acc) * multiplier[n]`` in ``out_dtype``. Bounded."""
    return real(accumulate(a, weight, bias_q), multiplier).to(out_dtype)


def linear_residual(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    residual: Tensor,
    accumulate: Accumulate = accumulate,
) -> Tensor:
    """S2 residual: ``residual + f32(acc) * multiplier[n]`` in float32, then the residual's dtype. Bounded.

    The residual broadcasts against [..., N]: a position embedding [S, N] serves every image.
    """
    return (residual.float() + real(accumulate(a, weight, bias_q), multiplier)).to(residual.dtype)


def linear_residual_layernorm(
    a: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias_q: Tensor,
    residual: Tensor,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    bits: int,
    accumulate: Accumulate = accumulate,
) -> tuple[Tensor, Tensor]:
    """``y = linear_residual(...)``, as it is rounded to its dtype, and ``layernorm(y)``: (y, codes). Bounded.

    A backend's codes are measured by the LayerNorm of its own y.
    """
    y = linear_residual(a, weight, multiplier, bias_q, residual, accumulate)
    return y, layernorm(y, gain, offset, eps, bits)


def linear_per_token(
    a: Tensor,
    token_scale: Tensor,
    weight: list[Tensor],
    multiplier: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Accumulate = accumulate,
) -> Tensor:
    """S5: ``f32(acc) * (token_scale[t] * multiplier[n]) + bias[n]`` in float32, then ``out_dtype``. Bounded."""
    y = accumulate(a, weight, None).float() * (token_scale.unsqueeze(-1) * multiplier)
    return (y if bias is None else y + bias).to(out_dtype)


def real(acc: Tensor, multiplier: Tensor) -> Tensor:
    """An accumulator in real units: ``f32(acc) * multiplier[n]``, float32."""
    return acc.float() * multiplier


def gelu(y: Tensor, approximate: str) -> Tensor:
    """GELU of float32 through float64 (within 2^-52 |y|, then rounded): the number that float32 kernels approximate."""
    return F.gelu(y.double(), approximate=approximate).float()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    levels: Tensor,
    multiplier: Tensor,
    zero_point: Tensor,
    bias_q: Tensor | None,
    inv_tau: Tensor | None,
    bits: int,
    windows: Tensor | None = None,
    pattern: Tensor | None = None,
) -> Tensor:
    """S4, log2-quantized softmax attention in integers, over all tokens or inside each window.

    ::

        acc[i,j] = sum_d q[i,d] * k[j,d] + bias_q[i,j]              int32
        c[i,j]   = min(rint(f32(max_j acc[i,j] - acc[i,j]) * kappa[h]), levels a head - 1)
        Z[i]     = sum_j levels[h, c[i,j]];   o[i,e] = sum_j levels[h, c[i,j]] * v[j,e]
        out[i,e] = requantise(o[i,e], f32(multiplier[h,e] * f32(1 / f32(Z[i]))), zero_point[h,e], bits)

    With ``inv_tau`` the codes are those of the normalised probability (``attention_offset``,
    ``attention_offset_codes``), o is taken over them, and ``levels[h, 0]`` stands for Z[i] in the last line.

    With ``windows`` each window is a sequence by itself: its S places hold the tokens that it names, and the output of
    a place goes to the place's token. Partition, cyclic shift and their reverse (Swin, arXiv:2103.14030) are one table.

    Args:
        q, k, v: int8 [B, H, L, D]; S = L without windows.
        kappa: float32 [H], code steps per unit of acc, > 0.
        levels: uint8 [H, 2^b], level of each code relative to the row maximum; levels[:, 0] > 0.
        multiplier: float32 [H, D], v scale over output scale.
        zero_point: int32 [H, D], of the output codes.
        bias_q: int32, broadcasts to [B, H, S, S], in units of acc, magnitude at most 2^29 (so that no distance
            overflows); or None. With windows: to [P, H, S, S], P patterns.
        inv_tau: float32 [H], code steps per factor of two, > 0; or None.
        bits: width of the output codes.
        windows: int32 [W, S], the token at each place of each window, a permutation of 0..L-1; or None.
        pattern: int32 [W], in 0..P-1: the bias that a window takes; None: all take the only one.

    Returns:
        int8 [B, L, H * D].
    """
    if windows is not None:
        q, k, v = (gather_windows(t, windows) for t in (q, k, v))
        if bias_q is not None and pattern is not None:
            bias_q = bias_q[pattern.long()].repeat(len(q) // len(pattern), 1, 1, 1)
        out = attention(q, k, v, kappa, levels, multiplier, zero_point, bias_q, inv_tau, bits)
        return scatter_windows(out, windows)
    acc = int_matmul(q, k.transpose(-2, -1))
    if bias_q is not None:
        acc = acc + bias_q
    distance = acc.amax(-1, keepdim=True) - acc
    codes = attention_codes(distance, kappa, levels.shape[1])
    heads = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    probability = levels.int()[heads, codes]
    total = probability.sum(-1, keepdim=True, dtype=torch.int32)
    if inv_tau is not None:
        largest = levels[:, :1, None].int()
        codes = attention_offset_codes(distance, kappa, attention_offset(total, largest, inv_tau), levels.shape[1])
        probability, total = levels.int()[heads, codes], largest
    out = int_matmul(probability, v)
    return attention_output(out, total, multiplier, zero_point, bits)


def gather_windows(x: Tensor, windows: Tensor) -> Tensor:
    """Tokens [B, H, L, D] in the order of int32 windows [W, S]: [B * W, H, S, D]."""
    return x[:, :, windows.long()].transpose(1, 2).flatten(0, 1)


def scatter_windows(out: Tensor, windows: Tensor) -> Tensor:
    """Places [B * W, S, C] of int32 windows [W, S] back at their tokens: [B, L, C]."""
    places = out.reshape(len(out) // len(windows), windows.numel(), out.shape[-1])
    return torch.empty_like(places).index_copy_(1, windows.flatten().long(), places)


def attention_codes(distance: Tensor, kappa: Tensor, levels: int) -> Tensor:
    """``min(rint(f32(distance) * kappa[h]), levels - 1)``: [B, H, S, S] non-negative to int64 codes."""
    steps = distance.float().double() * kappa.double().view(1, -1, 1, 1)
    return steps.round_().clamp_(max=levels - 1).long()


def attention_offset(total: Tensor, largest: Tensor, inv_tau: Tensor) -> Tensor:
    """Code steps from a row's maximum to probability 1: ``f32(log2(total / largest) * inv_tau[h])``, float32.

    The product is rounded to float64 first. ``total`` [B, H, S, 1] and ``largest`` [H, 1, 1] are positive integers.
    """
    return (log2_ratio(total, largest) * inv_tau.double()[:, None, None]).float()


def attention_offset_codes(distance: Tensor, kappa: Tensor, offset: Tensor, levels: int) -> Tensor:
    """``min(rint(f32(f32(f32(distance) * kappa[h]) + offset)), levels - 1)``: [B, H, S, S] to int64 codes."""
    steps = distance.float() * kappa.view(-1, 1, 1) + offset
    return steps.round_().clamp_(max=levels - 1).long()


def log2_ratio(a: Tensor, b: Tensor) -> Tensor:
    """``log2(a / b)`` of positive integers below 2^52 as float64, by one sequence of roundings on every machine.

    ``a = m_a * 2^e_a``, m in [1, 2), and the same of b. With ``f = (m_a - m_b) / (m_a + m_b)``, whose terms are exact,
    the logarithm is ``e_a - e_b + 2 / ln 2 * atanh(f)``, atanh by LOG2_TERMS terms in Horner's order. |f| < 1/3, so the
    series leaves out less than 2^-42; float32 keeps 2^-24 of the result.
    """
    (m_a, e_a), (m_b, e_b) = _split(a), _split(b)
    f = (m_a - m_b) / (m_a + m_b)
    square = f * f
    series = torch.full_like(square, TWO_OVER_LN2 / (2 * LOG2_TERMS - 1))
    for n in range(LOG2_TERMS - 2, -1, -1):
        series = series * square + TWO_OVER_LN2 / (2 * n + 1)
    return (e_a - e_b).double() + f * series


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """A positive integer as ``m * 2^e``, m in [1, 2) float64, e int64: the bits of its float64."""
    word = x.double().view(torch.int64)
    return ((word & ((1 << 52) - 1)) | (1023 << 52)).view(torch.float64), (word >> 52) - 1023


def attention_output(out: Tensor, total: Tensor, multiplier: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The last line of S4: int32 [B, H, S, D] and row totals [B, H, S, 1] to codes [B, S, H * D]."""
    total = total.float()
    scale = multiplier.unsqueeze(-2) * (torch.ones_like(total) / total)
    return requantise(out, scale, zero_point.unsqueeze(-2), bits).transpose(1, 2).flatten(2)
