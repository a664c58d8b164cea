"""Weights to codes: the scale of a row, and its rounding against the second moments of the inputs.

Pure functions of tensors; they know the vocabulary and nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitq_kernels.quantizers import SCALE_FLOOR

# Fractions of a row's absolute maximum tried as clipping points (methods.md 4: 0.5 to 1.0).
CLIP_GRID = tuple(0.5 + 0.02 * i for i in range(26))
DAMP = 0.01  # share of the mean diagonal of the second moments; .001 to .1 measured alike
BLOCK = 64  # columns updated eagerly before the rest sees one GEMM


def weight_scale(weight: Tensor, row_bits: Tensor) -> Tensor:
    """Symmetric scale per row by least squared error over a grid of clipping points.

    Args:
        weight: float32 [N, K].
        row_bits: int [N], width of each row.

    Returns:
        float32 [N], > 0.
    """
    # Codes reach -2^(b-1), so the scale counts half a step more than qmax: the largest weight rounds to qmax or qmin.
    half_levels = (2.0 ** (row_bits.double() - 1) - 0.5).float()
    absmax = weight.abs().amax(1).clamp_min(SCALE_FLOOR)
    best = torch.full_like(absmax, torch.inf)
    best_scale = absmax / half_levels
    for fraction in CLIP_GRID:
        scale = absmax * fraction / half_levels
        codes = round_to_nearest(weight, scale, row_bits)
        error = (codes.float() * scale[:, None] - weight).square_().sum(1)
        best_scale = torch.where(error < best, scale, best_scale)
        best = torch.minimum(best, error)
    return best_scale


def round_to_nearest(weight: Tensor, scale: Tensor, row_bits: Tensor) -> Tensor:
    """``clamp(rint(w / scale))`` per row: float32 [N, K] to int8 [N, K]."""
    low, high = code_bounds(row_bits)
    return (weight / scale[:, None]).round_().clamp_(low[:, None], high[:, None]).to(torch.int8)


def code_bounds(row_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of each row: int [N] to two float32 [N]."""
    limit = (2.0 ** (row_bits.double() - 1)).float()
    return -limit, limit - 1


def gptq(weight: Tensor, scale: Tensor, row_bits: Tensor, moment: Tensor, damp: float = DAMP) -> Tensor:
    """Rounds weights column after column, each column's error made good by the columns still to come.

    Minimises ``tr((W - s*Q) H (W - s*Q)^T)`` greedily (GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with
    columns in order of falling diagonal).

    Args:
        weight: float32 [N, K].
        scale: float32 [N].
        row_bits: int [N].
        moment: float64 [K, K], H: second moments of the inputs, in units of the columns.
        damp: share of the mean diagonal added to the diagonal.

    Returns:
        int8 [N, K].
    """
    diagonal = moment.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    h = damped(moment, damp)[order][:, order]
    # Upper Cholesky factor U of the inverse: row k holds what an error in column k does to the later ones.
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    # Transposed: columns are taken one by one, and strided ones took 1.4 to 2.5 times as long.
    work = weight[:, order].t().contiguous()
    codes = torch.empty_like(work, dtype=torch.int8)
    low, high = code_bounds(row_bits)
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = torch.empty_like(work[start:stop])
        for k in range(start, stop):
            code = (work[k] / scale).round_().clamp_(low, high)
            codes[k] = code
            errors[k - start] = (work[k] - code * scale) / upper[k, k]
            work[k + 1 : stop] -= upper[k, k + 1 : stop, None] * errors[k - start]
        work[stop:] -= upper[start:stop, stop:].t() @ errors
    result = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    result[:, order] = codes.t()
    return result


def refine(weight: Tensor, scale: Tensor, row_bits: Tensor, codes: Tensor, moment: Tensor, sweeps: int) -> Tensor:
    """Coordinate descent on the objective of ``gptq``: column after column takes its best code, the others given.

    GPTQ never comes back to a column it has rounded. On ViT-Tiny three sweeps took the KL of uniform W3A8 from 1.005 to
    .817 and of W4A8 from .177 to .167 (192 images beside the 64 calibrated on); the objective never rises.

    Args:
        weight: float32 [N, K].
        scale: float32 [N].
        row_bits: int [N].
        codes: int8 [N, K] to start from.
        moment: float64 [K, K].
        sweeps: >= 0, passes over all columns.

    Returns:
        int8 [N, K].
    """
    low, high = code_bounds(row_bits)
    h = damped(moment, DAMP / 10).float()
    codes = codes.float()
    for _ in range(sweeps):
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            # Transposed: a column of the weight is contiguous.
            gradient = ((weight - codes * scale[:, None]) @ h[:, start:stop]).t().contiguous()
            columns, block = codes[:, start:stop].t().contiguous(), h[start:stop, start:stop]
            curvature = block.diagonal()[:, None] * scale
            for k in range(stop - start):
                best = (columns[k] + gradient[k] / curvature[k]).round_().clamp_(low, high)
                # Earlier columns are not visited again in this sweep, and the next one computes the gradient anew.
                gradient[k + 1 :] += block[k, k + 1 :, None] * ((columns[k] - best) * scale)
                columns[k] = best
            codes[:, start:stop] = columns.t()
    return codes.to(torch.int8)


def damped(moment: Tensor, share: float) -> Tensor:
    """``moment`` with a share of its mean diagonal added to the diagonal, so that it has an inverse."""
    # Inputs that never vary have H = 0: any positive diagonal then rounds to nearest, and 1e-30 has an inverse.
    diagonal = moment.diagonal()
    return moment + torch.diag_embed((share * diagonal.mean().clamp_min(1e-30)).expand_as(diagonal))


def row_errors(weight: Tensor, moment: Tensor, candidates: Sequence[int], use_gptq: bool = True) -> Tensor:
    """Relative squared output error of each row at each width: float64 [N, len(candidates)].

    Args:
        weight: float32 [N, K].
        moment: float64 [K, K], second moments of the inputs.
        candidates: widths.
        use_gptq: round by ``gptq``, else to nearest.
    """
    energy = ((weight.double() @ moment) * weight).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    columns = []
    for bits in candidates:
        row_bits = torch.full((weight.shape[0],), bits, device=weight.device)
        scale = weight_scale(weight, row_bits)
        codes = gptq(weight, scale, row_bits, moment) if use_gptq else round_to_nearest(weight, scale, row_bits)
        error = codes.double() * scale.double()[:, None] - weight
        columns.append(((error @ moment) * error).sum(1) / energy)
    return torch.stack(columns, 1)
