"""All that can be checked and measured on a device, in stages, in one command of at most ten minutes.

    python -m benchmarks.device_check --out DIR [--stage NAME] [--assets DIR] [--overwrite]
    python -m benchmarks.device_check --dry-run

Every stage is a process of its own with a time limit: one that fails, hangs or crashes costs only its own result.
``DIR/device.json`` holds all results and is written after every stage, so the same command goes on where an earlier
call stopped: stages that are ``ok`` are not run again. ``summary.md`` is the same for a reader, ``log.txt`` what the
stages printed. What did not run is listed with its reason. Exit code 0: every chosen stage is ok.

A dry run walks every stage on a CPU in less than a minute: tiny sizes, the cpu backend in the place of kernels, and
where there is nothing to run without a GPU, what would run. It proves that the stages are fit to be sent to a GPU.

A kernel adds a row to STAGES: a function of one StageRun, in the file that it belongs to, which gives its numbers to
``run.keep`` as soon as it has them and raises CheckFailed or NotRun with the reason.

The parent process needs the standard library alone, so it also reports a package that does not import. Stages import
the installed vitq_kernels; the checkout gives benchmarks/, tests/ and, where nothing is installed, the package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from benchmarks.device_identity import ROOT, code_hash, query_gpu
from benchmarks.device_summary import summary

DRY = "dry run"
DRY_LIMIT_S = 120.0
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
    Stage("ceilings", "benchmarks.ceilings:ceilings", 30),
    Stage("tests", "benchmarks.device_stages:run_tests", 105),
    Stage("end_to_end", "benchmarks.device_stages:end_to_end", 35),
    Stage("triton_correctness", "benchmarks.kernel_stages:triton_correctness", 70),
    Stage("triton_microbenchmarks", "benchmarks.kernel_stages:triton_microbenchmarks", 75),
    Stage("cuda_correctness", "benchmarks.kernel_stages:cuda_correctness", 35),
    Stage("cuda_microbenchmarks", "benchmarks.kernel_stages:cuda_microbenchmarks", 55),
    Stage("cuda_sanitizer", "benchmarks.cuda_sanitizer:cuda_sanitizer", 30),
    Stage("kernel_profiles", "benchmarks.model_stages:kernel_profiles", 25),
    Stage("whole_models", "benchmarks.model_stages:whole_models", 65),  # last: compilers take what the others leave
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
    path: Path  # of the result file that the parent reads; plots and tables lie beside it
    dry_run: bool = False  # walk the code on a CPU, in a few seconds
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
        seconds = round(time.monotonic() - self.start, 1)
        write(self.path, json.dumps({"status": status, "reason": reason, "seconds": seconds, "data": self.data}))


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# What the process of a stage executes. The checkout comes last on the path: the installed package is what is checked.
CHILD = """
import sys
root, *given = sys.argv[1:]
sys.path[:] = [p for p in sys.path if p not in ("", root)] + [root]
from benchmarks.device_check import run_in_child
run_in_child(*given)
"""


def run_in_child(dry_run: str, assets: str, *stages: str) -> None:
    """Runs stages (function, limit and result file of each) and writes what came of them."""
    for function, limit_s, path in zip(stages[::3], stages[1::3], stages[2::3], strict=True):
        run = StageRun(Path(assets) if assets else None, float(limit_s), Path(path), dry_run == DRY)
        module, name = function.split(":")
        try:
            getattr(importlib.import_module(module), name)(run)
        except NotRun as reason:
            run.finish("not run", str(reason))
        except CheckFailed as reason:
            run.finish("failed", str(reason))
        except Exception as error:
            run.finish("failed", f"{type(error).__name__}: {error}")
            traceback.print_exc()
        else:
            run.finish("ok", "")


def run_stages(
    stages: Sequence[Stage], limit_s: float, assets: Path | None, out: Path, log: IO[str], dry_run: bool = False
) -> dict[str, dict[str, Any]]:
    """Runs stages in one process to its end or its limit; by name {"status", "reason", "seconds", "limit_s", ...}.

    It is one stage. In a dry run it is all of them: imports take longer than they do.
    """
    paths = {stage.name: out / f"{stage.name}.partial.json" for stage in stages}
    given = [word for stage in stages for word in (stage.function, str(limit_s), str(paths[stage.name]))]
    for path in paths.values():
        path.unlink(missing_ok=True)
    when, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    log.write(f"\n== {', '.join(paths)}, {when}\n")
    log.flush()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT), DRY if dry_run else "", str(assets or ""), *given],
        cwd=ROOT,
        env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if dry_run else {})},
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
    end = f"killed after {limit_s:.0f} s" if timed_out else f"the process ended with code {child.returncode}"
    rows, wall_s = {}, round(time.monotonic() - start, 1)
    for name, path in paths.items():
        row = {"status": "running", "reason": "", "data": {}}
        if path.exists():
            row.update(json.loads(path.read_text(encoding="utf-8")))
            path.unlink()
        if row["status"] == "running":
            row.update(status="timeout" if timed_out else "failed", reason=end, seconds=wall_s)
        rows[name] = {**row, "limit_s": round(limit_s, 1), "when": when}
    return rows


def kill_group(child: subprocess.Popen[Any]) -> None:
    """Ends a process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def check(
    out: Path,
    stages: Sequence[Stage] = STAGES,
    chosen: Sequence[str] = (),
    assets: Path | None = None,
    overwrite: bool = False,
    total_s: float = TOTAL_S,
    dry_run: bool = False,
) -> bool:
    """Runs the chosen stages (all, if none) that are not ok in ``out`` yet; whether all of them are ok now.

    A dry run runs all of the chosen ones, again too.

    Raises:
        ValueError: ``out`` holds results of other code or another device, and not ``overwrite``.
    """
    start = time.monotonic()
    gpu = None if dry_run else query_gpu()
    device = gpu[0] if gpu else f"CPU, {DRY}" if dry_run else "CPU"
    results: dict[str, Any] = {"device": device, "code": code_hash(), "stages": {}}
    if dry_run:
        results["note"] = "A dry run: tiny sizes, the cpu backend in place of kernels. No number on this page counts."
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
    waiting = [stage for stage in selected if stage.name not in done or dry_run]

    def keep(rows: dict[str, Any]) -> None:
        results["stages"].update(rows)
        write(store, json.dumps(results, indent=1) + "\n")
        write(out / "summary.md", summary(results, [stage.name for stage in stages]))
        for name, row in rows.items():
            print(f"{name}: {row['status']} after {row['seconds']} s {row['reason']}".rstrip(), flush=True)

    with (out / "log.txt").open("a", encoding="utf-8") as log:
        if dry_run:
            keep(run_stages(waiting, DRY_LIMIT_S, assets, out, log, dry_run=True))
        for stage in () if dry_run else selected:
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
                if overwrite and results["stages"].pop(stage.name, None):  # a stage may go on from what it kept
                    write(store, json.dumps(results, indent=1) + "\n")
                row = run_stages([stage], limit_s, assets, out, log)[stage.name]
            earlier = results["stages"].get(stage.name, {"data": {}})["data"]
            keep({stage.name: {**row, "data": row["data"] or earlier}})  # it may not have come as far as the last time
    return all(results["stages"][stage.name]["status"] == "ok" for stage in selected)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of device.json, summary.md, plots and log.txt")
    parser.add_argument("--dry-run", action="store_true", help="walk every stage on a CPU; --out is not needed")
    parser.add_argument("--stage", action="append", choices=[s.name for s in STAGES], help="only this one; repeatable")
    parser.add_argument("--assets", type=Path, help="real ViT-Tiny and its images; default: VITQ_ASSETS")
    parser.add_argument("--overwrite", action="store_true", help="run stages again that are ok already")
    args = parser.parse_args(arguments)
    assets = args.assets or (Path(os.environ["VITQ_ASSETS"]) if os.environ.get("VITQ_ASSETS") else None)
    if assets is not None and not assets.is_dir():
        parser.error(f"--assets must be a folder, got {assets}")
    if args.out is None and not args.dry_run:
        parser.error("--out must be given, but for a --dry-run")
    with tempfile.TemporaryDirectory(prefix="device_check-") as folder:
        out, assets = (args.out or Path(folder)).resolve(), assets and assets.resolve()
        try:
            ok = check(out, STAGES, args.stage or (), assets, args.overwrite, dry_run=args.dry_run)
        except ValueError as error:
            parser.error(str(error))
        if args.out is None and not ok:
            print((out / "log.txt").read_text(encoding="utf-8"))
    print(f"{args.out / 'summary.md' if args.out else DRY}: {'all stages ok' if ok else 'not all stages ok'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
