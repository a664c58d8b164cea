"""What an allocation may spend. Plain data, part of the vocabulary: ``vitq_kernels.spec`` exports it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Budget:
    """What an allocation may spend; at least one limit. Several limits hold together."""

    mean_weight_bits: float | None = None  # over the linears of the blocks
    size_mb: float | None = None  # 10^6 bytes of packed weights, patch embedding, head and row orders included
    bitops: float | None = None  # sum of MACs * weight bits * activation bits per image, over all sites
    mean_activation_bits: float | None = None  # over the sites of the blocks, each weighted by its MACs
    latency_ms: float | None = None  # sum of measured kernel times over all sites (latency.py)

    def __post_init__(self) -> None:
        if not self.given:
            raise ValueError(f"Budget needs one of {', '.join(f.name for f in fields(self))}, got none")
        for name, value in self.given.items():
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"Budget.{name} must be a positive number, got {value!r}")

    @property
    def given(self) -> dict[str, float]:
        """The limits by name, without those that are not set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
