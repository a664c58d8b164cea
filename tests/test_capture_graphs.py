"""The graphs of vitq.capture: threads and streams, recorded on the CPU (recorded_graphs.py), and on a GPU."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from recorded_graphs import RecordedCuda
from small_vits import small_vit, variant_images, variant_quantized
from test_capture import Calls, Spy, rows
from torch import Tensor

import vitq_kernels as vitq
from tests.numerics import assert_bitwise_equal

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded graphs"])
def test_threads_take_turns(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if recorded:
        RecordedCuda().install(monkeypatch)
    model = variant_quantized("class-token")
    images = variant_images(count=12)
    expected = model(images)
    fast = vitq.capture(model, (1, 4))
    together = threading.Barrier(4)

    def job(worker: int) -> None:
        together.wait()
        for start in range(6):
            part = slice(start, start + 1 + worker)
            assert_bitwise_equal(fast(images[part]), expected[part])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(job, range(4)))


def test_a_first_call_from_several_threads_captures_once() -> None:
    spy, together = Spy(), threading.Barrier(4)
    fast = vitq.capture(spy, (3,))

    def job(seed: int) -> None:
        together.wait()
        assert_bitwise_equal(fast(rows(2, seed)), 2 * rows(2, seed))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(job, range(4)))
    assert len(spy.seen) == 1 + 4


# --- graphs, recorded on the CPU ----------------------------------------------------------------------------------


@pytest.fixture
def recorded_cuda(monkeypatch: pytest.MonkeyPatch) -> RecordedCuda:
    cuda = RecordedCuda()
    cuda.install(monkeypatch)
    return cuda


def test_buckets_are_warmed_up_and_captured_on_a_side_stream_the_largest_first(recorded_cuda: RecordedCuda) -> None:
    called: list[tuple[int, str]] = []

    def model(x: Tensor) -> Tensor:
        called.append((len(x), recorded_cuda.current.name))
        return x

    vitq.capture(Calls(model), (1, 4, 2), rows(1))
    assert called == [(size, "side 1") for size in (4, 2, 1) for _ in range(4)]  # three warm-ups and the capture
    capture = ("capture", "side 1", "the pool", "thread_local")
    before, after = ("wait for", "side 1", "default"), ("wait for", "default", "side 1")
    assert recorded_cuda.log == [before, capture, capture, capture, after]


def test_a_replay_calls_no_python_and_runs_between_wait_and_record_on_the_callers_stream(
    recorded_cuda: RecordedCuda,
) -> None:
    spy = Spy()
    fast = vitq.capture(spy, (1, 4), rows(1))
    recorded_cuda.log.clear()
    spy.seen.clear()
    with recorded_cuda.stream(recorded_cuda.new_stream()):
        assert_bitwise_equal(fast(rows(9)), 2 * rows(9))
    replays = [("replay", "side 2")] * 3
    assert recorded_cuda.log == [("wait", "side 2"), *replays, ("record", "side 2")]
    assert spy.seen == []


def test_recorded_graphs_of_a_quantized_vit_give_the_same_bits(recorded_cuda: RecordedCuda) -> None:
    model, images = variant_quantized("class-token"), variant_images(count=7)
    expected = model(images)
    fast = vitq.capture(model, (1, 4))
    for count in (7, 1, 3, 4):
        assert_bitwise_equal(fast(images[:count]), expected[:count])


def test_a_bucket_that_fails_is_named_and_leaves_the_stream_as_it_was(recorded_cuda: RecordedCuda) -> None:
    def waits(x: Tensor) -> Tensor:
        if ("capture", "side 1", "the pool", "thread_local") in recorded_cuda.log and len(x) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(RuntimeError, match="capture: batch size 2 cannot be captured: operation not permitted"):
        vitq.capture(Calls(waits), (2, 4), rows(1))
    assert recorded_cuda.current.name == "default"


def test_what_a_graph_reads_outlives_its_replacement() -> None:
    array = np.ones(3, np.float32)
    model = Calls(lambda x: x)
    model.tables = {"a": [torch.from_numpy(array)]}  # an attribute, no buffer
    memory = weakref.ref(array)
    fast = vitq.capture(model, (1,), rows(1))
    del array, model.tables
    assert memory() is not None
    del fast
    gc.collect()
    assert memory() is None


# --- on a GPU -----------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_graphs_of_a_quantized_vit_give_the_same_bits(dtype: torch.dtype) -> None:
    model = vitq.quantize(small_vit(), variant_images(count=8)).to("cuda", dtype)
    images = variant_images(count=11).to("cuda", dtype)
    fast = vitq.capture(model, (1, 4, 8))
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in images])
    for count in (11, 1, 3, 4, 8, 9):
        assert_bitwise_equal(fast(images[:count]), expected[:count])


@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["float", "replace_linears"])
def test_graphs_of_other_models_give_what_an_eager_call_of_the_bucket_gives(dynamic: bool) -> None:
    model = vitq.replace_linears(small_vit(), weight_bits=8) if dynamic else small_vit()
    model = model.cuda()
    images = variant_images(count=8).cuda()
    fast = vitq.capture(model, (1, 4, 8))
    with torch.no_grad():
        for count in (8, 1, 4, 8):
            torch.testing.assert_close(fast(images[:count]), model(images[:count]), rtol=1e-3, atol=1e-3)


@needs_gpu
def test_calls_on_several_streams_and_threads_do_not_mix() -> None:
    model = vitq.quantize(small_vit(), variant_images(count=8)).cuda()
    images = variant_images(count=16).cuda()
    with torch.no_grad():
        expected = model(images)
    fast = vitq.capture(model, (1, 4))
    torch.cuda.synchronize()

    def job(worker: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = []
            for start in range(12):
                late = torch.zeros_like(images[: 1 + worker])
                torch.cuda._sleep(100_000)  # inputs come late on the stream of the caller
                late.copy_(images[start : start + 1 + worker])
                results.append(fast(late))
        stream.synchronize()
        for start, result in enumerate(results):
            assert_bitwise_equal(result, expected[start : start + 1 + worker])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(job, range(4)))


@needs_gpu
def test_a_model_that_waits_for_the_gpu_is_refused() -> None:
    """In a process of its own: torch may not capture again after it."""
    program = """
import torch, vitq_kernels as vitq
class Waits(torch.nn.Module):
    def forward(self, x):
        return x * float(x.sum())
vitq.capture(Waits().eval(), (1, 4), torch.ones(1, 3, device="cuda"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "RuntimeError: capture: batch size 4 cannot be captured: " in done.stderr


@needs_gpu
def test_other_buckets_and_eager_calls_do_not_disturb_a_replay() -> None:
    model = vitq.quantize(small_vit(), variant_images(count=8)).half().cuda()
    images = variant_images(count=8).half().cuda()
    fast = vitq.capture(model, (1, 2, 8))
    with torch.no_grad():
        expected = model(images)
        for count in (8, 1, 2, 8, 1):
            model(images[:3])
            torch.full((1 << 20,), 7.0, device="cuda")  # where freed memory of a graph would be handed out
            assert_bitwise_equal(fast(images[:count]), expected[:count])
