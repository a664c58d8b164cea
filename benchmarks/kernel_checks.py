"""What must hold of a backend of our own kernels on a GPU: the numbers, whatever tile, stream, graph or size.

The cases are those of the tests. They and the tiles run in several processes: Triton compiles them, and a kernel that
breaks the GPU context of its process breaks one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.built_case import Built, call_arguments, why_wrong
from benchmarks.device_check import CheckFailed, StageRun
from benchmarks.kernel_backend import KernelBackend, Layer, Tile
from benchmarks.kernel_cases import AttentionCase, LinearCase
from benchmarks.kernel_targets import FOUR_BIT
from benchmarks.window_cases import window_cases
from tests.conformance import assert_outputs, check_values, op_arguments, reference_call
from tests.numerics import CODE_KINDS, codes, integers, reals, uniform
from tests.op_cases import ALL_CASES, weight_codes, zero_points
from vitq_kernels.ops import reference, use_backend
from vitq_kernels.packing import pack_weight
from vitq_kernels.spec import RowGroups

KEPT_FAILURES = 20
RESERVE_S = 8.0  # left to the stage when it stops
PARTS = 0.22  # of the time is left to what comes after the cases of the tests
DELAY_CLOCKS = 20_000_000  # about 10 ms on the stream, so that whoever does not wait reads what was there before
# N and K are multiples of nothing convenient.
TILE_UNIFORM = RowGroups.uniform(768, 4)


def _mixed(widths: Sequence[int], group_rows: int) -> RowGroups:
    count = 1024 // group_rows  # the last tile's last group is shorter
    return RowGroups(1000, tuple(itertools.islice(itertools.cycle(widths), count)), group_rows)


# Layers on which every tile is tried, with the kind of their codes. Mixed: windows of 128 rows of at most 3, 6, 4 bits
# and rows of two widths inside every 64, which a layout may store in another order (other widths: the suite's cases);
# "in order": one width in each.
TILE_SHAPES = {
    "mixed": (Layer(197, 1328, _mixed((3, 2, 2, 3, 6, 4, 3, 6, 4, 3, 2, 4), 32)), "extreme"),
    "uniform": (Layer(197, 3072, TILE_UNIFORM), "one_sided"),
    "mixed in order": (Layer(197, 1328, _mixed((6, 4, 3, 2), 64)), "extreme"),
    "4 bits": (Layer(197, 3072, TILE_UNIFORM, input_bits=4), "one_sided"),
    "mixed, 4 bits": (Layer(197, 1328, _mixed((3, 2, 4, 4), 32), input_bits=4), "extreme"),
    # 6 blocks of a cluster; by twos, the last has no rows.
    "LayerNorm": (Layer(197, 1328, RowGroups.uniform(680, 4), "linear_residual_layernorm"), "random"),
    "LayerNorm, mixed": (Layer(197, 1328, _mixed((3, 2, 2, 8), 32), "linear_residual_layernorm"), "extreme"),
}
Task = tuple[str, Any]  # which check, and of what
# Runs a function on tasks, leaves so many seconds, and yields (task, what was wrong) of those that came in time.
Spread = Callable[[Callable[[Task], str], Sequence[Task], float], Iterable[tuple[Task, str]]]

REAL_LINEARS = tuple(
    LinearCase(f"{n}x{k}", "linear_codes", 8, 8 * 197, n, k, widths, "one_sided" if k > n else "uniform")
    for n, k in ((3072, 768), (768, 3072), (768, 768))
    for widths in ((8,), (4,), (3,), (6, 3, 4))
)
REAL_FOUR_BIT = tuple(
    LinearCase(f"{n}x{k}", "linear_codes", 8, 8 * 197, n, k, widths, FOUR_BIT)
    for n, k in ((3072, 768), (768, 3072))
    for widths in ((4,), (4, 2, 3))
)
REAL_ATTENTIONS = (*(AttentionCase(2, s, 12, 64) for s in (197, 577, 1025)), *window_cases(2))


def check_one(task: Task, backend: KernelBackend, device: str = "cuda") -> str:
    """Checks a case of the tests by its number, or a tile of the linear kernel; what was wrong, or nothing."""
    kind, what = task
    broken = _broken(device)
    if broken:
        return f"not run: {broken}"
    try:
        if kind == "case":
            check_values(ALL_CASES[what], backend.name, device, reference_floats=False)
        else:
            check_tile(kind, what, backend, device)
    except Exception as error:  # whatever a kernel does is the result of the check
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def check_tile(shape: str, tile: Tile, backend: KernelBackend, device: str) -> None:
    """Asserts that a layer launched so gives the reference's numbers, and is the problem that it was listed as.

    So 4-bit products are used where the GPU has them and inputs and weight are narrow, and nowhere else.
    """
    case, layer = tile_case(shape), TILE_SHAPES[shape][0]
    with use_backend(backend.name), backend.forced(tile), backend.asked() as problems:
        outputs = getattr(torch.ops.vitq, case.op)(*call_arguments(case, device))
    expected = [backend.problem(layer, backend.gpu(device))]
    assert problems == expected, f"the layer asked for a tile for {problems}, expected {expected}"
    assert_outputs(case, [outputs] if isinstance(outputs, Tensor) else outputs, tile_outputs(shape))


def _broken(device: str) -> str:
    """Why nothing can run in this process any more: after an illegal access every call of CUDA fails."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        return f"an earlier kernel broke the GPU context of the process ({error})".splitlines()[0]
    return ""


