"""Folders below which paths must lie: decided on what was opened, whatever links say meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from transfer import beneath, roots
from transfer.beneath import open_beneath
from transfer.errors import Denied, Misconfigured, NotFound
from transfer.plan import look, scan
from transfer.source import Sources


@pytest.fixture(params=["openat2", "step by step"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to open without links."""
    if request.param == "step by step":
        monkeypatch.setattr(beneath, "_syscall", None)
    return str(request.param)


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "inside"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("theirs")
    return folder


@pytest.fixture
def folder(inside: Path) -> Iterator[int]:
    fd = os.open(inside, beneath.WAY)
    yield fd
    os.close(fd)


def read(fd: int) -> str:
    with open(fd, encoding="utf-8") as file:
        return file.read()


def test_a_root_that_does_not_answer_holds_up_none_that_does(
    tmp_path: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: nothing was sent any more, from any folder, while the server of one share of TALARIA_SOURCES was away."""
    share, look, back, looks = tmp_path / "share", os.lstat, threading.Event(), list[str]()
    share.symlink_to(tmp_path / "outside")

    def hangs(path: str, *args: Any, **more: Any) -> os.stat_result:
        if os.fspath(path) == str(share):
            looks.append(path)
            back.wait(60)
        return look(path, *args, **more)

    monkeypatch.setattr(os, "lstat", hangs)
    monkeypatch.setattr(roots, "LOOK_S", 0.1)
    monkeypatch.setattr(roots, "KNOWN_S", 0.0)
    monkeypatch.setenv("TALARIA_SOURCES", f"{share}:{inside}")
    for _ in range(3):
        assert [item.path for item in scan([inside]).items] == ["a/b/file"]
        with pytest.raises(Denied):
            roots.sources().check(tmp_path / "outside" / "file")
    assert len(looks) == 1, "one thread waits there"
    back.set()
    roots._asked[str(share)]._thread.join()
    roots.sources().check(tmp_path / "outside" / "file")
    back.clear()
    roots.sources().check(tmp_path / "outside" / "file")  # it was so when it answered last
    back.set()


def test_what_lies_below_is_opened(way: str, folder: int, inside: Path) -> None:
    assert read(open_beneath(folder, "a/b/file")) == "mine"
    fd = open_beneath(folder, "a/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert (inside / "a" / "new").exists()
    fd = open_beneath(folder, ".", beneath.FOLDER)
    assert "a" in os.listdir(fd)
    os.close(fd)


@pytest.mark.parametrize("path", ["link", "folder/file", "a/absolute/file", "a/up/file", "inner/b/file"])
def test_no_link_is_followed(way: str, folder: int, inside: Path, path: str) -> None:
    (inside / "link").symlink_to("../outside/file")
    (inside / "folder").symlink_to("../outside")
    (inside / "a" / "absolute").symlink_to(inside.parent / "outside")
    (inside / "a" / "up").symlink_to("../../outside")
    (inside / "inner").symlink_to("a")  # not even one that stays inside: it may change
    with pytest.raises(OSError) as caught:
        open_beneath(folder, path)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("path", ["../outside/file", "a/../../outside/file", "/etc/passwd", "a/.."])
def test_no_path_climbs(way: str, folder: int, path: str) -> None:
    with pytest.raises(OSError) as caught:
        open_beneath(folder, path)
    assert caught.value.errno == errno.EXDEV


def test_errors_are_those_of_open(way: str, folder: int) -> None:
    with pytest.raises(FileNotFoundError):
        open_beneath(folder, "a/none/file")
    with pytest.raises(NotADirectoryError):
        open_beneath(folder, "a/b/file/x")
    with pytest.raises(FileExistsError):
        open_beneath(folder, "a/b/file", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@pytest.fixture
def only_inside(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(roots.SOURCES, f" {inside} , /nowhere:")


@pytest.mark.usefixtures("only_inside")
def test_a_path_below_a_root(way: str, inside: Path) -> None:
    (inside.parent / "way").symlink_to(inside / "a")  # a link may lead there
    assert read(roots.sources().open(inside / "a" / "b" / "file")) == "mine"
    assert read(roots.sources().open(inside.parent / "way" / "b" / "file")) == "mine"
    os.close(roots.sources().open(inside, beneath.FOLDER))
    assert roots.SOURCES not in roots.missing()


@pytest.mark.usefixtures("only_inside")
def test_a_path_elsewhere(way: str, inside: Path) -> None:
    (inside / "out").symlink_to(inside.parent / "outside")
    (inside.parent / "inside-not").mkdir()
    for path in ("/etc/shadow", inside / "out" / "file", inside.parent, inside.parent / "inside-not", inside / ".."):
        for ask in (roots.sources().open, roots.sources().check):
            with pytest.raises(Denied, match=r"below no folder of TALARIA_SOURCES"):
                ask(path)
    with pytest.raises(NotFound):
        roots.sources().open(inside / "none")
    roots.sources().check(inside / "none")


@pytest.mark.usefixtures("only_inside")
def test_what_there_is_elsewhere_is_not_shown(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(roots.SOURCES, str(inside))
    (inside / "link").symlink_to("../outside")
    elsewhere = inside.parent / "outside"
    links = inside / "link" / "file", inside / "link" / "none"
    for path in (Path("/none"), elsewhere / "file", elsewhere / "none", *links):
        for ask in (lambda path: roots.sources().open(path), lambda path: look([path])):
            with pytest.raises(Denied) as caught:
                ask(path)
            assert caught.value.message == f"{path}: lies below no folder of TALARIA_SOURCES"
    with pytest.raises(NotFound):
        roots.sources().open(inside / "none")


def test_a_link_put_there_between_look_and_opening(way: str, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = os.path.realpath

    def swapped(path: str, **how: bool) -> str:
        found = resolve(path, **how)
        if found.endswith("b/file"):
            (inside / "a" / "b").rename(inside / "was")
            (inside / "a" / "b").symlink_to(inside.parent / "outside")
        return found

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(Denied, match="a link was put on the way"):
        roots.sources().open(inside / "a" / "b" / "file")


@pytest.mark.parametrize("allowed", ["", "elsewhere"])
def test_of_the_state_directory_only_what_was_retrieved_is_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    home = tmp_path / "home"
    spool = home / "retrievals" / "run" / "spool" / "study"
    spool.mkdir(parents=True)
    (home / "api.auth").write_text("secret")
    (home.parent / "link").symlink_to(home)
    monkeypatch.setenv("TALARIA_HOME", str(home))
    monkeypatch.setenv(roots.SOURCES, str(tmp_path / allowed) if allowed else "")
    for path in (home, home / "api.auth", home.parent / "link" / "api.auth", home / "retrievals"):
        with pytest.raises(Denied, match="state directory"):
            roots.sources().open(path)
    os.close(roots.sources().open(spool))
    with pytest.raises(Denied, match="state directory"):  # sent from, and never written to
        roots.places().check(spool)
    studies.ct(spool, 2)
    assert len(scan([spool]).items) == 2
    with Sources([str(spool)]) as sources:
        os.close(sources.open(str(next(spool.glob("*.dcm")))))
    (spool / "link").symlink_to(home / "api.auth")
    with pytest.raises(Denied), Sources([str(spool / "link")]):
        pass


def test_without_roots_it_says_what_that_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(roots.SOURCES, "")
    monkeypatch.delenv(roots.PLACES, raising=False)
    assert roots.missing() == [roots.SOURCES, roots.PLACES]
    assert [line.partition(" ")[0] for line in roots.meaning()] == [roots.SOURCES, roots.PLACES]
    os.close(roots.sources().open("/etc/passwd"))
    monkeypatch.setenv(roots.PLACES, "/srv,/data")
    assert roots.missing() == [roots.SOURCES]
    monkeypatch.setenv(roots.SOURCES, "relative")
    with pytest.raises(Misconfigured, match="relative is not an absolute path"):
        roots.sources()
