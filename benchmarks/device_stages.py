"""The stages of ``benchmarks.device_check`` that belong to no kernel: environment, tests, ViT-Tiny end to end."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.device_check import ROOT, CheckFailed, NotRun, StageRun, code_hash, query_gpu

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batch = tuple[Tensor, Tensor | None]

DRY_TESTS = ("tests/test_config.py",)  # of a dry run
MOST_WORKERS = 12  # of the tests; each has a GPU context of about 0.5 GB
SETTLE_S = 20.0  # pytest gets this long to write its report after an interrupt
CALIBRATION_IMAGES = 64  # as the README's numbers are made: 64 by seed 0
DRY_CALIBRATION_IMAGES = 8
BATCH = 50
RESERVE_S = 15.0  # left to end_to_end when it stops taking batches
MEAN = STD = (0.5, 0.5, 0.5)  # of the augreg ViT-Tiny
# Ops whose int8 outputs may differ by 1 between devices, on at most this part of them; the others are exact.
BOUNDED_OPS = (
    *("layernorm", "add_layernorm", "layernorm_per_token", "linear_residual_layernorm"),
    *("linear_gelu_codes", "linear_gelu_levels"),
)
BOUNDED_PART = 1e-3


def environment(run: StageRun) -> None:
    """What runs here, and on what."""
    gpu = query_gpu()
    run.keep(
        gpu=gpu[0] if gpu else "none",
        driver=gpu[1] if gpu else "none",
        cpu=cpu_name(),
        cores=os.cpu_count(),
        system=platform.platform(),
        commit=commit(),
        code=code_hash(),
    )
    import torch

    import vitq_kernels
    from vitq_kernels.doctor import examine

    run.keep(package_folder=str(Path(vitq_kernels.__file__).parent), cuda=torch.version.cuda, **examine())
    if gpu and not torch.cuda.is_available():
        raise CheckFailed(f"nvidia-smi sees {gpu[0]}, torch {torch.__version__} does not")


def cpu_name() -> str:
    """As the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """HEAD and whether files differ from it; without git, what VITQ_COMMIT says."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        given = os.environ.get("VITQ_COMMIT")
        return f"{given} (as VITQ_COMMIT says)" if given else "not known: no git commit here"


def run_tests(run: StageRun) -> None:
    """The test suite: whole and with --require-cuda on a GPU, without the slow tests elsewhere."""
    import torch

    if run.dry_run:
        run.keep(on_a_gpu="pytest --require-cuda, all of tests/")
        check_tests(run, ["-p", "no:xdist", *DRY_TESTS])
        return
    selection = ["--require-cuda"] if torch.cuda.is_available() else ["-m", "not slow"]
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    if importlib.util.find_spec("xdist") and workers > 1:
        selection += ["-n", str(workers)]
    if run.assets:
        os.environ["VITQ_ASSETS"] = str(run.assets)
    run.keep(selection=" ".join(selection), gpu="yes" if torch.cuda.is_available() else "no: nothing ran on one")
    check_tests(run, selection)


def check_tests(run: StageRun, arguments: Sequence[str]) -> None:
    """Runs pytest in the checkout, on the installed package, and keeps its counts even when time runs out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code, output = _pytest([*arguments, f"--junitxml={report}"], run.left_s - SETTLE_S)
        suites = ElementTree.parse(report).iter("testsuite") if report.exists() else ()
        for suite in suites:
            counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            run.keep(**counts, failed_tests=_failures(suite))
    backends = re.search(r"^backends exercised: .*$", output, re.MULTILINE)
    run.keep(backends=backends.group(0) if backends else "no line from conftest")
    if code is None:
        raise CheckFailed("the time limit interrupted pytest; the counts are those until then")
    if code:
        raise CheckFailed(f"pytest ended with code {code}: {output.strip().splitlines()[-1:] or 'no output'}")


