"""What a device check is of: which GPU, which code. Needs the standard library alone."""

from __future__ import annotations

import hashlib
import importlib.machinery
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
