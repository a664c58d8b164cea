"""``vitq tune``: measures the tiles of a model's linear layers on this machine's GPU and keeps the fastest.

Every backend that has a choice would be here; so far it is Triton's. A tile is measured on the layer's own arguments,
and only after its output was bit for bit that of the tile which the cost model prefers. Whether that one is right is
for the tests and ``benchmarks.device_check`` to say.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitq_kernels.files import write_text
from vitq_kernels.ops.backends import BACKENDS, BackendUnavailableError, use_backend

Timer = Callable[[Callable[[], object]], float]  # microseconds of a call
WARM_UP, REPEATS = 3, 20
REPLAYS = 10  # calls between two events: a launch from Python takes longer than a small kernel


@dataclass(frozen=True)
class Tuned:
    """A linear layer's problem: what was measured, and what the model had said."""

    problem: str  # as the file of tiles names it
    tile: str
    us: float
    model_tile: str
    model_us: float  # measured time of the model's tile

    @property
    def speedup_x(self) -> float:
        """Over the tile that the model prefers."""
        return self.model_us / self.us


class WrongNumbersError(RuntimeError):
    """Two tiles of one kernel disagree: a fault of the kernel, its compiler or the GPU."""


def explain(run: Callable[[], object], gpu: str, most: int = 5) -> list[str]:
    """What the cost model thinks of a model's linear layers on a GPU that need not be there.

    Args:
        run: calls the model, on any device; nothing is computed.
        gpu: a name of ``tiles.ARCHITECTURES``.
        most: tiles a layer.
    """
    from vitq_kernels.ops.triton.launch import recorded_launches
    from vitq_kernels.ops.triton.tiles import named_device, ranking
    from vitq_kernels.ops.triton.tuned import asked

    device = named_device(gpu)
    with recorded_launches(device), asked() as problems, use_backend("triton"):
        run()
    return [ranking(problem, device, most) for problem in dict.fromkeys(problems)]


def tune(
    run: Callable[[], object],
    most: int = 12,
    timer: Timer | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tuned]:
    """Measures the ``most`` best tiles by the model for each different linear layer, and writes the file of tiles.

    Args:
        run: calls the model on the GPU (its images decide the numbers of tokens).
        most: tiles a layer.
        timer: instead of CUDA events.
        progress: is told (tiles measured, tiles in all).

    Raises:
        BackendUnavailableError: the Triton backend does not run here.
        WrongNumbersError: a tile gives other numbers than another; nothing is written.
        RuntimeError: no tile of a layer runs; nothing is written.
        ValueError: the file of tiles is none; it stays as it is.
    """
    if timer is None:
        require_gpu()
    from vitq_kernels.ops.triton import tuned
    from vitq_kernels.ops.triton.launch import device_of
    from vitq_kernels.ops.triton.tiles import rank

    calls = _linear_calls(run)
    found, tiles, done = [], {}, 0
    device = device_of(next(iter(calls.values()))[1][0])
    plans = {problem: [tile for tile, _ in rank(problem, device)[:most]] for problem in calls}
    total = sum(map(len, plans.values()))
    for problem, (op, arguments) in calls.items():
        expected: Tensor | None = None
        times: dict[Any, float] = {}
        for tile in plans[problem]:
            with tuned.forced(tile), use_backend("triton"):
                try:
                    out = op(*arguments)
                    expected = out if expected is None else expected
                    if not torch.equal(out.view(torch.uint8), expected.view(torch.uint8)):
                        first = plans[problem][0]
                        raise WrongNumbersError(f"{tuned.key(problem)}: {tile} gives other numbers than {first}")
                    times[tile] = (timer or _cuda_us)(partial(op, *arguments))
                except WrongNumbersError:
                    raise
                except Exception as error:  # such as too little shared memory: the other tiles are measured
                    warnings.warn(f"{tuned.key(problem)}: {tile} does not run: {error}", stacklevel=2)
            done += 1
            progress(done, total)
        if not times:
            raise RuntimeError(f"{tuned.key(problem)}: none of {len(plans[problem])} tiles runs")
        best = min(times, key=lambda tile: times[tile])
        first = next(iter(times))
        tiles[tuned.key(problem)] = best
        found.append(Tuned(tuned.key(problem), str(best), times[best], str(first), times[first]))
    path = tuned.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, tuned.with_tiles(device.name, tiles))
    tuned.forget()
    return found


def require_gpu() -> None:
    """Raises BackendUnavailableError where the Triton backend has no GPU to measure on."""
    reason = BACKENDS["triton"].why_not("linear_codes", "cuda")
    if reason is not None:
        raise BackendUnavailableError(f"tiles are measured on a GPU: backend triton {reason}")


def tiles_path() -> str:
    """Where ``tune`` keeps its result."""
    from vitq_kernels.ops.triton import tuned

    return str(tuned.path())


def _linear_calls(run: Callable[[], object]) -> dict[Any, tuple[Callable[..., Tensor], tuple[Any, ...]]]:
    """One call of each different problem: the op and its arguments."""
    from vitq_kernels.ops.triton.tuned import asked

    calls: dict[Any, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {}

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with asked() as problems:
                result = func(*args, **(kwargs or {}))
            for problem in problems:
                kept = [t.clone() if isinstance(t, Tensor) else t for t in args]
                calls.setdefault(problem, (func, tuple(kept)))
            return result

    with torch.no_grad(), use_backend("triton"), Keep():
        run()
    if not calls:
        raise ValueError("run must call an integer linear layer, got none")
    return calls


def _cuda_us(call: Callable[[], object]) -> float:
    """Median time of a call in a CUDA graph, without Python's launch overhead; its tensors may stay in L2."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(REPLAYS):
                call()
        times = []
        for _ in range(REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(1e3 * start.elapsed_time(stop) / REPLAYS)
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times)
