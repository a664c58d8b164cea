"""Measured kernel times, and what a site takes at a pair of widths. Looked up exactly: nothing is interpolated.

A file of kernel times is JSON::

    {"batch": 1,
     "times": [
      {"kind": "linear", "rows": 576, "cols": 192, "tokens": 197, "weight_bits": 4, "activation_bits": 8, "us": 11.5},
      {"kind": "qk", "macs": 7451328, "activation_bits": 8, "us": 6.0},
      {"site": "head", "weight_bits": 8, "activation_bits": 8, "us": 3.1}]}

or the list alone, for batch 1. A row is of a shape (``kind`` "linear" of output rows, input columns and tokens; "qk" or
"av" of MACs) or of one ``site`` by its name, which goes before the shape. Tokens and MACs are those of the whole batch.
``weight_bits`` is left out at qk and av. ``us`` are microseconds. Other keys are ignored: a benchmark's rows may say
more. Where one kernel does qk and av, give its time to one of the two and 0 to the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, get_args

from vitq_kernels.spec import Site, check_bits

Kind = Literal["linear", "qk", "av"]
SHAPE = {"linear": ("rows", "cols", "tokens"), "qk": ("macs",), "av": ("macs",)}  # what a row of each kind says


@dataclass(frozen=True)
class KernelTime:
    """One measurement: of a shape (kind and its sizes) or of a site by name."""

    us: float  # microseconds, >= 0
    activation_bits: int
    weight_bits: int | None = None  # None at qk and av
    site: str | None = None
    kind: Kind | None = None
    rows: int | None = None
    cols: int | None = None
    tokens: int | None = None  # of the whole batch
    macs: int | None = None  # of the whole batch

    def __post_init__(self) -> None:
        if isinstance(self.us, bool) or not isinstance(self.us, int | float) or not 0 <= self.us < float("inf"):
            raise ValueError(f"kernel time: us must be a number >= 0, got {self.us!r}")
        check_bits(self.activation_bits, "kernel time: activation_bits")
        if self.weight_bits is not None:
            check_bits(self.weight_bits, "kernel time: weight_bits")
        if (self.site is None) == (self.kind is None):
            raise ValueError(f"kernel time: give exactly one of site and kind, got {self.site!r} and {self.kind!r}")
        if self.kind is not None:
            if self.kind not in SHAPE:
                raise ValueError(f"kernel time: kind must be one of {get_args(Kind)}, got {self.kind!r}")
            if (self.kind == "linear") != (self.weight_bits is not None):
                raise ValueError(
                    f"kernel time: weight_bits go with kind linear, got {self.weight_bits} with {self.kind}"
                )
            for name in SHAPE[self.kind]:
                size = getattr(self, name)
                if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                    raise ValueError(f"kernel time: {name} of a {self.kind} must be a positive integer, got {size!r}")

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is the time of."""
        shape = tuple(getattr(self, name) for name in SHAPE[self.kind]) if self.kind else ()
        return self.site, self.kind, *shape, self.weight_bits, self.activation_bits


@dataclass(frozen=True)
class KernelTimes:
    """Kernel times of a device, read from a file that the module describes."""

    times: tuple[KernelTime, ...]
    batch: int = 1  # images a forward that the times are of

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(self.times))
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"KernelTimes.batch must be a positive integer, got {self.batch!r}")
        if len(self._by_key) < len(self.times):
            keys = [time.key for time in self.times]
            twice = next(time for time in self.times if keys.count(time.key) > 1)
            raise ValueError(f"KernelTimes.times must differ in what they are of, got more than one of {_shown(twice)}")

    @cached_property
    def _by_key(self) -> dict[tuple[Any, ...], KernelTime]:
        return {time.key: time for time in self.times}

    def us(self, site: Site, weight_bits: int | None, activation_bits: int) -> Fraction:
        """Microseconds of a site at a pair of widths, for the batch; ``weight_bits`` is None at qk and av.

        Raises:
            ValueError: it was not measured; the message is the row that is missing.
        """
        if site.has_weight:
            tokens = Fraction(self.batch * site.macs, site.rows * site.cols)
            key: tuple[Any, ...] = ("linear", site.rows, site.cols, tokens, weight_bits, activation_bits)
            sizes = f'"rows": {site.rows}, "cols": {site.cols}, "tokens": {tokens}, "weight_bits": {weight_bits}'
        else:
            key = (site.kind, self.batch * site.macs, None, activation_bits)
            sizes = f'"macs": {self.batch * site.macs}'
        found = self._by_key.get((site.name, None, weight_bits, activation_bits)) or self._by_key.get((None, *key))
        if found is None:
            raise ValueError(
                f'kernel times have none for site {site.name}: {{"kind": "{key[0]}", {sizes}, '
                f'"activation_bits": {activation_bits}}} is missing'
            )
        return Fraction(str(found.us))  # the decimal as it was written

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal object."""
        rows = [{name: value for name, value in asdict(time).items() if value is not None} for time in self.times]
        return json.dumps({"batch": self.batch, "times": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> KernelTimes:
        """Reads a file's text; raises ValueError that says what is wrong with it."""
        known = {f.name for f in fields(KernelTime)}
        try:
            payload = json.loads(text)
            payload = payload if isinstance(payload, Mapping) else {"times": payload}
            rows = [{name: value for name, value in row.items() if name in known} for row in payload["times"]]
            return cls(tuple(KernelTime(**row) for row in rows), payload.get("batch", 1))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not kernel times: {type(error).__name__}: {error}") from error


def _shown(time: KernelTime) -> str:
    return json.dumps({name: value for name, value in asdict(time).items() if value is not None and name != "us"})
