"""Log2-quantized softmax attention on a CPU: two int8 GEMMs a head, the rest a few heads at a time in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.ops import reference
from vitq_kernels.ops.cpu.primitives import (
    ROUND_TO_INTEGER,
    ROUND_TO_INTEGER_BITS,
    addcmul_rounds_once,
    matmul_into,
    requantise_into,
    slices,
    tile_rows,
)

LEVEL_CENTRE = 128  # a level of 0..255 less this is an int8, which the GEMM takes


@dataclass(frozen=True)
class _Tables:
    """What a head has, repeated for every image: [B * H, ...]."""

    kappa: Tensor  # float32 [B * H, 1, 1]
    place: Tensor  # int32 [B * H, 1, 1], where a head's levels begin in ``levels``
    levels: Tensor  # int8 [H * 2^b], less LEVEL_CENTRE
    count: int  # 2^b

    @classmethod
    def of(cls, kappa: Tensor, levels: Tensor, images: int) -> _Tables:
        heads, count = levels.shape
        place = torch.arange(0, heads * count, count, dtype=torch.int32)
        centred = (levels.int() - LEVEL_CENTRE).to(torch.int8).flatten()
        return cls(kappa.repeat(images)[:, None, None], place.repeat(images)[:, None, None], centred, count)

    def codes(self, drop: Tensor, heads: slice) -> Tensor:
        """``reference.attention_codes`` of ``-drop`` [G, S, S], each a place in ``levels``: int32."""
        kappa, place = self.kappa[heads], self.place[heads]
        if not addcmul_rounds_once():
            steps = (drop.float().double() * -kappa.double()).round_().clamp_(max=self.count - 1)
            return steps.int().add_(place)
        # As in requantise_into. A head's first place is even, so that ties still go to even codes.
        first = (place + ROUND_TO_INTEGER).float()
        value = drop.float()
        # One of the two factors as a row: torch is slow where both are one number a head.
        torch.addcmul(first.expand(-1, 1, drop.shape[-1]).contiguous(), value, -kappa, out=value)
        torch.minimum(value, first + (self.count - 1), out=value)
        return value.view(torch.int32).sub_(ROUND_TO_INTEGER_BITS)

    def normalised_codes(self, drop: Tensor, heads: slice, total: Tensor, inv_tau: Tensor) -> Tensor:
        """``reference.attention_offset_codes`` likewise; ``total`` int32 [G, S, 1], ``inv_tau`` float32 [G]."""
        offset = reference.attention_offset(total, self.largest(heads), inv_tau)
        codes = reference.attention_offset_codes(drop.neg(), self.kappa[heads].flatten(), offset, self.count)
        return codes.int().add_(self.place[heads])

    def largest(self, heads: slice) -> Tensor:
        """``levels[h, 0]`` as int32 [G, 1, 1]."""
        return self.levels[self.place[heads].long()].int() + LEVEL_CENTRE

    def probabilities(self, codes: Tensor) -> Tensor:
        """Levels less LEVEL_CENTRE, int8, of places in ``levels``."""
        # index_select of a vector is several times as fast as levels[codes].
        return self.levels.index_select(0, codes.view(-1)).view(codes.shape)


def _groups(images: int, heads: int, size: int) -> Iterator[slice]:
    """Heads, numbered over all images, up to ``size`` at a time: whole images, or some heads of one."""
    if size >= heads:
        yield from slices(images * heads, size // heads * heads)
    else:
        for first in range(0, images * heads, heads):
            yield from (slice(first + part.start, first + part.stop) for part in slices(heads, size))


@dataclass(frozen=True)
class _Bias:
    """Biases [P, H, S, S], and which one each sequence takes: int64 [B]; None: B = P, each its own."""

    rows: Tensor
    pattern: Tensor | None

    def add_to(self, acc: Tensor, heads: slice) -> None:
        """Adds to the scores [G, S, S] of some heads what their sequences take."""
        per_image = self.rows.shape[1]
        (image, head), last = divmod(heads.start, per_image), (heads.stop - 1) // per_image
        rows = self.rows[:, head : head + heads.stop - heads.start]
        images = slice(image, last + 1)
        part = rows[images] if self.pattern is None else rows.index_select(0, self.pattern[images])
        acc.view(part.shape).add_(part)


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
    """``reference.attention``. Windows are gathered once, and are sequences from there on."""
    tables = _Tables.of(kappa, levels, len(q) * (1 if windows is None else len(windows)))
    tail = (tables, multiplier, zero_point, inv_tau, bits)
    (b, h, tokens, d), bias = q.shape, None
    if windows is None:
        if bias_q is not None:
            bias = _Bias(bias_q.expand(b, h, tokens, tokens), None)
        q, k, v = (t.reshape(b * h, tokens, d) for t in (q, k, v))
        out = _sequences(q, k, v, bias, *tail)
        return out.view(b, h, tokens, d).transpose(1, 2).flatten(2)
    count, s = windows.shape
    if bias_q is not None and pattern is None:
        bias = _Bias(bias_q.expand(b * count, h, s, s), None)
    elif bias_q is not None and pattern is not None:
        bias = _Bias(bias_q.expand(-1, h, s, s).contiguous(), pattern.long().repeat(b))
    places = windows.flatten().long()
    # By whole tokens, which is several times as fast as by channels of a head.
    ordered = (t.transpose(1, 2).reshape(b, tokens, h * d).index_select(1, places) for t in (q, k, v))
    q, k, v = (t.view(b, count, s, h, d).transpose(2, 3).reshape(b * count * h, s, d) for t in ordered)
    out = _sequences(q, k, v, bias, *tail)
    ordered_out = out.view(b, count, h, s, d).transpose(2, 3).reshape(b, tokens, h * d)
    return ordered_out.index_select(1, places.argsort())


def _sequences(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: _Bias | None,
    tables: _Tables,
    multiplier: Tensor,
    zero_point: Tensor,
    inv_tau: Tensor | None,
    bits: int,
) -> Tensor:
    """``reference.attention`` of int8 [G, S, D], heads of a sequence one after the other, to codes [G, S, D].

    The GEMM takes int8, so it sums levels less LEVEL_CENTRE; LEVEL_CENTRE times the sum of v is added to its result. A
    column of ones beside v gives the sum of levels.
    """
    (g, s, d), h = queries.shape, len(multiplier)
    queries, keys = queries.contiguous(), keys.contiguous()
    values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    left_out = LEVEL_CENTRE * values.sum(1, keepdim=True, dtype=torch.int32)
    scales, zeros = (t.repeat(g // h, 1)[:, None] for t in (multiplier, zero_point))
    taus = None if inv_tau is None else inv_tau.repeat(g // h)
    out = torch.empty(g, s, d, dtype=torch.int8)
    for heads in _groups(g // h, h, tile_rows(s * s)):
        count = heads.stop - heads.start
        acc = torch.empty(count, s, s, dtype=torch.int32)
        matmul_into(acc, queries[heads], keys[heads].mT)
        if bias is not None:
            bias.add_to(acc, heads)
        drop = acc.sub_(acc.amax(-1, keepdim=True))  # minus the distance to the row's maximum
        probability = tables.probabilities(tables.codes(drop, heads))
        if taus is not None:
            total = probability.sum(-1, keepdim=True, dtype=torch.int32) + LEVEL_CENTRE * s
            probability = tables.probabilities(tables.normalised_codes(drop, heads, total, taus[heads]))
        product = torch.empty(count, s, d + 1, dtype=torch.int32)
        matmul_into(product, probability, values[heads])
        product.add_(left_out[heads])
        total = (product[..., d:] if taus is None else tables.largest(heads)).float()
        scale = scales[heads] * (torch.ones_like(total) / total)
        output = product[..., :d].float()
        requantise_into(out[heads], output, scale, zeros[heads], bits, output)
    return out
