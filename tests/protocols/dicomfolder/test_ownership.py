"""Whose folder and whose index it is: what others may read, and what they may not change."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imaging.query import Query
from protocols.dicomfolder.folder import DicomFolder
from protocols.dicomfolder.index import NAME
from protocols.dicomfolder.indexes import clear_indexes
from tests.protocols.dicomfolder.looking import look, series

NOBODY = 65534  # a user without rights; root may do everything and can't test what others may not


def as_nobody(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a child process of a user without rights."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            theirs.send(work())
        except BaseException as exc:
            theirs.send(exc)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    result = ours.recv()
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own ones are private."""
    root = Path(tempfile.mkdtemp(prefix="talaria-test-"))
    root.chmod(0o755)
    yield root
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o700)
    shutil.rmtree(root)


def read_only(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            os.chmod(os.path.join(folder, name), 0o444)
        os.chmod(folder, 0o555)


def test_read_only_folder_is_indexed_in_the_state_directory(public: Path) -> None:
    data, state = public / "data", public / "state"
    series(data / "a", 4, PatientName="Quell^A")
    state.mkdir()
    state.chmod(0o777)
    read_only(data)

    def work() -> list[Any]:
        first, second = look(data, state), look(data, state)
        with DicomFolder(data, state) as folder:
            found = [match.instances for match in folder.find(Query(PatientName="quell*"))]
        (kept,) = (state / "indexes").iterdir()
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (kept.parent, kept)]
        return [first.read, second.read, second.unchanged, first.saved, found, modes]

    assert as_nobody(work) == [4, 0, 4, True, [4], [0o700, 0o600]]
    assert not (data / NAME).exists()


def test_indexes_that_nobody_uses_any_more_are_removed(public: Path) -> None:
    state = public / "state"
    state.mkdir()
    state.chmod(0o777)
    for name in ("used", "unused"):
        series(public / name, 2)
        read_only(public / name)

    def work() -> list[Any]:
        folder = state / "indexes"
        look(public / "unused", state)
        (unused,) = folder.iterdir()
        look(public / "used", state)
        (used,) = set(folder.iterdir()) - {unused}
        part = unused.with_name(f"{unused.name}.0123456789ab.part")
        part.touch()
        other = folder / "notes.txt"
        other.touch()
        for path in (used, unused, part, other):
            os.utime(path, (1000, 1000))
        again = look(public / "used", state)  # nothing to save, but it counts as used
        removed = [clear_indexes(state, 500), clear_indexes(state, 2000)]
        left = set(folder.iterdir()) == {used, other}
        return [again.read, removed, left, look(public / "unused", state).read, clear_indexes(public / "none", 2000)]

    assert as_nobody(work) == [0, [0, 1], True, 2, 0]


def test_read_only_folder_without_state_directory_is_indexed_in_memory(public: Path) -> None:
    data = public / "data"
    series(data, 3)
    read_only(data)

    def work() -> list[Any]:
        with DicomFolder(data, None) as folder:
            first, second = folder.refresh(), folder.refresh()
        return [first.read, second.read, first.saved, look(data, data / "no" / "such").read]

    assert as_nobody(work) == [3, 0, False, 3]


def test_index_that_others_keep_in_a_read_only_folder_is_used(public: Path) -> None:
    data = public / "data"
    series(data, 3)
    look(data)
    (data / NAME).chmod(0o644)
    data.chmod(0o555)
    assert as_nobody(lambda: look(data).read) == 0


def test_index_of_another_user_that_is_private_is_left_alone(public: Path) -> None:
    data, state = public / "data", public / "state"
    series(data, 3)
    look(data)
    for folder in (data, state):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    if os.geteuid() != 0:  # then there is no other user: what nobody may read is as closed as what is another's
        (data / NAME).chmod(0)
    assert as_nobody(lambda: [look(data, state).read, look(data, state).read]) == [3, 0]
    (data / NAME).chmod(0o600)
    assert look(data).read == 0


def test_what_may_not_be_read_is_counted_and_read_later(public: Path) -> None:
    data = public / "data"
    paths = series(data / "a", 3)
    series(data / "closed", 2)
    paths[0].chmod(0)
    (data / "closed").chmod(0)
    if os.geteuid() == 0:
        os.chown(data, NOBODY, NOBODY)
    report = as_nobody(lambda: look(data))
    assert (report.read, len(report.unread)) == (2, 2)
    paths[0].chmod(0o644)
    (data / "closed").chmod(0o755)
    report = as_nobody(lambda: look(data))
    assert (report.read, report.unread, report.unchanged) == (3, (), 2)


@pytest.mark.parametrize(("mode", "expected"), [(0o700, 0o600), (0o750, 0o640), (0o777, 0o640), (0o2770, 0o640)])
def test_index_may_be_read_by_the_folders_group_at_most(tmp_path: Path, mode: int, expected: int) -> None:
    root = tmp_path / "data"
    series(root, 1)
    root.chmod(mode)
    look(root)
    assert stat.S_IMODE((root / NAME).stat().st_mode) == expected
