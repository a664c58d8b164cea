"""Timing arithmetic of ``benchmarks.microbench``; the timer itself needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.microbench import GraphTimer, Timing, copied, rotated, timing
from vitq_kernels.roofline import Peaks, Work, peaks_of

PEAKS = Peaks(1979, 989, 4800)


@pytest.mark.parametrize(
    ("gpu", "gbps"),
    [
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA A100-SXM4-80GB", 2000),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L4", None),
    ],
)
def test_peaks_by_name(gpu: str, gbps: float | None) -> None:
    peaks = peaks_of(gpu)
    assert (peaks.gbps if peaks else None) == gbps


def test_rates() -> None:
    qkv = Work(int8_ops=2.0 * 12608 * 2304 * 768).rates(38.0, PEAKS)  # a row of kernels.md 5.1
    assert (qkv["tops"], qkv["pct_of_peak"]) == (pytest.approx(1174, abs=1), pytest.approx(59.3, abs=0.1))
    assert Work(bytes=48e6).rates(20.0, PEAKS) == {"gbps": 2400.0, "pct_of_peak": 50.0}
    assert Work(int8_ops=1979e6, f16_ops=989e6).rates(4.0, PEAKS)["pct_of_peak"] == 50.0
    assert Work(bytes=48e6).rates(20.0, None)["pct_of_peak"] is None


def test_percentiles() -> None:
    assert timing([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.5, 2.0, 5.0)


def test_copies_keep_strides_and_shared_storage() -> None:
    qkv = torch.arange(24).view(2, 3, 4)
    q, k, v = copied(tuple(qkv.unbind(1)))
    assert torch.equal(k, qkv[:, 1])
    assert k.stride() == (12, 1)
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    assert [t.shape for t in copied([torch.empty(3, 0), torch.empty(5, 0)])] == [(3, 0), (5, 0)]


def test_buffers_push_each_other_out() -> None:
    x = torch.zeros(100, dtype=torch.int8)
    calls = rotated(lambda x: x + 1, [x], l2_bytes=1000)  # 200 bytes a call
    assert len(calls) == 15
    x += 1
    assert [int(call()[0]) for call in calls] == [2] + [1] * 14


class CountingTimer(GraphTimer):
    """Graphs are numbers of calls, each of which takes so many microseconds."""

    def __init__(self, us: float) -> None:
        super().__init__(replays=4)
        self.us, self.captured, self.replayed = us, [], 0

    def warm_up(self, calls: Sequence[Callable[[], object]]) -> None:
        calls[0]()

    def capture(self, calls: Sequence[Callable[[], object]], count: int) -> int:
        self.captured.append(count)
        return count

    def replay(self, graphs: Sequence[int]) -> list[float]:
        self.replayed += len(graphs)
        return [self.us * graph for graph in graphs]


@pytest.mark.parametrize(
    ("us", "buffers", "captured"),
    [(60.0, 2, [10]), (5.0, 1, [10, 80]), (0.5, 1, [10, 400]), (5.0, 90, [90])],
    ids=["long enough", "short", "as many as there may be", "many buffers"],
)
def test_a_graph_is_long_enough(us: float, buffers: int, captured: list[int]) -> None:
    timer = CountingTimer(us)
    assert timer([lambda: None] * buffers).us == pytest.approx(us)
    assert timer.captured == captured


def test_candidates_take_turns_and_each_replays_untimed_first() -> None:
    replayed: list[float] = []

    class Timer(CountingTimer):
        def replay(self, graphs: Sequence[int]) -> list[float]:
            replayed.extend(graphs)
            return [float(graph + 1000 * (i % 2)) for i, graph in enumerate(graphs)]

    timer = Timer(1.0)
    assert timer.together([(10, 10), (20, 5)]) == [[101.0] * 4, [204.0] * 4]
    assert replayed == [10, 10, 20, 20, 20, 20, 10, 10] * 2


def test_a_roofline_is_the_slower_of_products_and_bytes() -> None:
    work = Work(int8_ops=1979e6, bytes=9600e3)  # 1 us and 2 us
    assert work.pct_of_roofline(4.0, PEAKS, from_memory=True) == 50.0
    assert work.pct_of_roofline(4.0, PEAKS, from_memory=False) == 25.0
    assert Work(int4_ops=1979e6).pct_of_roofline(1.0, PEAKS, from_memory=True) == 50.0
    assert Work(bytes=9600e3).pct_of_roofline(4.0, PEAKS, from_memory=False) is None
