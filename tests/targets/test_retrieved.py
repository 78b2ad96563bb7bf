"""What a retrieval has brought is on disk when it ends, whatever it came from: its study is noted as whole then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imaging.query import Query
from protocols.files import durable
from protocols.files import filesystem as fs
from talaria.testing import studies
from tasks import dicom, dicomweb
from tests.servers.dicomweb import scripted
from tests.servers.qr import archive
from tests.targets import dicomweb_file
from tests.targets.dicom import dicom_target
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.finding import hold
from tests.targets.pulling import study
from transfer.outcome import Kind
from transfer.receipt import PushReport, Receipt


@contextmanager
def source(way: str, files: list[bytes], folder: Path) -> Iterator[Callable[[Path], Receipt]]:
    """Yield what retrieves everything into a folder."""
    if way == "web":
        with scripted() as server:
            hold(server, *files)
            yield lambda into: dicomweb.retrieve(dicomweb_target(server.url), Query(), into, PushReport())
    elif way == "folder":
        for number, data in enumerate(files):
            studies.write(folder / f"{number}.dcm", data)
        yield lambda into: dicomweb.retrieve(dicomweb_file.target(folder), Query(), into, PushReport())
    else:
        with archive(files) as peer:
            target = dicom_target(peer.port, aet_target=peer.aet, idle_timeout_s=3, direction="query")
            yield lambda into: dicom.retrieve(target, Query(), into, PushReport())


@pytest.mark.parametrize("way", ["web", "folder", "get"])
def test_what_came_is_on_disk(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a process that was killed before it had flushed anything, too."""
    into, flush, flushed = tmp_path / "into", os.fdatasync, set[int]()

    def noted(fd: int) -> None:
        flushed.add(os.fstat(fd).st_ino)
        flush(fd)

    monkeypatch.setattr(os, "fdatasync", noted)
    with source(way, study(4), tmp_path / "source") as retrieve:
        for kind in (Kind.DELIVERED, Kind.ALREADY):
            assert retrieve(into).counts[kind] == 4
            assert flushed >= {path.stat().st_ino for path in into.iterdir()}
            flushed.clear()


@pytest.mark.parametrize("way", ["web", "folder", "get"])
def test_many_are_flushed_at_once(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[int] = []
    monkeypatch.setattr(durable, "FEW_FILES", 3)
    monkeypatch.setattr(fs, "kind", lambda folder: "xfs")
    monkeypatch.setattr(fs, "flush_all", lambda folder, check: not named.append(len(list(folder.glob("*.dcm")))))
    with source(way, study(4, 1), tmp_path / "source") as retrieve:
        retrieve(tmp_path / "into")
    assert named == [4]
