"""Sweeps of an inbox: what is ready, what was sent, what comes late, what fails, and what becomes of the files."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from protocols.files.tree import Tree
from talaria.testing import studies as material
from tasks import DRIVERS
from tasks.sources import after, again, sweep, writers
from tasks.sources.inbox import TAKEN
from tasks.sources.sweep import LATER
from tests.sources.bench import Bench
from transfer import confirmed, unitlist
from transfer.errors import Denied, Interrupted, Misconfigured, NotFound
from transfer.ledger import Ledger
from transfer.sourcebook import UnitState


@pytest.fixture(autouse=True)
def _without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start one


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def delivered(bench: Bench, target: str = "shelf") -> int:
    return sum(not one.endswith(".complete") for one in names(bench.at(target)))


def told(bench: Bench) -> list[dict[str, Any]]:
    with Ledger(bench.home.ledger) as ledger:
        rows = ledger._db.execute("SELECT about FROM happenings WHERE event='source.stuck'")
        return [row[0] for row in rows]


def test_each_folder_is_sent_once(bench: Bench) -> None:
    for number in range(3):
        material.ct(bench.inbox / f"s{number}", 2)
    done = bench.sweep()
    assert sum(done.runs.values()) == 3 and len(done.runs) == 1, "one flood for all"
    assert not bench.sweep().runs, "while they are under way"
    bench.dispatch()
    bench.sweep()
    assert bench.states() == dict.fromkeys(("s0", "s1", "s2"), "done") and delivered(bench) == 6
    again = bench.sweep()
    assert again.words == "nothing new" and not bench.asked
    assert names(bench.inbox) == {f"s{n}/{one.name}" for n in range(3) for one in (bench.inbox / f"s{n}").iterdir()}


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_a_time_that_nothing_can_keep_stops_no_other(bench: Bench, unit: str) -> None:
    """As a wrong clock, or a share's server, gives a file: it is rejected, and what lies beside it is sent."""
    bench.source = bench.named(unit=unit)
    for number in range(2):
        material.ct(bench.inbox / f"s{number}", 2)
    late = bench.inbox / "s0" / "CT0001.dcm"
    os.utime(late, ns=(0, 2**63 + 10**18))
    assert late.stat().st_mtime_ns > 2**63, "the file system keeps it"
    bench.all()
    assert sorted(bench.states().values()) == ["done", "failed"] and delivered(bench) == 3
    assert not bench.sweep().runs


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_files_of_the_year_1601_are_sent_and_go(bench: Bench, unit: str) -> None:
    """As Linux shows those of a share by SMB whose server keeps no times; a sweep, and each dispatch, ended by that."""
    with TemporaryDirectory(dir="/dev/shm") as share:
        bench.source = bench.named(unit=unit, folder=share, after="delete")
        for number, at_ns in enumerate((-11_644_473_600 * 10**9, -62_135_596_800 * 10**9)):
            for file in material.ct(Path(share, f"s{number}"), 2):
                os.utime(file, ns=(0, at_ns))
                assert file.stat().st_mtime_ns == at_ns, "the file system keeps it"
        bench.all()
        assert {*bench.states().values()} == {"done"} and delivered(bench) == 4 and not names(Path(share))


def test_what_may_still_be_written_to_waits(bench: Bench) -> None:
    bench.source = bench.named(settle_s=1000)
    material.ct(bench.inbox / "copied", 1)
    begun = time.time()
    done = bench.sweep()
    assert not done.runs and done.waiting == 1 and begun + 990 < done.next < time.time() + 1000
    (bench.inbox / "copied" / ".complete").touch()
    assert bench.sweep().runs, "its sender says that it is complete"
    bench.dispatch()
    material.ct(bench.inbox / "copied", 1, first=7)
    assert not bench.sweep().runs, "a file that is younger than the marker is not what it was about"


@pytest.mark.parametrize("unit", ["study", "series"])
@pytest.mark.parametrize(
    ("markers", "ready"),
    [
        (["a/b", "c"], True),
        (["a", "c"], True),
        ([""], True),
        (["a/b"], False),
        (["a", "d"], False),
        ([], False),
    ],
    ids=["beside", "above", "in the inbox", "of a part", "elsewhere", "none"],
)
def test_loose_files_are_complete_where_each_of_their_folders_is(
    bench: Bench, unit: str, markers: list[str], ready: bool
) -> None:
    bench.source = bench.named(unit=unit, settle_s=1000)
    (bench.inbox / "d").mkdir()
    for number, where in enumerate(("a/b", "c")):
        material.dicom(bench.inbox / where / f"{number}.dcm", study="1.2", series="1.2.1")
    for where in markers:
        (bench.inbox / where / ".complete").touch()
    assert bool(bench.sweep().runs) == ready
    if ready:
        bench.dispatch()
        material.dicom(bench.inbox / "c" / "late.dcm", study="1.2", series="1.2.1")
        assert not bench.sweep().runs, "a file that is younger than the marker is not what it was about"


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_a_marker_of_the_future_says_nothing_of_what_comes_after_it(bench: Bench, unit: str) -> None:
    bench.source = bench.named(unit=unit, settle_s=1000)
    (bench.inbox / "s").mkdir()
    marker = bench.inbox / "s" / ".complete"
    marker.touch()
    os.utime(marker, (time.time() + 500_000, time.time() + 500_000))
    (path,) = material.ct(bench.inbox / "s", 1)
    while path.stat().st_ctime_ns <= marker.stat().st_ctime_ns:  # clocks of file systems tick each four milliseconds
        path.touch()
    assert bench.sweep().waiting == 1


