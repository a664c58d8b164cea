"""Stage ``ceilings`` of ``benchmarks.device_check``: the rates against which everything else is read.

Products by torch and by our own kernels at K so large that only their loop counts, copies through memory and inside
L2, and the floor of a kernel in a CUDA graph. Codes are bell-shaped and uniform where power depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.built_case import call_arguments, why_wrong
from benchmarks.clock_timer import quick_timer
from benchmarks.device_check import CheckFailed, StageRun
from benchmarks.kernel_backend import KernelBackend
from benchmarks.kernel_bench import CHANNELS, TOKENS, linear_cases
from benchmarks.kernel_cases import LinearCase
from benchmarks.kernel_stages import kernel_backends, need_gpu
from benchmarks.microbench import GraphTimer, Row, Timer, clocks
from benchmarks.row_cases import RowCase
from vitq_kernels.ops import use_backend
from vitq_kernels.roofline import Peaks, peaks_of
from vitq_kernels.stopwatch import Call

DATA = ("gaussian", "uniform")
BEST_PLANS = 3  # of the cost model's order, of which the fastest is the loop's rate
HEADLINE_PEAKS = ("int8_tops", "f16_tops", "gbps")  # of what ``best`` finds: a roofline
RESERVE_S = 4.0  # left when measuring stops


@dataclass(frozen=True)
class Sizes:
    """What is multiplied and copied."""

    product: int = 8192  # of square products
    loop: tuple[int, int, int] = (4096, 4096, 16384)  # M, N, K
    batches: tuple[int, ...] = (64, 8, 1)  # of ViT-B's layers
    tokens: int = TOKENS
    channels: int = CHANNELS
    copied_bytes: int = 1 << 30
    l2_bytes: int = 1 << 20

    @property
    def within_l2_bytes(self) -> int:
        """Source and target together take half of it."""
        return self.l2_bytes // 4


TINY = Sizes(32, (16, 32, 256), (1,), 5, 16, 1 << 16, 1 << 14)  # of a dry run


@dataclass(frozen=True)
class Ceiling:
    """A call, and how much of ``unit`` (10^12 operations or 10^9 bytes a second) it does in a microsecond."""

    name: str
    call: Call
    amount: float = 0.0  # 0: its time is what counts
    unit: str = "us"

    def row(self, timer: Timer) -> Row:
        """Measures it."""
        found = timer([self.call])
        value = self.amount / found.us if self.amount else found.us
        return {"ceiling": self.name, "value": value, "unit": self.unit, **vars(found)}


def ceilings(run: StageRun) -> None:
    """Every ceiling of the device."""
    if run.dry_run:
        Measured(run, "cpu", quick_timer(), TINY, None).everything(kernel_backends(run))
        return
    need_gpu(run)
    properties = torch.cuda.get_device_properties(0)
    run.keep(gpu=properties.name, l2_bytes=properties.L2_cache_size, datasheet=str(peaks_of(properties.name)))
    sizes = Sizes(l2_bytes=properties.L2_cache_size)
    Measured(run, "cuda", GraphTimer(), sizes, peaks_of(properties.name)).everything(kernel_backends(run))


class Measured:
    """One run of the stage; rows are kept as they come."""

    def __init__(self, run: StageRun, device: str, timer: Timer, sizes: Sizes, peaks: Peaks | None) -> None:
        self.run, self.device, self.timer, self.sizes, self.peaks = run, device, timer, sizes, peaks
        self.rows: list[Row] = []
        self.wrong: list[Row] = []
        self.left_out: list[str] = []

    def everything(self, backends: Sequence[KernelBackend]) -> None:
        """Measures in the order of what the others are read by.

        Raises:
            CheckFailed: a kernel of ours gave wrong numbers, which is not timed, or time ran out.
        """
        for one in products(self.device, self.sizes.product):
            one.row(self.timer)  # about a second of work: an idle GPU has low clocks
        self.run.keep(clocks_before=clocks())
        self.torch(products(self.device, self.sizes.product))
        for backend in backends[:1]:
            self.loops(backend)
        self.run.keep(clocks_after_products=clocks())
        self.torch(copies(self.device, self.sizes.copied_bytes, self.sizes.within_l2_bytes))
        self.torch(layers(self.device, self.sizes))
        self.torch(floors(self.device, backends))
        for backend in backends[1:]:  # which may have to compile first
            self.loops(backend)
        self.run.keep(clocks_after=clocks())
        reasons = [f"wrong: {', '.join(row['case'] for row in self.wrong)}"] if self.wrong else []
        reasons += [f"time ran out before {', '.join(self.left_out)}"] if self.left_out else []
        if reasons:
            raise CheckFailed("; ".join(reasons))

    def torch(self, wanted: Iterable[Ceiling]) -> None:
        """Measures what needs no check."""
        for one in wanted:
            if self.in_time(one.name):
                self.keep(one.row(self.timer))

    def loops(self, backend: KernelBackend) -> None:
        """Our own integer product with little around it: the model's best plans, each checked before it is timed."""
        m, n, k = self.sizes.loop
        gpu, count = backend.gpu(self.device), 1 if backend.compiles else BEST_PLANS
        for data in DATA:
            case = LinearCase(f"{m}x{n}x{k}", "linear_codes", 0, m, n, k, (8,), data)
            if not self.in_time(f"{backend.name} {case.case} {data}"):
                continue
            built = case.build(self.device)
            for plan, _ in backend.rank(backend.problem(case.layer, gpu), gpu)[:count]:
                name = f"our loop, {backend.name}, {case.case} W8A8, {data} codes, {plan}"
                with backend.forced(plan):
                    why = why_wrong(built, backend.name, self.device)
                    if why:
                        self.wrong.append({"case": name, "why": why})
                        self.run.keep(wrong=self.wrong)
                        continue
                    with use_backend(backend.name):
                        given = call_arguments(built, self.device)
                        call = _bound(torch.ops.vitq.linear_codes, given)
                        self.keep(Ceiling(name, call, 2e-6 * m * n * k, "TOPS").row(self.timer))

    def in_time(self, name: str) -> bool:
        """Whether there is time for another; writes down if not."""
        if self.run.left_s < RESERVE_S:
            self.left_out.append(name)
            return False
        return True

    def keep(self, row: Row) -> None:
        """Adds a row, with its part of the datasheet's rate, and what follows from all of them."""
        peak = self.datasheet(row)
        self.rows.append({**row, "pct_of_datasheet": 100 * row["value"] / peak if peak else None})
        found = best(self.rows)
        text = ", ".join(f"{name} {'not measured' if x is None else format(x, '.4g')}" for name, x in found.items())
        self.run.keep(headline=text, **found, rows=self.rows)

    def datasheet(self, row: Row) -> float | None:
        """The rate that a datasheet has for a row."""
        if self.peaks is None or "inside L2" in row["ceiling"]:
            return None
        products = self.peaks.f16_tops if row["ceiling"].startswith("bf16") else self.peaks.int8_tops
        return {"TOPS": products, "GB/s": self.peaks.gbps}.get(row["unit"])


