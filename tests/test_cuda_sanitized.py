"""The emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import emulated_cuda
from tests.conftest import EMULATED

TESTS = Path(__file__).parent
# Codes of K = 200 and 35 tokens: the last copies of a row and of the tokens would leave their tensors.
RAGGED = """
import torch
from tests.test_cuda_linear import check, linear_case
from vitq_kernels.ops.cuda.extension import module
from vitq_kernels.spec import RowGroups
if {planted}:
    module().plant(unbounded_copies=True)
check(linear_case(RowGroups.uniform(72, 4), 35, 208), "cpu")
print("numbers are right")
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a process that loads the sanitized emulation: Python itself is not built with the sanitizers."""
    module = emulated_cuda.build(sanitize=True)
    runtimes = [
        subprocess.run([emulated_cuda.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    preload = " ".join(done.stdout.strip() for done in runtimes)
    # Python leaks by design; no warning about fibers, whose switches the emulation announces.
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(TESTS.parent)}
    return {**os.environ, **options, EMULATED: str(module), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=TESTS.parent
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "at_most"),
    [
        (["tests/test_ops.py", "-k", "cuda-emulated and values"], 90),
        (["tests/test_cuda_linear.py", "-k", "emulated and not longest_sums"], 45),
        (["tests/test_cuda_norm.py", "-k", "emulated"], 3),
        (["tests/test_cuda_attention.py", "-k", "(head_dim and (33 or 64 or 72)) or (emulated and not head_dim)"], 5),
        (["tests/test_cuda_attention_sm90.py", "-k", "not planted and not needed"], 6),
        (["tests/test_cuda_rows.py", "-k", "emulated and not 16000 and not 8200"], 25),
    ],
    ids=["ops", "linear", "norm", "attention", "attention-sm90", "rows"],
)
def test_no_sanitizer_complains(environment: dict[str, str], selection: list[str], at_most: int) -> None:
    """A sample: a case takes 3 to 10 times as long here, and what it computes is compared without sanitizers too."""
    done = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--at-most", str(at_most), *selection)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True], ids=["as-it-is", "without-the-bound"])
def test_a_copy_beyond_a_tensor_is_caught(environment: dict[str, str], planted: bool) -> None:
    done = run(environment, "-c", RAGGED.format(planted=planted))
    if planted:
        assert done.returncode != 0
        # What lies behind a tensor: its redzone, or memory that was freed.
        assert re.search("AddressSanitizer: heap-(buffer-overflow|use-after-free)", done.stderr), done.stderr[:3000]
        assert "copy_async" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "numbers are right" in done.stdout