def test_a_copy_that_keeps_its_times_is_as_young_as_it_is(bench: Bench) -> None:
    bench.source = bench.named(settle_s=1000)
    (path,) = material.ct(bench.inbox / "copied", 1)
    os.utime(path, (1, 1))
    assert bench.sweep().waiting == 1


@pytest.mark.parametrize(("late", "sent"), [("append", 3), ("resend", 3), ("hold", 2)])
def test_files_that_come_late(bench: Bench, late: str, sent: int) -> None:
    bench.source = bench.named(late=late)
    uids = {"study": material.uid(56), "series": material.uid(56)}
    material.ct(bench.inbox / "s", 2, **uids)
    bench.all()
    material.ct(bench.inbox / "s", 1, **uids, first=9)
    bench.sweep()
    forced = [asked["force"] for asked in bench.asked.values()]
    assert forced == {"append": [False], "resend": [True], "hold": []}[late]
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "held" if late == "hold" else "done"} and delivered(bench) == sent
    bench.sweep()
    assert len(told(bench)) == (late == "hold"), "once, and not at each sweep"
    with Ledger(bench.home.ledger) as ledger:
        ledger.sources.forget("box", ["s"])  # as `talaria source retry` does
    bench.all()
    assert delivered(bench) == 3


@pytest.mark.parametrize("how", ["retried", "changed"])
def test_what_was_to_be_sent_by_force_and_failed_is_sent_by_force(bench: Bench, how: str) -> None:
    """Only what had come late was: of what its target had lost, nothing."""
    bench.source = bench.named(late="resend")
    uids = {"study": material.uid(56), "series": material.uid(56)}
    material.ct(bench.inbox / "s", 2, **uids)
    material.ct(bench.inbox / "t", 1)
    bench.all()
    for path in bench.at("shelf").rglob("*.dcm"):
        path.unlink()
    material.ct(bench.inbox / "s", 1, **uids, first=9)
    (bench.inbox / "new").mkdir()
    bench.down = {"shelf"}
    bench.all()
    material.ct(bench.inbox / "new", 1)
    bench.all()
    assert bench.states() == {"s": "failed", "t": "done", "new": "failed"}
    bench.down.clear()
    if how == "retried":
        with Ledger(bench.home.ledger) as ledger:
            failed = ledger.sources.units("box", UnitState.FAILED).values()
            again.forget(bench.home, ledger.sources, "box", failed)
    else:
        material.ct(bench.inbox / "s", 1, **uids, first=7)
        material.ct(bench.inbox / "new", 1, first=7)
    bench.all()
    assert bench.states() == {"s": "done", "t": "done", "new": "done"}
    sent = {path.name for path in bench.at("shelf").rglob("*.dcm")}
    assert len(list((bench.at("shelf") / uids["study"]).glob("*.dcm"))) == 3 + (how == "changed"), sent
    assert not bench.sweep().runs


@pytest.mark.parametrize("late", ["append", "resend", "hold"])
@pytest.mark.parametrize("unit", ["folder", "study"])
def test_what_was_changed_in_the_future_goes_once_when_it_has_stayed_as_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: str, late: str
) -> None:
    """By the clock of a server that is a year ahead, or by ours before it was set right."""
    clock, passed = time.time, -365 * 86_400
    monkeypatch.setattr(time, "time", lambda: clock() + passed)
    bench.source = bench.named(settle_s=1000, late=late, unit=unit, after="delete")
    uids = {"study": material.uid(56), "series": material.uid(56)}
    material.ct(bench.inbox / "s", 2, **uids)

    def swept() -> int:
        return sum(bench.sweep().runs.values())

    assert [swept(), swept()] == [0, 0] and set(bench.states().values()) == {"held"} and len(told(bench)) == 1
    passed += 990
    material.ct(bench.inbox / "s", 1, first=7, **uids)
    passed += 20
    assert [swept(), swept()] == [0, 0], "it has changed again"
    passed += 1010
    assert swept() == 1 and [asked["force"] for asked in bench.asked.values()] == [False]
    bench.dispatch()
    assert [swept(), swept()] == [0, 0] and set(bench.states().values()) == {"done"} and not names(bench.inbox)
    material.ct(bench.inbox / "s", 1, first=9, **uids)
    assert swept() == 0
    passed += 1010
    assert swept() == (late != "hold")
    assert set(bench.states().values()) == {"held" if late == "hold" else "dispatched"}
    passed += 1010
    assert swept() == 0


def test_what_fails_stays_and_is_told_once(bench: Bench) -> None:
    bench.source = bench.named(after="delete")
    material.ct(bench.inbox / "s", 2)
    bench.down = {"shelf"}
    bench.sweep()
    (run, asked), *_ = bench.asked.items()
    bench.dispatch()
    bench.sweep()
    (row,) = bench.rows().values()
    assert row.state == "failed" and "shelf: " in row.detail
    for _ in range(3):
        assert not bench.sweep().runs
    assert len(told(bench)) == 1 and len(names(bench.inbox)) == 2
    bench.down = set()
    bench.again(run, asked)  # `talaria jobs retry`
    bench.sweep()
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "done"} and not names(bench.inbox) and delivered(bench) == 2


