"""The shape of the package (CONTRIBUTING.md, Layers): who may import whom, small files, no dumping grounds."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

PACKAGE = "vitq_kernels"
ROOT = Path(next(iter(importlib.util.find_spec(PACKAGE).submodule_search_locations)))
CHECKOUT = Path(__file__).parents[1]

# What a module may import of the package: names of modules, each with everything below it. The row that fits best
# decides; a module without a row may import anything but backends.
ALLOWED = {
    "budget": (),
    "spec": ("budget",),
    "packing": ("spec",),
    "ops.reference": ("spec", "packing"),
    "ops": ("spec", "packing", "ops"),
    "ops.tuning": ("files", "ops"),
    "activations": (),
    "rotary": (),
    "windows": (),
    "nn": ("spec", "packing", "ops", "nn", "activations", "rotary", "windows"),
    # The stages know the vocabulary and the model, and each other only through data.
    "models": ("spec", "models", "activations", "rotary", "windows"),
    "quantizers": ("spec",),
    "rounding": ("spec", "quantizers"),
    "config": ("spec",),
    "levels": ("quantizers",),
    "compensation": ("models", "observers"),
    "observers": ("spec", "config", "quantizers"),
    "files": (),
    "stopwatch": (),
    "roofline": ("stopwatch",),
    "tensor_file": ("files",),
    "calibration": ("spec", "config", "files", "models", "observers", "quantizers", "windows"),
    "lrp_composite": (),
    "lrp_chefer": ("activations", "lrp_composite"),
    "lrp_attnlrp": ("activations", "lrp_composite"),
    "lrp_rules": ("lrp_chefer", "lrp_attnlrp"),
    "simulation": ("spec", "models", "activations", "rotary"),
    "rotation": ("models",),
    "distributed": (),
    "relevance_program": ("spec", "models", "lrp_composite", "windows"),
    "fisher": ("activations", "lrp_attnlrp", "lrp_composite"),
    "relevance_target": (),
    "relevance": ("spec", "models", "lrp_rules", "fisher", "relevance_program", "relevance_target", "distributed"),
    "sensitivity": ("spec",),
    "sensitivity_cache": ("files", "distributed"),
    "sensitivity_quantizers": (
        "spec",
        "config",
        "levels",
        "models",
        "quantizers",
        "rounding",
        "calibration",
        "sensitivity",
    ),
    "sensitivity_runs": (
        "spec",
        "config",
        "models",
        "calibration",
        "simulation",
        "distributed",
        "sensitivity",
        "sensitivity_cache",
        "sensitivity_quantizers",
    ),
    # Pure numbers: neither model nor images.
    "latency": ("spec",),
    "costs": ("spec",),
    "limits": ("spec", "latency"),
    "knapsack": (),
    "quadratic": ("knapsack",),
    "greedy": ("knapsack",),
    "marginals": ("limits",),
    "grouping": ("spec",),
    "choices": ("spec", "costs", "grouping", "limits"),
    "allocation": (
        *("spec", "latency", "costs", "limits", "grouping", "choices"),
        *("knapsack", "quadratic", "greedy", "marginals"),
    ),
    "strategies": ("spec", "costs", "relevance", "sensitivity"),
    "presets": ("spec", "models", "simulation", "presets", "tensor_file"),
    "data": ("spec", "data"),
}
BACKENDS = ("ops.reference", "ops.cpu", "ops.triton", "ops.cuda")  # imported by ops alone
MAX_LINES = 300
LONGER = {
    "spec.py": 340,  # the vocabulary: one place to look, plain data
    "ops/triton/attention.py": 320,  # a kernel with its launcher
    "ops/reference.py": 385,  # the specification: one place to look
}
DUMPING_GROUNDS = {"utils", "util", "helpers", "common", "misc"}


def covers(module: str, name: str) -> bool:
    """Whether ``name`` is ``module`` or lies below it."""
    return name == module or name.startswith(f"{module}.")


def modules() -> dict[str, Path]:
    """Every module of the package under its name without the package's; ``""`` is the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, source: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules of the package that a source imports anywhere in it, functions and type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = [PACKAGE, *name.split(".")] if name else [PACKAGE]
                up = node.level - is_package
                base = ".".join(parents[: len(parents) - up] + ([base] if base else []))
            for alias in node.names:
                below = f"{base}.{alias.name}"
                found.add(below if below.removeprefix(f"{PACKAGE}.") in known else base)
    return {
        module.removeprefix(PACKAGE).removeprefix(".")
        for module in found
        if module == PACKAGE or module.startswith(f"{PACKAGE}.")
    }


