"""Bit allocations for a model: relevance of its rows, what each width costs them, and the exact solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vitq_kernels.allocation import allocate_bits
from vitq_kernels.calibration import block_linears, input_covariances
from vitq_kernels.costs import layer_costs, relevance_costs
from vitq_kernels.models import vit_parts, vit_sites
from vitq_kernels.quantizers import row_errors
from vitq_kernels.relevance import Relevance
from vitq_kernels.spec import MAX_BITS, MIN_BITS, BitAllocation, Budget

CANDIDATES = tuple(range(MIN_BITS, MAX_BITS + 1))
Strategy = Literal["relevance", "lrp-qvit", "random"]


@torch.no_grad()
def measure_errors(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Relative squared output error of every row of the block linears at every width 2..8.

    With images the error is measured by the covariance of the linear's inputs and weights are rounded as conversion
    rounds them (GPTQ); without, inputs count as white and weights round to nearest.

    Returns:
        Site name to float64 [N, 7].
    """
    covariances = None if images is None else input_covariances(model, images)
    linears = [(f"{b.name}.{suffix}", module) for b in vit_parts(model).blocks for suffix, module in block_linears(b)]
    errors = {}
    for done, (name, module) in enumerate(linears, start=1):
        weight = module.weight.detach().float()
        white = torch.eye(module.in_features, dtype=torch.float64, device=weight.device)
        moment = white if covariances is None else covariances[name]
        errors[name] = row_errors(weight, moment, CANDIDATES, use_gptq=covariances is not None).cpu().numpy()
        if progress:
            progress(done, len(linears))
    return errors


def allocate(
    model: nn.Module,
    scores: Relevance,
    budget: Budget,
    *,
    activation_bits: int = 8,
    images: Tensor | Iterable[Tensor] | None = None,
    strategy: Strategy = "relevance",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BitAllocation:
    """Widths of every site that cost least under a budget.

    Args:
        model: the float VisionTransformer.
        scores: its relevance; attnlrp for "relevance", chefer for "lrp-qvit" as published.
        budget: limits that hold together.
        activation_bits: width of all activations inside the blocks.
        images: to measure what each width costs a row; without them the cost is estimated from the weights alone.
        strategy: "relevance": groups of rows, relevance of a row times its relative error (methods.md 2).
            "lrp-qvit": one width a layer, mean relevance times 4^-bits (methods.md 2). "random": "relevance" with the
            rows' relevance permuted over the model, the control.
        seed: of the permutation.
        progress: called with (linears measured, linears in all).

    Raises:
        ValueError: scores of another model, a budget that nothing meets.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")
    sites = vit_sites(model)
    if strategy == "lrp-qvit":
        costs = layer_costs(sites, scores.mean_score, None, candidates=CANDIDATES)
        return allocate_bits(sites, costs, budget, activation_bits=activation_bits, granularity="layer")
    flow = {name: np.asarray(rows) for name, rows in scores.row_flow.items()}
    if strategy == "random":
        relevance_costs(sites, flow)  # which checks the scores
        free = [s.name for s in sites if s.in_block and s.has_weight]
        shuffled = np.random.default_rng(seed).permutation(np.concatenate([flow[name] for name in free]))
        cuts = np.cumsum([len(flow[name]) for name in free])[:-1]
        flow |= dict(zip(free, np.split(shuffled, cuts), strict=True))
    errors = measure_errors(model, images, progress=progress)
    costs = relevance_costs(sites, flow, errors, candidates=CANDIDATES)
    return allocate_bits(sites, costs, budget, activation_bits=activation_bits, granularity="rows")
