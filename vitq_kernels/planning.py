"""Bit allocations for a model: relevance of its rows, what each width costs them, and the exact solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from vitq_kernels.allocation import COUPLED, allocate_bits
from vitq_kernels.calibration import calibrate, image_batches, input_covariances
from vitq_kernels.config import QuantConfig
from vitq_kernels.costs import CANDIDATES
from vitq_kernels.latency import KernelTimes
from vitq_kernels.models import model_parts, model_sites
from vitq_kernels.quantizers import affine_quantizer
from vitq_kernels.relevance import Relevance
from vitq_kernels.rounding import row_errors
from vitq_kernels.sensitivity import Sensitivity
from vitq_kernels.spec import BitAllocation, Budget, Site
from vitq_kernels.strategies import BY_ROW, Strategy, price


@torch.no_grad()
def measure_errors(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | None,
    *,
    activation_bits: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Relative squared output error of every row of the block linears at every width 2..8.

    With images the error is measured by the covariance of the linear's inputs, and weights are rounded as conversion
    rounds them: by GPTQ, columns in the scales of input codes of ``activation_bits`` (with unscaled columns, mixed
    widths of 3 bits in the mean had a KL of .549 instead of .517). Without, inputs count as white and weights round to
    nearest.

    Returns:
        Site name to float64 [N, 7].
    """
    linears = model_parts(model).linears
    if images is not None:
        batches = image_batches(images, 16, next(iter(linears.values())).weight.device)
        covariances, stats, config = input_covariances(model, batches), calibrate(model, batches), QuantConfig()
    kinds = {site.name: site.kind for site in model_sites(model)}
    errors = {}
    for done, (name, module) in enumerate(linears.items(), start=1):
        weight = module.weight.detach().float()
        if images is None:
            moment = torch.eye(module.in_features, dtype=torch.float64, device=weight.device)
        else:
            low, high = stats.inputs[name].choose(activation_bits, config)
            scale = affine_quantizer(low, high, activation_bits, config.exponent(kinds[name], activation_bits)).scale
            weight, moment = weight * scale, covariances[name] / torch.outer(scale, scale).double()
        errors[name] = row_errors(weight, moment, CANDIDATES, use_gptq=images is not None).cpu().numpy()
        if progress:
            progress(done, len(linears))
    return errors