def problems(name: str, imported: set[str]) -> list[str]:
    """Imports of a module that the rule forbids."""
    rows = [row for row in ALLOWED if covers(row, name)]
    wrong = set()
    if rows:
        allowed = ALLOWED[max(rows, key=len)]
        wrong = {module for module in imported if not any(covers(a, module) for a in allowed)}
    if not covers("ops", name):
        wrong |= {module for module in imported if any(covers(backend, module) for backend in BACKENDS)}
    return [f"{name} imports {module or PACKAGE}" for module in sorted(wrong)]


MODULES = modules()
IMPORTS = {
    name: imports_of(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", set(MODULES))
    for name, path in MODULES.items()
}


@pytest.mark.parametrize("name", MODULES, ids=[name or PACKAGE for name in MODULES])
def test_a_module_imports_only_what_it_may(name: str) -> None:
    assert problems(name, IMPORTS[name]) == []


def test_there_are_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for module in IMPORTS.get(name, ()):
                visit(module, (*path, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES, ids=[name or PACKAGE for name in MODULES])
def test_a_file_is_small(name: str) -> None:
    path = MODULES[name]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = LONGER.get(path.relative_to(ROOT).as_posix(), MAX_LINES)
    assert lines <= limit, f"{path.name} has {lines} lines: is there one reason to change it?"


@pytest.mark.parametrize(
    "folder", [ROOT, *(CHECKOUT / n for n in ("csrc", "tests", "benchmarks"))], ids=lambda p: p.name
)
def test_no_file_is_a_dumping_ground(folder: Path) -> None:
    assert [p.name for p in folder.rglob("*") if p.name.split(".")[0].lower() in DUMPING_GROUNDS] == []


# The rule itself sees what it should.
@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("nn.linear", "from vitq_kernels.ops import cpu", ["nn.linear imports ops.cpu"]),
        ("nn.linear", "from vitq_kernels.ops.reference import requantise", ["nn.linear imports ops.reference"]),
        ("nn.linear", "from ..ops import reference", ["nn.linear imports ops.reference"]),
        ("nn.linear", "def f():\n    import vitq_kernels.convert", ["nn.linear imports convert"]),
        ("nn.linear", "from . import module\nfrom ..spec import Site\nfrom vitq_kernels import ops", []),
        ("convert", "from vitq_kernels.ops import cpu", ["convert imports ops.cpu"]),
        ("convert", "from vitq_kernels.ops import use_backend\nfrom vitq_kernels import nn", []),
        ("quantizers", "from vitq_kernels.models import model_parts", ["quantizers imports models"]),
        ("spec", "from vitq_kernels import packing", ["spec imports packing"]),
        ("spec", "from vitq_kernels import relevance_function", ["spec imports vitq_kernels"]),
        ("ops.reference", "from vitq_kernels.ops import cpu", ["ops.reference imports ops.cpu"]),
        ("ops.triton.linear", "from vitq_kernels.ops import reference", []),
        ("allocation", "if TYPE_CHECKING:\n    from .nn import QuantLinear", ["allocation imports nn"]),
    ],
)
def test_the_rule_sees(name: str, source: str, expected: list[str]) -> None:
    known = {"spec", "packing", "ops", "ops.cpu", "ops.reference", "nn", "nn.module", "models", "convert"}
    assert problems(name, imports_of(name, source, False, known)) == expected
