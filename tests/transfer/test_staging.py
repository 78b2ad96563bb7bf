"""Staging: without copying where it can, whole where it must, and nothing is left."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from talaria.testing import studies
from tests.clock import tick
from transfer.content import copy_bytes
from transfer.errors import Busy, Cancelled, Denied, Misconfigured, NotFound, Rejected
from transfer.plan import Item, Plan, scan
from transfer.staging import Way, discard, stage


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another file system."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def assert_staged(plan: Plan, staged: Plan) -> None:
    assert staged.dispatch_id == plan.dispatch_id
    assert staged.items == plan.items
    for item in staged.items:
        assert staged.file(item).read_bytes() == plan.file(item).read_bytes()
        with staged.open(item) as fd:
            staged.check(item, fd)


def assert_rejected(staged: Plan, item: Item) -> None:
    """A file that has changed is rejected, whether it has been opened or not."""
    with pytest.raises(Rejected, match="changed"):
        staged.check(item)
    with pytest.raises(Rejected, match="changed"), staged.open(item):
        pass


@pytest.mark.parametrize("way", [Way.READ, Way.PLACE])
def test_a_time_before_those_that_the_ledger_can_keep(tmp_path: Path, elsewhere: Path, way: Way) -> None:
    """1601, as of a share whose server keeps no times."""
    for file in studies.ct(elsewhere / "source", 2):
        os.utime(file, ns=(0, -11_644_473_600 * 10**9))
    plan = scan([elsewhere / "source"])
    assert not any(item.problem or item.mtime_ns % 10**9 for item in plan.items), "a whole second proves nothing"
    for into in (tmp_path / "staging" / "run", elsewhere / "staging" / "run"):
        assert_staged(plan, stage(plan, into, way=way))


def test_links_where_it_can(tmp_path: Path) -> None:
    studies.sample(tmp_path / "source")
    studies.odd_names(tmp_path / "source" / "odd")
    plan = scan([tmp_path / "source"])
    staged = stage(plan, tmp_path / "staging" / "run")
    assert_staged(plan, staged)
    assert all(staged.file(item).stat().st_ino == plan.file(item).stat().st_ino for item in plan.items)
    assert (tmp_path / "staging" / "run").stat().st_mode & 0o777 == 0o700
    discard(staged.root)
    assert not staged.root.exists()
    assert scan([tmp_path / "source"]) == plan, "the source is as it was"


def test_copies_where_names_are_needed(tmp_path: Path, elsewhere: Path) -> None:
    studies.sample(tmp_path)
    studies.write(tmp_path / "empty.txt", b"")
    studies.write(tmp_path / "large", os.urandom(20 << 20))
    plan = scan([tmp_path])
    staged = stage(plan, elsewhere / "run", way=Way.NAME)
    assert_staged(plan, staged)
    (tmp_path / "CT" / "1.dcm").unlink()  # held still
    assert staged.file(staged.items[0]).exists()


def test_copies_first_where_that_is_asked_for(tmp_path: Path) -> None:
    (file,) = studies.ct(tmp_path / "source", 1)
    plan = scan([tmp_path / "source"])
    data = file.read_bytes()
    staged = stage(plan, tmp_path / "run", way=Way.COPY)
    assert_staged(plan, staged)
    file.write_bytes(b"changed meanwhile")
    with staged.open(staged.items[0]) as fd:
        assert os.read(fd, len(data) + 1) == data
        staged.check(staged.items[0], fd)


# ---- read in its place


def in_place(source: Path, into: Path) -> Plan:
    """Stage a source on another file system, and make sure that nothing was copied."""
    staged = stage(scan([source]), into)
    assert all(item.in_place for item in staged.items if not item.problem)
    assert not any(path.is_file() or path.is_symlink() for path in into.rglob("*"))
    return staged


def test_reads_in_place_where_it_can_not_link(tmp_path: Path, elsewhere: Path) -> None:
    studies.sample(tmp_path)
    studies.odd_names(tmp_path / "odd")
    studies.write(tmp_path / "empty.txt", b"")
    (tmp_path / "file.dcm").symlink_to("CT/1.dcm")
    (tmp_path / "folder").symlink_to("CT")
    plan = scan([tmp_path])
    staged = in_place(tmp_path, elsewhere / "run")
    assert_staged(plan, staged)
    for item in staged.items:
        staged.check(item)


def test_files_named_one_by_one_are_read_in_place(tmp_path: Path, elsewhere: Path) -> None:
    files = studies.ct(tmp_path / "source", 3)
    plan = scan(files[:2])
    staged = stage(plan, elsewhere / "run")
    assert [item.in_place for item in staged.items] == [True, True]
    assert_staged(plan, staged)


def test_what_a_user_may_not_link_is_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of another user, where fs.protected_hardlinks is on."""
    studies.ct(tmp_path / "source", 3)
    monkeypatch.setattr("os.link", mock.Mock(side_effect=PermissionError(errno.EPERM, "not ours")))
    assert_staged(scan([tmp_path / "source"]), in_place(tmp_path / "source", tmp_path / "run"))


