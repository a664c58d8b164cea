"""Every shipped Triton configuration: each op called as its launcher is, on tensors without data.

Compiled by ``triton_resources.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vitq_kernels.ops import bit_planes
from vitq_kernels.ops import triton as backend
from vitq_kernels.ops.triton.launch import Device, Launch, recorded_launches
from vitq_kernels.ops.triton.tiles import ARCHITECTURES, Architecture, Problem, Tile, candidates
from vitq_kernels.ops.triton.tuned import forced

COMPILED = (80, 89, 90, 100, 120)  # sm_86 has the tiles and limits of sm_89
WINDOWS = (49, 64, 144, 256, 576)  # places of Swin's windows: sides of 7, 8, 12, 16, 24
MIXED = (3, 4, 6)  # windows of a layer with several widths, as allocations at a mean of 3 to 4 bits have them
TOKENS, ROWS, COLS = 1576, 768, 768  # ViT-B's proj at batch 8; sizes are run-time arguments of one kernel
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Configuration:
    """A kernel as it is shipped: which op, how specialised, for which class of GPUs."""

    op: str
    variant: str  # what the kernel is specialised on
    architecture: Architecture
    run: Callable[[], object]  # calls the op on tensors without data
    tile: Tile | None = None  # of a linear op

    def launches(self) -> list[Launch]:
        """What the op launches on this architecture."""
        device = Device(self.architecture.cc, self.architecture.sms, self.architecture.name)
        with recorded_launches(device) as launches, forced(self.tile):
            self.run()
        return launches


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data: launchers read shapes and dtypes."""
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(widths: tuple[int, ...], rows: int = ROWS, cols: int = COLS) -> list[Tensor]:
    """A prepared weight without data, its windows of these widths."""
    sizes = {"set of widths": sum(1 << b for b in widths), "rows": rows}
    forms = bit_planes.forms(rows, cols)
    return [empty(*(sizes.get(str(s), s) for s in shape), dtype=dtype) for _, dtype, shape in forms]


def linear_call(
    op: str, widths: tuple[int, ...], dtype: torch.dtype = torch.float16, cols: int = COLS, **given: object
) -> None:
    """Calls a linear op of the backend."""
    a, real, integer = empty(TOKENS, cols, dtype=torch.int8), empty(ROWS), empty(ROWS, dtype=torch.int32)
    arguments = {
        "linear_codes": (real, integer, integer, 8),
        "linear_gelu_codes": (real, integer, real, integer, 8, given.get("approximate", "none")),
        "linear_gelu_levels": (
            *(real, integer, real, empty(15), empty(16, dtype=torch.int8)),
            given.get("approximate", "none"),
        ),
        "linear_real": (real, integer, dtype),
        "linear_residual": (real, integer, empty(TOKENS, ROWS, dtype=dtype)),
        "linear_per_token": (real, real, dtype),
    }[op]
    scale = (empty(TOKENS),) if op == "linear_per_token" else ()
    getattr(backend, op)(a, *scale, weight(widths, cols=cols), *arguments)


def linear_configurations(arch: Architecture) -> Iterator[Configuration]:
    """Every tile with every width, and with every epilogue at one width that is unpacked and at 8 bits."""
    device = Device(arch.cc, arch.sms)

    def one(op: str, widths: tuple[int, ...], tile: Tile, label: str, **options: object) -> Configuration:
        names = "/".join(map(str, widths))
        return Configuration(op, f"w{names}, {label}, {tile}", arch, partial(linear_call, op, widths, **options), tile)

    for widths in (*((b,) for b in range(2, 9)), MIXED, tuple(range(2, 9))):
        for tile in candidates(Problem(TOKENS, ROWS, COLS, widths, "residual"), device):
            # More than two splits are the same kernels with other run-time bounds.
            some = widths in ((4,), (8,), MIXED)
            if tile.splits == 1 or (tile.splits == 2 and some):
                yield one("linear_residual", widths, tile, "residual float32", dtype=torch.float32)
            if tile.splits == 1 and some:  # steps of 64 columns
                yield one("linear_residual", widths, tile, "residual float32 K=192", dtype=torch.float32, cols=192)
    for widths in ((4,), (8,)):
        variants: list[tuple[str, str, dict[str, object]]] = [("linear_codes", "codes", {})]
        for form in ("none", "tanh"):
            name = {"none": "gelu", "tanh": "tanh"}[form]
            variants += [
                (f"linear_gelu_{kind}", f"{name}_{kind}", {"approximate": form}) for kind in ("codes", "levels")
            ]
        for dtype in DTYPES:
            named = str(dtype).removeprefix("torch.")
            variants += [(f"linear_{e}", f"{e} {named}", {"dtype": dtype}) for e in ("real", "per_token")]
        variants += [
            ("linear_residual", f"residual {n}", {"dtype": getattr(torch, n)}) for n in ("float16", "bfloat16")
        ]
        for op, label, options in variants:
            problem = Problem(TOKENS, ROWS, COLS, widths, label.split(" ")[0])
            for tile in candidates(problem, device):
                if tile.splits == 1:
                    yield one(op, widths, tile, label, **options)


