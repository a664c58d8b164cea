"""LayerNorm and quantize of ViTs, of every kind, beside torch's own ops.

python -m pytest benchmarks/bench_layernorm.py --benchmark-enable -k "DeiT-B and b8" [--record]
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.bench_plan import Planned, row_plan


@pytest.mark.parametrize("planned", list(row_plan()), ids=str)
def test_layernorm(measured: Callable[[Planned, str], None], planned: Planned, backend: str) -> None:
    """Right, then as fast as it is."""
    measured(planned, backend)
