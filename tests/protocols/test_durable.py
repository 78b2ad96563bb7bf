"""How a received file becomes durable: by what its file system needs, and whole before it has a name."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from mmap import PAGESIZE
from pathlib import Path

import pytest

from protocols.files import durable
from protocols.files import filesystem as fs
from protocols.files.durable import AHEAD_BYTES
from protocols.files.partial import PartialFile


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("ext4", durable.OneCommit),
        ("xfs", durable.OneCommit),
        ("btrfs", durable.DurableFile),
        ("nfs4", durable.DurableFile),
        ("", durable.DurableFile),
        ("tmpfs", durable.VolatileFile),
    ],
)
def test_each_file_system_gets_what_it_needs(
    kind: str, way: type[durable.DurableFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    part = way(tmp_path)
    os.write(part.fd, b"data")
    part.wrote(4)
    part.written()
    part.keep("1.dcm", replace=False)
    part.named(str(tmp_path))
    part.close()
    assert (tmp_path / "1.dcm").read_bytes() == b"data"
    assert (
        flushed
        == {
            durable.OneCommit: ["fsync of file, 1 named"],
            durable.DurableFile: ["fdatasync of file, 0 named", "fsync of folder, 1 named"],
            durable.VolatileFile: [],
        }[way]
    )
    assert written == ([0] if way is durable.OneCommit else [])  # the data before the name


def test_the_disk_begins_while_data_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whole pages, each once, behind each other; a small file is left to the end."""
    begun: list[tuple[int, int]] = []
    real = fs.begin_write_back

    def noted(fd: int, begin: int, count: int) -> None:
        begun.append((begin, count))
        real(fd, begin, count)

    monkeypatch.setattr(fs, "begin_write_back", noted)
    data = os.urandom(3 * AHEAD_BYTES + 4321)
    for name, size in (("large", len(data)), ("small", AHEAD_BYTES - 1)):
        part, size_now = durable.OneCommit(tmp_path), 0
        begun.clear()
        for step in itertools.cycle((312, 65_530, 131_060)):
            size_now += os.write(part.fd, data[size_now : min(size, size_now + step)])
            part.wrote(size_now)
            if size_now == size:
                break
        at = 0
        for begin, count in begun:
            assert begin == at and count > 0 and count % PAGESIZE == 0
            at += count
        assert size - AHEAD_BYTES < at <= size
        part.written()
        part.keep(name)
        part.named(str(tmp_path))
        part.close()
        assert (tmp_path / name).read_bytes() == data[:size]


@pytest.mark.mounts
@pytest.mark.skipif(not (os.geteuid() == 0 and os.path.exists("/dev/loop-control")), reason="needs a loop device")
@pytest.mark.parametrize("journal", ["has_journal", "^has_journal"])
def test_a_copy_of_the_disk_has_what_was_named(journal: str, tmp_path: Path) -> None:
    """As a power cut would leave it: each file that was waited for is there and whole, what still comes has no name."""
    data = {str(size): os.urandom(size) for size in (1, 4096, 30_001, 3 * AHEAD_BYTES + 4321, 1_500_000)}
    image, copy, there = tmp_path / "disk", tmp_path / "copy", tmp_path / "there"
    there.mkdir()
    with image.open("wb") as file:
        file.truncate(1 << 26)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", journal, image], check=True, env={"PATH": "/usr/sbin:/sbin"})
    subprocess.run(["mount", "-o", "loop", image, there], check=True)
    way = durable.way_of(there)
    assert way is durable.OneCommit

    def keep(name: str) -> None:
        part = way(there)
        for at in range(0, len(data[name]), 65_530):
            part.wrote(at + os.write(part.fd, data[name][at : at + 65_530]))
        part.written()
        part.keep(name, replace=False)
        part.named(str(there))
        part.close()

    with ThreadPoolExecutor() as pool:
        list(pool.map(keep, data))
    coming = way(there)
    coming.wrote(os.write(coming.fd, bytes(2 * AHEAD_BYTES)))
    shutil.copyfile(image, copy)
    coming.close()
    subprocess.run(["umount", there], check=True)
    subprocess.run(["mount", "-o", "loop", copy, there], check=True)
    assert {path.name: path.read_bytes() for path in there.iterdir() if path.is_file()} == data


def test_a_system_without_the_call_gets_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fs, "kind", lambda folder: "ext4")
    monkeypatch.setattr(fs, "_SYNC_FILE_RANGE", None)
    assert durable.way_of(tmp_path) is durable.DurableFile
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
