"""setup.py: what it finds and asks for, and real builds of a small csrc/ in clean environments."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import BackendCase
from vitq_kernels.ops import cuda
from vitq_kernels.ops.cuda import extension

CHECKOUT = Path(__file__).parents[1]
VARIABLES = ("VITQ_BUILD_CUDA", "VITQ_CUDA_ARCHITECTURES", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")
# A kernel beside the real bindings would need all launchers: a module of one function is the build's own test.
BINDINGS = """
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
int version();
PYBIND11_MODULE(_cuda, module) {
  module.def("version", &version);
  module.def("launch_error", [] { int count = 0; return std::string(cudaGetErrorString(cudaGetDeviceCount(&count))); });
}
"""
KERNEL = '#include "number.cuh"\n__global__ void kernel(int* x) { *x = NUMBER; }\nint version() { return NUMBER; }\n'


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("vitq_setup", CHECKOUT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, version: str, builds: bool = True) -> Path:
    """An nvcc that says its version, and fails at anything else."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    says = f"echo 'release, V{version}' && exit {int(not builds)}"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {says}\necho "k.cu(1): error: no such kernel"\nexit 3\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("mode", ["auto", "0", "1"])
def test_modes(script: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("VITQ_BUILD_CUDA", mode)
    assert script.build_mode() == mode


@pytest.mark.parametrize("mode", ["yes", "", "2"])
def test_an_unknown_mode_is_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("VITQ_BUILD_CUDA", mode)
    with pytest.raises(SystemExit, match=f"^VITQ_BUILD_CUDA must be auto, 0 or 1, got '{mode}'$"):
        script.build_mode()


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("80", "-gencode 'arch=compute_80,code=sm_80'"),
        (
            "89+PTX;90a",
            (
                "-gencode 'arch=compute_89,code=[sm_89,compute_89]' "
                "-gencode 'arch=compute_90a,code=sm_90a' -DVITQ_HAS_SM90A"
            ),
        ),
        (
            "86;80+PTX;120",
            (
                "-gencode 'arch=compute_80,code=sm_86' -gencode 'arch=compute_80,code=[sm_80,compute_80]' "
                "-gencode 'arch=compute_120,code=sm_120'"
            ),
        ),
    ],
)
def test_architectures(script: ModuleType, given: str, flags: str) -> None:
    assert script.gencode(given) == flags


@pytest.mark.parametrize("given", ["", "sm_80", "80,86", "8.0", "80;", "90a+ptx"])
def test_architectures_of_another_form_are_refused(script: ModuleType, given: str) -> None:
    with pytest.raises(SystemExit, match=r"^VITQ_CUDA_ARCHITECTURES must be like '80\+PTX;86;89"):
        script.gencode(given)


