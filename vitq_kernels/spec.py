"""The vocabulary: what is quantized (Site), how wide (RowGroups, SiteBits, BitAllocation), under what budget.

Everything here is plain data: frozen, comparable, printable, written by hand in a test, and round-trips through JSON.
No torch. The import rule of the package starts at this file: of vitq_kernels it imports the budget alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from vitq_kernels.budget import Budget as Budget  # a word of the vocabulary

MIN_BITS, MAX_BITS = 2, 8
TILE_ROWS = 256  # the order of rows is free inside a tile (docs/semantics.md)
# Of one width, unless asked otherwise: four such groups are the 64 rows that a CUDA kernel has together.
DEFAULT_GROUP_ROWS = 16

SiteKind = Literal["patch_embed", "qkv", "qk", "av", "proj", "fc1", "fc2", "reduction", "head"]


def check_bits(bits: Any, argument: str) -> int:
    """Returns ``bits`` as an int in 2..8, or raises ValueError naming ``argument``."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{argument} must be an integer in {MIN_BITS}..{MAX_BITS}, got {bits!r}")
    return bits


@dataclass(frozen=True)
class QuantFormat:
    """A signed two's-complement integer format of ``bits`` bits, stored in an int8."""

    bits: int  # 2..8

    def __post_init__(self) -> None:
        check_bits(self.bits, "QuantFormat.bits")

    @property
    def qmin(self) -> int:
        """Smallest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Site:
    """A place in the model that is quantized, under its timm name.

    The two matmuls of attention have no module of their own; they are named ``blocks.{i}.attn.qk`` and ``.av``.
    """

    name: str
    kind: SiteKind
    rows: int  # output channels N of the weight; 0 for qk and av
    cols: int  # input channels K of the weight; 0 for qk and av
    macs: int  # multiply-accumulates per image

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise ValueError(f"Site.kind must be one of {get_args(SiteKind)}, got {self.kind!r}")
        if self.rows < 0 or self.macs < 0 or (self.cols > 0) != (self.rows > 0):
            raise ValueError(
                f"Site {self.name}: rows and cols must be both positive or both 0, and macs not negative, "
                f"got rows={self.rows}, cols={self.cols}, macs={self.macs}"
            )

    @property
    def has_weight(self) -> bool:
        """False for the two attention matmuls."""
        return self.rows > 0

    @property
    def in_block(self) -> bool:
        """True for the sites of transformer blocks and patch mergings, False for patch embedding and head."""
        return self.kind not in ("patch_embed", "head")


@dataclass(frozen=True)
class RowGroups:
    """The widths of a weight's output rows.

    Rows lie in tiles of up to 256 consecutive rows; inside a tile they are reordered and cut into groups of
    ``group_rows`` rows (the last group of a tile may be shorter), each of one width. One width is the case of one group
    per tile in the model's own order.
    """

    rows: int
    bits: tuple[int, ...]  # one width a group, tile after tile
    group_rows: int = TILE_ROWS
    order: tuple[int, ...] | None = None  # order[i]: model row stored at place i; None: the model's order

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"RowGroups.rows must be positive, got {self.rows}")
        if not 1 <= self.group_rows <= TILE_ROWS or TILE_ROWS % self.group_rows:
            raise ValueError(f"RowGroups.group_rows must divide {TILE_ROWS}, got {self.group_rows}")
        object.__setattr__(self, "bits", tuple(check_bits(b, "RowGroups.bits") for b in self.bits))
        expected = sum(1 for _ in self._spans())
        if len(self.bits) != expected:
            raise ValueError(
                f"RowGroups.bits must have {expected} widths for {self.rows} rows in groups of {self.group_rows}, "
                f"got {len(self.bits)}"
            )
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))
            for start in range(0, self.rows, TILE_ROWS):
                stop = min(start + TILE_ROWS, self.rows)
                if sorted(self.order[start:stop]) != list(range(start, stop)) or len(self.order) != self.rows:
                    raise ValueError(
                        f"RowGroups.order must permute the {self.rows} rows inside tiles of {TILE_ROWS}; "
                        f"tile {start}..{stop - 1} does not"
                    )
            # No order is stored for a tile of one width: there it is the model's.
            kept = list(range(self.rows))
            for start, stop in self.mixed_tiles():
                kept[start:stop] = self.order[start:stop]
            object.__setattr__(self, "order", None if kept == list(range(self.rows)) else tuple(kept))

    def _spans(self) -> Iterator[tuple[int, int]]:
        for tile in range(0, self.rows, TILE_ROWS):
            end = min(tile + TILE_ROWS, self.rows)
            for start in range(tile, end, self.group_rows):
                yield start, min(start + self.group_rows, end)

    @classmethod
    def uniform(cls, rows: int, bits: int) -> RowGroups:
        """One width for all rows."""
        return cls(rows, (bits,) * -(-rows // TILE_ROWS))

    def groups(self) -> Iterator[tuple[int, int, int]]:
        """Yields (first stored row, one past the last, bits) of each group."""
        for (start, stop), bits in zip(self._spans(), self.bits, strict=True):
            yield start, stop, bits

    def mixed_tiles(self) -> Iterator[tuple[int, int]]:
        """Yields (first row, one past the last) of each tile that has more than one width."""
        for tile in range(0, self.rows, TILE_ROWS):
            end = min(tile + TILE_ROWS, self.rows)
            if len({b for start, _, b in self.groups() if tile <= start < end}) > 1:
                yield tile, end

    @property
    def mean_bits(self) -> float:
        """Average width of a row."""
        return sum((stop - start) * b for start, stop, b in self.groups()) / self.rows

    def weight_bytes(self, cols: int) -> int:
        """Size of the packed codes, sum of rows*cols*bits/8 over the groups (each rounded up to a whole byte)."""
        return sum(-(-(stop - start) * cols * b // 8) for start, stop, b in self.groups())

    @property
    def order_bytes(self) -> int:
        """One byte a row in tiles of more than one width."""
        return sum(end - start for start, end in self.mixed_tiles())

    def row_bits(self) -> list[int]:
        """Width of every row, in the model's order."""
        stored = [b for start, stop, b in self.groups() for _ in range(start, stop)]
        if self.order is None:
            return stored
        result = [0] * self.rows
        for place, row in enumerate(self.order):
            result[row] = stored[place]
        return result


