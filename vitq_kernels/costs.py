"""Scores and measurements to costs: what each width costs an output row, a layer, or a site's activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitq_kernels.spec import Site, check_bits

CANDIDATES = (2, 3, 4, 5, 6, 7, 8)
LARGEST = 1e290  # of a cost: sums of as many as memory holds are finite


def relevance_costs(
    sites: Sequence[Site],
    row_flow: Mapping[str, Sequence[float] | np.ndarray],
    errors: Mapping[str, np.ndarray] | None = None,
    *,
    exponent: float = 1.0,
    candidates: Sequence[int] = CANDIDATES,
) -> dict[str, np.ndarray]:
    """Cost of each output row of the blocks' linears at each width, ``|flow|**exponent * error``: [N, len(candidates)].

    Args:
        sites: the model's sites; only linears of blocks get a cost, the others have no choice.
        row_flow: relevance through each output row, by site name, [N]; only its magnitude counts.
        errors: relative output error of each row at each of ``candidates``, by site name, [N, len(candidates)], >= 0;
            or [len(candidates)], alike for all rows. None: 4**-bits, the noise power of a uniform quantizer.
        exponent: >= 0; 0 leaves the error alone.
        candidates: widths, ascending, each in 2..8.

    Raises:
        ValueError: a site is missing, a shape differs from the above, or a value is NaN, infinite or a negative error.

    Source: methods.md 2.
    """
    free, widths = free_linears(sites), check_candidates("candidates", candidates)
    omega = {s.name: _omega("row_flow", row_flow, s, (s.rows,), exponent) for s in free}
    return {s.name: omega[s.name][:, None] * table("errors", errors, s, widths) for s in free}


def layer_costs(
    sites: Sequence[Site],
    scores: Mapping[str, float],
    errors: Mapping[str, np.ndarray] | None = None,
    *,
    exponent: float = 1.0,
    candidates: Sequence[int] = CANDIDATES,
) -> dict[str, np.ndarray]:
    """Cost of each linear of the blocks as a whole, ``|score|**exponent * mean error of its rows``: [len(candidates)].

    Arguments and errors as ``relevance_costs``, but one score a site.
    """
    free, widths = free_linears(sites), check_candidates("candidates", candidates)
    omega = {s.name: _omega("scores", scores, s, (), exponent) for s in free}
    return {s.name: omega[s.name] * table("errors", errors, s, widths).mean(axis=0) for s in free}


def site_costs(
    sites: Sequence[Site],
    scores: Mapping[str, float],
    errors: Mapping[str, np.ndarray] | None = None,
    *,
    exponent: float = 1.0,
    candidates: Sequence[int] = CANDIDATES,
) -> dict[str, np.ndarray]:
    """``|score|**exponent * error`` of every site of the blocks, matmuls included: [len(candidates)].

    As ``layer_costs``, for errors [len(candidates)] that belong to the site as a whole: of its activations, or of
    weights and activations of one width.
    """
    widths = check_candidates("candidates", candidates)
    result = {}
    for site in block_sites(sites):
        error = 4.0 ** -np.array(widths)
        if errors is not None:
            error = numbers("errors", errors, site, (len(widths),))
        result[site.name] = _omega("scores", scores, site, (), exponent) * error
    return result


def within_kind(sites: Sequence[Site], scores: Mapping[str, float]) -> dict[str, float]:
    """Magnitudes of the blocks' scores over their mean in sites of the same kind; all 1 in a kind without any.

    Relevance of different kinds of sites is not comparable: their outputs differ in size and place (methods.md 1). What
    a kind costs as a whole is left to a measured sensitivity.
    """
    kinds: dict[str, list[str]] = {}
    for site in block_sites(sites):
        numbers("scores", scores, site, (), negative=True)
        kinds.setdefault(site.kind, []).append(site.name)
    result: dict[str, float] = {}
    for names in kinds.values():
        mean = math.fsum(abs(scores[name]) for name in names) / len(names)
        result |= {name: abs(scores[name]) / mean if mean else 1.0 for name in names}
    return result


def block_sites(sites: Sequence[Site]) -> list[Site]:
    """Sites of the blocks, by name."""
    names = [site.name for site in sites]
    if len(set(names)) < len(names):
        raise ValueError(f"sites must have distinct names, got {max(names, key=names.count)!r} more than once")
    return sorted((site for site in sites if site.in_block), key=lambda site: site.name)


def free_linears(sites: Sequence[Site]) -> list[Site]:
    """Sites whose weight widths are chosen, by name."""
    free = [site for site in block_sites(sites) if site.has_weight]
    if not free:
        raise ValueError(f"sites must include a linear of a transformer block, got {[s.name for s in sites][:3]}")
    return free


def check_candidates(argument: str, candidates: Sequence[int]) -> tuple[int, ...]:
    """Widths to choose from, ascending; raises ValueError naming ``argument``."""
    widths = tuple(check_bits(b, argument) for b in candidates)
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"{argument} must be distinct widths, ascending, got {widths}")
    return widths


def numbers(
    argument: str, values: Mapping[str, Any], site: Site, *shapes: tuple[int, ...], negative: bool = False
) -> np.ndarray:
    """``values[site.name]`` as float64 of one of ``shapes``, finite, and not negative unless ``negative``."""
    if site.name not in values:
        every = "linear" if site.has_weight else "site"
        raise ValueError(f"{argument} must have every {every} of the blocks, got none for {site.name}")
    label, expected = f"{argument}[{site.name!r}]", " or ".join(map(str, shapes))
    try:
        array = np.asarray(values[site.name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label} must be numbers of shape {expected}, got {error}") from error
    if array.shape not in shapes:
        raise ValueError(f"{label} must have shape {expected}, got {array.shape}")
    bad = ~((np.abs(array) <= LARGEST) & (negative | (array >= 0)))
    if bad.any():
        raise ValueError(f"{label} must be finite{'' if negative else ' and not negative'}, got {array[bad].flat[0]}")
    return array


def table(argument: str, values: Mapping[str, Any] | None, site: Site, widths: Sequence[int]) -> np.ndarray:
    """[N, widths], or [1, widths] for the whole layer; 4**-bits without values."""
    if values is None:
        return 4.0 ** -np.array([widths])
    n = len(widths)
    return np.atleast_2d(numbers(argument, values, site, (site.rows, n), (1, n), (n,)))


def _omega(argument: str, scores: Mapping[str, Any], site: Site, shape: tuple[int, ...], exponent: float) -> np.ndarray:
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be finite and not negative, got {exponent!r}")
    return np.abs(numbers(argument, scores, site, shape, negative=True)) ** exponent
