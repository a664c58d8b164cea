"""The diagonal of the Fisher information in the form of relevance: what a relative error of a value costs in KL.

Plain gradients of the log-probability of a class drawn from the model's own prediction: then the mean of a squared
gradient is the Fisher information (Martens, JMLR 2020), and ``(y * dlog p / dy)^2`` times the squared relative error of
y is twice the KL it causes, to second order and without its fellows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.activations import ACTIVATIONS
from vitq_kernels.lrp_attnlrp import ATTNLRP
from vitq_kernels.lrp_composite import plain_norm

FISHER = replace(
    ATTNLRP,
    name="fisher",
    matmul=torch.matmul,
    norm=plain_norm,
    activation=lambda x, name: ACTIVATIONS[name].function(x),
    product=torch.mul,
    relevance=lambda value, gradient: (value * gradient).square(),
)


def drawn_classes(logits: Tensor) -> Tensor:
    """One class an image from the model's prediction [B, classes], int64 [B]; the same for the same logits."""
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


def log_probability_start(logits: Tensor, chosen: Tensor) -> Tensor:
    """Gradient of the chosen classes' log-probability by the logits, [B, classes]."""
    return F.one_hot(chosen, logits.shape[-1]).to(logits.dtype) - logits.detach().softmax(-1)
