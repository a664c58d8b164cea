"""Which models a comparison makes: methods at widths, each with the controls that say whether it is worth anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vitq_kernels.presets import PRESETS
from vitq_kernels.spec import MAX_BITS, MIN_BITS, check_bits
from vitq_kernels.strategies import BY_ROW, Strategy

Kind = Literal["uniform", "allocation", "preset"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
METHODS = tuple(dict.fromkeys(("uniform", *STRATEGIES, *PRESETS)))  # lrp-qvit and mix-qvit are both kinds
PERMUTATIONS = 3


@dataclass(frozen=True)
class Job:
    """A model to make."""

    kind: Kind
    method: str
    weight_bits: float  # the width, or for an allocation the mean whose bytes it may take
    activation_bits: int
    seed: int

    @property
    def label(self) -> str:
        """The row's name; it says which of the two a method is that is both allocation and preset."""
        if self.kind == "preset":
            return f"{self.method} (preset, {self.executes})"
        if self.kind == "uniform":
            return self.method
        return f"{self.method} allocation" + (f", seed {self.seed}" if self.method == "random" else "")

    @property
    def executes(self) -> str:
        """ "integers" or "simulated"."""
        return PRESETS[self.method].executes if self.kind == "preset" else "integers"

    @property
    def widths(self) -> tuple[float, int]:
        """Rows of the same widths are compared with each other."""
        return self.weight_bits, self.activation_bits

    @property
    def controls(self) -> tuple[str, ...]:
        """What it is judged against: methods at the same widths."""
        if self.kind == "uniform":
            return ()
        return ("uniform", "random") if self.method in BY_ROW and self.method != "random" else ("uniform",)


def plan_jobs(
    methods: Sequence[str] | None,
    pairs: Sequence[tuple[int, int]],
    means: Sequence[float],
    activation_bits: int,
    seed: int,
) -> list[Job]:
    """The models to make, controls first; the controls of a method come with it whether they are named or not.

    Presets are made at the pairs, allocations at the means. Uniform is made at every pair and at every mean that is a
    whole number: the others have no uniform model of equal bytes.

    Args:
        methods: names of METHODS; "lrp-qvit" and "mix-qvit" are an allocation and a preset. None: all that have a row.
        pairs: widths of weights and activations, 2..8.
        means: mean widths of weights, in 2..8.
        activation_bits: of the allocations, 2..8.
        seed: of the methods; permutation i has ``seed + i``.

    Raises:
        ValueError: an argument is not as above, or a method has no row at these widths.
    """
    check_bits(activation_bits, "activation_bits")
    for pair in pairs:
        check_bits(pair[0], "pairs: weight bits")
        check_bits(pair[1], "pairs: activation bits")
    for mean in means:
        if not MIN_BITS <= mean <= MAX_BITS:
            raise ValueError(f"means must be in {MIN_BITS}..{MAX_BITS}, got {mean}")
    if unknown := [name for name in methods or () if name not in METHODS]:
        raise ValueError(f"methods must be among {', '.join(METHODS)}, got {unknown[0]!r}")
    named, methods = methods or (), METHODS if methods is None else methods
    at_pairs = dict.fromkeys((float(weight), activation) for weight, activation in pairs)
    at_means = dict.fromkeys((float(mean), activation_bits) for mean in means)
    strategies = [name for name in STRATEGIES if name in methods and name != "random"]
    permuted = "random" in methods or any(name in BY_ROW for name in strategies)
    jobs: list[Job] = []
    for weight, activation in {**at_pairs, **at_means}:
        if weight.is_integer():
            jobs.append(Job("uniform", "uniform", weight, activation, seed))
        if (weight, activation) in at_means:
            seeds = range(seed, seed + PERMUTATIONS if permuted else seed)
            jobs += [Job("allocation", "random", weight, activation, each) for each in seeds]
            jobs += [Job("allocation", name, weight, activation, seed) for name in strategies]
        if (weight, activation) in at_pairs:
            jobs += [Job("preset", name, weight, activation, seed) for name in PRESETS if name in methods]
    if idle := [name for name in named if name not in {job.method for job in jobs}]:
        raise ValueError(f"methods: {idle[0]!r} has no row: presets need pairs of widths, allocations means")
    if not jobs:
        raise ValueError("methods have no row: give pairs of widths or means")
    return jobs