def replaced(file: Path) -> None:
    """Put another file of the same length and times in its place."""
    info, other = file.stat(), file.with_suffix(".other")
    other.write_bytes(bytes(info.st_size))
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.replace(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten with its old times": lambda file: rewrite(file),
    "replaced by one of the same length and times": replaced,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"  "),
    "shorter": lambda file: os.truncate(file, 1000),
    "touched": os.utime,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("watched", [True, False])
def test_a_change_of_what_is_read_in_place_is_noticed(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, change: str, watched: bool
) -> None:
    if not watched:
        monkeypatch.setattr("transfer.watch._add", lambda *_: -1)
    (file,) = studies.ct(tmp_path / "source", 1)
    staged = in_place(tmp_path / "source", elsewhere / "run")
    (item,) = staged.items
    tick(tmp_path)
    with staged.open(item) as fd:
        CHANGES[change](file)
        if not change.startswith("replaced"):  # what was opened is still the old one
            with pytest.raises(Rejected, match="changed"):
                staged.check(item, fd)
    assert_rejected(staged, item)


def test_what_is_gone_from_its_place_is_named(tmp_path: Path, elsewhere: Path) -> None:
    (file,) = studies.ct(tmp_path / "source", 1)
    staged = in_place(tmp_path / "source", elsewhere / "run")
    file.unlink()
    with pytest.raises(Rejected, match=r"can't be read: No such file .*CT0001"), staged.open(staged.items[0]):
        pass
    with pytest.raises(Rejected, match="can't be read: No such file"):
        staged.check(staged.items[0])


@pytest.mark.parametrize("what", ["the file", "its folder", "the source"])
def test_a_link_put_in_the_place_of_what_is_read_is_not_followed(tmp_path: Path, elsewhere: Path, what: str) -> None:
    """Not even if it leads to the same file, outside of the source."""
    source, secret = tmp_path / "source", tmp_path / "secret"
    (file,) = studies.ct(source / "a", 1)
    staged = in_place(source, elsewhere / "run")
    (secret / "a").mkdir(parents=True)
    os.link(file, secret / "a" / file.name)
    swapped = {"the file": file, "its folder": file.parent, "the source": source}[what]
    swapped.rename(tmp_path / "was")
    swapped.symlink_to(secret / swapped.relative_to(source))
    with pytest.raises(Rejected, match="changed"), staged.open(staged.items[0]):
        pass
    with pytest.raises(Rejected, match="changed"):
        staged.check(staged.items[0])


def test_what_happens_to_what_is_read_in_place_but_not_to_its_content(tmp_path: Path, elsewhere: Path) -> None:
    (file,) = studies.ct(tmp_path / "source", 1)
    staged = in_place(tmp_path / "source", elsewhere / "run")
    tick(tmp_path)
    file.chmod(0o640)
    os.link(file, tmp_path / "link")
    with staged.open(staged.items[0]) as fd:
        staged.check(staged.items[0], fd)
    (tmp_path / "link").unlink()
    staged.check(staged.items[0])


