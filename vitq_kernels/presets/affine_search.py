"""Asymmetric codes by FPCS: of weight rows, tensors, channels and heads, by squared output error (AdaLog)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitq_kernels.presets.output_error import ProductError, in_chunks
from vitq_kernels.presets.progressive_search import Grid, progressive_search, uniform_grid
from vitq_kernels.presets.quantizers import Uniform

CANDIDATES, KEPT = 128, 16


def fake_affine(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """x [..., T] through codes 0..2^bits - 1 with a scale and zero point [...] a row, in one new tensor."""
    scale, zero_point = scale[..., None], zero_point[..., None]
    codes = (x / scale).round_().add_(zero_point).clamp_(0, (1 << bits) - 1)
    return codes.sub_(zero_point).mul_(scale)


def _search(grid: Grid, errors: Callable[[Tensor, Tensor], Tensor], elements: int, steps: int) -> tuple[Tensor, Tensor]:
    """FPCS with the released code's numbers; one candidate of all groups makes ``elements`` numbers."""

    def chunked(scale: Tensor, companion: Tensor) -> Tensor:
        return in_chunks(errors, elements, scale, companion)

    return progressive_search(grid, chunked, kept=KEPT, refined=CANDIDATES // KEPT, steps=steps)


def search_rows(weight: Tensor, row_bits: Tensor, product: ProductError | None, steps: int) -> Tensor:
    """Weights [N, K] through the asymmetric codes of each row that FPCS finds, dequantized.

    Without a product, by the squared error of the weight itself.
    """
    result = torch.empty_like(weight)
    for bits in row_bits.unique().tolist():
        chosen = row_bits == bits
        rows = weight[chosen]

        error_of = product and product.rows(chosen)

        def errors(
            scale: Tensor,
            zero: Tensor,
            rows: Tensor = rows,
            bits: int = bits,
            error_of: ProductError | None = error_of,
        ) -> Tensor:
            candidates = fake_affine(rows, scale, zero, bits)
            return error_of(candidates) if error_of else (candidates - rows).square().sum(-1)

        # From 7 bits on, for which there is no released setting, as many zero points as at 6.
        grid = uniform_grid(rows, bits, min(32, 1 << (bits - 1)), CANDIDATES)
        result[chosen] = fake_affine(rows, *_search(grid, errors, rows.numel(), steps), bits)
    return result


def search_tensor(
    x: Tensor, weights: Tensor, bits: int, product: ProductError | None, grid: Grid, steps: int
) -> Uniform:
    """The asymmetric codes of a whole tensor, of which x [T, K] are some tokens that count ``weights`` [T] times."""

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        candidates = fake_affine(x, scale, zero, bits)  # scale [p, 1] is that of every token
        rows = product(candidates) if product else (candidates - x).square().sum(-1)
        return (rows @ weights)[:, None]

    scale, zero = _search(grid, errors, x.numel(), steps)
    return Uniform(scale[0], zero[0], 0, (1 << bits) - 1)


def tensor_grid(x: Tensor, bits: int) -> Grid:
    """Where ``search_tensor`` starts, from all tokens [T, K]."""
    return uniform_grid(x.flatten()[None], bits, min(16, 1 << bits), CANDIDATES)


def search_channels(x: Tensor, weights: Tensor, bits: int, steps: int) -> Uniform:
    """Asymmetric codes of every channel of x [T, K], by the squared error of x itself, weighted [T]."""
    rows = x.mT.contiguous()

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        return (fake_affine(rows, scale, zero, bits) - rows).square_() @ weights

    grid = uniform_grid(rows, bits, min(16, 1 << bits), CANDIDATES)
    return Uniform(*_search(grid, errors, x.numel(), steps), 0, (1 << bits) - 1)


def search_heads(x: Tensor, bits: int, product: ProductError | None, steps: int) -> Uniform:
    """The asymmetric codes of every head of x [B, H, T, K]; without a product, the first guess of the released code."""
    grid = uniform_grid(x.transpose(0, 1).flatten(1), bits, min(16, 1 << (bits - 1)), CANDIDATES)
    if product is None:
        return Uniform(grid.scale[-2, :, None, None], grid.companion[-2, :, None, None], 0, (1 << bits) - 1)

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        candidates = fake_affine(x, scale[:, None, :, None], zero[:, None, :, None], bits)
        return product(candidates).sum((1, 3))

    scale, zero = _search(grid, errors, x.numel(), steps)
    return Uniform(scale[:, None, None], zero[:, None, None], 0, (1 << bits) - 1)