def test_why_items_were_rejected_is_said_of_the_unit(bench: Bench) -> None:
    material.ct(bench.inbox / "s", 1)
    os.mkfifo(bench.inbox / "s" / "pipe")
    bench.all()
    assert bench.rows()["s"].detail == "shelf: partial, 1 rejected: not a regular file"


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_what_a_check_of_the_file_system_has_found_is_no_study(bench: Bench, unit: str) -> None:
    """An inbox may be a whole file system; only root can look into that folder, so that it counted as not readable."""
    bench.source = bench.named(unit=unit, after="delete")
    for folder in ("lost+found", "s/lost+found"):
        material.ct(bench.inbox / folder, 1)
    bench.all()
    assert len(bench.states()) == 1 and len(names(bench.inbox / "lost+found")) == 1 == delivered(bench)


def test_only_what_every_target_has_confirmed_goes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "one", "two", after="delete", exclude="*.txt")
    material.ct(bench.inbox / "s", 2)
    (bench.inbox / "s" / "note.txt").write_text("of the sender's")
    bench.down = {"two"}
    bench.all()
    assert bench.states() == {"s": "failed"} and len(names(bench.inbox)) == 3 and delivered(bench, "one") == 2
    bench.down = set()
    material.ct(bench.inbox / "s", 1, first=8)
    bench.all()
    assert names(bench.inbox) == {"s/note.txt"}, "what is not sent is not deleted"
    assert delivered(bench, "one") == 3 == delivered(bench, "two")
    assert bench.sweep().words == "nothing new"


def test_a_target_that_verified_less_than_it_should_keeps_the_files(bench: Bench) -> None:
    bench.source = bench.named(after="delete")
    material.ct(bench.inbox / "s", 1)
    bench.sweep()
    bench.dispatch()
    bench.targets["shelf"] = bench.target("shelf", verify="proven")  # asked for after it was sent
    bench.sweep()
    (row,) = bench.rows().values()
    assert names(bench.inbox) and "not confirmed by every target" in row.detail


@pytest.mark.parametrize("edit", ["content", "times", "replaced", "elsewhere"])
def test_what_was_edited_after_it_was_sent_stays(bench: Bench, edit: str) -> None:
    bench.source = bench.named(after="delete")
    (path,) = material.ct(bench.inbox / "s", 1)
    bench.sweep()
    bench.dispatch()
    info = path.stat()
    match edit:
        case "content" | "times":
            data = bytearray(path.read_bytes())
            data[-1] ^= edit == "content"
            path.write_bytes(data)
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # as some programs do
        case "replaced":
            shutil.copy2(path, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        case "elsewhere":
            bench.targets["shelf"] = bench.target("shelf", folder=str(bench.folder / "sent"))
    bench.sweep()
    assert path.exists()
    assert f"1 file stays ({path.name}): " in bench.rows()["s"].detail


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_a_file_that_somebody_has_open_for_writing_is_not_dispatched(bench: Bench, unit: str) -> None:
    bench.source = bench.named(after="delete", unit=unit)
    first, second = material.ct(bench.inbox / "s", 2)
    with second.open("ab"), first.open("rb"):
        done = bench.sweep()
        assert not done.runs and done.waiting == 1 and done.next > time.time() + 30, "looked at again, but not at once"
    bench.all()
    assert delivered(bench) == 2 and not names(bench.inbox)


@pytest.mark.parametrize("after", ["delete", "move"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_file_that_is_written_to_again_is_not_deleted(bench: Bench, after: str, killed: bool) -> None:
    bench.source = bench.named(after=after, move_to=str(bench.folder / "sent") if after == "move" else "")
    (path,) = material.ct(bench.inbox / "s", 1)
    bench.sweep()
    bench.dispatch()
    with path.open("ab") as writer:
        if killed:
            path.rename(path.with_name(f"{TAKEN}{path.name}"))
        bench.sweep()
        writer.write(b"\0" * 8)
    assert bench.rows()["s"].detail == f"{LATER}1 file stays ({path.name}): it is still open for writing"
    assert names(bench.inbox) == {f"s/{path.name}"} and path.read_bytes().endswith(b"\0" * 8)
    bench.all()
    assert not names(bench.inbox), "when it is whole, it is sent again, and goes"


def test_a_file_that_was_only_open_for_writing_goes_with_a_later_sweep(bench: Bench) -> None:
    bench.source = bench.named(after="delete")
    (path,) = material.ct(bench.inbox / "s", 1)
    bench.sweep()
    bench.dispatch()
    with path.open("ab"):
        done = bench.sweep()
        assert done.waiting == 1 and done.next > time.time() + 30 and not told(bench)
    bench.sweep()
    assert not names(bench.inbox) and bench.states() == {"s": "done"} and delivered(bench) == 1


def test_a_list_is_read_once_for_all_whose_files_are_to_go_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source = bench.named(after="move", move_to=str(bench.folder / "sent"))
    for name in "abcd":
        material.ct(bench.inbox / name, 1)
    bench.sweep()
    bench.dispatch()
    read, reads = unitlist.read, list[object]()

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(after, "_move", fails)
    bench.sweep()
    monkeypatch.setattr(unitlist, "read", lambda path: reads.append(path) or read(path))
    assert bench.sweep().waiting == 4
    assert len(reads) == 2  # and once more, to write it anew


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOTCONN])
@pytest.mark.parametrize("late", ["append", "hold"])
def test_what_a_full_disk_or_a_share_keeps_from_being_moved_goes_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: int, late: str
) -> None:
    """It is said once, and what has gone meanwhile is neither missed nor taken for a change."""
    bench.source = bench.named(after="move", move_to=str(bench.folder / "sent"), late=late)
    for name in ("s", "t"):
        material.ct(bench.inbox / name, 3)
    bench.sweep()
    bench.dispatch()
    move, moved = after._move, list[str]()

    def fails(folder: int, taken: str, tree: Any, final: str) -> None:
        if len(moved) >= 2:
            raise OSError(error, os.strerror(error))
        move(folder, taken, tree, final)
        moved.append(final)

    with monkeypatch.context() as patch:
        patch.setattr(after, "_move", fails)
        for _ in range(3):
            done = bench.sweep()
            assert not done.runs and done.waiting == 2 and done.next > time.time() + 60
    rows = bench.rows()
    assert {str(row.state) for row in rows.values()} == {"delivered"} and len(names(bench.inbox)) == 4
    assert all(row.detail.startswith(LATER) and os.strerror(error) in row.detail for row in rows.values())
    assert len(told(bench)) == 1
    bench.sweep()
    assert set(bench.states().values()) == {"done"} and not names(bench.inbox) and not bench.asked
    assert len(names(bench.folder / "sent")) == 6 and not any(row.detail for row in bench.rows().values())
    material.ct(bench.inbox / "s", 1, first=9)
    bench.all()
    assert len(told(bench)) == 1 + (late == "hold")


