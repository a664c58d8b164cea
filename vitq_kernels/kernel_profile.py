"""Where the time of a forward pass goes: every op with its kernels, its share, and its distance to the roofline.

Each op runs inside a range of torch's profiler, so a GPU's kernels are counted at the op that launched them, whoever
wrote them; on a CPU the op itself is timed. What an op must do at least (operations, bytes of its tensors, each once)
is read from the same call. The model runs eagerly: inside a CUDA graph kernels cannot be told apart, but are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vitq_kernels.peak_memory import silent_profiler
from vitq_kernels.roofline import Peaks, Work
from vitq_kernels.stopwatch import waiter, wall_times_us

ROUNDS = 5
WARM_UP = 2
RANGE = "vitq_profile#"
SHOWN_PCT = 1.0  # ops of a smaller share are one line of the table
KERNELS = 3  # names of the longest kernels of an op


@dataclass(frozen=True)
class ProfiledOp:
    """All calls of an op with the same sizes in a forward pass."""

    # With its sizes: of a linear layer outputs x inputs, of attention heads (x windows) x tokens x channels of a head.
    op: str
    calls: int
    us: float  # of all calls: of their kernels on a GPU, of the ops on a CPU
    floor_us: float  # that the roofline asks for
    kernels: tuple[str, ...] = ()  # on a GPU, the longest first

    @property
    def pct_of_roofline(self) -> float:
        """Above 100 what comes from a cache, at rates of memory."""
        return 100 * self.floor_us / self.us if self.us else 0.0


@dataclass(frozen=True)
class KernelProfile:
    """A forward pass."""

    model: str  # which, for a reader
    device: str
    batch: int
    wall_us: float  # of a forward without the profiler, median
    peaks: Peaks
    ops: tuple[ProfiledOp, ...]  # the longest first
    unattributed_us: float = 0.0  # of kernels that the profiler linked to no op

    @property
    def busy_us(self) -> float:
        """Of all ops; what a forward takes longer is launching and waiting."""
        return sum(op.us for op in self.ops) + self.unattributed_us

    def share(self, op: ProfiledOp) -> float:
        """Of the busy time, in percent."""
        return 100 * op.us / self.busy_us if self.busy_us else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "device": self.device,
            "batch": self.batch,
            "wall_us": self.wall_us,
            "busy_us": self.busy_us,
            "unattributed_us": self.unattributed_us,
            "peaks": vars(self.peaks),
            "ops": [
                {
                    "op": op.op,
                    "calls": op.calls,
                    "us": op.us,
                    "share_pct": self.share(op),
                    "roofline_us": op.floor_us,
                    "pct_of_roofline": op.pct_of_roofline,
                    "kernels": list(op.kernels),
                }
                for op in self.ops
            ],
        }

    def shown(self) -> list[ProfiledOp]:
        """The ops of at least SHOWN_PCT, and the others as one."""
        large = [op for op in self.ops if self.share(op) >= SHOWN_PCT]
        small = [op for op in self.ops if self.share(op) < SHOWN_PCT]
        if not small:
            return large
        totals = sum(op.calls for op in small), sum(op.us for op in small), sum(op.floor_us for op in small)
        return [*large, ProfiledOp(f"{len(small)} others", *totals)]

    def table(self) -> str:
        """For a reader."""
        time = f"{self.busy_us:.0f} us in ops of {self.wall_us:.0f} us a forward, eager"
        lines = [
            f"{self.model}, batch {self.batch}, {self.device}: {time}",
            f"{'share %':>8} {'us':>10} {'calls':>6} {'% of roofline':>14}  op",
        ]
        for op in self.shown():
            kernels = f"  [{', '.join(name[:48] for name in op.kernels)}]" if op.kernels else ""
            lines.append(
                f"{self.share(op):8.1f} {op.us:10.1f} {op.calls:6} {op.pct_of_roofline:14.0f}  {op.op}{kernels}"
            )
        if self.unattributed_us:
            lines.append(
                f"{100 * self.unattributed_us / self.busy_us:8.1f} {self.unattributed_us:10.1f}  kernels of no op"
            )
        rates = self.peaks
        lines.append(f"roofline: {rates.int8_tops:.4g} int8 TOPS, {rates.f16_tops:.4g} float, {rates.gbps:.4g} GB/s")
        return "\n".join(lines)


def profile_forward(
    model: Callable[[Tensor], Tensor], images: Tensor, peaks: Peaks, label: str = "model", rounds: int = ROUNDS
) -> KernelProfile:
    """Profiles a model's forward.

    Args:
        model: on the images' device, eager; its numbers do not matter.
        images: [B, C, H, W] in the model's precision.
        peaks: what the distances are to.
        label: names the model in the result.
        rounds: forwards under the profiler, and as many without; times are medians of each call.

    Raises:
        ValueError: rounds below 1.
        RuntimeError: the calls of a forward are not those of the one before.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = images.device
    wait = waiter(str(device))
    with torch.no_grad():
        for _ in range(WARM_UP):
            model(images)
        (wall,) = wall_times_us([lambda: model(images)], rounds, wait)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        ranges = [_Ranges(number) for number in range(rounds)]
        with silent_profiler(activities) as profiler:
            for one in ranges:
                with one:
                    model(images)
            wait()
    calls = ranges[0].calls
    if any(one.calls != calls for one in ranges):
        raise RuntimeError(f"{label}: the ops of a forward must be the same each time, got others")
    seen = list(profiler.events())
    timed = {event.name: _Timed.of(event, device.type) for event in _ranges_of(seen)}
    ops = _grouped(calls, [[timed[one.name(i)] for one in ranges] for i in range(len(calls))], peaks)
    found_us = sum(one.us for one in timed.values()) / rounds
    every_us = sum(event.device_time_total for event in seen if _is_kernel(event)) / rounds
    left_us = every_us - found_us if device.type == "cuda" and every_us > 1.001 * found_us else 0.0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return KernelProfile(label, name, len(images), statistics.median(wall), peaks, ops, left_us)