def test_a_link_inside_the_source_becomes_a_file(tmp_path: Path) -> None:
    studies.ct(tmp_path / "source" / "a", 1)
    (tmp_path / "source" / "file.dcm").symlink_to("a/CT0001.dcm")
    (tmp_path / "source" / "folder").symlink_to("a")
    plan = scan([tmp_path / "source"])
    staged = stage(plan, tmp_path / "run")
    assert_staged(plan, staged)
    assert not any(path.is_symlink() for path in staged.root.rglob("*"))


def test_problems_stay_and_are_not_touched(tmp_path: Path) -> None:
    outside = studies.note(tmp_path / "outside.json")
    studies.ct(tmp_path / "source", 1)
    (tmp_path / "source" / "out").symlink_to(outside)
    os.mkfifo(tmp_path / "source" / "fifo")
    plan = scan([tmp_path / "source"])
    staged = stage(plan, tmp_path / "run")
    assert staged.items == plan.items
    assert {path.name for path in staged.root.rglob("*")} == {"CT0001.dcm"}


def test_what_changed_since_it_was_planned(tmp_path: Path, elsewhere: Path) -> None:
    for into in (tmp_path / "run", elsewhere / "run"):
        source = tmp_path / f"source-{into.parent.name}"
        studies.ct(source, 4)
        plan = scan([source])
        with open(source / "CT0001.dcm", "ab") as file:
            file.write(b"\0\0")
        tick(tmp_path)
        (source / "CT0002.dcm").touch()
        (source / "CT0003.dcm").unlink()
        staged = stage(plan, into)
        assert [item.in_place for item in staged.items] == [False, False, False, into.parent == elsewhere]
        assert [item.problem for item in staged.items] == [
            "changed since the dispatch was planned",
            "changed since the dispatch was planned",
            "can't be read: No such file or directory",
            "",
        ]
        assert [item.path for item in staged.items] == [item.path for item in plan.items]


def test_a_change_after_staging_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    """A hard link keeps a file from vanishing, not from being written to."""
    (file,) = studies.ct(tmp_path / "source", 1)
    staged = stage(scan([tmp_path / "source"]), tmp_path / "run")
    tick(tmp_path)
    with open(file, "r+b") as other:
        other.write(b"x")
    with pytest.raises(Exception, match="changed"), staged.open(staged.items[0]):
        pass


def test_what_an_earlier_run_left_is_replaced(tmp_path: Path) -> None:
    studies.ct(tmp_path / "source", 1)
    studies.ct(tmp_path / "run", 1, first=9)
    staged = stage(scan([tmp_path / "source"]), tmp_path / "run")
    assert {path.name for path in staged.root.iterdir()} == {"CT0001.dcm"}


def test_the_source_is_gone(tmp_path: Path) -> None:
    studies.ct(tmp_path / "source", 1)
    plan = scan([tmp_path / "source"])
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(NotFound, match="source"):
        stage(plan, tmp_path / "run")


def test_stops_between_files_and_within_a_copy(tmp_path: Path, elsewhere: Path) -> None:
    studies.ct(tmp_path, 5)
    studies.write(tmp_path / "large", bytes(64 << 20))
    plan = scan([tmp_path])

    def stopping(after: int) -> Callable[[], None]:
        calls = 0

        def check() -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Cancelled("stop")

        return check

    for after in (0, 3, 12):
        with pytest.raises(Cancelled):
            stage(plan, elsewhere / "run", stopping(after), Way.COPY)
    for after in (0, 3):
        with pytest.raises(Cancelled):
            stage(plan, elsewhere / "run", stopping(after))
    with pytest.raises(Cancelled):
        stage(plan.narrowed(plan.items[-1:]), elsewhere / "run", stopping(2), Way.COPY)


