"""A folder that is not as it should be."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from protocols.files.tree import Tree
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tasks.folder import check
from tests.targets.folder_push.pushing import target
from transfer.errors import Denied, Misconfigured, NotFound, Unreachable
from transfer.plan import scan


def test_a_missing_folder_is_never_made(archive: Path, study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(target(archive / "share" / "x"), study)
    assert isinstance(sent.error, NotFound)
    assert "mount" in str(sent.error)
    assert not list(archive.iterdir())


def test_a_file_in_the_place_of_the_target(archive: Path, study: Path) -> None:
    studies.ct(study, 1)
    file = studies.write(archive / "file", b"x")
    for folder in (file, file / "below"):
        assert isinstance(attempt(target(folder), study).error, Misconfigured)
        assert isinstance(check(target(folder)).error, Misconfigured)


def test_no_permission(open_folder: Path, as_nobody: Callable[[], AbstractContextManager[None]]) -> None:
    studies.ct(open_folder / "study", 1)
    closed = open_folder / "closed"
    closed.mkdir(mode=0o555)
    (open_folder / "secret").mkdir(mode=0o700)
    plan = scan([open_folder / "study"])
    with as_nobody():
        if os.geteuid() != os.getuid():
            for folder in (closed, open_folder / "secret" / "below"):
                sent = attempt(target(folder), plan)
                assert isinstance(sent.error, Denied)
                assert "nobody" in str(sent.error)
                assert not sent.outcomes
                health = check(target(folder))
                assert isinstance(health.error, Denied)
        else:
            closed.chmod(0o555)
            assert isinstance(attempt(target(closed), plan).error, Denied)
            assert isinstance(check(target(closed)).error, Denied)
    assert not list(closed.iterdir())


def test_a_share_that_hangs_is_unreachable(archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(study, 1)
    over = threading.Event()
    real = os.statvfs

    def hanging(path: str | int) -> os.statvfs_result:
        if path == str(archive):
            over.wait(20)
        return real(path)

    monkeypatch.setattr(os, "statvfs", hanging)
    begun = time.monotonic()
    sent = attempt(target(archive, connect_timeout_s=0.3), study)
    over.set()
    assert isinstance(sent.error, Unreachable)
    assert "0.3 s" in str(sent.error)
    assert time.monotonic() - begun < as_loaded(5)


def test_a_check_that_fails_leaves_nothing(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tree, "rename", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    health = check(target(archive))
    assert not health.ok
    assert [(probe.name, probe.result) for probe in health.probes][:2] == [("folder", "ok"), ("authorize", "failed")]
    assert "Input/output error" in health.probes[1].detail
    assert not list(archive.iterdir())


def test_check_tells_what_it_found(archive: Path) -> None:
    health = check(target(archive))
    assert {probe.name: probe.result for probe in health.probes} == {"folder": "ok", "authorize": "ok", "space": "ok"}
    assert str(archive) in health.probes[0].detail
    assert "free" in health.probes[2].detail
