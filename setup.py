"""Build entry point: the CUDA extension is built here, without torch (docs/building.md). Metadata: pyproject.toml."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"
ARCHITECTURES = "80+PTX;86;89;90a"  # never those of the GPUs present; PTX of a plain one serves later GPUs
OLDEST_NVCC = (12, 0)  # knows sm_90a
# Of one minor version: others give "Unsupported .version" (design.md 6). They lie in site-packages/nvidia/cu13.
PARTS = ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
NVCC_FROM_PYPI = [f"nvidia-{name}==13.0.*" for name in PARTS]
# No contraction of a*b + c: every rounding stands in the source.
FLAGS = "-std=c++17 -O3 -fmad=false --threads 1 -Xcompiler -fPIC,-fvisibility=hidden,-Wall"
RULES = """
rule compile
  command = $nvcc $flags $python -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $nvcc -shared -cudart static $libraries $in -o $out
"""


def build_mode() -> str:
    """VITQ_BUILD_CUDA."""
    mode = os.environ.get("VITQ_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"VITQ_BUILD_CUDA must be auto, 0 or 1, got {mode!r}")
    return mode


def nvcc_version(nvcc: Path) -> str:
    """As nvcc says it, such as 13.0.88; empty where it does not run."""
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else ""


def machine_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, CUDA_PATH or PATH, if it is new enough."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [Path(home) / "bin" / "nvcc" for home in homes] + [Path(p) for p in [shutil.which("nvcc")] if p]
    for nvcc in found:
        version = nvcc_version(nvcc)
        if version and tuple(map(int, version.split(".")[:2])) >= OLDEST_NVCC:
            return nvcc.resolve()
    return None


def pypi_nvcc() -> Path | None:
    """nvcc of the build requirements, on sys.path."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return next((p for place in places if (p := Path(place) / "cu13" / "bin" / "nvcc").exists()), None)


def requirements() -> list[str]:
    """What building needs, beside setuptools."""
    if build_mode() == "0":
        return []
    from_pypi = machine_nvcc() is None and (sys.platform, platform.machine()) == ("linux", "x86_64")
    return ["ninja", "pybind11", *(NVCC_FROM_PYPI if from_pypi else [])]


def gencode(architectures: str) -> str:
    """nvcc's flags for "80+PTX;86;90a": machine code of each, and PTX where it says so.

    Those before Hopper are all assembled from the PTX of their oldest: csrc/ asks whether it compiles for 9.0 or later,
    and nothing finer, and nvcc's front end takes two thirds of the time.
    """
    asked = []
    for architecture in architectures.split(";"):
        match = re.fullmatch(r"(\d+)(a?)(\+PTX)?", architecture)
        if match is None:
            raise SystemExit(f"VITQ_CUDA_ARCHITECTURES must be like {ARCHITECTURES!r}, got {architectures!r}")
        asked.append((int(match[1]), match[2], bool(match[3])))
    oldest = min(number for number, _, _ in asked)
    flags = []
    for number, features, with_ptx in asked:
        virtual = f"compute_{oldest if number < 90 else number}{features}"
        code = f"[sm_{number}{features},{virtual}]" if with_ptx else f"sm_{number}{features}"
        flags.append(f"-gencode 'arch={virtual},code={code}'")
    return " ".join(flags) + " -DVITQ_HAS_SM90A" * any(asks[:2] == (90, "a") for asks in asked)


class BuildCuda(build_ext):
    """Runs ninja; writes what it did beside the extension, for ``vitq doctor``."""

    def build_extension(self, ext: Extension) -> None:
        """Builds, or writes down why not."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # An editable install is built elsewhere, and only the extension is copied from there.
        package = CSRC.parent.resolve() / "vitq_kernels" if self.editable_mode else target.parent
        architectures = os.environ.get("VITQ_CUDA_ARCHITECTURES", ARCHITECTURES)
        record = {"built": False, "nvcc": "", "architectures": architectures, "reason": ""}
        nvcc = machine_nvcc() or pypi_nvcc()
        gencode(architectures)  # refused before anything is tried
        try:
            if nvcc is None:
                raise RuntimeError("no nvcc: set CUDA_HOME to a CUDA toolkit of version 12 or later")
            record["nvcc"] = nvcc_version(nvcc)
            print(f"building vitq_kernels._cuda for {architectures} with {nvcc}")
            self.run_ninja(nvcc, architectures, target)
            record["built"] = True
        except (RuntimeError, ImportError, OSError) as error:
            record["reason"] = str(error)
            if build_mode() == "1":
                raise SystemExit(f"VITQ_BUILD_CUDA=1, but vitq_kernels._cuda was not built: {error}") from error
            for old in (target, package / target.name):
                old.unlink(missing_ok=True)
            print(f"warning: vitq_kernels is installed without its CUDA kernels: {error}", file=sys.stderr)
        (package / "_cuda_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def run_ninja(self, nvcc: Path, architectures: str, target: Path) -> None:
        """Compiles what has changed and links."""
        import pybind11

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # For the bindings alone: pip's isolated builds have pybind11 somewhere else each time.
        python = f"  python = -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
        libraries = " ".join(f"-L{nvcc.parents[1] / name}" for name in ("lib64", "lib"))
        sources = [*sorted(CSRC.resolve().glob("*.cu")), CSRC.resolve() / "bindings.cpp"]
        flags = f"{FLAGS} {gencode(architectures)} -I{CSRC.resolve()}"
        lines = [f"nvcc = {nvcc}", f"flags = {flags}", "python =", f"libraries = {libraries}"]
        lines += [RULES, *(f"build {source.stem}.o: compile {source}" for source in sources), python]
        lines += [f"build {target}: link {' '.join(f'{source.stem}.o' for source in sources)}", f"default {target}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        command = [sys.executable, "-m", "ninja", "-j", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode:
            errors = [line.strip() for line in done.stdout.splitlines() if "error" in line]
            raise RuntimeError(errors[0] if errors else f"ninja failed: {done.stdout[-200:]}")


if __name__ == "__main__":  # so that tests can import what is above
    setup(
        ext_modules=[] if build_mode() == "0" else [Extension("vitq_kernels._cuda", [], optional=True)],
        cmdclass={"build_ext": BuildCuda},
        setup_requires=requirements(),
    )
