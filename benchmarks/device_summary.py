"""The Markdown page beside ``device.json``. Needs the standard library alone, as all of the parent process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Keys of a stage's data: what it comes to in a line, and names of drawings beside the page.
HEADLINE, PLOTS = "headline", "plots"


def summary(results: dict[str, Any], stages: Sequence[str]) -> str:
    """``device.json`` for a reader: status and reason of every stage, what each comes to, then what each one kept."""
    lines = [f"# Device check: {results['device']}", "", f"Code {results['code']}.", ""]
    if "note" in results:
        lines += [results["note"], ""]
    lines += ["| stage | status | seconds | reason |", "|---|---|---|---|"]
    rows = results["stages"]
    never = {"status": "not run", "reason": "not chosen so far", "seconds": "", "data": {}}
    for stage in stages:
        row = rows.get(stage, never)
        lines.append(f"| {stage} | {row['status']} | {row['seconds']} | {_cell(row['reason'])} |")
    if short := [f"- {name}: {row['data'][HEADLINE]}" for name, row in rows.items() if HEADLINE in row["data"]]:
        lines += ["", "In short:", "", *short]
    for name, row in rows.items():
        if kept := {key: value for key, value in row["data"].items() if key not in (HEADLINE, PLOTS)}:
            partly = "" if row["status"] == "ok" else f" ({row['status']}: as far as it came)"
            lines += ["", f"## {name}{partly}", "", *_table(kept)]
            lines += [line for plot in row["data"].get(PLOTS, ()) for line in ("", f"![{plot}]({plot})")]
    return "\n".join(lines) + "\n"


def _table(data: dict[str, Any]) -> list[str]:
    """Plain values as one table; after it one table for each list of dicts."""
    lines = ["| | |", "|---|---|"]
    for key, value in data.items():
        if not (isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)):
            lines.append(f"| {key} | {_cell(value)} |")
    for key, value in data.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            columns = list(dict.fromkeys(column for entry in value for column in entry))
            lines += ["", f"{key}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(_cell(entry.get(column)) for column in columns)} |" for entry in value]
    return lines


def _cell(value: Any) -> str:
    text = "not known" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")[:300]
