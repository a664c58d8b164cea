"""README's tables, from the committed results alone: a number without a row there does not appear.

    python -m benchmarks.readme_tables

Accuracy: ``accuracy.py``, of a Swin ``digits_swin.py``. Speed: whole models and kernels of every device with a results
file (``speed_tables.py``); while none of them is a GPU, README says so and shows what the compilers made
(``compiled_tables.py``).
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import accuracy, compiled_tables, digits_swin, speed_tables
from vitq_kernels.files import write_text

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Every generated part of README by its name: Markdown that ends with a newline."""
    measured = speed_tables.measured(results)
    parts = [speed_tables.text(measured)] if measured else []
    if not any(speed_tables.is_gpu(rows) for rows in measured.values()):
        parts.append(compiled_tables.text(results))
    return {
        "accuracy": accuracy.table(results / accuracy.ROWS.name),
        "swin": digits_swin.table(results / digits_swin.RESULT.name),
        "speed": "\n".join(parts),
    }


def with_tables(readme: str, parts: dict[str, str]) -> str:
    """README's text with each part between its markers ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->`` replaced.

    Raises:
        ValueError: a marker is missing, or there twice.
    """
    for name, text in parts.items():
        start, end = f"<!-- table:{name} -->\n", f"<!-- /table:{name} -->"
        if readme.count(start) != 1 or readme.count(end) != 1 or readme.index(end) < readme.index(start):
            raise ValueError(f"README must have {start.strip()} and then {end}, each once")
        head, rest = readme.split(start)
        readme = head + start + text + end + rest.split(end)[1]
    return readme


def main() -> None:
    """Rewrites README."""
    write_text(README, with_tables(README.read_text(encoding="utf-8"), tables()))


if __name__ == "__main__":
    main()