def allocate(
    model: nn.Module,
    scores: Relevance | None,
    budget: Budget,
    *,
    activation_bits: int = 8,
    tied: bool = False,
    activation_candidates: Sequence[int] | None = None,
    images: Tensor | Iterable[Tensor] | None = None,
    errors: Mapping[str, np.ndarray] | None = None,
    strategy: Strategy = "relevance",
    sensitivity: Sensitivity | Sequence[Sensitivity] = (),
    candidates: Sequence[int] | None = None,
    group_rows: int | None = None,
    exponent: float = 1.0,
    times: KernelTimes | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BitAllocation:
    """Widths of every site that cost least under a budget.

    Strategies that give groups of rows their widths:

    - "relevance": relevance of a row times its relative error (methods.md 2).
    - "fisher": the same with scores of method "fisher".
    - "random": "relevance" with the rows' relevance permuted over the model, the control.

    Strategies that give a layer one width:

    - "lrp-qvit": mean relevance times 4^-bits, as published (methods.md 2).
    - "sensitivity": the measured sensitivity alone.
    - "combined": flow of relevance over its mean in sites of the same kind, times the sensitivity.
    - "mix-qvit": mean relevance times sensitivity, and measured pair terms inside the blocks: a quadratic program.
    - "greedy": sensitivity, narrowed step by step (MPTQ-ViT) instead of solved.

    Activations inside the blocks have ``activation_bits``, unless they are ``tied``, or ``activation_candidates`` or a
    budget of ``mean_activation_bits`` let every site choose. What an activation width costs is measured where
    the strategy has a sensitivity; else it is the site's relevance times 4^-bits.

    Args:
        model: the float VisionTransformer.
        scores: its relevance: attnlrp, but fisher for "fisher", and chefer for "lrp-qvit" and "mix-qvit" as published.
            None where the strategy takes none: "sensitivity" and "greedy".
        budget: limits that hold together.
        activation_bits: width of all activations inside the blocks, where they are not chosen.
        tied: a site's weights and activations have one width; one width a layer.
        activation_candidates: widths to choose activations from; None: those that ``candidates`` are by default.
        images: to measure what each width costs a row; without them the cost is estimated from the weights alone.
        errors: of an earlier ``measure_errors``, instead of images.
        strategy: one of the above.
        sensitivity: measured sensitivities, one of each part that is needed: "weight"; with chosen activations also
            "activation"; where tied, "both".
        candidates: widths to choose weights from, ascending; None: those of the sensitivity, or 2..8.
        group_rows: rows a group: 16, 32 or 64, sorted four groups at a time; None: 16, which have a
            width of their own in the CUDA kernels' layout too, so that it adds no bytes.
        exponent: of the relevance, >= 0; 0 leaves the error or the sensitivity alone.
        times: kernel times, for a budget of latency.
        seed: of the permutation.
        progress: called with (linears measured, linears in all).

    Raises:
        ValueError: scores of another model, a budget that nothing meets, a sensitivity that is missing.
    """
    given = [sensitivity] if isinstance(sensitivity, Sensitivity) else list(sensitivity)
    sites = model_sites(model)
    chosen = choose_activations(budget, tied, activation_candidates)
    _check_strategy(strategy, budget, tied, chosen)
    if strategy in BY_ROW:  # the others measure nothing here, so allocate_bits says it as soon
        check_plan(
            sites,
            budget,
            activation_bits=activation_bits,
            activation_candidates=activation_candidates,
            strategy=strategy,
            candidates=candidates,
            group_rows=group_rows,
            times=times,
        )
    priced = price(
        sites,
        strategy,
        scores,
        given,
        lambda: errors or measure_errors(model, images, activation_bits=activation_bits, progress=progress),
        candidates=candidates,
        activation_candidates=activation_candidates,
        tied=tied,
        chosen_activations=chosen,
        exponent=exponent,
        seed=seed,
    )
    found = allocate_bits(
        sites,
        priced.cost,
        budget,
        activation_bits=activation_bits,
        activation_cost=priced.activation_cost,
        activation_candidates=priced.activation_candidates,
        tied=tied,
        candidates=priced.candidates,
        granularity="rows" if strategy in BY_ROW else "layer",
        group_rows=group_rows,
        interactions=priced.interactions,
        times=times,
        search="greedy" if strategy == "greedy" else "exact",
    )
    return replace(found, solver={"strategy": strategy, **found.solver})


def choose_activations(budget: Budget, tied: bool, activation_candidates: Sequence[int] | None) -> bool:
    """Whether activation widths are chosen, site by site."""
    return tied or activation_candidates is not None or budget.mean_activation_bits is not None


def check_plan(
    sites: Sequence[Site],
    budget: Budget,
    *,
    activation_bits: int = 8,
    tied: bool = False,
    activation_candidates: Sequence[int] | None = None,
    strategy: Strategy = "relevance",
    candidates: Sequence[int] | None = None,
    group_rows: int | None = None,
    times: KernelTimes | None = None,
) -> None:
    """Raises ValueError where ``allocate`` would for these arguments, before anything is measured.

    So for a budget that cannot be met, with the smallest that can.
    """
    chosen = choose_activations(budget, tied, activation_candidates)
    _check_strategy(strategy, budget, tied, chosen)
    widths = CANDIDATES if candidates is None else candidates
    of_activations = widths if activation_candidates is None else activation_candidates
    blocks = [site for site in sites if site.in_block]
    allocate_bits(
        sites,
        {site.name: np.zeros(len(widths)) for site in blocks if site.has_weight},
        budget,
        activation_bits=activation_bits,
        activation_cost={site.name: np.zeros(len(of_activations)) for site in blocks} if chosen else None,
        activation_candidates=of_activations if chosen else None,
        tied=tied,
        candidates=widths,
        granularity="layer",
        group_rows=group_rows,
        times=times,
    )


def _check_strategy(strategy: Strategy, budget: Budget, tied: bool, chosen: bool) -> None:
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")
    coupled = [name for name in COUPLED if name in budget.given]
    if strategy in BY_ROW and chosen and (tied or coupled):
        why = "tied widths" if tied else f"activation widths chosen under {' and '.join(coupled)}"
        layers = ", ".join(name for name in get_args(Strategy) if name not in BY_ROW)
        raise ValueError(f"{why} need one width a layer: strategy must be one of {layers}, got {strategy!r}")