@pytest.mark.mounts
def test_no_room_is_busy(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    small = disk("size=1m")
    studies.ct(tmp_path / "source", 8, side=256)  # 137 kB each
    plan = scan([tmp_path / "source"])
    with pytest.raises(Busy, match="no room"):
        stage(plan, small / "run", way=Way.COPY)
    discard(small / "run")
    assert not list(small.iterdir())
    staged = stage(plan.narrowed(plan.items[:6]), small / "run", way=Way.COPY)
    assert not any(item.problem for item in staged.items)


# ---- links that somebody puts there meanwhile


@pytest.mark.parametrize("what", ["the file", "its folder", "the source"])
def test_a_link_put_there_after_planning_is_not_followed(tmp_path: Path, elsewhere: Path, what: str) -> None:
    """What it leads to has the same length, times and header, so that only where it lies is wrong."""
    for into in (tmp_path / "run", elsewhere / "run"):
        source, secret = tmp_path / into.parent.name / "source", tmp_path / into.parent.name / "secret"
        (file,) = studies.ct(source / "a", 1)
        (secret / "a").mkdir(parents=True)
        plan = scan([source])
        os.link(file, secret / "a" / file.name)
        swapped = {"the file": file, "its folder": file.parent, "the source": source}[what]
        swapped.rename(tmp_path / into.parent.name / "was")
        swapped.symlink_to(secret / swapped.relative_to(source))
        (item,) = stage(plan, into).items
        assert item.problem == "changed since the dispatch was planned"
        assert not any(path.is_file() for path in into.rglob("*"))


def test_links_swapped_while_files_are_staged(tmp_path: Path) -> None:
    """A thread swaps the folder for a link to another one, as fast as it can: never is a file of that one staged."""
    studies.ct(tmp_path / "source" / "a", 1)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "CT0001.dcm").write_bytes(b"secret")
    (tmp_path / "source" / "link").symlink_to(victim)
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for one, other in (("a", "was"), ("link", "a"), ("a", "link"), ("was", "a")):
                (tmp_path / "source" / one).rename(tmp_path / "source" / other)

    thread = threading.Thread(target=swap)
    plan = scan([tmp_path / "source" / "a"])
    thread.start()
    try:
        for count in range(300):
            run = tmp_path / f"run{count}"
            with suppress(NotFound):
                stage(plan, run)
            assert all(path.read_bytes() != b"secret" for path in run.rglob("*") if path.is_file())
            with suppress(NotFound, Misconfigured):
                for item in scan([tmp_path / "source"]).items:
                    assert item.size != len(b"secret"), item
    finally:
        over.set()
        thread.join()


def test_only_what_lies_below_the_roots_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(tmp_path / "data" / "study", 1)
    (tmp_path / "data" / "link").symlink_to("/etc")
    (tmp_path / "data" / "study" / "link").symlink_to("/etc/passwd")
    monkeypatch.setenv("TALARIA_SOURCES", str(tmp_path / "data"))
    plan = scan([tmp_path / "data" / "study"])
    assert {item.path: item.problem for item in stage(plan, tmp_path / "run").items} == {
        "CT0001.dcm": "",
        "link": "a symbolic link that leads out of the source",
    }
    for path in ("/etc/shadow", tmp_path, tmp_path / "data" / "link" / "shadow", tmp_path / "data" / "link"):
        with pytest.raises(Denied, match="below no folder of TALARIA_SOURCES"):
            scan([path])
    monkeypatch.setenv("TALARIA_SOURCES", "/srv")
    with pytest.raises(Denied):
        stage(plan, tmp_path / "run")


def test_the_state_directory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "user" / ".talaria"
    home.mkdir(parents=True)
    (home / "api.auth").write_text("secret")
    studies.ct(tmp_path / "user" / "study", 1)
    (tmp_path / "user" / "study" / "folder").symlink_to(home)
    (tmp_path / "user" / "study" / "file").symlink_to(home / "api.auth")
    monkeypatch.setenv("TALARIA_HOME", str(home))
    plan = scan([tmp_path / "user"])
    assert {item.path: item.problem for item in plan.items} == {
        "study/CT0001.dcm": "",
        "study/file": "a symbolic link that leads out of the source",
        "study/folder": "a symbolic link that leads out of the source",
    }
    why = "Talaria's state directory, which holds secrets"
    assert {item.path: item.not_sent for item in plan.left_out} == {".talaria": why}


