"""Where and by what the rows of tests were measured, and whole models with times that are easy to follow."""

from __future__ import annotations

from benchmarks.measured_case import Setting
from tests.fake_timer import FakeTimer
from vitq_kernels.model_bench import ModelBench, ModelTime
from vitq_kernels.roofline import Peaks

GPU = "NVIDIA H200"
SETTING = Setting("cuda", GPU, FakeTimer(), Peaks(1979, 989, 4800), 1000, ("cold", "hot"), "580.1")
ORIGIN = {
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "git_sha": "abc1234",
    "semantics_version": "1",
    "timestamp": "2026-11-26T12:00:00+00:00",
}
MODELS_FOUND = ModelBench(
    "NVIDIA H200",
    "cuda",
    (
        ModelTime("ours", 8, (1e3, 2e3, 3e3, 2e3, 2e3), 40_000_000),
        ModelTime("ours-captured", 8, (1e3,) * 5, 50_000_000),
        ModelTime("float16", 8, (4e3, 4e3, 9e3, 4e3, 4e3), 80_000_000),
        ModelTime("ours", 1, (1e3,), 30_000_000),
    ),
    {"float16-compiled": "no compiler"},
)