@dataclass(frozen=True)
class _OpCall:
    label: str
    work: Work


class _Ranges(TorchDispatchMode):
    """Puts every op of a forward into a range of its own, and writes down what it does."""

    def __init__(self, forward: int) -> None:
        super().__init__()
        self.forward, self.calls = forward, list[_OpCall]()

    def name(self, call: int) -> str:
        """Of the range of a call."""
        return f"{RANGE}{self.forward}#{call}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with record_function(self.name(len(self.calls))):
            result = func(*args, **(kwargs or {}))
        self.calls.append(op_call(func, args, kwargs or {}, result))
        return result


def op_call(func: Any, args: Any, kwargs: Any, result: Any) -> _OpCall:
    """What a call of an op (``torch.ops...``) is named, and does at least."""
    name = func._schema.name.replace("vitq::", "").replace("::", ".")
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if func.is_view or not outputs:
        return _OpCall(name, Work())
    moved = float(sum(_bytes(leaf) for leaf in (*tree_leaves((args, kwargs)), *outputs) if isinstance(leaf, Tensor)))
    ours = func.namespace == "vitq"
    if "attention" in name:
        b, h, s, d = args[0].shape
        windows = (*args[10:11], kwargs.get("windows"))[0] if ours else None
        keys = args[1].shape[-2] if windows is None else windows.shape[1]
        product = 2.0 * b * h * s * keys * d
        work = Work(int8_ops=product, f16_ops=product, bytes=moved) if ours else Work(f16_ops=2 * product, bytes=moved)
        return _OpCall(f"{name} {h}x{s if windows is None else f'{s // keys}x{keys}'}x{d}", work)
    ops = _products(func, args, kwargs, result, outputs[0])
    if not ops:
        return _OpCall(name, Work(bytes=moved))
    channels = outputs[0].shape[1 if "conv" in name else -1]
    work = Work(int8_ops=ops, bytes=moved) if ours else Work(f16_ops=ops, bytes=moved)
    return _OpCall(f"{name} {channels}x{round(ops / 2 / outputs[0].numel())}", work)


def _products(func: Any, args: Any, kwargs: Any, result: Any, first: Tensor) -> float:
    """Operations of an op that multiplies matrices, whose first output is given; ours have the codes first."""
    if func.namespace == "vitq":
        return 2.0 * prod(args[0].shape) * first.shape[-1] if func._schema.name.startswith("vitq::linear") else 0.0
    counter = flop_registry.get(func.overloadpacket)
    return float(counter(*args, **kwargs, out_val=result)) if counter else 0.0


def _bytes(tensor: Tensor) -> int:
    """That a call must move of a tensor; of one that broadcasts, what there is of it."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class _Timed:
    us: float
    kernels: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, event: Any, device: str) -> _Timed:
        """What the profiler has of a range."""
        kernels = tuple((kernel.name, float(kernel.duration)) for kernel in _kernels(event))
        return cls(sum(us for _, us in kernels) if device == "cuda" else float(event.cpu_time_total), kernels)


def _kernels(event: Any) -> Iterator[Any]:
    yield from event.kernels
    for child in event.cpu_children:
        yield from _kernels(child)


def _ranges_of(events: Iterable[Any]) -> Iterator[Any]:
    """Ours, as the CPU sees them; a GPU's trace has each of them a second time."""
    return (event for event in events if event.name.startswith(RANGE) and event.device_type == DeviceType.CPU)


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.name.startswith(RANGE)


def _grouped(calls: Sequence[_OpCall], timed: Sequence[Sequence[_Timed]], peaks: Peaks) -> tuple[ProfiledOp, ...]:
    """Calls of one label together; views and what launches no kernel take no time on a GPU, and are left out."""
    groups: dict[str, list[int]] = {}
    for index, call in enumerate(calls):
        groups.setdefault(call.label, []).append(index)
    found = []
    for label, members in groups.items():
        us = sum(statistics.median(one.us for one in timed[i]) for i in members)
        floor_us = sum(calls[i].work.floor_us(peaks, from_memory=True) for i in members)
        kernels: dict[str, float] = {}
        for i in members:
            for name, each_us in timed[i][0].kernels:
                kernels[name] = kernels.get(name, 0.0) + each_us
        longest = sorted(kernels, key=lambda name: -kernels[name])[:KERNELS]
        if us:
            found.append(ProfiledOp(label, len(members), us, floor_us, tuple(longest)))
    return tuple(sorted(found, key=lambda op: -op.us))
