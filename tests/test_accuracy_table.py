"""README's accuracy table is what the committed rows say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.accuracy import CASES, ROWS, table, with_table

README = Path(__file__).parents[1] / "README.md"


def test_readme_shows_the_committed_rows():
    text = README.read_text(encoding="utf-8")
    assert with_table(text, table()) == text, "run python -m benchmarks.accuracy --table"


def test_every_case_has_a_row_with_its_origin():
    with ROWS.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["case"] for row in rows] == list(CASES)
    assert all(row["git_sha"] and row["torch"] and row["images"] == "400" for row in rows)


def test_table_follows_the_rows(tmp_path):
    with ROWS.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    rows[1]["top1"] = "12.34"
    changed = tmp_path / "rows.csv"
    with changed.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert "| 12.34 |" in table(changed)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="unpack"):
        with_table("no markers here", "table")