def test_no_source_asks_for_a_finer_architecture_than_the_front_end_sees() -> None:
    # Machine code of sm_86 and 89 is made from the PTX of compute_80 (setup.py, gencode).
    sources = [path for path in (CHECKOUT / "csrc").glob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    asked = [found for path in sources for found in re.findall(r"__CUDA_ARCH__ *[^\w) ]+ *\w+", path.read_text())]
    assert set(asked) == {"__CUDA_ARCH__ >= 900"}


def test_the_default_architectures(script: ModuleType) -> None:
    """The design's, but for the PTX: that of the oldest, from which those before Hopper are made, not the newest."""
    assert script.ARCHITECTURES == "80+PTX;86;89;90a"


def test_cuda_home_goes_before_path(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, on_path = fake_nvcc(tmp_path / "home", "12.4.1"), fake_nvcc(tmp_path / "path", "13.0.2")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert script.machine_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    assert script.machine_nvcc() == home
    assert script.requirements() == ["ninja", "pybind11"]


@pytest.mark.parametrize(("version", "builds"), [("11.8.89", True), ("13.0.1", False)], ids=["too-old", "broken"])
def test_an_nvcc_of_no_use_is_passed_over(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, builds: bool
) -> None:
    nvcc = fake_nvcc(tmp_path, version, builds)
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}/bin")
    assert script.machine_nvcc() is None


def test_without_nvcc_it_is_asked_for(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = script.requirements()
    assert asked[:2] == ["ninja", "pybind11"]
    assert all(name.startswith("nvidia-") and name.endswith("==13.0.*") for name in asked[2:])
    assert len(asked) == 7
    monkeypatch.setenv("VITQ_BUILD_CUDA", "0")
    assert script.requirements() == []


# --- real builds --------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The checkout's build files with a csrc/ of one small kernel."""
    project = tmp_path / "project"
    (project / "csrc").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, project)
    (project / "vitq_kernels").mkdir()
    (project / "vitq_kernels" / "__init__.py").write_text('"""Without torch."""\n')
    (project / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (project / "csrc" / "kernel.cu").write_text(KERNEL)
    (project / "csrc" / "number.cuh").write_text("#define NUMBER 42\n")
    return project


def install(project: Path, folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """``pip install --no-deps .`` in a new environment; what it said, and where the package went."""
    venv.create(folder, with_pip=True)
    given = {"VITQ_CUDA_ARCHITECTURES": "80", **os.environ, **environment}
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--verbose", "--no-deps", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=folder)
    return (
        done,
        folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "vitq_kernels",
    )


def call(folder: Path, expression: str) -> str:
    """What an expression of the built module gives in that environment."""
    code = f"from vitq_kernels import _cuda; print({expression})"
    return subprocess.run(
        [str(folder / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True, cwd=folder
    ).stdout.strip()


def hidden_nvcc(folder: Path) -> str:
    """A PATH with the system's tools, without nvcc."""
    path = os.pathsep.join(p for p in ("/usr/bin", "/bin") if not (Path(p) / "nvcc").exists())
    assert shutil.which("nvcc", path=path) is None
    assert shutil.which("c++", path=path) is not None
    return path


@pytest.mark.slow
def test_nvcc_of_pypi_builds_where_the_machine_has_none(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    done, package = install(project, folder, PATH=hidden_nvcc(folder), VITQ_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cu13/bin/nvcc" in done.stdout + done.stderr
    record = json.loads((package / "_cuda_build.json").read_text())
    assert record["built"]
    assert record["nvcc"].startswith("13.0.")
    assert call(folder, "_cuda.version()") == "42"
    # Imports without a driver; only a call of CUDA says that there is none.
    assert call(folder, "_cuda.launch_error()") != ""
    # A changed header is noticed, nothing else is compiled again.
    (project / "csrc" / "number.cuh").write_text("#define NUMBER 43\n")
    done, _ = install(project, folder, PATH=hidden_nvcc(folder), VITQ_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert call(folder, "_cuda.version()") == "43"


@pytest.mark.parametrize(("mode", "installed"), [("auto", True), ("1", False)])
def test_a_compiler_that_fails(project: Path, tmp_path: Path, mode: str, installed: bool) -> None:
    nvcc = fake_nvcc(tmp_path / "broken", "13.0.1")
    folder = tmp_path / "venv"
    done, package = install(project, folder, CUDA_HOME=str(nvcc.parents[1]), VITQ_BUILD_CUDA=mode)
    assert (done.returncode == 0) == installed, done.stdout + done.stderr
    if installed:
        assert "warning: vitq_kernels is installed without its CUDA kernels" in done.stdout + done.stderr
        record = json.loads((package / "_cuda_build.json").read_text())
        assert not record["built"]
        assert record["reason"] == "k.cu(1): error: no such kernel"
    else:
        assert "VITQ_BUILD_CUDA=1, but vitq_kernels._cuda was not built" in done.stdout + done.stderr


def test_a_pure_install(project: Path, tmp_path: Path) -> None:
    done, package = install(project, tmp_path / "venv", VITQ_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in package.iterdir() if path.is_file()) == ["__init__.py"]


# --- what the package says of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"built": True, "nvcc": "13.0.88", "architectures": "80;90a"}, "built by nvcc 13.0.88 for 80;90a"),
        ({"built": False, "nvcc": "", "architectures": "80", "reason": "no nvcc"}, "the build failed: no nvcc"),
        (None, "it was installed with VITQ_BUILD_CUDA=0"),
        ([], "_cuda_build.json cannot be read (TypeError)"),
    ],
    ids=["built", "failed", "none", "broken"],
)
def test_the_record_in_words(record: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if record is not None:
        (tmp_path / "_cuda_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(extension, "files", lambda package: tmp_path)
    assert extension.build_record() == said


def test_the_build_of_this_package_did_not_fail() -> None:
    """Else the tests of the compiled code would only be skipped."""
    assert not extension.build_record().startswith("the build failed")


def test_an_extension_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(extension.EMULATION_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vitq_kernels._cuda", None)
    monkeypatch.setattr(extension, "build_record", lambda: "the build failed: no nvcc")
    extension._module.cache_clear()
    cuda.gpu_reason.cache_clear()
    try:
        assert extension.state() == "no: vitq_kernels._cuda is not built: the build failed: no nvcc"
        assert cuda.unavailable("cuda") == "vitq_kernels._cuda is not built: the build failed: no nvcc"
    finally:
        extension._module.cache_clear()
        cuda.gpu_reason.cache_clear()


def test_the_emulation_may_come_after_the_extension(emulated: BackendCase, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ[extension.EMULATION_VARIABLE]
    monkeypatch.delenv(extension.EMULATION_VARIABLE)
    extension.state()
    monkeypatch.setenv(extension.EMULATION_VARIABLE, path)
    assert hasattr(extension.module(), "set_seed")
