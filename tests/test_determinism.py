"""Same seed, same bits, same file: the whole line in two processes that share nothing, not even their hash seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

LINE = """
import sys
import vitq_kernels as vitq
from small_vits import small_vit, variant_images

strategy, out = sys.argv[1:]
model, images = small_vit(), variant_images()
rules = {"lrp-qvit": "chefer", "mix-qvit": "chefer", "fisher": "fisher"}.get(strategy, "attnlrp")
measured = [vitq.sensitivity(model, images, candidates=(2, 3, 4), pairs=True)] if strategy == "mix-qvit" else ()
bits = vitq.allocate(
    model,
    vitq.relevance(model, images, method=rules),
    vitq.Budget(mean_weight_bits=3),
    images=images,
    strategy=strategy,
    sensitivity=measured,
    activation_bits=4,
    seed=7,
)
vitq.save(vitq.quantize(model, images, bits), out)
"""


@pytest.mark.parametrize("strategy", ["relevance", "fisher", "random", "mix-qvit"])
def test_two_processes_write_the_same_model(strategy: str, tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", LINE, strategy, str(tmp_path / f"{seed}.safetensors")],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for seed in (1, 2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    metadata = [safe_open(tmp_path / f"{seed}.safetensors", framework="pt").metadata() for seed in (1, 2)]
    assert metadata[0]["sha256"] == metadata[1]["sha256"]
    assert metadata[0] == metadata[1]
