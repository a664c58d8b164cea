"""The embedded Swin at several widths on the 500 test digits: the rows of README's Swin table.

    python -m benchmarks.digits_swin     # a few minutes on two CPU cores; rewrites results/digits_swin.json

It is ``vitq compare`` on a model that timm has no name for: uniform widths, and relevance rows in the bytes of a mean
of 4 bits with their permutations.
"""

from __future__ import annotations

from pathlib import Path

from vitq_kernels.compare import compare
from vitq_kernels.compare_rows import Comparison
from vitq_kernels.data import digits_images, load_digits_swin
from vitq_kernels.files import write_text

RESULT = Path(__file__).parent / "results" / "digits_swin.json"
PAIRS, MEANS = ((8, 8), (4, 8)), (4.0,)
CALIBRATION_IMAGES, BATCH = 64, 50


def table(path: Path = RESULT) -> str:
    """README's Swin table: Markdown."""
    return Comparison.from_json(path.read_text(encoding="utf-8")).markdown()


def main() -> None:
    """Measures every row and writes them."""
    images, labels = digits_images("test")
    result = compare(
        load_digits_swin(),
        digits_images("calibration")[0][:CALIBRATION_IMAGES],
        list(zip(images.split(BATCH), labels.split(BATCH), strict=True)),
        pairs=PAIRS,
        means=MEANS,
        methods=["uniform", "relevance"],
        progress=lambda text: print(text, flush=True),
    )
    write_text(RESULT, result.to_json())
    print(result.table())


if __name__ == "__main__":
    main()
