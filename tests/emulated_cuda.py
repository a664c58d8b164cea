"""Builds csrc/ for a CPU, with the emulation of the CUDA execution model in place of a GPU.

As a program, ``python -m tests.emulated_cuda [--sanitize]``, it prints the path of the built module.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
CACHE = Path(os.environ.get("VITQ_EMULATION_CACHE", CSRC.parent / "build" / "emulation"))
COMPILER = os.environ.get("CXX", "g++")
# As the kernels are meant: no contraction, wrapping int32 sums like the hardware's.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fwrapv", "-DVITQ_EMULATION")
WARNINGS = ("-Wall", "-Wno-unknown-pragmas")
# With -O1 this takes 580 s of a CPU instead of 170, and the sample of test_cuda_sanitized.py gains less than that.
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def sources(csrc: Path = CSRC) -> list[Path]:
    """What the emulated extension consists of: every kernel, the bindings and the emulation."""
    kernels = [path for path in sorted(csrc.glob("*.cu")) if path.name != "device.cu"]
    return [*kernels, csrc / "bindings.cpp", csrc / "emulation" / "execution.cpp"]


def build(sanitize: bool = False, csrc: Path = CSRC) -> Path:
    """Compiles what has changed since the last call; returns the module's path.

    Raises:
        RuntimeError: the compiler failed; the message is what it printed.
    """
    import pybind11

    includes = [f"-I{csrc}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*FLAGS, *WARNINGS, *(SANITIZERS if sanitize else ()), *includes]
    headers = sorted([*csrc.glob("*.cuh"), *csrc.glob("*.h"), *csrc.glob("emulation/*.h")])
    shared = b"".join(path.read_bytes() for path in headers) + " ".join([COMPILER, *flags]).encode()
    CACHE.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(shared + source.name.encode() + source.read_bytes()).hexdigest()[:16]
        target = CACHE / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.tmp")
            _run(COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(partial))
            partial.replace(target)
        return target

    # One process builds: the others of pytest-xdist find what it left.
    with open(CACHE / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(compile_one, sources(csrc)))
    key = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    module = CACHE / key / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        partial = module.with_suffix(f".{os.getpid()}.tmp")
        _run(COMPILER, *flags, "-shared", *map(str, objects), "-o", str(partial))
        partial.replace(module)
    return module


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv[1:]))