def _pytest(arguments: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """Exit code (None: interrupted at the limit) and output."""
    # Without PYTHONSAFEPATH, `-m` would put the checkout before the installed package.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_interruptible,
    ) as process:
        interrupted = False
        try:
            output, _ = process.communicate(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            interrupted = True
            process.send_signal(signal.SIGINT)  # pytest then writes its report and summary
            output, _ = process.communicate()  # the parent kills the whole stage if this hangs
    print(output)
    return None if interrupted else process.returncode, output


def _interruptible() -> None:
    """In the child, before it starts: what a shell runs in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _failures(suite: ElementTree.Element, most: int = 20) -> list[dict[str, str]]:
    """The first failed tests and the first line of why."""
    rows = []
    for test in suite.iter("testcase"):
        for problem in (*test.findall("failure"), *test.findall("error")):
            reason = (problem.get("message") or "").splitlines()
            rows.append({"test": f"{test.get('classname')}::{test.get('name')}", "why": reason[0] if reason else ""})
    return rows[:most]


def end_to_end(run: StageRun) -> None:
    """The real ViT-Tiny: float against W8A8 on the device, and the same integers from two backends.

    In a dry run a ViT that comes with the package, and whether the assets are complete if there are any.
    """
    import torch

    import vitq_kernels as vitq
    from vitq_kernels.ops.backends import chosen_backend

    given = real_images(run.assets) if run.assets is not None else None
    if run.dry_run:
        run.keep(assets="none" if given is None else f"{given.name}, {given.count} images")
        given = digits_images_of_the_package()
    if given is None:
        raise NotRun("no assets: give --assets or set VITQ_ASSETS")
    device, model = "cuda" if torch.cuda.is_available() else "cpu", given.model
    run.keep(device=device, model=given.name, calibration_images=len(given.calibration))

    start = time.perf_counter()
    quantized = vitq.quantize(model, given.calibration)  # uniform W8A8, on the CPU
    run.keep(widths="W8A8", quantize_s=round(time.perf_counter() - start, 1))
    first = given.batches[0]
    rows = compare_backends(quantized, first[0][:2], device)
    run.keep(compared_backends=f"cpu on cpu, reference on {device}: 2 images", int8_outputs=rows)

    model, quantized = model.to(device), quantized.to(device)
    vitq.evaluate(quantized, [first], float_model=model)  # warm-up
    run.keep(backend=chosen_backend("linear_codes", device).name, batch=BATCH)
    run.keep(float_images_per_s=vitq.evaluate(model, [first] * 3).images_per_s)
    found = vitq.evaluate(quantized, in_time(run, given.batches), float_model=model).to_dict()
    run.keep(evaluation_images=given.count, **found)
    if wrong := [row["op"] for row in rows if not row["as_expected"]]:
        raise CheckFailed(f"reference on {device} and cpu give other integers in {', '.join(wrong)}")


@dataclass(frozen=True)
class Images:
    """A model and its images."""

    name: str
    model: nn.Module
    calibration: Tensor
    batches: Sequence[Batch]
    count: int  # images of the batches


def real_images(assets: Path) -> Images:
    """The real ViT-Tiny and its images; StopIteration or an error that names a file where they are not complete."""
    import timm
    from safetensors.torch import load_file

    from vitq_kernels.images import ImageFolder, eval_transform, load_folder

    checkpoint = next(assets.glob("vit_tiny_patch16_224*.safetensors"))
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(checkpoint))
    transform = eval_transform(model, mean=MEAN, std=STD)
    calibration, _ = load_folder(assets / "calibration", transform, limit=CALIBRATION_IMAGES, seed=0)
    folder = ImageFolder.scan(assets / "evaluation")
    return Images(checkpoint.name, model, calibration, folder.batches(transform, BATCH), len(folder.files))


def digits_images_of_the_package() -> Images:
    """The ViT of ``vitq demo`` and two batches."""
    from vitq_kernels.data import digits_images, load_digits_vit

    (calibration, _), (images, labels) = digits_images("calibration"), digits_images("test")
    batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in (0, BATCH)]
    return Images("digits", load_digits_vit(), calibration[:DRY_CALIBRATION_IMAGES], batches, 2 * BATCH)


def in_time(run: StageRun, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches for which there is time; the number of images that came through is in the evaluation."""
    longest, last = 0.0, time.monotonic()
    for batch in batches:
        yield batch
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        if run.left_s < RESERVE_S + 2 * longest:
            return


def compare_backends(model: nn.Module, images: Tensor, device: str) -> list[dict[str, Any]]:
    """Runs a model on the cpu backend and every op of it, on the same inputs, on the reference backend of a device.

    Returns:
        For each op with int8 outputs: calls, how many values came out, how many differ, and by how much at most.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_map_only

    from vitq_kernels.ops import use_backend

    found: dict[str, dict[str, Any]] = {}

    class Replay(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.namespace == "vitq":
                with use_backend("reference"):
                    again = func(*tree_map_only(torch.Tensor, lambda t: t.to(device), args))
                for one, other in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if one.dtype == torch.int8:
                        count(func._schema.name.split("::")[1], (one.int() - other.cpu().int()).abs())
            return result

    def count(op: str, difference: Tensor) -> None:
        row = found.setdefault(op, {"op": op, "calls": 0, "values": 0, "differing": 0, "largest_difference": 0})
        row["calls"] += 1
        row["values"] += difference.numel()
        row["differing"] += int((difference > 0).sum())
        row["largest_difference"] = max(row["largest_difference"], int(difference.max()))

    with torch.no_grad(), use_backend("cpu"), Replay():
        model(images)
    for row in found.values():
        exact = row["op"] not in BOUNDED_OPS
        row["rule"] = "identical" if exact else f"within 1 on {BOUNDED_PART:.1%}"
        few = row["differing"] <= (0 if exact else BOUNDED_PART * row["values"])
        row["as_expected"] = few and row["largest_difference"] <= 1
    if not found:
        raise CheckFailed("the quantized model called no vitq op with int8 outputs")
    return list(found.values())
