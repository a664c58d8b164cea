"""The compiled extension: loaded on first use, and what is known of how it was built."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from functools import cache
from importlib.resources import files
from types import ModuleType

# Path of the extension built for a CPU with csrc/emulation, for tests: tensors then lie on the cpu.
EMULATION_VARIABLE = "VITQ_CUDA_EMULATION"


def emulated() -> bool:
    """Whether the kernels run on the CPU in this process."""
    return bool(os.environ.get(EMULATION_VARIABLE))


def module() -> ModuleType:
    """The extension, or its emulation where the environment names one.

    Raises:
        ImportError: it was not built, or cannot be loaded; the message says why.
    """
    return _module(os.environ.get(EMULATION_VARIABLE, ""))


@cache  # by path: a process may ask for the extension first, and for the emulation later
def _module(path: str) -> ModuleType:
    if not path:
        try:
            return importlib.import_module("vitq_kernels._cuda")
        except ModuleNotFoundError as error:
            raise ImportError(f"vitq_kernels._cuda is not built: {build_record()}") from error
    spec = importlib.util.spec_from_file_location("_cuda", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{EMULATION_VARIABLE} must be the path of an extension module, got {path}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build_record() -> str:
    """What setup.py wrote down when this package was installed (docs/building.md)."""
    try:
        record = json.loads((files("vitq_kernels") / "_cuda_build.json").read_text(encoding="utf-8"))
        if record["built"]:
            return f"built by nvcc {record['nvcc']} for {record['architectures']}"
        return f"the build failed: {record['reason']}"
    except FileNotFoundError:
        return "it was installed with VITQ_BUILD_CUDA=0"
    except (ValueError, KeyError, TypeError) as error:
        return f"_cuda_build.json cannot be read ({type(error).__name__})"


def state() -> str:
    """One line for ``vitq doctor``: built and loadable, or why not."""
    try:
        module()
    except ImportError as error:
        return f"no: {error}"
    return f"emulated on the CPU ({EMULATION_VARIABLE})" if emulated() else f"loads, {build_record()}"