def best(rows: Sequence[Row]) -> dict[str, float | None]:
    """The ceilings by what they are of: the largest rate that anyone reached, the least time of a kernel."""

    def largest(unit: str, *words: str) -> float | None:
        values = [r["value"] for r in rows if r["unit"] == unit and any(word in r["ceiling"] for word in words)]
        return max(values, default=None)

    return {
        "int8_tops": largest("TOPS", "our loop", "_int_mm"),
        "f16_tops": largest("TOPS", "bf16"),
        "gbps": largest("GB/s", "through memory"),
        "l2_gbps": largest("GB/s", "inside L2"),
        "graph_floor_us": min((r["value"] for r in rows if r["unit"] == "us"), default=None),
    }


def products(device: str, size: int) -> Iterator[Ceiling]:
    """torch's, square, on codes of both kinds."""
    ops = 2e-6 * size**3
    for data in DATA:
        a = _codes(data, (size, size), device)
        x = a.to(torch.bfloat16) / 64
        yield Ceiling(f"bf16 {size}^3, {data}", _bound(torch.mm, (x, x.t())), ops, "TOPS")
        yield Ceiling(f"_int_mm {size}^3, {data} codes", _bound(torch._int_mm, (a, a.t())), ops, "TOPS")


def layers(device: str, sizes: Sizes) -> Iterator[Ceiling]:
    """cuBLAS in bf16 at the shapes of a ViT."""
    for batch in sizes.batches:
        for case in linear_cases(batch, sizes.tokens, sizes.channels, widths=((8,),)):
            shapes = ((case.m, case.k), (case.n, case.k), (case.n,))
            given = tuple(torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes)
            name = f"bf16 F.linear {case.case} {case.m}x{case.n}x{case.k}, batch {batch}, gaussian"
            yield Ceiling(name, _bound(F.linear, given), 2e-6 * case.m * case.n * case.k, "TOPS")


def copies(device: str, copied_bytes: int, within_l2_bytes: int) -> Iterator[Ceiling]:
    """Read and written, of random bytes."""
    for count, where in ((copied_bytes, "through memory"), (within_l2_bytes, "inside L2")):
        source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
        name = f"copy of {count / (1 << 20):.4g} MiB {where}, read and written"
        yield Ceiling(name, _bound(torch.empty_like(source).copy_, (source,)), 2e-3 * count, "GB/s")


def floors(device: str, backends: Sequence[KernelBackend]) -> Iterator[Ceiling]:
    """The least time of a kernel inside a graph of many: one of torch's, and one of each of ours, on one row."""
    yield Ceiling("kernel of one element in a graph", _bound(torch.zeros(1, device=device).add_, (1,)))
    for backend in backends:
        built = RowCase("quantize", 1, 1, 64).build(device)
        for way, context in {"": nullcontext, **backend.ways_to_launch}.items():
            call = _bound(torch.ops.vitq.quantize, call_arguments(built, device), backend.name, context)
            yield Ceiling(f"quantize of one row, {backend.name}, in a graph{way and ', '}{way}", call)


def _bound(
    function: object,
    given: Sequence[object],
    backend: str = "",
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Call:
    assert callable(function)
    if not backend:
        return lambda: function(*given)

    def call() -> object:
        with use_backend(backend), context():
            return function(*given)

    return call


def _codes(data: str, shape: tuple[int, ...], device: str) -> Tensor:
    if data == "gaussian":
        return (32 * torch.randn(shape, device=device)).round_().clamp_(-128, 127).to(torch.int8)
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
