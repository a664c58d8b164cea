"""How far candidates for one operand move a matrix product: what AdaLog, PTQ4ViT and NoisyQuant minimise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # of candidates held at once, 4 MiB: they stay in a core's cache


class ProductError:
    """``sum_n importance * (a^ b^T - a b^T)^2`` of candidates a^ for a, while b is quantized as it stands now.

    It is ``(a^ - a) b_q^T + a (b_q - b)^T`` squared; the second term does not depend on the candidate. Where b has more
    rows than columns and nothing has an importance, the triangle of ``b_q = Q R`` stands for b_q: that changes the sum
    by a constant.
    """

    def __init__(self, own: Tensor, other: Tensor, other_quantized: Tensor, importance: Tensor | None = None) -> None:
        """Takes a [..., T, K], b and its quantized form [..., N, K], and importances that broadcast to [..., T, N]."""
        self.own, self.importance = own, importance
        self.factor = other_quantized.mT
        self.residual = own @ (other_quantized - other).mT
        if importance is None and other.shape[-2] > other.shape[-1]:
            basis, triangle = torch.linalg.qr(other_quantized)
            self.factor, self.residual = triangle.mT, self.residual @ basis

    @property
    def elements(self) -> int:
        """Numbers that one candidate makes."""
        return max(self.own.numel(), self.residual.numel())

    def rows(self, chosen: Tensor) -> ProductError:
        """The same for some rows of a [T, K], a mask [T]; without importances."""
        part = copy.copy(self)
        part.own, part.residual = self.own[chosen], self.residual[chosen]
        return part

    def __call__(self, candidates: Tensor) -> Tensor:
        """Candidates [P, ..., T, K] to their errors [P, ..., T], each less the same constant."""
        error = ((candidates - self.own) @ self.factor).add_(self.residual).square_()
        if self.importance is not None:
            error.mul_(self.importance)
        return error.sum(-1)


def in_chunks(errors: Callable[..., Tensor], elements: int, *parameters: Tensor) -> Tensor:
    """``errors(*parameters)`` for a few of the parameters' leading index at a time, concatenated.

    Args:
        errors: from parameters [p, ...] to [p, ...].
        elements: how many elements one candidate makes.
        parameters: tensors [P, ...].
    """
    size = max(1, CHUNK_ELEMENTS // elements)
    pieces = zip(*(parameter.split(size) for parameter in parameters), strict=True)
    return torch.cat([errors(*piece) for piece in pieces])
