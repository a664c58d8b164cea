"""What the CUDA kernels' model expects of a H100 SXM or H200, before one has run: ``python -m benchmarks.predictions``.

Rewrites the table of ``benchmarks/README.md``. The numbers are ``estimate_us`` of ``vitq_kernels/ops/cuda/tiles.py``:
facts about sizes, assumptions about rates. They stand there to be held against the first measurement, not to be
believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.vit_shapes import BATCHES, MLP_RATIO, VITS
from vitq_kernels.files import write_text
from vitq_kernels.ops.cuda.tiles import TILES, Gpu, Problem, rank

PAGE = Path(__file__).parent / "README.md"
START, END = "<!-- predictions -->\n", "<!-- /predictions -->"
HOPPER = Gpu(90, 132, "H100 SXM, H200")
PEAK_TOPS = 1979  # dense int8, data sheet
MODELS = ("DeiT-B", "ViT-L")
HEAD = """| model | batch | layer (N, K) | plan, 8 bits | us | TOPS | of the peak | with rows of several widths |
|---|---|---|---|---|---|---|---|
"""


def rows() -> Iterator[str]:
    """A line of the table a layer."""
    for vit in (vit for vit in VITS if vit.name in MODELS):
        c = vit.channels
        for batch in BATCHES:
            tokens = batch * vit.tokens
            for layer, n, k in (
                ("qkv", 3 * c, c),
                ("proj", c, c),
                ("fc1", MLP_RATIO * c, c),
                ("fc2", c, MLP_RATIO * c),
            ):
                (plan, us), mixed = (
                    rank(Problem(tokens, n, k, 8, ordered, False), HOPPER)[0] for ordered in (False, True)
                )
                tops = 2 * tokens * n * k / us / 1e6
                kind = "wgmma" if TILES[plan.tile].wgmma else "mma.sync"
                cells = (vit.name, batch, f"{layer} ({n}, {k})", f"{kind}, {plan}", f"{us:.1f}", f"{tops:.0f}")
                share, ratio = f"{100 * tops / PEAK_TOPS:.0f} %", f"{mixed[1] / us:.2f}x the time"
                yield f"| {' | '.join(map(str, (*cells, share, ratio)))} |\n"


def with_table(page: str) -> str:
    """The page with the table between its markers replaced."""
    head, rest = page.split(START)
    return head + START + HEAD + "".join(rows()) + END + rest.split(END)[1]


if __name__ == "__main__":
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
