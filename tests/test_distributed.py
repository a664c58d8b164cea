"""Two processes give the numbers of one, bit for bit; one process without a group is as if there were no sharding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from vitq_kernels.distributed import from_first, in_order, process_group, rank, world_size

ROOT = Path(__file__).parents[1]


def torchrun(*words: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs ``python WORDS`` in processes of one gloo group, one thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run([*launch, *map(str, words)], env=environment, capture_output=True, text=True, timeout=240)


def test_one_process_needs_no_group() -> None:
    assert (rank(), world_size()) == (0, 1)
    assert from_first(lambda: 7) == 7
    with process_group():  # no torchrun, no group
        assert not dist.is_initialized()


def test_one_process_computes_item_after_item() -> None:
    started: list[int] = []

    def compute(item: int) -> int:
        started.append(item)
        return -item

    results = in_order(iter([3, 1, 2]), compute)
    assert started == []
    assert next(results) == -3
    assert started == [3]
    assert list(results) == [-1, -2]


@pytest.mark.parametrize("items", [[], ()], ids=["list", "tuple"])
def test_nothing_gives_nothing(items: list[int]) -> None:
    assert list(in_order(items, str)) == []


def test_an_error_is_the_items_own() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order([1, 0], lambda x: 1 / x))
