"""What the model's answers lose when the width of one site changes; sensitivity_runs.py measures it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import isotonic_regression

from vitq_kernels.spec import check_bits

Part = Literal["weight", "activation", "both"]  # which width of a site changes; "both" is the papers' tied reading
Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Sensitivity:
    """Mean KL(float, quantized) over images, in nats, with one site (or two) at another width than all others.

    Source: Mix-QViT's sensitivity (arXiv:2501.06357), completed in methods.md 2.2 and 2.3.
    """

    part: Part
    baseline: int | None  # width of that part at all other sites of the blocks; None: they stay float
    candidates: tuple[int, ...]  # rising widths
    images: int
    base_kl: float  # of the baseline model; 0 where it is the float model
    kl: Mapping[str, tuple[float, ...]]  # site -> KL with the site at each candidate
    pair_candidates: tuple[int, ...] = ()  # the widths of which pairs were measured
    # site -> later site of the same block -> KL with both changed, [width of the first][width of the later one]
    pairs: Mapping[str, Mapping[str, Table]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"Sensitivity.part must be one of {get_args(Part)}, got {self.part!r}")
        if self.baseline is not None:
            check_bits(self.baseline, "Sensitivity.baseline")
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 1:
            raise ValueError(f"Sensitivity.images must be a positive integer, got {self.images!r}")
        for name, required in (("candidates", True), ("pair_candidates", False)):
            object.__setattr__(self, name, check_candidates(f"Sensitivity.{name}", getattr(self, name), required))
        if not set(self.pair_candidates) <= set(self.candidates):
            raise ValueError(
                f"Sensitivity.pair_candidates must be among candidates {self.candidates}, got {self.pair_candidates}"
            )
        object.__setattr__(self, "kl", {site: tuple(row) for site, row in self.kl.items()})
        pairs = {a: {b: tuple(map(tuple, t)) for b, t in row.items()} for a, row in self.pairs.items()}
        object.__setattr__(self, "pairs", pairs)
        _check_numbers("base_kl", [self.base_kl], 1)
        for site, row in self.kl.items():
            _check_numbers(f"kl of {site}", row, len(self.candidates))
        for a, tables in pairs.items():
            for b, table in tables.items():
                if not {a, b} <= set(self.kl):
                    raise ValueError(f"Sensitivity.pairs must be of sites in kl, got {a} and {b}")
                if len(table) != len(self.pair_candidates):
                    expected = f"{len(self.pair_candidates)} rows"
                    raise ValueError(f"Sensitivity.pairs of {a} and {b} must have {expected}, got {len(table)}")
                for row in table:
                    _check_numbers(f"pairs of {a} and {b}", row, len(self.pair_candidates))

    def costs(self) -> dict[str, np.ndarray]:
        """What each site costs at each width, over the baseline: float64 [len(candidates)], >= 0, never rising in bits.

        ``max(0, kl - base_kl)``, then the closest such numbers in least squares: a wider site that measures worse is
        noise of few images.
        """
        return {
            site: isotonic_regression(np.maximum(0.0, np.array(row) - self.base_kl), increasing=False).x
            for site, row in self.kl.items()
        }

    def interactions(self) -> dict[tuple[str, str], np.ndarray]:
        """What two sites cost together beyond the sum of both: ``I[c, c'] = L_ab(c, c') - L_a(c) - L_b(c')``.

        L is ``kl - base_kl`` as measured, without ``costs``'s projection. float64 [len(candidates), len(candidates)],
        of either sign, 0 at widths of which no pairs were measured.
        """
        measured = [self.candidates.index(bits) for bits in self.pair_candidates]
        result = {}
        for a, tables in self.pairs.items():
            for b, table in tables.items():
                alone = [np.array(self.kl[site])[measured] for site in (a, b)]
                full = np.zeros((len(self.candidates),) * 2)
                full[np.ix_(measured, measured)] = np.array(table) - alone[0][:, None] - alone[1] + self.base_kl
                result[a, b] = full
        return result

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Reads ``to_json`` text; raises ValueError that says what is wrong with it."""
        try:
            payload = json.loads(text)
            return cls(**{f.name: payload[f.name] for f in fields(cls)})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a sensitivity: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        others = "in float" if self.baseline is None else f"at {self.baseline} bits"
        lines = [f"{self.part} sensitivity, {self.images} images, other sites {others} (KL {self.base_kl:.4g})"]
        lines.append(f"{'KL with the site at':24}" + "".join(f"{bits:>7} bits" for bits in self.candidates))
        for site, row in self.kl.items():
            lines.append(f"{site:24}" + "".join(f"{value:12.4g}" for value in row))
        return "\n".join(lines)


def _check_numbers(what: str, row: Sequence[float], count: int) -> None:
    if len(row) != count or not all(isinstance(v, float | int) and math.isfinite(v) for v in row):
        raise ValueError(f"Sensitivity.{what} must be {count} finite numbers, got {list(row)}")


def check_candidates(argument: str, values: Any, required: bool = True) -> tuple[int, ...]:
    """Widths as a tuple; raises ValueError that names ``argument`` if they do not rise in 2..8, or are missing."""
    widths = tuple(check_bits(bits, argument) for bits in values)
    if list(widths) != sorted(set(widths)) or (required and not widths):
        raise ValueError(f"{argument} must be rising widths{', at least one' if required else ''}, got {widths}")
    return widths