@pytest.mark.parametrize("watch", [True, False])
def test_what_has_come_does_not_wait_for_what_is_moved(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, watch: bool
) -> None:
    """To a NAS it may take an hour. What nothing begins a sweep for is moved by the one that there is."""
    bench.source = bench.named(
        after="move", move_to=str(bench.folder / "sent"), watch=watch, **({} if watch else {"cron": "0 2 * * *"})
    )
    for number in range(4):
        material.ct(bench.inbox / f"s{number}", 1)
    bench.sweep()
    bench.dispatch()
    material.ct(bench.inbox / "new", 1)
    monkeypatch.setattr(sweep, "LET_GO_S", 0.0)
    done = bench.sweep()
    assert sum(done.runs.values()) == 1 and len(names(bench.folder / "sent")) == (1 if watch else 4)
    assert (0 < done.next <= time.time()) is watch
    for _ in range(3):
        bench.sweep()
    assert len(names(bench.folder / "sent")) == 4
    assert sorted(bench.states().values()) == ["dispatched", *["done"] * 4]


def test_what_is_moved_in_vain_does_not_keep_the_rest_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NAS that is full says so only when most of a file is there: all of a backlog was tried in one sweep."""
    bench.source = bench.named(after="move", move_to=str(bench.folder / "sent"))
    for name in "abc":  # three lists
        material.ct(bench.inbox / name, 1)
        bench.sweep()
    bench.dispatch()
    read, reads, tried = unitlist.read, list[object](), list[str]()

    def fails(folder: int, taken: str, tree: Any, final: str) -> None:
        tried.append(final[0])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sweep, "LET_GO_S", 0.0)
    monkeypatch.setattr(after, "_move", fails)
    monkeypatch.setattr(unitlist, "read", lambda path: reads.append(path) or read(path))
    material.ct(bench.inbox / "new", 1)
    done = bench.sweep()
    assert sum(done.runs.values()) == 1 and len(tried) == 1 and len(reads) == 2  # of one list, and to write it anew
    assert 0 < done.next <= time.time()
    for _ in range(3):
        done = bench.sweep()
    assert sorted(tried[:3]) == ["a", "b", "c"] and tried[3] == tried[0] and done.next > time.time() + 60


@pytest.mark.parametrize("late", ["append", "resend", "hold"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_what_is_half_moved_when_the_time_is_over_is_not_late(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, late: str
) -> None:
    """What a sweep that was killed has left of a unit was dispatched again, and a file kept the name of ours."""
    bench.source = bench.named(unit="study", after="move", move_to=str(bench.folder / "sent"), late=late)
    uids = {name: {"study": material.uid(56), "series": material.uid(56)} for name in "abz"}
    for name in uids:
        material.ct(bench.inbox / name, 2, **uids[name])
    bench.sweep()
    bench.dispatch()
    monkeypatch.setattr(sweep.Sweep, "_let_go", lambda *args, **more: None)
    bench.sweep()
    monkeypatch.undo()
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
    last = max(uids, key=lambda name: uids[name]["study"])
    one, two = sorted((bench.inbox / last).iterdir())
    (bench.folder / "sent" / last).mkdir()
    one.rename(bench.folder / "sent" / last / one.name)
    if how == "killed":
        two.rename(two.with_name(f"{TAKEN}{two.name}"))
        material.ct(bench.inbox / last, 1, first=9, **uids[last])
    monkeypatch.setattr(sweep, "LET_GO_S", 0.0)
    bench.sweep()
    bench.sweep()
    assert not bench.asked and "held" not in bench.states().values()
    for _ in range(3):
        bench.all()
    moved = 6 if how == "stopped" or late == "hold" else 7
    assert len(names(bench.folder / "sent")) == moved and not list(bench.inbox.rglob(f"{TAKEN}*"))


def test_that_files_may_not_be_deleted_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source = bench.named(after="delete")
    for name in ("s", "t"):
        material.ct(bench.inbox / name, 2)

    def refused(*what: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(after, "_take", refused)
    bench.all()
    bench.sweep()
    assert set(bench.states().values()) == {"done"} and len(names(bench.inbox)) == 4
    (words,) = told(bench)
    assert "files of delivered units stay" in words and "Permission denied" in words


@pytest.mark.parametrize("first", [False, True])
def test_an_inbox_that_is_written_to_meanwhile_may_copy_first(bench: Bench, first: bool) -> None:
    """What was there when its turn came arrives, and what has come since follows; else it waits for the next sweep."""
    bench.source = bench.named(after="delete", copy_first=first)
    (path,) = material.ct(bench.inbox / "s", 1)
    before = path.read_bytes()
    changed = bytes([*before[:-1], before[-1] ^ 1])
    shelf = DRIVERS.of(bench.targets["shelf"])

    def push(target: Any, plan: Any, report: Any) -> Any:
        path.write_bytes(changed)  # in place, so that a link would see it
        return shelf.push(target, plan, report)

    bench.drivers["shelf"] = replace(shelf, push=push)
    bench.sweep()
    bench.dispatch()
    arrived = [one.read_bytes() for one in bench.at("shelf").rglob("*.dcm")]
    assert arrived == ([before] if first else [])
    del bench.drivers["shelf"]
    bench.sweep()
    assert path.read_bytes() == changed, "what nobody has confirmed stays"
    bench.dispatch()
    bench.all()
    assert changed in [one.read_bytes() for one in bench.at("shelf").rglob("*.dcm")] and not names(bench.inbox)


def test_no_lease_is_no_sign_of_a_writer_on_shares(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = material.ct(bench.inbox / "s", 1)
    with path.open("ab"):
        assert writers.name_is_written(str(path))
        monkeypatch.setattr(writers, "kind", lambda folder: "nfs4")
        assert not writers.name_is_written(str(path)) and bench.sweep().runs


def test_a_lease_does_not_stay(tmp_path: Path) -> None:
    """Whoever opens the file next would wait for it, and its break would be a signal to us."""
    path = tmp_path / "a"
    path.write_bytes(b"a")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert not writers.is_written(fd)
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    finally:
        os.close(fd)


@pytest.mark.parametrize("unit", ["folder", "study"])
@pytest.mark.parametrize("gone", ["all", "one", "killed at the end", "killed", "killed under our name"])
def test_a_unit_whose_files_are_gone_stops_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: str, gone: str
) -> None:
    sent = bench.folder / "sent"
    bench.source = bench.named(after="move", move_to=str(sent), move_layout="{StudyInstanceUID}", unit=unit)
    first, second = material.ct(bench.inbox / "s", 2, study=material.uid(56))
    bench.sweep()
    bench.dispatch()
    if gone == "all":
        shutil.rmtree(bench.inbox / "s")
    elif gone == "one":
        first.unlink()
    else:
        _killed_after_its_files(bench, monkeypatch)
        for path in (first, second) if gone == "killed at the end" else (first,):
            path.unlink()
        if gone == "killed under our name":
            second.rename(second.with_name(f"{TAKEN}{second.name}"))
    material.ct(bench.inbox / "other", 1)
    assert bench.sweep().runs, "what came meanwhile is dispatched"
    bench.dispatch()
    bench.sweep()
    assert set(bench.states().values()) == {"done"} and not names(bench.inbox)
    assert len(names(sent)) == 1 + (gone in ("one", "killed", "killed under our name"))


def _killed_after_its_files(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep, and kill it when it is about to deal with files of units that were delivered."""
    with monkeypatch.context() as patch:
        patch.setattr("tasks.sources.after.finish", _killed)
        with pytest.raises(KeyboardInterrupt):
            bench.sweep()


