"""Log2 attention of ViTs and Swins beside torch's fused attentions.

python -m pytest benchmarks/bench_attention.py --benchmark-enable -k "DeiT-B and b8" [--record]
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.bench_plan import Planned, attention_plan


@pytest.mark.parametrize("planned", list(attention_plan()), ids=str)
def test_attention(measured: Callable[[Planned, str], None], planned: Planned, backend: str) -> None:
    """Right, then as fast as it is."""
    measured(planned, backend)
