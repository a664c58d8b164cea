"""The roofline: what a device can do at most, what a call needs of it, and how long it takes at least."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from vitq_kernels.stopwatch import Call, waiter, wall_times_us

ROUNDS = 5


@dataclass(frozen=True)
class Peaks:
    """Rates of a device, dense: of a GPU by its datasheet, or as they were measured.

    TOPS are 10^12 operations a second, GB/s 10^9 bytes a second.
    """

    int8_tops: float
    f16_tops: float
    gbps: float


# By a name of nvidia-smi. Other variants of these chips (PCIe, NVL, 40 GB, GH200) have other numbers: none, not wrong.
PEAKS = (
    (r"H200$", Peaks(1979, 989, 4800)),
    (r"H100 80GB HBM3$", Peaks(1979, 989, 3350)),
    (r"A100.*80GB", Peaks(624, 312, 2000)),
)


def peaks_of(gpu: str) -> Peaks | None:
    """The peaks of a GPU by its name, None where they are not known here."""
    found = (peaks for pattern, peaks in PEAKS if re.search(rf"\b{pattern}", gpu))
    return next(found, None)


@dataclass(frozen=True)
class Work:
    """What a call does; a rate in TOPS where it multiplies matrices, else in GB/s.

    ``f16_ops`` are operations of float products: on a GPU half precision, elsewhere that of ``Peaks.f16_tops``.
    """

    int8_ops: float = 0.0
    f16_ops: float = 0.0
    bytes: float = 0.0
    int4_ops: float = 0.0  # at twice the int8 peak, on GPUs that have 4-bit products

    def rates(self, us: float, peaks: Peaks | None) -> dict[str, Any]:
        """``tops`` or ``gbps``, and the part of the time that the peak rates would need."""
        ops = self.int4_ops + self.int8_ops + self.f16_ops
        rate = {"tops": ops / us / 1e6} if ops else {"gbps": self.bytes / us / 1e3}
        if peaks is None:
            return {**rate, "pct_of_peak": None}
        floor_us = self.ops_us(peaks) if ops else self.bytes / peaks.gbps / 1e3
        return {**rate, "pct_of_peak": 100 * floor_us / us}

    def ops_us(self, peaks: Peaks) -> float:
        """Microseconds that the products need at the peak rates."""
        int8_ops = self.int8_ops + self.int4_ops / 2
        return (int8_ops / peaks.int8_tops + self.f16_ops / peaks.f16_tops) / 1e6

    def floor_us(self, peaks: Peaks, from_memory: bool) -> float:
        """Microseconds that the slower of products and, if they come from memory, bytes need at the peak rates."""
        return max(self.ops_us(peaks), self.bytes / peaks.gbps / 1e3 if from_memory else 0.0)

    def pct_of_roofline(self, us: float, peaks: Peaks, from_memory: bool) -> float | None:
        """``floor_us`` as a part of a time; None where it is nothing."""
        floor_us = self.floor_us(peaks, from_memory)
        return 100 * floor_us / us if floor_us else None


def measured_peaks(device: str, dtype: torch.dtype) -> Peaks:
    """What torch reaches here with large products and copies, the best of a few, in less than a second.

    A datasheet has no rates of a CPU, and none of many GPUs. Of int8 it is ``torch._int_mm``, which on Hopper is no
    ceiling for kernels on wgmma.

    Args:
        device: where it is measured.
        dtype: of the float products.
    """
    size, copied_bytes = (8192, 1 << 30) if torch.device(device).type == "cuda" else (768, 1 << 26)
    x = torch.randn(size, size, device=device).to(dtype)
    a = torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device)
    source = torch.randint(0, 256, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: list[Call] = [lambda: torch._int_mm(a, a.t()), lambda: x @ x, lambda: target.copy_(source)]
    for call in calls:
        call()
    int8_us, float_us, copy_us = (min(times) for times in wall_times_us(calls, ROUNDS, waiter(device)))
    ops = 2e-6 * size**3
    return Peaks(ops / int8_us, ops / float_us, 2e-3 * copied_bytes / copy_us)
