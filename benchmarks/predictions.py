"""What the CUDA kernels' model expects of a H100 SXM or H200, before one has run: ``python -m benchmarks.predictions``.

Rewrites the tables of ``benchmarks/README.md``. The numbers are ``estimate_us`` of ``vitq_kernels/ops/cuda/tiles.py``
and of ``cuda_attention_model.py``: facts about sizes and machine code, assumptions about rates. They stand there to be
held against the first measurement, not to be believed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks import cuda_attention_model
from benchmarks.vit_shapes import BATCHES, VITS
from vitq_kernels.files import write_text
from vitq_kernels.ops.cuda.gpus import Gpu, architecture
from vitq_kernels.ops.cuda.tiles import LAUNCH_US, TILES, Plan, Problem, rank

PAGE = Path(__file__).parent / "README.md"
HOPPER = Gpu(90, 132, "H100 SXM, H200")
GPUS = (Gpu(80, 108, "A100"), Gpu(86, 84, "RTX 3090"), Gpu(89, 128, "RTX 4090"), HOPPER)
PEAK_TOPS = 1979  # dense int8, data sheet
MODELS = ("DeiT-B", "ViT-L")
HEAD = """| model | batch | layer (N, K) | plan, 8 bits | us | TOPS | of the peak | with rows of several widths |
|---|---|---|---|---|---|---|---|
"""


ATTENTION_HEAD = """| model | batch | tokens | head dim | passes | clocks a head | values | fullest pipe | us | TFLOPS |
|---|---|---|---|---|---|---|---|---|---|
"""
MIXED_HEAD = """| GPU | batch | layers within 5 % | median | worst |
|---|---|---|---|---|
"""
NORM_BATCHES = (1, 4, 8, 16, 64)
LAYERNORM_HEAD = """| model | batch | proj, LayerNorm | in one launch | fc2, LayerNorm | in one launch |
|---|---|---|---|---|---|
"""
# Beside the models of the linears: 384 pixels, and 512.
LENGTHS = (("DeiT-B", 197), ("DeiT-B", 577), ("ViT-L", 1025), ("ViT-H", 257))


def one_and_several_widths(layer: str, tokens: int, n: int, k: int, bits: int, gpu: Gpu) -> list[tuple[Plan, float]]:
    """Plan and microseconds of a block's layer whose rows all have ``bits``, and of one where that is the most."""
    words = layer in ("proj", "fc2")  # they write the residual stream
    return [rank(Problem(tokens, n, k, bits, several, False, words), gpu)[0] for several in (False, True)]


def linear_rows() -> Iterator[str]:
    """A line of the table a layer."""
    for vit in (vit for vit in VITS if vit.name in MODELS):
        for batch in BATCHES:
            tokens = batch * vit.tokens
            for layer, n, k in vit.linears:
                (plan, us), mixed = one_and_several_widths(layer, tokens, n, k, 8, HOPPER)
                tops = 2 * tokens * n * k / us / 1e6
                kind = "wgmma" if TILES[plan.tile].wgmma else "mma.sync"
                cells = (vit.name, batch, f"{layer} ({n}, {k})", f"{kind}, {plan}", f"{us:.1f}", f"{tops:.0f}")
                share, ratio = f"{100 * tops / PEAK_TOPS:.0f} %", f"{mixed[1] / us:.2f}x the time"
                yield f"| {' | '.join(map(str, (*cells, share, ratio)))} |\n"


def attention_rows() -> Iterator[str]:
    """A line a model, length and batch."""
    made = cuda_attention_model.load()
    for name, tokens in LENGTHS:
        vit = next(vit for vit in VITS if vit.name == name)
        clocks = cuda_attention_model.head_clocks(made, tokens, vit.head_dim)
        fullest = max(cuda_attention_model.PIPES, key=lambda pipe: clocks[pipe])
        for batch in BATCHES[:-1]:
            heads, ghz = batch * vit.heads, architecture(HOPPER).ghz
            us = LAUNCH_US + cuda_attention_model.estimate_us(made, tokens, vit.head_dim, heads, HOPPER.sms, ghz)
            tflops = 4 * heads * tokens**2 * vit.head_dim / us / 1e6
            cells = (vit.name, batch, tokens, vit.head_dim, 1 if tokens <= 256 else 2, f"{clocks[fullest]:.0f}")
            rest = (f"{100 * clocks['values'] / clocks[fullest]:.0f} %", fullest, f"{us:.1f}", f"{tflops:.0f}")
            yield f"| {' | '.join(map(str, (*cells, *rest)))} |\n"


def mixed_rows() -> Iterator[str]:
    """A line a GPU and batch: all layers of all models, their rows of several widths beside their widest alone."""
    for gpu in GPUS:
        for batch in BATCHES:
            ratios = []
            for vit, bits in itertools.product(VITS, (8, 4)):
                for layer, n, k in vit.linears:
                    one, mixed = one_and_several_widths(layer, batch * vit.tokens, n, k, bits, gpu)
                    ratios.append((mixed[1] / one[1], f"{vit.name} ({n}, {k}), {bits} bits"))
            within = sum(ratio <= 1.05 for ratio, _ in ratios)
            worst, layer = max(ratios)
            middle = statistics.median(ratio for ratio, _ in ratios)
            cells = (gpu.name, batch, f"{within} of {len(ratios)}", f"{middle:.2f}x", f"{worst:.2f}x: {layer}")
            yield f"| {' | '.join(map(str, cells))} |\n"


def layernorm_rows() -> Iterator[str]:
    """A line a model and batch: LayerNorm behind the two GEMMs that write the residual stream."""
    for vit in VITS:
        sizes = {name: (n, k) for name, n, k in vit.linears}
        for batch in NORM_BATCHES:
            cells = [vit.name, str(batch)]
            for n, k in (sizes[name] for name in ("proj", "fc2")):
                ranked = rank(Problem(batch * vit.tokens, n, k, 8, False, False, words=True, norm=True), HOPPER)
                apart = next(us for plan, us in ranked if not plan.norm)
                cells.append(f"{apart:.1f}")
                together = next(((plan, us) for plan, us in ranked if plan.norm), None)
                if together is None:
                    cells.append("no cluster holds its rows")
                else:
                    plan, us = together
                    cells.append(f"{us:.1f} ({us / apart:.2f}x, {TILES[plan.tile].tokens} tokens)")
            yield f"| {' | '.join(cells)} |\n"


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table between the markers of a name replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, rest = page.split(start)
    return head + start + table + end + rest.split(end)[1]


def with_tables(page: str) -> str:
    """The page with its tables."""
    page = with_table(page, "predictions", HEAD + "".join(linear_rows()))
    page = with_table(page, "attention", ATTENTION_HEAD + "".join(attention_rows()))
    page = with_table(page, "mixed", MIXED_HEAD + "".join(mixed_rows()))
    return with_table(page, "layernorm", LAYERNORM_HEAD + "".join(layernorm_rows()))


if __name__ == "__main__":
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8")))
