"""Files that have no name before they are whole, on every kind of file system."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocols.files import partial
from protocols.files.partial import PartialFile

real_open, real_link = os.open, os.link


def without_unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)


def without_empty_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old kernel: the same answer as for a folder that is not there."""

    def refused(*args: object) -> int:
        ctypes.set_errno(errno.ENOENT)
        return -1

    monkeypatch.setattr(partial, "_LINKAT", refused)


def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    without_empty_paths(monkeypatch)

    def linked(source: Any, target: Any, **options: Any) -> None:
        if str(source).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        real_link(source, target, **options)

    monkeypatch.setattr(os, "link", linked)


def as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("lacking", [as_usual, without_unnamed, without_empty_paths, without_proc])
def test_a_file_gets_its_name_when_it_is_whole(
    lacking: Callable[[pytest.MonkeyPatch], None], there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(monkeypatch)
    if there:
        (tmp_path / "1.dcm").write_bytes(b"what was there before")
    part = PartialFile(tmp_path)
    os.write(part.fd, b"12345")
    assert [path.name for path in tmp_path.glob("*.dcm")] == ["1.dcm"] * there
    part.keep("1.dcm")
    assert os.fstat(part.fd).st_nlink == 1
    part.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1.dcm"]
    assert (tmp_path / "1.dcm").read_bytes() == b"12345"


@pytest.mark.parametrize("lacking", [as_usual, without_unnamed, without_empty_paths])
def test_a_name_that_is_taken_and_a_folder_that_is_not_there(
    lacking: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(monkeypatch)
    (tmp_path / "1.dcm").write_bytes(b"first")
    part = PartialFile(tmp_path)
    with pytest.raises(FileExistsError):
        part.keep("1.dcm", replace=False)
    with pytest.raises(FileNotFoundError):
        part.keep("nowhere/1.dcm", replace=False)
    part.keep("2.dcm", replace=False)
    part.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"1.dcm": b"first", "2.dcm": b""}


@pytest.mark.parametrize("lacking", [as_usual, without_unnamed])
def test_nothing_is_left_of_one_that_is_not_kept(
    lacking: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(monkeypatch)
    part = PartialFile(tmp_path)
    os.write(part.fd, b"12345")
    part.close()
    assert not list(tmp_path.iterdir())