def attention_configurations(arch: Architecture) -> Iterator[Configuration]:
    """Every head dim with a short and a long sequence, with and without bias, the normalised form, Swin's windows."""
    for head_dim in (32, 64, 80, 96, 128):
        for tokens in (49, 64, 197, 257, 577):
            for biased in (False, True):
                for normalised in (False, True) if head_dim == 64 else (False,):
                    variant = f"S={tokens}, D={head_dim}{', bias' * biased}{', normalised' * normalised}"
                    yield Configuration(
                        "attention", variant, arch, attention_call(tokens, head_dim, biased, normalised)
                    )
    for places in WINDOWS:
        for biased, normalised in ((True, False), (True, True), (False, False)):
            variant = f"windows of {places}, D=32{', bias' * biased}{', normalised' * normalised}"
            call = attention_call(places, 32, biased, normalised, windows=4)
            yield Configuration("attention", variant, arch, call)


def attention_call(
    tokens: int, head_dim: int, biased: bool, normalised: bool, batch: int = 8, heads: int = 12, windows: int = 0
) -> Callable[[], object]:
    """A call of the backend's attention, q, k and v being views of one tensor as in the module.

    With windows ``tokens`` are those of one, and a bias has four patterns.
    """
    qkv = empty(batch, tokens * max(1, windows), 3 * heads * head_dim, dtype=torch.int8)
    q, k, v = qkv.view(batch, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    bias = empty(4 if windows else 1, heads, tokens, tokens, dtype=torch.int32) if biased else None
    places = empty(windows, tokens, dtype=torch.int32) if windows else None
    pattern = empty(windows, dtype=torch.int32) if windows and biased else None
    levels, vectors = empty(heads, 16, dtype=torch.uint8), (empty(heads, head_dim),)
    zero, inv_tau = empty(heads, head_dim, dtype=torch.int32), empty(heads) if normalised else None
    return lambda: backend.attention(q, k, v, empty(heads), levels, *vectors, zero, bias, inv_tau, 8, places, pattern)


def row_configurations(arch: Architecture) -> Iterator[Configuration]:
    """LayerNorm and quantize in every dtype at the widths of ViT-T to ViT-H."""
    for dtype in DTYPES:
        for cols in (192, 384, 768, 1024, 1152, 1216, 1280, 2880, 3072, 11008):
            x, real, zero = empty(TOKENS, cols, dtype=dtype), empty(cols), empty(cols, dtype=torch.int32)
            calls: dict[str, tuple[object, ...]] = {
                "layernorm": (x, real, real, 1e-6, 8),
                "add_layernorm": (x, x, real, real, 1e-6, 8),
                "layernorm_per_token": (x, real, real, 1e-6),
                "quantize": (x, real, zero, 8),
                "quantize_per_token": (x,),
            }
            for op, arguments in calls.items():
                variant = f"K={cols}, {str(dtype).removeprefix('torch.')}"
                yield Configuration(op, variant, arch, lambda op=op, a=arguments: getattr(backend, op)(*a))
        image, patch = empty(8, 3, 224, 224, dtype=dtype), 3 * 16 * 16
        arguments = (image, empty(patch), empty(patch, dtype=torch.int32), 16, 16, 8)
        variant = f"224 px, 16 px patches, {str(dtype).removeprefix('torch.')}"
        yield Configuration("quantize_patches", variant, arch, lambda a=arguments: backend.quantize_patches(*a))


def edge_configurations() -> list[Configuration]:
    """Sizes of one, of which Triton makes constants, and optional tensors left out: compiled in ways of their own."""
    byte, whole = torch.int8, torch.int32
    found = []
    for arch in ARCHITECTURES:
        for m, n, k, widths in ((1, 1, 1, (8,)), (1, 1000, 65, (2, 8)), (17, 7, 3072, (4,))):
            a, w, real, vector = empty(m, k, dtype=byte), weight(widths, n, k), empty(n), empty(n, dtype=whole)
            calls: dict[str, tuple[object, ...]] = {
                "linear_codes": (a, w, real, vector, vector, 8),
                "linear_gelu_levels": (a, w, real, vector, real, empty(1), empty(2, dtype=byte), "tanh"),
                "linear_residual": (a, w, real, vector, empty(n)),
                "linear_per_token": (a, empty(m), w, real, None, torch.float16),
            }
            for op, given in calls.items():
                label = f"{m}x{n}x{k}, w{'/'.join(map(str, widths))}"
                found.append(Configuration(op, label, arch, partial(getattr(backend, op), *given)))
        for tokens, head_dim in ((1, 1), (2, 33), (300, 64)):
            for biased, normalised in itertools.product((False, True), repeat=2):
                label = f"S={tokens}, D={head_dim}{', bias' * biased}{', normalised' * normalised}"
                call = attention_call(tokens, head_dim, biased, normalised, batch=1, heads=1)
                found.append(Configuration("attention", label, arch, call))
                call = attention_call(tokens, head_dim, biased, normalised, batch=1, heads=1, windows=1 + tokens % 2)
                found.append(Configuration("attention", f"windows, {label}", arch, call))
        one = empty(1, 1), empty(1), empty(1, dtype=whole)
        found.append(Configuration("quantize", "1x1", arch, partial(backend.quantize, *one, 8)))
        found.append(Configuration("layernorm", "1x1", arch, partial(backend.layernorm, *one[:2], one[1], 1e-6, 8)))
        found.append(Configuration("quantize_per_token", "1x1", arch, partial(backend.quantize_per_token, one[0])))
    return [c for c in found if c.architecture.cc in (80, 90)]


def configurations() -> list[Configuration]:
    """All that is shipped, in a stable order."""
    return [
        configuration
        for arch in ARCHITECTURES
        if arch.cc in COMPILED
        for part in (linear_configurations, attention_configurations, row_configurations)
        for configuration in part(arch)
    ]


LISTS = {"shipped": configurations, "edges": edge_configurations}