@dataclass(frozen=True)
class SiteBits:
    """Widths at one site.

    ``activation`` is the width of a linear's input codes; at a qk site, of the codes q, k and v; at an av site, of the
    log2 code of the attention probabilities.
    """

    activation: int
    weight: RowGroups | None = None  # None at qk and av

    def __post_init__(self) -> None:
        check_bits(self.activation, "SiteBits.activation")


@dataclass(frozen=True)
class BitAllocation:
    """Widths of every site: the one thing that allocation hands to conversion."""

    sites: Mapping[str, SiteBits]
    solver: Mapping[str, Any] = field(default_factory=dict)  # how it was found: objective, gap, budget; for the reader

    @classmethod
    def uniform(
        cls, sites: Sequence[Site], weight_bits: int, activation_bits: int = 8, boundary_bits: int = 8
    ) -> BitAllocation:
        """One width for all block sites; patch embedding and head at ``boundary_bits`` for weights and inputs."""
        check_bits(weight_bits, "weight_bits")
        check_bits(activation_bits, "activation_bits")
        check_bits(boundary_bits, "boundary_bits")
        result = {}
        for site in sites:
            w, a = (weight_bits, activation_bits) if site.in_block else (boundary_bits, boundary_bits)
            result[site.name] = SiteBits(a, RowGroups.uniform(site.rows, w) if site.has_weight else None)
        return cls(result)

    def check(self, sites: Sequence[Site]) -> None:
        """Raises ValueError unless this allocation names exactly these sites with these row counts."""
        known = {site.name: site for site in sites}
        unknown = sorted(set(self.sites) - set(known))
        missing = [name for name in known if name not in self.sites]
        if unknown or missing:
            raise ValueError(
                "allocation does not fit the model: "
                + "; ".join(
                    f"{what} {names[:3]}{' ...' if len(names) > 3 else ''}"
                    for what, names in (("unknown sites", unknown), ("missing sites", missing))
                    if names
                )
            )
        for name, site in known.items():
            groups = self.sites[name].weight
            got = groups.rows if groups is not None else 0
            if got != site.rows:
                raise ValueError(f"allocation of {name} must have {site.rows} weight rows, got {got}")

    def weight_bytes(self, sites: Sequence[Site]) -> int:
        """Bytes of all packed weights, row-order bytes included; scales and float parameters are not."""
        total = 0
        for site in sites:
            groups = self.sites[site.name].weight
            if groups is not None:
                total += groups.weight_bytes(site.cols) + groups.order_bytes
        return total

    def mean_weight_bits(self, sites: Sequence[Site]) -> float:
        """Bits per weight over the linears of the transformer blocks (patch embedding and head are not counted)."""
        bits = weights = 0  # integers: one rounding, so that a budget that holds exactly is not exceeded by an ulp
        for site in sites:
            groups = self.sites[site.name].weight
            if groups is not None and site.in_block:
                bits += sum((stop - start) * b for start, stop, b in groups.groups()) * site.cols
                weights += site.rows * site.cols
        return bits / weights if weights else 0.0

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal object."""
        payload = {
            "sites": {
                name: {"activation": s.activation, "weight": groups_to_dict(s.weight) if s.weight else None}
                for name, s in self.sites.items()
            },
            "solver": dict(self.solver),
        }
        return json.dumps(payload, indent=1)

    @classmethod
    def from_json(cls, text: str) -> BitAllocation:
        """Reads ``to_json`` text; raises ValueError that says what is wrong with it."""
        try:
            payload = json.loads(text)
            sites = {
                name: SiteBits(s["activation"], groups_from_dict(s["weight"]) if s["weight"] else None)
                for name, s in payload["sites"].items()
            }
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a bit allocation: {type(error).__name__}: {error}") from error
        return cls(sites, payload.get("solver", {}))

    def __str__(self) -> str:
        lines = [f"{'site':24} {'weight bits':>24} {'act':>4}"]
        for name, s in self.sites.items():
            if s.weight is None:
                shown = "-"
            else:
                rows_at: dict[int, int] = {}
                for start, stop, b in s.weight.groups():
                    rows_at[b] = rows_at.get(b, 0) + stop - start
                shown = " ".join(f"{b}b:{n}" for b, n in sorted(rows_at.items())) if len(rows_at) > 1 else str(*rows_at)
            lines.append(f"{name:24} {shown:>24} {s.activation:>4}")
        return "\n".join(lines)


def groups_to_dict(groups: RowGroups) -> dict[str, Any]:
    """RowGroups as JSON-ready data."""
    return {f.name: getattr(groups, f.name) for f in fields(groups)}


def groups_from_dict(data: Mapping[str, Any]) -> RowGroups:
    """The inverse of ``groups_to_dict``."""
    order = data.get("order")
    return RowGroups(data["rows"], tuple(data["bits"]), data["group_rows"], None if order is None else tuple(order))
