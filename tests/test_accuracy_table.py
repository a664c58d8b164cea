"""The accuracy table is what the committed rows say; README has it (test_readme_tables.py)."""

from __future__ import annotations

import csv

from benchmarks.accuracy import CASES, ROWS, table


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