@cache
def tile_case(name: str) -> Built:
    """The case on which tiles are tried: adversarial codes, outputs over the whole range."""
    layer, kind = TILE_SHAPES[name]
    m, k, groups = layer.m, layer.k, layer.groups
    a, weight = codes(kind, (m, k), layer.input_bits, seed=51), weight_codes("random", groups, k, seed=52)
    acc = reference.accumulate(a, [weight], None)
    bias_q = integers(-60, 60, (groups.rows,), seed=53) - acc.double().mean(0).int()
    multiplier = 160 * uniform(0.5, 1.5, (groups.rows,), seed=54) / (acc + bias_q).abs().amax(0).clamp_min(1)
    known = {"a": a, "weight": pack_weight(weight, groups), "multiplier": multiplier, "bias_q": bias_q}
    tail: dict[str, Any] = {"zero_point": zero_points((groups.rows,), 8, 55), "bits": 8}
    if layer.op == "linear_residual_layernorm":
        vectors = {vector: uniform(-30, 30, (groups.rows,), seed) for vector, seed in (("gain", 56), ("offset", 57))}
        dtype = torch.float16 if len(set(groups.bits)) == 1 else torch.float32  # the most registers
        tail = {"residual": reals("normal", (m, groups.rows), dtype, seed=58), **vectors, "eps": 1e-6, "bits": 8}
    return Built(layer.op, f"tiles-{name}", known | tail, layer.input_bits)


@cache
def tile_outputs(name: str) -> tuple[Tensor, ...]:
    """What the reference gives of the case."""
    return reference_call(tile_case(name))


def tile_tasks(backend: KernelBackend, device: str = "cuda") -> list[Task]:
    """Every legal tile of the backend's shapes."""
    gpu = backend.gpu(device)
    return [
        (name, tile)
        for name in backend.shapes
        for tile in backend.candidates(backend.problem(TILE_SHAPES[name][0], gpu), gpu)
    ]


