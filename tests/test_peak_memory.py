"""Peak memory counts what is held at once, and stays."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from vitq_kernels.peak_memory import made_with_bytes, peak_bytes_of, running_bytes

MB = 1 << 20
SLACK = 4096  # small change of the ops


def block() -> torch.Tensor:
    return torch.empty(MB, dtype=torch.uint8)


def one_after_another() -> None:
    for _ in range(4):
        block()


def at_once() -> None:
    a, b = block(), block()
    c = a + b
    del a
    c.add_(block())


@pytest.mark.parametrize(
    ("call", "blocks"), [(one_after_another, 1), (at_once, 3), (lambda: None, 0)], ids=["freed", "at once", "nothing"]
)
def test_the_peak_is_the_worst_moment(call: Callable[[], None], blocks: int) -> None:
    assert blocks * MB <= peak_bytes_of(call, "cpu") <= blocks * MB + SLACK


def test_memory_that_stays_is_told_from_what_is_freed() -> None:
    def make() -> list[torch.Tensor]:
        at_once()
        return [block(), block()]

    made, held = made_with_bytes(make, "cpu")
    assert len(made) == 2
    assert 2 * MB <= held <= 2 * MB + SLACK


def test_custom_ops_and_their_temporaries_count() -> None:
    x = torch.randn(64, 1024)
    scale, zero_point = torch.ones(1024), torch.zeros(1024, dtype=torch.int32)
    codes_bytes = 64 * 1024
    peak = peak_bytes_of(lambda: torch.ops.vitq.quantize(x, scale, zero_point, 8), "cpu")
    assert peak > 4 * codes_bytes  # the cpu backend's float32 product is larger than the codes that come out


def test_events_are_summed_in_order_of_time() -> None:
    def event(ts: float, size: int, name: str = "[memory]", device: int = 0) -> dict[str, object]:
        return {"name": name, "ts": ts, "args": {"Bytes": size, "Device Type": device}}

    others = [event(2.5, 999, "aten::add"), event(2.6, 999, device=1)]
    events = [event(3, -70), event(1, 50), event(2, 20), *others, event(4, 10)]
    assert running_bytes(events) == [0, 50, 70, 0, 10]
    assert running_bytes([{"name": "aten::add"}]) == [0]


def test_an_error_in_the_call_is_its_own_and_stderr_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        peak_bytes_of(lambda: 1 / 0, "cpu")
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