# ---- copying


def copied(data: bytes, tmp_path: Path, piece_bytes: int = 1 << 24) -> tuple[bytes, list[int]]:
    source = studies.write(tmp_path / "source", data)
    pieces: list[int] = []
    with open(source, "rb") as reader, open(tmp_path / "copy", "wb") as writer:
        assert copy_bytes(reader.fileno(), writer.fileno(), pieces.append, piece_bytes) == len(data)
    return (tmp_path / "copy").read_bytes(), pieces


@pytest.mark.parametrize("size", [0, 1, 4096, 1_000_000, 3_000_001])
@pytest.mark.parametrize("in_kernel", [True, False])
def test_copies_all(tmp_path: Path, size: int, in_kernel: bool) -> None:
    data = os.urandom(size)
    unsupported = mock.patch("os.copy_file_range", side_effect=OSError(errno.EXDEV, "cross-device"))
    with mock.MagicMock() if in_kernel else unsupported:
        copy, pieces = copied(data, tmp_path, 1_000_000)
    assert copy == data
    assert sum(pieces) == size
    assert all(0 < piece <= 1_000_000 for piece in pieces)


def test_a_kernel_that_copies_nothing_is_not_believed(tmp_path: Path) -> None:
    with mock.patch("os.copy_file_range", return_value=0):
        assert copied(b"x" * 5000, tmp_path)[0] == b"x" * 5000


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_real_error_of_the_kernel_is_raised(tmp_path: Path, number: int) -> None:
    with (
        mock.patch("os.copy_file_range", side_effect=OSError(number, "x")),
        pytest.raises(OSError, match="x") as caught,
    ):
        copied(b"x", tmp_path)
    assert caught.value.errno == number


def test_short_writes_are_continued(tmp_path: Path) -> None:
    write = os.write
    with (
        mock.patch("os.copy_file_range", side_effect=OSError(errno.EXDEV, "x")),
        mock.patch("os.write", lambda fd, data: write(fd, data[:7])),
    ):
        assert copied(b"0123456789" * 20, tmp_path)[0] == b"0123456789" * 20


# ---- what is written to while its times say nothing


