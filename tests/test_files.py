"""A failed write leaves the file that was there, and nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitq_kernels.files import replaced_file, write_text


@pytest.fixture
def umask() -> Iterator[None]:
    """Puts the umask back."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "existing"])
def test_a_whole_write_takes_the_place(old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    if old is not None:
        path.write_bytes(old)
    with replaced_file(path) as temporary:
        assert temporary.parent == tmp_path  # the same file system, so that replacing is atomic
        temporary.write_bytes(b"new")
        assert (path.read_bytes() if path.exists() else None) == old  # not before the end
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["result.bin"]


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "existing"])
@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr
)
def test_a_failed_write_changes_nothing(error: BaseException, old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    if old is not None:
        path.write_bytes(old)

    def write_half() -> None:
        with replaced_file(path) as temporary:
            temporary.write_bytes(b"ne")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert os.listdir(tmp_path) == ([] if old is None else ["result.bin"])
    assert old is None or path.read_bytes() == old


def test_a_failed_replacement_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="read-only"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_writing_over_a_folder_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "result", "new")
    assert os.listdir(tmp_path) == ["result"]


def test_text_that_cannot_be_encoded_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \udc80")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000], ids=oct)
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    os.umask(mask)
    write_text(tmp_path / "result.txt", "new")
    (tmp_path / "plain").touch()
    assert permissions(tmp_path / "result.txt") == permissions(tmp_path / "plain") == 0o666 & ~mask
    assert os.umask(0o022) == mask  # as it was


def test_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "result.txt"
    with pytest.raises(ValueError, match=rf"cannot write {path}: directory {path.parent} does not exist"):
        write_text(path, "new")
    assert os.listdir(tmp_path) == []


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"directory \S+/file does not exist"):
        write_text(tmp_path / "file" / "result.txt", "new")


def test_text_is_utf8_with_line_ends_as_given(tmp_path: Path) -> None:
    write_text(str(tmp_path / "result.txt"), "é\nτ\n")
    assert (tmp_path / "result.txt").read_bytes() == "é\nτ\n".encode()


def test_a_bare_name_is_written_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text("result.txt", "new")
    assert (tmp_path / "result.txt").read_text() == "new"