def _killed(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "state"),
    [(Denied("not allowed"), "done"), (Interrupted("not now"), "delivered"), (OSError(5, "not now"), "delivered")],
)
def test_what_goes_wrong_with_one_unit_stops_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    bench.source = bench.named(after="delete")
    for name in ("bad", "good"):
        material.ct(bench.inbox / name, 1)
    bench.sweep()
    bench.dispatch()
    finish = after.finish

    def broken(source: Any, folder: Any, unit: Any, *more: Any) -> Any:
        if unit.key == "bad":
            raise error
        return finish(source, folder, unit, *more)

    monkeypatch.setattr("tasks.sources.after.finish", broken)
    material.ct(bench.inbox / "new", 1)
    assert bench.sweep().runs
    rows = bench.rows()
    assert (rows["bad"].state, rows["good"].state) == (state, "done")
    assert rows["bad"].detail.partition(": ")[2]
    assert all(name.startswith(("bad/", "new/")) for name in names(bench.inbox))
    monkeypatch.undo()
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
    monkeypatch.setenv("TALARIA_HOME", str(bench.home.root))
    bench.sweep()
    assert any(name.startswith("bad/") for name in names(bench.inbox)) is (state == "done")


def test_a_list_that_a_kill_left_half_written_goes(bench: Bench) -> None:
    half = unitlist.place(bench.home, "box", "half").with_suffix(unitlist.PART)
    half.parent.mkdir(parents=True)
    half.write_text("{")
    material.ct(bench.inbox / "s", 1)
    bench.all()
    assert not half.exists() and set(bench.states().values()) == {"done"}


