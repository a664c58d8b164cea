"""README, CONTRIBUTING and CHANGELOG stay true: their snippets run, their paths exist, CI finds its commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

CHECKOUT = Path(__file__).parents[1]
# A name without a folder is a repository path if it ends like a source; `bits.json` or `summary.md` are the user's.
SOURCE_SUFFIXES = (".py", ".toml", ".yaml", ".cu", ".cuh", ".cpp", ".h")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NO_TEST = re.compile(r"<!-- no-test:(.*)-->\s*\Z")
INLINE_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Snippet:
    """A fenced python block."""

    code: str
    line: int  # of its first line of code, counted from 1
    no_test: str | None  # the reason in the comment before it


def read(name: str) -> str:
    path = CHECKOUT / name
    if not path.is_file():
        pytest.fail(f"{name} is missing in {CHECKOUT}")
    return path.read_text(encoding="utf-8")


def snippets(text: str) -> list[Snippet]:
    """The python blocks in order; ``<!-- no-test: reason -->`` right before one marks it as not for running."""
    found = []
    for block in FENCED.finditer(text):
        if block.group(1) == "python":
            comment = NO_TEST.search(text[: block.start()])
            reason = comment.group(1).strip() if comment else None
            found.append(Snippet(block.group(2), text[: block.start(2)].count("\n") + 1, reason))
    return found


def run_snippets(blocks: list[Snippet], name: str, namespace: dict[str, Any]) -> None:
    """Executes blocks in one namespace; tracebacks show the lines of the document."""
    for block in blocks:
        if block.no_test is None:
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)


def ci_command(text: str, marker: str) -> str | None:
    """The ```bash block after ``<!-- ci:marker -->``, as .ci/run finds it."""
    found = re.search(rf"^<!-- ci:{marker} -->\n\s*```bash\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    return found.group(1) if found else None


def named_paths(text: str, top: set[str]) -> Iterator[str]:
    """Inline code that looks like a path of the repository, whose entries are ``top``."""
    for code in INLINE_CODE.findall(FENCED.sub("", text)):
        path = code.split("::")[0].rstrip("/")
        if not re.fullmatch(r"[\w.*/-]+", path) or path.startswith(("/", "..", "~")):
            continue
        first, slash, _ = path.partition("/")
        if first in top if slash or code.endswith("/") else path in top or path.endswith(SOURCE_SUFFIXES):
            yield path


def versions_of(changelog: str) -> list[str]:
    """Versions with a section, newest first; "Unreleased" counts as one."""
    return re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", changelog, re.MULTILINE)


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``timm.create_model`` gives small random ViTs and fetches nothing; the working directory is ``tmp_path``."""
    original = timm.create_model

    def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        small = {"embed_dim": 64, "depth": 2, "num_heads": 2}
        return original(name, pretrained=False, **{**kwargs, **small})

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.usefixtures("tiny_models")
def test_readme_snippets_run() -> None:
    """In order and in one namespace, which holds ``images``: eight random ones of 224 pixels."""
    blocks = snippets(read("README.md"))
    assert [block for block in blocks if block.no_test is None], "README.md has no python snippet that runs"
    run_snippets(blocks, "README.md", {"images": torch.randn(8, 3, 224, 224)})


def test_readme_snippets_that_do_not_run_say_why(record_property: pytest.RecordProperty) -> None:
    blocks = snippets(read("README.md"))
    record_property("snippets not run", sum(block.no_test is not None for block in blocks))
    assert [block.line for block in blocks if block.no_test == ""] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_named_paths_exist(name: str) -> None:
    top = {path.name for path in CHECKOUT.iterdir()} | {"csrc", "shared"}
    assert [path for path in named_paths(read(name), top) if not any(CHECKOUT.glob(path))] == []


@pytest.mark.parametrize("marker", ["run", "test"])
def test_ci_finds_its_commands(marker: str) -> None:
    assert ci_command(read("README.md"), marker), f"README.md needs a ```bash block after <!-- ci:{marker} -->"


def test_changelog_knows_the_version() -> None:
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    newest, *_ = versions_of(read("CHANGELOG.md")) or ["none"]
    assert version is not None
    assert newest in ("Unreleased", version.group(1))


def test_ruff_is_pinned_once() -> None:
    pinned = re.search(r'"ruff==([\d.]+)"', read("pyproject.toml"))
    hook = re.search(r"ruff-pre-commit\n +rev: v([\d.]+)\n", read(".pre-commit-config.yaml"))
    assert pinned is not None
    assert hook is not None
    assert pinned.group(1) == hook.group(1)


# The checks themselves, on a document made for it.
DOCUMENT = """# Title
See `vitq_kernels/spec.py`, `tests/`, `csrc/nothing.cu`, `lost.py`, `q/k/v`, `bits.json`, `vitq demo` and `setup.py`.

<!-- ci:run -->
```bash
pip install . && vitq demo
```

```python
x = images + 1  # `tests/in_a_block.py`
```
<!-- no-test: needs a GPU -->
```python
x.cuda()
```
<!-- no-test: -->

```python
raise SystemExit
```

<!-- ci:test -->
Some text first.
```bash
pytest
```
```python
y = x * 2
assert y == 5
```
"""


def test_snippets_are_found_with_lines_and_reasons() -> None:
    found = snippets(DOCUMENT)
    assert [block.no_test for block in found] == [None, "needs a GPU", "", None]
    lines = DOCUMENT.splitlines()
    assert [lines[block.line - 1] for block in found] == [block.code.splitlines()[0] for block in found]


def test_snippets_share_a_namespace_and_fail_at_their_line() -> None:
    namespace: dict[str, Any] = {"images": 1}
    with pytest.raises(AssertionError) as caught:
        run_snippets(snippets(DOCUMENT), "DOC.md", namespace)
    assert (namespace["x"], namespace["y"]) == (2, 4)
    frame = caught.traceback[-1]
    assert (str(frame.path), DOCUMENT.splitlines()[frame.lineno]) == ("DOC.md", "assert y == 5")


def test_paths_are_told_from_other_code() -> None:
    found = named_paths(DOCUMENT, {"vitq_kernels", "tests", "csrc", "setup.py"})
    assert list(found) == ["vitq_kernels/spec.py", "tests", "csrc/nothing.cu", "lost.py", "setup.py"]


def test_ci_commands_follow_their_marker_at_once() -> None:
    assert ci_command(DOCUMENT, "run") == "pip install . && vitq demo"
    assert ci_command(DOCUMENT, "test") is None


def test_versions_of_a_changelog() -> None:
    assert versions_of("# Changelog\n## [Unreleased]\n### Added\n## [0.1.0] - 2026-11-20\n") == ["Unreleased", "0.1.0"]


@pytest.mark.usefixtures("tiny_models")
def test_models_in_snippets_are_small_and_need_no_network() -> None:
    model = timm.create_model("vit_base_patch16_224", pretrained=True)
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_the_script_of_ci_reads_readme_as_these_tests_do(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = read(".ci/run")
    (tmp_path / ".ci" / "run").write_text(script[: script.index("run_command=$(")] + '\nreadme_command "$1"\n')
    (tmp_path / "README.md").write_text(DOCUMENT)
    for marker in ("run", "test"):
        done = subprocess.run(["bash", ".ci/run", marker], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        expected = ci_command(DOCUMENT, marker)
        assert (done.returncode == 0) == (expected is not None)
        if expected is None:
            assert "no ```bash block after <!-- ci:test -->" in done.stderr
        else:
            assert done.stdout.splitlines()[0] == expected
