"""All that can be checked and measured on a device, in stages, in one command of at most ten minutes.

    python -m benchmarks.device_check --out DIR [--stage NAME] [--assets DIR] [--overwrite]

Every stage is a process of its own with a time limit: one that fails, hangs or crashes costs only its own result.
``DIR/device.json`` holds all results and is written after every stage, so the same command goes on where an earlier
call stopped: stages that are ``ok`` are not run again. ``summary.md`` is the same for a reader, ``log.txt`` what the
stages printed. What did not run is listed with its reason. Exit code 0: every chosen stage is ok.

A kernel adds a row to STAGES: a function of one StageRun, in the file that it belongs to, which gives its numbers to
``run.keep`` as soon as it has them and raises CheckFailed or NotRun with the reason.

The parent process needs the standard library alone, so it also reports a package that does not import. Stages import
the installed vitq_kernels; the checkout gives benchmarks/, tests/ and, where nothing is installed, the package.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 540.0  # of one call: ten minutes less what installing the package before it takes


@dataclass(frozen=True)
class Stage:
    """A row of the table."""

    name: str
    function: str  # "module:function", imported in the stage's own process
    limit_s: float  # that it can count on; it may take what no later stage counts on


# Together they fit into one call; what one leaves goes to those after it.
STAGES = (
    Stage("environment", "benchmarks.device_stages:environment", 15),
    Stage("tests", "benchmarks.device_stages:run_tests", 140),
    Stage("end_to_end", "benchmarks.device_stages:end_to_end", 40),
    Stage("triton_correctness", "benchmarks.kernel_stages:triton_correctness", 90),
    Stage("triton_microbenchmarks", "benchmarks.kernel_stages:triton_microbenchmarks", 100),
    Stage("cuda_correctness", "benchmarks.kernel_stages:cuda_correctness", 40),
    Stage("cuda_microbenchmarks", "benchmarks.kernel_stages:cuda_microbenchmarks", 70),
    Stage("cuda_sanitizer", "benchmarks.cuda_sanitizer:cuda_sanitizer", 45),
)


class NotRun(Exception):
    """Raised by a stage that cannot run here; the message is the reason."""


class CheckFailed(Exception):
    """Raised by a stage that ran and found something wrong; the message says what."""


@dataclass
class StageRun:
    """What a stage is given, and where it puts its numbers."""

    assets: Path | None  # folder with the real ViT-Tiny and its images
    limit_s: float
    path: Path  # of the result file that the parent reads
    start: float = field(default_factory=time.monotonic)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds until the parent kills the stage."""
        return self.start + self.limit_s - time.monotonic()

    def keep(self, **values: Any) -> None:
        """Adds to the stage's numbers (JSON-ready); they survive whatever happens to the stage afterwards."""
        self.data.update(values)
        self.finish("running", "")

    def finish(self, status: str, reason: str) -> None:
        """Writes the result file."""
        write(self.path, json.dumps({"status": status, "reason": reason, "data": self.data}))


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# What the process of a stage executes. The checkout comes last on the path: the installed package is what is checked.
CHILD = """
import sys
root, function, assets, limit_s, path = sys.argv[1:]
sys.path[:] = [p for p in sys.path if p not in ("", root)] + [root]
from benchmarks.device_check import run_in_child
run_in_child(function, assets, float(limit_s), path)
"""


def run_in_child(function: str, assets: str, limit_s: float, path: str) -> None:
    """Runs a stage's function and writes what came of it."""
    run = StageRun(Path(assets) if assets else None, limit_s, Path(path))
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(run)
    except NotRun as reason:
        run.finish("not run", str(reason))
    except CheckFailed as reason:
        run.finish("failed", str(reason))
    except Exception as error:
        run.finish("failed", f"{type(error).__name__}: {error}")
        raise  # the traceback goes to the log
    else:
        run.finish("ok", "")