def rewrite(file: Path) -> None:
    """Write other pixels into a file, in place, and give it its old times back."""
    info = file.stat()
    with open(file, "r+b") as other:
        other.seek(info.st_size // 2)
        other.write(b"\xff" * (info.st_size // 4))
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert file.stat().st_mtime_ns == info.st_mtime_ns


@pytest.mark.parametrize("through", ["its own name", "another link", "a link that is gone"])
def test_a_file_rewritten_with_its_old_times_is_noticed(tmp_path: Path, through: str) -> None:
    (file,) = studies.ct(tmp_path / "source", 1)
    staged = stage(scan([tmp_path / "source"]), tmp_path / "run")
    (item,) = staged.items
    with staged.open(item) as fd:
        staged.check(item, fd)
        name = file
        if through != "its own name":
            name = tmp_path / "link"
            os.link(file, name)
        rewrite(name)
        if through == "a link that is gone":
            name.unlink()
        with pytest.raises(Rejected, match="changed"):
            staged.check(item, fd)
    assert_rejected(staged, item)


def test_what_happens_to_a_file_but_not_to_its_content_is_no_change(tmp_path: Path) -> None:
    """Other dispatches stage the same files and clear up; somebody moves, copies or shares them."""
    (file,) = studies.ct(tmp_path / "source", 1)
    plan = scan([tmp_path / "source"])
    staged = stage(plan, tmp_path / "run")
    (item,) = staged.items

    def assert_same() -> None:
        staged.check(item)
        with staged.open(item) as fd:
            staged.check(item, fd)

    tick(tmp_path)
    other = stage(plan, tmp_path / "other")
    assert_same()
    discard(other.root)
    assert_same()
    file.chmod(0o640)
    assert_same()
    file.rename(tmp_path / "moved.dcm")
    assert_same()
    (tmp_path / "moved.dcm").unlink()
    assert_same()
    assert staged.file(item).stat().st_ctime_ns != item.ctime_ns


def test_without_a_watch_a_link_more_is_no_change_and_a_rewritten_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.watch._add", lambda *_: -1)  # the user has used up all that there are
    (file,) = studies.ct(tmp_path / "source", 1)
    staged = stage(scan([tmp_path / "source"]), tmp_path / "run")
    (item,) = staged.items
    tick(tmp_path)
    os.link(file, tmp_path / "link")
    staged.check(item)
    (tmp_path / "link").unlink()
    rewrite(file)
    with pytest.raises(Rejected, match="changed"):
        staged.check(item)


@pytest.mark.parametrize("watched", [True, False])
def test_a_file_rewritten_before_it_was_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool) -> None:
    """Its length and times are those of the one that was planned; without a watch, the header tells."""
    if not watched:
        monkeypatch.setattr("transfer.watch._add", lambda *_: -1)
    for name in ("same", "other"):
        (file,) = studies.ct(tmp_path / name, 1)
        plan = scan([tmp_path / name])
        info = file.stat()
        tick(tmp_path)
        file.write_bytes(file.read_bytes() if name == "same" else studies.ct_bytes())
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
        (item,) = stage(plan, tmp_path / "run" / name).items
        assert item.problem == ("changed since the dispatch was planned" if watched or name == "other" else "")


def test_what_others_do_to_a_file_before_it_is_staged_is_no_change(tmp_path: Path) -> None:
    (file,) = studies.ct(tmp_path / "source", 1)
    plan = scan([tmp_path / "source"])
    tick(tmp_path)
    discard(stage(plan, tmp_path / "other").root)
    file.chmod(0o640)
    staged = stage(plan, tmp_path / "run")
    assert not staged.items[0].problem
    staged.check(staged.items[0])


def test_a_file_rewritten_while_it_is_copied(tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its old times: the copy is compared once more if anything happened to the source meanwhile."""
    for name in ("rewritten", "linked"):
        (file,) = studies.ct(tmp_path / name, 1)
        plan = scan([tmp_path / name])
        tick(tmp_path)

        def midway(source: int, copy: Path, check: Any, name: str = name, file: Path = file) -> None:
            shutil.copy2(f"/proc/self/fd/{source}", copy)
            os.link(file, file.with_suffix(".link"))
            if name == "rewritten":
                rewrite(file)

        monkeypatch.setattr("transfer.staging._copy", midway)
        (item,) = stage(plan, elsewhere / name, way=Way.COPY).items
        assert item.problem == ("changed since the dispatch was planned" if name == "rewritten" else "")


# ---- holes


@pytest.mark.parametrize("form", ["begins with one", "ends with one", "several", "nothing else", "none"])
def test_holes_stay_holes(tmp_path: Path, form: str) -> None:
    source, size = tmp_path / "source", 32 << 20
    with open(source, "wb") as file:
        file.truncate(size)
        for offset in {"begins with one": [size - 5], "ends with one": [0], "several": [1 << 20, 9 << 20]}.get(
            form, []
        ):
            file.seek(offset)
            file.write(b"data!")
        if form == "none":
            file.truncate(1 << 20)
            file.write(os.urandom(1 << 20))
    moved: list[int] = []
    with open(source, "rb") as reader, open(tmp_path / "copy", "wb") as writer:
        assert copy_bytes(reader.fileno(), writer.fileno(), moved.append) == source.stat().st_size
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert sum(moved) == source.stat().st_size
    assert (tmp_path / "copy").stat().st_blocks <= source.stat().st_blocks + 16


def test_a_file_in_the_place_of_the_staging_folder(tmp_path: Path) -> None:
    studies.ct(tmp_path / "source", 1)
    (tmp_path / "staging").write_text("a file")
    with pytest.raises(Misconfigured, match="there is a file where a folder is expected"):
        stage(scan([tmp_path / "source"]), tmp_path / "staging" / "run")
