"""How a received file becomes durable: by what its file system needs, and whole before it has a name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocols.files import durable
from protocols.files import filesystem as fs
from protocols.files.partial import PartialFile


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("ext4", durable.OneCommit),
        ("xfs", durable.OneCommit),
        ("btrfs", durable.AnyFileSystem),
        ("nfs4", durable.AnyFileSystem),
        ("", durable.AnyFileSystem),
        ("tmpfs", durable.Volatile),
    ],
)
def test_each_file_system_gets_what_it_needs(
    kind: str, way: durable.DurableWay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "kind", lambda folder: kind)
    assert durable.way_of(tmp_path) is way
    flushed: list[str] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def noted(fd: int, name: str = name, real: object = real) -> None:
            where = "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"
            flushed.append(f"{name} of {where}, {len(list(tmp_path.iterdir()))} named")

        monkeypatch.setattr(os, name, noted)
    written: list[int] = []
    monkeypatch.setattr(fs, "write_back", lambda fd: written.append(len(list(tmp_path.iterdir()))))
    part = PartialFile(tmp_path)
    os.write(part.fd, b"data")
    made = way(part)
    part.keep("1.dcm", replace=False)
    made.named(str(tmp_path))
    part.close()
    assert (tmp_path / "1.dcm").read_bytes() == b"data"
    assert (
        flushed
        == {
            durable.OneCommit: ["fsync of file, 1 named"],
            durable.AnyFileSystem: ["fdatasync of file, 0 named", "fsync of folder, 1 named"],
            durable.Volatile: [],
        }[way]
    )  # type: ignore[index]
    assert written == ([0] if way is durable.OneCommit else [])  # the data before the name


def test_a_system_without_the_call_gets_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fs, "kind", lambda folder: "ext4")
    monkeypatch.setattr(fs, "_SYNC_FILE_RANGE", None)
    assert durable.way_of(tmp_path) is durable.AnyFileSystem
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_not_given(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(b"first")
    part = PartialFile(tmp_path)
    with pytest.raises(FileExistsError):
        part.keep("1.dcm", replace=False)
    with pytest.raises(FileNotFoundError):
        part.keep("gone/1.dcm", replace=False)
    part.keep("2.dcm", replace=False)
    part.close()
    assert (tmp_path / "1.dcm").read_bytes() == b"first" and (tmp_path / "2.dcm").read_bytes() == b""
    assert len(list(tmp_path.iterdir())) == 2
