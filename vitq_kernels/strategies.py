"""Ways to say what a width costs: each strategy makes costs of relevance, measured errors and measured sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vitq_kernels.costs import CANDIDATES, check_candidates, layer_costs, relevance_costs, site_costs, within_kind
from vitq_kernels.relevance import Relevance
from vitq_kernels.sensitivity import Part, Sensitivity
from vitq_kernels.spec import Site

Strategy = Literal["relevance", "fisher", "lrp-qvit", "mix-qvit", "sensitivity", "combined", "greedy", "random"]
BY_ROW = ("relevance", "fisher", "random")  # groups of rows; the others give a layer one width
BY_SENSITIVITY = ("mix-qvit", "sensitivity", "combined", "greedy")
WITHOUT_SCORES = ("sensitivity", "greedy")
Errors = Callable[[], Mapping[str, np.ndarray]]  # measures the rows at the widths of CANDIDATES, if it is called


@dataclass(frozen=True)
class Priced:
    """The widths to choose from and what they cost, as ``allocation.allocate_bits`` takes them."""

    candidates: tuple[int, ...]
    cost: Mapping[str, np.ndarray]
    activation_candidates: tuple[int, ...] | None = None  # None: activation widths are fixed
    activation_cost: Mapping[str, np.ndarray] | None = None
    interactions: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)


def rules_of(strategy: Strategy) -> str:
    """The method of relevance whose scores a strategy takes: a name that ``vitq.relevance`` knows."""
    return {"fisher": "fisher", "lrp-qvit": "chefer", "mix-qvit": "chefer"}.get(strategy, "attnlrp")


def parts_of(tied: bool, chosen_activations: bool) -> tuple[Part, ...]:
    """The sensitivities that a strategy of BY_SENSITIVITY takes."""
    return ("both",) if tied else ("weight", "activation") if chosen_activations else ("weight",)


def price(
    sites: Sequence[Site],
    strategy: Strategy,
    scores: Relevance | None,
    sensitivity: Sequence[Sensitivity],
    errors: Errors,
    *,
    candidates: Sequence[int] | None,
    activation_candidates: Sequence[int] | None,
    tied: bool,
    chosen_activations: bool,
    exponent: float,
    seed: int,
) -> Priced:
    """What every width costs by one strategy; arguments and errors as ``planning.allocate``."""
    if scores is None and strategy not in WITHOUT_SCORES:
        raise ValueError(f"strategy {strategy!r} needs scores, of vitq.relevance or `vitq score`; got none")
    if strategy == "fisher" and scores is not None and scores.method != "fisher":
        raise ValueError(f'strategy "fisher" takes scores of method "fisher", got those of {scores.method!r}')
    if strategy in BY_SENSITIVITY:
        return _by_sensitivity(
            sites,
            strategy,
            scores,
            [_measured(sites, sensitivity, strategy, part) for part in parts_of(tied, chosen_activations)],
            candidates,
            activation_candidates,
            exponent,
        )
    assert scores is not None  # checked above
    widths = check_candidates("candidates", CANDIDATES if candidates is None else candidates)
    of_activations = check_candidates("activation_candidates", activation_candidates or widths)
    omega = scores.mean_score if strategy == "lrp-qvit" else scores.flow
    if strategy == "lrp-qvit":
        cost = layer_costs(sites, omega, exponent=exponent, candidates=widths)
    else:
        flow = {name: np.asarray(rows) for name, rows in scores.row_flow.items()}
        relevance_costs(sites, flow)  # which checks the scores, before anything is measured
        if strategy == "random":
            rng = np.random.default_rng(seed)
            flow = _permuted(rng, {s.name: flow[s.name] for s in sites if s.in_block and s.has_weight})
            of_sites = _permuted(rng, {s.name: np.array([omega[s.name]]) for s in sites if s.in_block})
            omega = {name: float(values[0]) for name, values in of_sites.items()}
        columns = [CANDIDATES.index(b) for b in widths]
        measured = {name: rows[:, columns] for name, rows in errors().items()}
        cost = relevance_costs(sites, flow, measured, exponent=exponent, candidates=widths)
    if not chosen_activations:
        return Priced(widths, cost)
    noise = site_costs(sites, omega, exponent=exponent, candidates=of_activations)
    if tied:  # one score a site, of all that it computes: counted once
        cost = {name: np.zeros(len(widths)) for name in cost}
    return Priced(widths, cost, of_activations, noise)


def _by_sensitivity(
    sites: Sequence[Site],
    strategy: Strategy,
    scores: Relevance | None,
    measured: Sequence[Sensitivity],
    candidates: Sequence[int] | None,
    activation_candidates: Sequence[int] | None,
    exponent: float,
) -> Priced:
    """Importance ** exponent times the measured KL; pair terms for mix-qvit."""
    names = [site.name for site in sites if site.in_block]
    importance = dict.fromkeys(names, 1.0)
    if strategy == "combined" and scores is not None:
        importance = within_kind(sites, scores.flow)
    if strategy == "mix-qvit" and scores is not None:
        # Of mean 1, so that they leave the costs in nats, as the pair terms are.
        mean = sum(abs(scores.mean_score[name]) for name in names) / len(names)
        importance = {name: abs(scores.mean_score[name]) / mean for name in names} if mean else importance

    first = measured[0]
    widths = _among("candidates", candidates, first)
    own = _columns(first, widths)
    if first.part == "weight":
        cost = layer_costs(sites, importance, own, exponent=exponent, candidates=widths)
    else:
        cost = {site.name: np.zeros(len(widths)) for site in sites if site.in_block and site.has_weight}
    interactions = {}
    if strategy == "mix-qvit":
        if len(measured) > 1:
            raise ValueError('strategy "mix-qvit" chooses one width a site: activations must be fixed or tied')
        if not first.pairs:
            raise ValueError('strategy "mix-qvit" needs a sensitivity with pairs, got one without')
        at = np.ix_(*[[first.candidates.index(b) for b in widths]] * 2)
        interactions = {pair: table[at] for pair, table in first.interactions().items()}
    if len(measured) == 1 and first.part == "weight":
        return Priced(widths, cost, interactions=interactions)
    of_activations = (
        widths if first.part == "both" else _among("activation_candidates", activation_candidates, measured[1])
    )
    noise = site_costs(
        sites, importance, _columns(measured[-1], of_activations), exponent=exponent, candidates=of_activations
    )
    return Priced(widths, cost, of_activations, noise, interactions)


def _measured(sites: Sequence[Site], given: Sequence[Sensitivity], strategy: Strategy, part: Part) -> Sensitivity:
    found = next((one for one in given if one.part == part), None)
    if found is None:
        raise ValueError(
            f"strategy {strategy!r} needs the {part} sensitivity of the sites, which `vitq score --sensitivity` or "
            f"vitq.sensitivity measures and --sensitivity FILE gives; got {[one.part for one in given] or 'none'}"
        )
    missing = [s.name for s in sites if s.in_block and (s.has_weight or part != "weight") and s.name not in found.kl]
    if missing:
        raise ValueError(f"{part} sensitivity must have every site of the blocks, got none for {missing[0]}")
    return found


def _among(argument: str, wanted: Sequence[int] | None, measured: Sensitivity) -> tuple[int, ...]:
    widths = check_candidates(argument, measured.candidates if wanted is None else wanted)
    if not set(widths) <= set(measured.candidates):
        known = f"the widths of the {measured.part} sensitivity, {measured.candidates}"
        raise ValueError(f"{argument} must be among {known}, got {widths}")
    return widths


def _columns(measured: Sensitivity, widths: Sequence[int]) -> dict[str, np.ndarray]:
    columns = [measured.candidates.index(b) for b in widths]
    return {name: values[columns] for name, values in measured.costs().items()}


def _permuted(rng: np.random.Generator, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same numbers at other places of the model."""
    shuffled = rng.permutation(np.concatenate(list(values.values())))
    cuts = np.cumsum([len(rows) for rows in values.values()])[:-1]
    return dict(zip(values, np.split(shuffled, cuts), strict=True))
