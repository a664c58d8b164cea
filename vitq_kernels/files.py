"""Writing files so that a failure never leaves half a file in place of a good one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_DISCARD = ContextVar("_DISCARD", default=False)


@contextlib.contextmanager
def discarded() -> Iterator[None]:
    """Inside, files are made as always but replace nothing: for processes of which one alone shall write."""
    token = _DISCARD.set(True)
    try:
        yield
    finally:
        _DISCARD.reset(token)


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` to write to; on success it takes the place of ``path``.

    On an exception the temporary file is removed and ``path`` stays as it was.

    Raises:
        ValueError: the directory of ``path`` does not exist.
    """
    path = Path(path).resolve()  # a link stays a link
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: directory {path.parent} does not exist")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if _DISCARD.get():
            return
        # mkstemp makes files that only their owner may read; a result is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text through ``replaced_file``."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