def run_stage(stage: Stage, assets: Path | None, limit_s: float, out: Path, log: IO[str]) -> dict[str, Any]:
    """Runs one stage to its end or its limit: {"status", "reason", "seconds", "limit_s", "when", "data"}."""
    path = out / f"{stage.name}.partial.json"
    path.unlink(missing_ok=True)
    when, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    log.write(f"\n== {stage.name}, {when}\n")
    log.flush()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT), stage.function, str(assets or ""), str(limit_s), str(path)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    timed_out = False
    try:
        child.wait(limit_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        kill_group(child)
    row = {"status": "running", "reason": "", "data": {}}
    if path.exists():
        row = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    if row["status"] == "running":
        reason = f"killed after {limit_s:.0f} s" if timed_out else f"the process ended with code {child.returncode}"
        row.update(status="timeout" if timed_out else "failed", reason=reason)
    return {**row, "seconds": round(time.monotonic() - start, 1), "limit_s": round(limit_s, 1), "when": when}


def kill_group(child: subprocess.Popen[Any]) -> None:
    """Ends a process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def query_gpu() -> tuple[str, str] | None:
    """Name and driver version of the first GPU, as nvidia-smi has them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, driver = answer.splitlines()[0].split(", ")
    return name, driver


def code_hash() -> str:
    """Identifies the code under check where there is no git: the package as stages import it, benchmarks and tests."""
    elsewhere = [p for p in sys.path if Path(p).resolve() != ROOT]
    package = importlib.machinery.PathFinder.find_spec("vitq_kernels", [*elsewhere, str(ROOT)])
    folders = [*(package.submodule_search_locations or () if package else ()), ROOT / "benchmarks", ROOT / "tests"]
    digest = hashlib.sha256()
    for folder in map(Path, folders):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".so", ".npz", ".safetensors")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def summary(results: dict[str, Any], stages: Sequence[Stage]) -> str:
    """``device.json`` for a reader: status and reason of every stage, then what each one kept."""
    lines = [f"# Device check: {results['device']}", "", f"Code {results['code']}.", ""]
    lines += ["| stage | status | seconds | reason |", "|---|---|---|---|"]
    rows = results["stages"]
    never = {"status": "not run", "reason": "not chosen so far", "seconds": "", "data": {}}
    for stage in stages:
        row = rows.get(stage.name, never)
        lines.append(f"| {stage.name} | {row['status']} | {row['seconds']} | {_cell(row['reason'])} |")
    for name, row in rows.items():
        if row["data"]:
            partly = "" if row["status"] == "ok" else f" ({row['status']}: as far as it came)"
            lines += ["", f"## {name}{partly}", "", *_table(row["data"])]
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


def check(
    out: Path,
    stages: Sequence[Stage] = STAGES,
    chosen: Sequence[str] = (),
    assets: Path | None = None,
    overwrite: bool = False,
    total_s: float = TOTAL_S,
) -> bool:
    """Runs the chosen stages (all, if none) that are not ok in ``out`` yet; whether all of them are ok now.

    Raises:
        ValueError: ``out`` holds results of other code or another device, and not ``overwrite``.
    """
    start = time.monotonic()
    gpu = query_gpu()
    results: dict[str, Any] = {"device": gpu[0] if gpu else "CPU", "code": code_hash(), "stages": {}}
    out.mkdir(parents=True, exist_ok=True)
    store = out / "device.json"
    if store.exists():
        earlier = json.loads(store.read_text(encoding="utf-8"))
        same = all(earlier.get(key) == results[key] for key in ("device", "code"))
        if same:
            results = earlier
        elif not overwrite:
            there, here = (f"code {found.get('code')} on {found.get('device')}" for found in (earlier, results))
            raise ValueError(f"{out} holds results of {there}, this is {here}: give another --out, or --overwrite")
    selected = [stage for stage in stages if not chosen or stage.name in chosen]
    done = {name for name, row in results["stages"].items() if row["status"] == "ok" and not overwrite}
    waiting = [stage for stage in selected if stage.name not in done]
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for stage in selected:
            if stage not in waiting:
                print(f"{stage.name}: ok already, not run again", flush=True)
                continue
            waiting.remove(stage)
            left_s = total_s - (time.monotonic() - start)
            limit_s = max(min(stage.limit_s, left_s), left_s - sum(later.limit_s for later in waiting))
            if limit_s < 1:
                reason = f"the {total_s:.0f} s of this call were used up; the same command goes on from here"
                row = {"status": "not run", "reason": reason, "seconds": 0.0, "limit_s": 0.0, "data": {}}
            else:
                print(f"{stage.name}: running, at most {limit_s:.0f} s", flush=True)
                row = run_stage(stage, assets, limit_s, out, log)
            results["stages"][stage.name] = row
            write(store, json.dumps(results, indent=1) + "\n")
            write(out / "summary.md", summary(results, stages))
            print(f"{stage.name}: {row['status']} after {row['seconds']} s {row['reason']}".rstrip(), flush=True)
    return all(results["stages"][stage.name]["status"] == "ok" for stage in selected)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of device.json, summary.md and log.txt")
    parser.add_argument("--stage", action="append", choices=[s.name for s in STAGES], help="only this one; repeatable")
    parser.add_argument("--assets", type=Path, help="real ViT-Tiny and its images; default: VITQ_ASSETS")
    parser.add_argument("--overwrite", action="store_true", help="run stages again that are ok already")
    args = parser.parse_args(arguments)
    assets = args.assets or (Path(os.environ["VITQ_ASSETS"]) if os.environ.get("VITQ_ASSETS") else None)
    if assets is not None and not assets.is_dir():
        parser.error(f"--assets must be a folder, got {assets}")
    try:
        ok = check(args.out.resolve(), STAGES, args.stage or (), assets and assets.resolve(), args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out / 'summary.md'}: {'all stages ok' if ok else 'not all stages ok'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