class Checks:
    """One run of the checks; counts and failures are kept as they come."""

    def __init__(self, run: StageRun, backend: KernelBackend, device: str = "cuda") -> None:
        self.run, self.backend, self.device = run, backend, device
        self.failures: list[dict[str, str]] = []
        self.counts: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []

    def count(self, part: str, case: str, why: str) -> None:
        """Writes down what came of one check."""
        row = self.counts.setdefault(part, {"checked": part, "passed": 0, "failed": 0, "not_run": 0})
        row["not_run" if why.startswith("not run") else "failed" if why else "passed"] += 1
        if why:
            self.failures.append({"checked": part, "case": case, "why": why})
        self.run.keep(counts=list(self.counts.values()), failures=self.failures[:KEPT_FAILURES])

    def spread(self, spread: Spread, tasks: Sequence[Task], reserve_s: float) -> None:
        """Runs tasks in other processes; those that did not come in time count as not run."""
        waiting = dict.fromkeys(tasks)
        check = partial(check_one, backend=self.backend, device=self.device)
        for task, why in spread(check, tasks, reserve_s):
            del waiting[task]
            self.count(*_label(task), why)
        for task in waiting:
            part, case = _label(task)
            self.left_out.append(f"{part} {case}")
            row = self.counts.setdefault(part, {"checked": part, "passed": 0, "failed": 0, "not_run": 0})
            row["not_run"] += 1
        self.run.keep(counts=list(self.counts.values()), left_out=len(self.left_out))

    def part(self, part: str, case: str, check: Callable[[], str]) -> None:
        """Runs a check here, if there is time."""
        if self.run.left_s < RESERVE_S:
            self.left_out.append(f"{part} {case}")
            return
        try:
            why = check()
        except Exception as error:  # as in check_one
            why = f"{type(error).__name__}: {error}"[:500]
        self.count(part, case, why)

    def conclude(self) -> None:
        """Raises CheckFailed, naming what failed and what was left out."""
        reasons = []
        if self.failures:
            names = ", ".join(f"{row['checked']} {row['case']}" for row in self.failures[:KEPT_FAILURES])
            reasons.append(f"{len(self.failures)} failed: {names}")
        if self.left_out:
            names = ", ".join(self.left_out[:KEPT_FAILURES])
            reasons.append(f"time ran out before {len(self.left_out)} checks: {names}")
        if reasons:
            raise CheckFailed("; ".join(reasons))

    def everything(self, spread: Spread) -> None:
        """All parts: the tests' cases first, the tiles, of which there are most, last."""
        # Kinds of data follow each other in the list and share a kernel: one of each first, so that it compiles once.
        order = sorted(range(len(ALL_CASES)), key=lambda i: i % len(CODE_KINDS))
        self.spread(spread, [("case", i) for i in order], RESERVE_S + PARTS * self.run.limit_s)
        self.part("stream", "block on a stream of its own", self.check_stream)
        self.part("graph", "block replayed with other inputs", self.check_graph)
        narrow = REAL_FOUR_BIT if any(TILE_SHAPES[name][0].input_bits == 4 for name in self.backend.shapes) else ()
        for real in (*REAL_LINEARS, *narrow, *REAL_ATTENTIONS):
            self.part("real sizes", f"{real.op} {real.sizes}", lambda real=real: self.check_real(real))
        self.spread(spread, tile_tasks(self.backend, self.device), RESERVE_S)
        self.conclude()

    def check_real(self, case: LinearCase | AttentionCase) -> str:
        """Bit-identical to the reference on the same GPU."""
        return why_wrong(case.build(self.device), self.backend.name, self.device)

    def check_stream(self) -> str:
        """Everything runs on the current stream: inputs come late on it, and outputs are read on it."""
        with use_backend(self.backend.name):
            block = Block(self.device)
            given = block.input(1)
            expected = block(given)
            late = torch.zeros_like(given)
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(DELAY_CLOCKS)
                late.copy_(given)
                actual = block(late)
            stream.synchronize()
            return "" if torch.equal(actual, expected) else _differing(actual, expected)

    def check_graph(self) -> str:
        """A graph captured on one input and replayed on others gives what eager calls give."""
        with use_backend(self.backend.name):
            block = Block(self.device)
            static = block.input(1)
            block(static)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = block(static)
            for seed in (2, 3):
                static.copy_(block.input(seed))
                captured.zero_()
                graph.replay()
                torch.cuda.synchronize()
                expected = block(block.input(seed))
                if not torch.equal(captured, expected):
                    return f"input {seed}: {_differing(captured, expected)}"
        return ""


class Block:
    """A transformer block of ops: two LayerNorms, four linears of mixed widths, attention, GELU, two residual adds."""

    def __init__(self, device: str, batch: int = 2, s: int = 197, heads: int = 3, head_dim: int = 64) -> None:
        c = heads * head_dim
        self.shape, self.heads, self.device = (batch, s, c), heads, device
        attention = AttentionCase(batch, s, heads, head_dim).build(device)
        self.tables = [v for name, v in attention.arguments.items() if name not in ("q", "k", "v")]
        layers = (
            ("qkv", "linear_codes", 3 * c, c),
            ("proj", "linear_residual", c, c),
            ("fc1", "linear_gelu_codes", 4 * c, c),
            ("fc2", "linear_residual", c, 4 * c),
        )
        self.tails: dict[str, tuple[Any, ...]] = {}
        for name, op, n, k in layers:
            built = LinearCase(name, op, batch, batch * s, n, k, (6, 3, 4)).build(device)
            self.tails[name] = op_arguments(built, device)[1:]  # prepared weight, layout, and what follows
        self.norm = (torch.full((c,), 40.0, device=device), torch.full((c,), 0.25, device=device), 1e-6, 8)

    def input(self, seed: int) -> Tensor:
        """A residual stream, float16 [B, S, C]."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.shape, generator=generator, device=self.device).half()

    def __call__(self, x: Tensor) -> Tensor:
        """The residual stream after the block."""
        ops, (b, s, c) = torch.ops.vitq, self.shape
        qkv = ops.linear_codes(ops.layernorm(x, *self.norm), *self.tails["qkv"])
        q, k, v = qkv.view(b, s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = ops.linear_residual(ops.attention(q, k, v, *self.tables), *self.tails["proj"][:-1], x)
        hidden = ops.linear_gelu_codes(ops.layernorm(x, *self.norm), *self.tails["fc1"])
        return ops.linear_residual(hidden, *self.tails["fc2"][:-1], x)


def _differing(actual: Tensor, expected: Tensor) -> str:
    return f"{int((actual != expected).sum())} of {actual.numel()} values differ"


def _label(task: Task) -> tuple[str, str]:
    kind, what = task
    return (ALL_CASES[what].op, ALL_CASES[what].label) if kind == "case" else (f"tiles, {kind}", str(what))
