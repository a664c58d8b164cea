"""Integer linears of ViTs, every epilogue and width, beside cuBLAS, `torch._int_mm` and torchao.

python -m pytest benchmarks/bench_linear.py --benchmark-enable -k "DeiT-B and b8" [--record]
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.bench_plan import Planned, linear_plan


@pytest.mark.parametrize("planned", list(linear_plan()), ids=str)
def test_linear(measured: Callable[[Planned, str], None], planned: Planned, backend: str) -> None:
    """Right, then as fast as it is."""
    measured(planned, backend)