@pytest.mark.parametrize("change", ["target", "verify", "run", "leave"])
def test_what_a_kill_left_under_our_name_gets_its_own_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    bench.source = bench.named(after="delete")
    (path,) = material.ct(bench.inbox / "s", 1)
    bench.sweep()
    bench.dispatch()
    _killed_after_its_files(bench, monkeypatch)
    path.rename(path.with_name(f"{TAKEN}{path.name}"))
    match change:
        case "target":
            bench.targets["cloud"] = bench.target("cloud")
            bench.source = bench.named(after="delete")
        case "verify":
            bench.targets["shelf"] = bench.target("shelf", verify="proven")
        case "run":
            bench.done.clear()
        case "leave":
            bench.source = bench.named()
    bench.sweep()
    assert names(bench.inbox) == {f"s/{path.name}"}
    if change == "target":
        assert [asked["targets"] for asked in bench.asked.values()] == [["shelf", "cloud"]]
        return
    assert bench.states() == {"s": "done"}
    assert bench.rows()["s"].detail == (
        "" if change == "leave" else f"1 file stays ({path.name}): not confirmed by every target"
    )


@pytest.mark.parametrize("unit", ["folder", "study"])
@pytest.mark.parametrize(("first", "then"), [(["one"], ["one", "two"]), (["one"], ["two"]), (["one", "two"], ["one"])])
def test_what_is_under_way_when_its_source_gets_other_targets_goes_to_those_as_well(
    tmp_path: Path, unit: str, first: list[str], then: list[str]
) -> None:
    """It stayed for good, as nobody would send it to the new one, or hear from one that was removed."""
    bench = Bench(tmp_path, "one", "two")
    bench.source = bench.named(after="delete", unit=unit, targets=first, late="resend")
    material.ct(bench.inbox / "s", 2)
    bench.sweep()
    bench.source = bench.named(after="delete", unit=unit, targets=then, late="resend")
    bench.dispatch()
    if len(first) == 2:
        del bench.targets["two"]
    bench.sweep()
    (asked,) = bench.asked.values()
    assert asked["targets"] == then and not asked["force"]
    bench.dispatch()
    assert bench.sweep().words == "1 done" and not names(bench.inbox) and not bench.asked
    assert [delivered(bench, name) for name in bench.targets] == [2] * len(bench.targets)


