"""Stage ``cuda_sanitizer`` of ``benchmarks.device_check``: NVIDIA's compute-sanitizer over a sample of the CUDA tests.

memcheck sees accesses outside of what was allocated, racecheck threads that meet in shared memory without a barrier.
Only our kernels are instrumented.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.device_check import ROOT, CheckFailed, NotRun, StageRun
from benchmarks.kernel_stages import need_cuda_backend
from benchmarks.sampled_tests import REPORT

TOOLS = ("memcheck", "racecheck")
CUDA_BIN = "/usr/local/cuda/bin"
OPTIONS = ("--kernel-name", "kernel_substring=vitq", "--report-api-errors", "no")
TESTS = ("test_cuda_linear.py", "test_cuda_norm.py", "test_cuda_rows.py", "test_cuda_attention.py")
EACH = 6  # parameter sets of a test function
RESERVE_S = 5.0  # left to the stage when it stops
END_S = 5.0  # of a tool's time is left to its last test and its end
SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.MULTILINE)
FINDING = re.compile(r"^========= (?!COMPUTE-SANITIZER|\w+ SUMMARY:)(\S.*)$", re.MULTILINE)
# What the watched process executes; the checkout comes last on the path, as in device_check.
PROGRAM = """
import sys
root, label, each, seconds, *files = sys.argv[1:]
sys.path[:] = [p for p in sys.path if p not in ("", root)] + [root]
from benchmarks.sampled_tests import main
sys.exit(main(label, int(each), float(seconds), files))
"""


def cuda_sanitizer(run: StageRun) -> None:
    """memcheck and racecheck over small cases on the GPU."""
    need_cuda_backend(run)
    files = [ROOT / "tests" / name for name in TESTS]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise CheckFailed(f"no {', '.join(missing)}")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA_BIN)
    if run.dry_run:
        commands = [f"{program or 'compute-sanitizer'} --tool {tool} {' '.join(OPTIONS)}" for tool in TOOLS]
        run.keep(would_run=[f"{command} python: {EACH} each of {', '.join(TESTS)}" for command in commands])
        return
    if program is None:
        raise NotRun(f"no compute-sanitizer in PATH or {CUDA_BIN}")
    sanitize(run, program, "cuda", EACH, list(map(str, files)))


def sanitize(run: StageRun, program: str, label: str, each: int, files: Sequence[str]) -> None:
    """Runs the sample of a row of the backend axis under each tool, and keeps a row of results each.

    Raises:
        CheckFailed: a tool found something or did not come to its end, a test failed, or time ran out.
    """
    rows: list[dict[str, Any]] = []
    for number, tool in enumerate(TOOLS):
        start, limit_s = time.monotonic(), (run.left_s - RESERVE_S) / (len(TOOLS) - number)
        arguments = [str(ROOT), label, str(each), str(limit_s - END_S), *files]
        output = _output([program, "--tool", tool, *OPTIONS, sys.executable, "-c", PROGRAM, *arguments], limit_s)
        rows.append({"tool": tool, **verdict(output), "seconds": round(time.monotonic() - start, 1)})
        run.keep(sanitizer=program, tools=rows)
    reasons = [f"{row['tool']}: {row['problem']}" for row in rows if row["problem"]]
    if reasons:
        raise CheckFailed("; ".join(reasons))


def _output(command: Sequence[str], limit_s: float) -> str:
    """What a command prints. It ends by itself, as its tests stop in time; if it hangs, what it printed until then."""
    # Without torch's cache every tensor is an allocation of its own, with a bound that memcheck knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as printed:  # no pipe: a process that the tool leaves behind would keep it open
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, timeout=limit_s
            )
        printed.seek(0)
        output = printed.read()
    print(output)
    return output


def verdict(output: str) -> dict[str, Any]:
    """Counts of the tests, the tool's summary and its first finding; ``problem``: what is wrong, or nothing."""
    summary, finding = SUMMARY.search(output), FINDING.search(output)
    tests = re.search(rf"^{REPORT} (\d+) passed, (\d+) failed, (\d+) skipped of (\d+)$", output, re.MULTILINE)
    passed, failed, skipped, chosen = map(int, tests.groups()) if tests else (0, 0, 0, 0)
    first = finding.group(1) if finding else ""
    problem = ""
    if summary is None or tests is None:
        problem = f"did not come to its end: {first or (output.strip().splitlines() or ['no output'])[-1]}"
    elif not re.match(r"0 (errors|hazards)\b", summary.group(1)):
        problem = f"{summary.group(1)}: {first}"
    elif failed or skipped:
        problem = f"{failed} tests failed, {skipped} were skipped"
    elif passed < chosen or not chosen:
        problem = f"time ran out after {passed} of {chosen} tests"
    return {
        "summary": summary.group(1) if summary else "none",
        "tests": chosen,
        "passed": passed,
        "first_finding": first,
        "problem": problem,
    }