@pytest.mark.parametrize("how", ["delete", "move", "killed"])
@pytest.mark.parametrize("name", ["n" * 255, "影" * 80 + ".dcm"])
def test_files_with_long_names_go_as_well(bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, name: str) -> None:
    """Our own name for them would have been longer than one may be; of an encrypted folder that is 143 bytes."""
    bench.source = (
        bench.named(after="delete") if how != "move" else bench.named(after=how, move_to=str(bench.folder / "sent"))
    )
    (path,) = material.ct(bench.inbox / "s", 1)
    path = path.rename(path.with_name(name))
    bench.sweep()
    bench.dispatch()
    rename, seen = os.rename, list[str]()

    def renamed(source: str, to: str, **more: Any) -> None:
        seen.append(to)
        rename(source, to, **more)
        if how == "killed" and len(seen) == 1:
            raise KeyboardInterrupt

    if how == "killed":
        monkeypatch.setattr(os, "rename", renamed)
        monkeypatch.setattr(after, "_put_back", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            bench.sweep()
        monkeypatch.undo()
        monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
        monkeypatch.setenv("TALARIA_HOME", str(bench.home.root))
        (left,) = (bench.inbox / "s").iterdir()
        assert left.name.startswith(TAKEN) and len(os.fsencode(left.name)) < 143
    bench.sweep()
    assert not names(bench.inbox) and not list(bench.inbox.rglob(f"{TAKEN}*"))
    assert names(bench.folder / "sent") == ({f"s/{name}"} if how == "move" else set())


def test_what_stays_is_named_as_far_as_people_read() -> None:
    kept = {"open": ["a"], "not confirmed": ["s/1", "s/2", "s/3", "s/4", "s/5"], "full": ["b", "c"]}
    assert after.Finished("0:0", kept=kept).words == (
        "1 file stays (a): open; 5 files stay (s/1, s/2, s/3 and 2 more): not confirmed; 2 files stay (b, c): full"
    )


@pytest.mark.parametrize("after", ["delete", "move"])
def test_files_of_another_folder_stay_with_words(bench: Bench, after: str) -> None:
    more = {"after": after, "move_to": str(bench.folder / "sent") if after == "move" else ""}
    bench.source = bench.named(**more)
    (path,) = material.ct(bench.inbox / "s", 1)
    bench.sweep()
    bench.dispatch()
    (bench.folder / "elsewhere").mkdir()
    bench.source = bench.named(**more, folder=str(bench.folder / "elsewhere"))
    bench.sweep()
    assert path.exists()
    assert bench.rows()["s"].detail.endswith(f"{path.name}): it lies outside the source's folder")


@pytest.mark.parametrize("layout", ["", "{StudyInstanceUID}"])
def test_moved_files_keep_what_is_there(bench: Bench, layout: str) -> None:
    bench.source = bench.named(after="move", move_to=str(bench.folder / "sent"), move_layout=layout)
    path = material.dicom(bench.inbox / "s" / "a.dcm", study="1.2.3")
    data, place = path.read_bytes(), bench.folder / "sent" / ("1.2.3" if layout else "s")
    place.mkdir()
    (place / path.name).write_bytes(b"somebody else's")
    bench.all()
    assert not names(bench.inbox) and not (bench.inbox / "s").exists()
    assert (place / path.name).read_bytes() == b"somebody else's"
    (other,) = [one for one in place.iterdir() if one.name != path.name]
    assert other.read_bytes() == data and other.stat().st_nlink == 1


@pytest.mark.parametrize("other", [False, True], ids=["same file system", "another one"])
def test_who_could_read_a_file_can_read_it_where_it_was_moved_to(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    """Whatever the umask of the worker is, which systemd's unit sets to 0077."""
    sent, link = bench.folder / "sent", os.link
    sent.chmod(0o750)
    bench.source = bench.named(after="move", move_to=str(sent), move_layout="{StudyInstanceUID}/files")
    path = material.dicom(bench.inbox / "s" / "a.dcm", study="1.2.3")
    path.chmod(0o444)
    data, time_ns = path.read_bytes(), path.stat().st_mtime_ns

    def linking(source: Any, name: Any, **folders: Any) -> None:
        if other and str(source).startswith(after.TAKEN) and folders["src_dir_fd"] != folders["dst_dir_fd"]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(source, name, **folders)

    monkeypatch.setattr(os, "link", linking)
    before = os.umask(0o077)
    try:
        bench.all()
    finally:
        os.umask(before)
    place = sent / "1.2.3" / "files" / "a.dcm"
    assert not names(bench.inbox) and names(sent) == {"1.2.3/files/a.dcm"}
    assert [stat.S_IMODE(one.stat().st_mode) for one in (place, place.parent, sent / "1.2.3")] == [0o444, 0o750, 0o750]
    assert place.read_bytes() == data and place.stat().st_mtime_ns == time_ns


def test_what_a_kill_left_of_a_copy_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is moved to another file system, which may have gigabytes."""
    sent = bench.folder / "sent"
    bench.source = bench.named(after="move", move_to=str(sent))
    material.dicom(bench.inbox / "s" / "a.dcm")
    copy, unlink = after.copy_bytes, Tree.unlink

    def linking(source: Any, name: Any, **folders: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def copied(source: int, writer: int) -> None:
        os.write(writer, b"half of it")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", linking)
        patch.setattr(after, "copy_bytes", copied)
        patch.setattr(Tree, "unlink", lambda tree, path: None)
        bench.all()
        patch.setattr(Tree, "unlink", unlink)
        (left,) = names(sent)
        assert left.startswith("s/.talaria-") and names(bench.inbox) == {"s/a.dcm"}
        patch.setattr(after, "copy_bytes", copy)
        bench.sweep()
    assert names(sent) == {"s/a.dcm"} and not names(bench.inbox)


def test_a_copy_that_a_stopped_sweep_still_makes_is_not_made_by_the_next_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that a share holds up goes on when it answers: it would give its name to half of the other's copy."""
    sent = bench.folder / "sent"
    bench.source = bench.named(after="move", move_to=str(sent))
    data = material.dicom(bench.inbox / "s" / "a.dcm").read_bytes()
    copy, copies = after.copy_bytes, list[int]()

    def linking(source: Any, name: Any, **folders: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def copied(source: int, writer: int) -> int:
        copies.append(writer)
        if len(copies) == 1:
            bench.sweep()
        return copy(source, writer)

    monkeypatch.setattr(os, "link", linking)
    monkeypatch.setattr(after, "copy_bytes", copied)
    bench.all()
    assert len(copies) == 1
    assert names(sent) == {"s/a.dcm"} and (sent / "s" / "a.dcm").read_bytes() == data
    bench.all()
    assert names(sent) == {"s/a.dcm"} and not names(bench.inbox)


@pytest.mark.parametrize("unit", ["study", "series"])
def test_loose_files_are_grouped_by_their_uids(bench: Bench, unit: str) -> None:
    bench.source = bench.named(unit=unit, after="delete")
    for number, where in enumerate(("", "a", "a/b")):
        for series in ("1.2.1", "1.2.2"):
            material.dicom(bench.inbox / where / f"{number}{series}.dcm", study="1.2", series=series)
    material.dicom(bench.inbox / "other.dcm", study="1.3", series="1.3.1")
    (bench.inbox / "note.txt").write_text("no DICOM")
    bench.sweep()
    expected = {"1.2", "1.3"} if unit == "study" else {"1.2.1", "1.2.2", "1.3.1"}
    assert set(bench.states()) == expected
    bench.dispatch()
    bench.sweep()
    assert delivered(bench) == 7 and names(bench.inbox) == {"note.txt"}
    material.dicom(bench.inbox / "late.dcm", study="1.2", series="1.2.1")
    bench.all()
    assert delivered(bench) == 8 and names(bench.inbox) == {"note.txt"}


def test_a_sweep_that_was_killed_before_its_run_was_created(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    material.ct(bench.inbox / "s", 1)

    async def killed(batch: str, parameters: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.sweep()
    assert bench.states() == {"s": "dispatched"} and not bench.asked
    assert bench.sweep().runs
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "done"} and delivered(bench) == 1


def test_a_run_that_was_removed_is_made_again(bench: Bench) -> None:
    material.ct(bench.inbox / "s", 1)
    bench.sweep()
    bench.asked.clear()
    bench.sweep()
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "done"} and delivered(bench) == 1


def test_an_inbox_that_is_gone_is_not_an_empty_one(bench: Bench) -> None:
    material.ct(bench.inbox / "s", 1)
    bench.all()
    bench.inbox.rename(bench.folder / "unmounted")
    with pytest.raises(NotFound, match="no such file or folder"):
        bench.sweep()
    bench.inbox.write_text("a file")
    with pytest.raises(Misconfigured, match="is not a folder"):
        bench.sweep()
    assert bench.states() == {"s": "done"}


def test_what_failed_and_is_not_there_any_more_is_forgotten_one_day(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.down = {"shelf"}
    for name in ("gone", "there"):
        material.ct(bench.inbox / name, 1)
    bench.all()
    shutil.rmtree(bench.inbox / "gone")
    bench.sweep()
    assert bench.states() == {"gone": "failed", "there": "failed"}
    monkeypatch.setattr("tasks.sources.sweep.KEPT_S", -1.0)
    bench.sweep()
    assert bench.states() == {"there": "failed"}


def test_lists_that_nobody_needs_go(bench: Bench) -> None:
    material.ct(bench.inbox / "s", 1)
    bench.all()
    bench.sweep()
    assert not names(bench.home.root / "sources")


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_a_thousand_studies_in_one_sweep(bench: Bench, unit: str) -> None:
    bench.source = bench.named(unit=unit, after="delete")
    for number in range(1000):
        material.ct(bench.inbox / f"s{number}", 1)
    done = bench.sweep()
    assert sorted(done.runs.values()) == [250] * 4
    assert bench.sweep().words == "nothing new"
    with Ledger(bench.home.ledger) as ledger:
        assert ledger.sources.counts() == {"box": {"dispatched": 1000}}


def test_what_a_target_may_not_hold_any_more_stays(bench: Bench) -> None:
    """Another dispatch has replaced it there, or pushed at the same time."""
    bench.source = bench.named(after="delete")
    material.ct(bench.inbox / "s", 2)
    bench.sweep()
    bench.dispatch()
    with Ledger(bench.home.ledger) as ledger:
        endpoint = bench.targets["shelf"].endpoint_for()
        for place, item in ledger._db.execute("SELECT place, item FROM confirmed").fetchall():
            confirmed.withdraw(ledger._db, endpoint, [confirmed.Spot(place, item)], ledger.now())
    bench.sweep()
    assert len(names(bench.inbox)) == 2
    (row,) = bench.rows().values()
    assert row.state == "done" and row.detail


@pytest.mark.parametrize("layout", ["{dispatch_id}", "{StudyInstanceUID}"])
def test_other_content_under_the_same_name_length_time_and_uid_is_sent_before_it_goes(
    bench: Bench, layout: str
) -> None:
    bench.targets["shelf"] = bench.target("shelf", layout=layout)
    bench.source = bench.named(after="delete")
    (path,) = material.ct(bench.inbox / "s", 1)
    first = path.read_bytes()
    second = first.replace(first[-64:], bytes(byte ^ 1 for byte in first[-64:]))
    assert len(second) == len(first) and second != first
    for content in (first, second):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        bench.all()
        there = [one.read_bytes() for one in bench.at("shelf").rglob("*.dcm")]
        assert content in there or path.exists(), "nothing is deleted that isn't there"
        assert content in there
        shutil.rmtree(path.parent, ignore_errors=True)


@pytest.mark.parametrize("how", ["edited", "chmod"])
@pytest.mark.parametrize("next_", ["retried", "late"])
@pytest.mark.parametrize(
    ("layout", "copy_first"), [("{StudyInstanceUID}", False), ("{dispatch_id}", False), ("{StudyInstanceUID}", True)]
)
def test_what_was_touched_after_it_was_confirmed_is_sent_before_it_goes(
    tmp_path: Path, how: str, next_: str, layout: str, copy_first: bool
) -> None:
    """Whoever edits a file may restore its length and time, which the ledger knows the confirmed content by."""
    bench = Bench(tmp_path / "bench", "one", "two")
    bench.targets = {name: bench.target(name, layout=layout) for name in bench.targets}
    bench.source = bench.named(after="delete", copy_first=copy_first)
    study = material.uid(56)
    path = material.dicom(bench.inbox / "s" / "a.dcm", study=study)
    bench.down = {"two"} if next_ == "retried" else set()
    bench.sweep()
    bench.dispatch()
    info, data = path.stat(), bytearray(path.read_bytes())
    if how == "edited":
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    else:
        path.chmod(0o600)
    bench.sweep()
    assert path.exists()
    bench.down = set()
    if next_ == "retried":
        with Ledger(bench.home.ledger) as ledger:
            ledger.sources.forget("box", ["s"])
    else:
        material.dicom(bench.inbox / "s" / "b.dcm", study=study)
    bench.all()
    assert bench.states() == {"s": "done"} and not path.exists()
    for name in bench.targets:
        assert bytes(data) in [one.read_bytes() for one in bench.at(name).rglob("a.dcm")]
