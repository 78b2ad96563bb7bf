"""What of an inbox can't be dispatched as it is: nothing of it is passed over in silence, or for ever."""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blocks.inbox import InboxSource
from talaria.service import sources
from talaria.testing import studies as material
from tasks.sources import again, inbox, sweep
from tests.sources.bench import Bench
from transfer.database import Sqlite
from transfer.errors import NotFound
from transfer.ledger import Ledger
from transfer.plan import Plan

STRANGE = ("Muster\u3000Taro/a.dcm", "M\udcfcller/b.dcm", "no\u00a0break.dcm", "no\udca0break.dcm", "a\\x20b/c\nd.dcm")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start a server
    return Bench(tmp_path, unit="study")


def delivered(bench: Bench) -> int:
    return sum(path.is_file() and path.name != inbox.MARKER for path in bench.at("shelf").rglob("*"))


def told(bench: Bench) -> int:
    with Ledger(bench.home.ledger) as ledger:
        return len(list(ledger._db.execute("SELECT about FROM happenings WHERE event='source.stuck'")))


def unreadable(monkeypatch: pytest.MonkeyPatch, which: Path) -> None:
    """Let the file system fail at a file or folder, as a share does that is away for a moment."""
    read, look = inbox.read_header, os.scandir

    def fails() -> OSError:
        return OSError(errno.EIO, os.strerror(errno.EIO))

    def read_header(fd: int, size: int) -> Any:
        if which.is_file() and os.path.samestat(os.fstat(fd), which.stat()):
            raise fails()
        return read(fd, size)

    def scandir(path: Any) -> Any:
        if path == str(which):
            raise fails()
        return look(path)

    monkeypatch.setattr(inbox, "read_header", read_header)
    monkeypatch.setattr(inbox.os, "scandir", scandir)


def test_a_file_that_could_not_be_read_once_is_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = material.dicom(bench.inbox / "a.dcm", study="1.2")
    with monkeypatch.context() as patch:
        unreadable(patch, path)
        assert not bench.sweep().runs and not bench.sweep().runs
    (row,) = bench.rows().values()
    assert row.state == "held" and "1 files or folders can't be read: Input/output error" in row.detail
    assert "a.dcm" in row.shown and told(bench) == 1, "once, and not at each sweep"
    bench.all()
    assert bench.states() == {"1.2": "done"} and delivered(bench) == 1


def test_what_can_not_be_read_again_is_told_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    material.dicom(bench.inbox / "a.dcm", study="1.2")
    path = material.dicom(bench.inbox / "ward" / "b.dcm", study="1.3")
    for which in (path, bench.inbox / "ward"):
        before = told(bench)
        for times in (1, 2):
            with monkeypatch.context() as patch:
                unreadable(patch, which)
                for _ in range(2):
                    bench.sweep()
            assert told(bench) == before + times, "once each time"
            bench.all()
            assert bench.states() == {"1.2": "done", "1.3": "done"}
            path.touch()  # or its header is known


def test_a_test_of_an_edited_inbox_leaves_what_is_known_of_the_saved_one(bench: Bench, tmp_path: Path) -> None:
    """Else the next sweep would read all headers again, and hold again what is held."""
    material.dicom(bench.inbox / "a.dcm", study="1.2")
    bench.all()
    material.dicom(tmp_path / "elsewhere" / "b.dcm", study="1.3")
    targets = [*bench.targets.values()]

    def known() -> list[str]:
        with Ledger(bench.home.ledger) as ledger:
            return [one.name for one in ledger.sources.by_uid("box")]

    def tested(source: InboxSource) -> dict[str, Any]:
        office: Any = SimpleNamespace(home=bench.home)
        return sources._tested(office, source, [source], targets, bench.source, {})

    saved = bench.named(unit="study")
    assert tested(saved)["units"]["known"] == 1 and known() == ["a.dcm"]
    edited = tested(bench.named(unit="study", folder=str(tmp_path / "elsewhere")))
    assert edited["units"]["ready"] == 1 and edited["ok"] and known() == ["a.dcm"]


def test_a_folder_that_only_lists_its_names_holds_up_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source = bench.named(unit="folder")
    for name in ("a/1.dcm", "b/2.dcm"):
        material.dicom(bench.inbox / name)
    look = os.scandir

    class Entry:
        name, path = "1.dcm", str(bench.inbox / "a/1.dcm")

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def scandir(path: Any) -> Any:
        return nullcontext([Entry()]) if str(path) == str(bench.inbox / "a") else look(path)

    with monkeypatch.context() as patch:
        patch.setattr(inbox.os, "scandir", scandir)
        bench.sweep()
    assert bench.states()["b"] == "dispatched", "without a traceback"
    bench.dispatch()
    bench.all()
    assert bench.states() == {"a": "done", "b": "done"} and delivered(bench) == 2


def test_files_of_a_folder_that_can_not_be_read_are_not_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source = bench.named(unit="study", late="hold")
    for name in ("a/b/1.dcm", "a/2.dcm", "3.dcm"):
        material.dicom(bench.inbox / name, study="1.2")
    bench.all()
    with monkeypatch.context() as patch:
        unreadable(patch, bench.inbox / "a")
        material.dicom(bench.inbox / "4.dcm", study="1.3")
        bench.sweep()
    assert bench.states() == {"1.2": "done", "1.3": "dispatched", inbox.UNREAD: "held"}
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"1.2": "done", "1.3": "done"} and delivered(bench) == 4


def test_damaged_files_are_told_until_they_are_whole(bench: Bench) -> None:
    whole = material.dicom(bench.inbox / "a.dcm", study="1.2").read_bytes()
    (bench.inbox / "a.dcm").write_bytes(whole[:-10])
    material.dicom(bench.inbox / "none.dcm", study=" ")
    (bench.inbox / "note.txt").write_text("no DICOM")
    for _ in range(2):
        assert not bench.sweep().runs
    (row,) = bench.rows().values()
    assert row.state == "held" and "2 files are damaged" in row.detail and told(bench) == 1
    assert row.shown == f"{inbox.DAMAGED}: a.dcm, none.dcm"
    (bench.inbox / "none.dcm").unlink()
    (bench.inbox / "a.dcm").write_bytes(whole)
    bench.all()
    assert bench.states() == {"1.2": "done"} and delivered(bench) == 1


def test_studies_beside_the_folders_of_an_inbox_are_told_once(bench: Bench, tmp_path: Path) -> None:
    """Who put them there heard nothing, as an inbox takes folders unless it says otherwise."""
    bench.source = bench.named(unit="folder", exclude="*.skip")
    material.ct(bench.inbox / "s", 1)
    for name in ("notes.txt", "a.skip"):
        (bench.inbox / name).write_text("no study")
    bench.all()
    assert bench.states() == {"s": "done"} and told(bench) == 0
    material.ct(bench.inbox, 5)
    bench.all()
    assert bench.states() == {"s": "done", inbox.BESIDE: "held"} and told(bench) == 1
    row = bench.rows()[inbox.BESIDE]
    assert row.shown == f"{inbox.BESIDE}: CT0001.dcm, CT0002.dcm, CT0003.dcm and 2 more" and "unit: study" in row.detail
    material.ct(bench.inbox, 1, first=7)
    bench.sweep()
    assert told(bench) == 1, "as long as there are any"
    with Ledger(bench.home.ledger) as ledger:
        found = sources._tested(
            cast(Any, SimpleNamespace(home=bench.home)), bench.source, [], [*bench.targets.values()], bench.source, {}
        )
        assert inbox.BESIDE in ledger.sources.units("box")
    assert found["held"][0].startswith(inbox.BESIDE) and found["units"]["ready"] == 0, found
    for path in bench.inbox.glob("*.dcm"):
        path.unlink()
    bench.sweep()
    assert bench.states() == {"s": "done"}
    (tmp_path / "study").mkdir()
    (bench.inbox / "link").symlink_to(tmp_path / "study")
    bench.sweep()
    assert bench.rows()[inbox.BESIDE].shown == f"{inbox.BESIDE}: link" and told(bench) == 2


def test_names_that_can_not_be_shown_are_names(bench: Bench) -> None:
    bench.source = bench.named(unit="study", after="delete")
    for number, name in enumerate(STRANGE):
        material.dicom(bench.inbox / name, study=f"1.2.{number}")
    bench.sweep()
    assert not bench.sweep().runs, "all of them are known"
    bench.dispatch()
    bench.sweep()
    assert set(bench.states().values()) == {"done"} and delivered(bench) == len(STRANGE)
    assert not any(path.is_file() for path in bench.inbox.rglob("*"))


def test_a_folder_that_keeps_a_wrong_time_settles(bench: Bench) -> None:
    bench.source = bench.named()
    material.ct(bench.inbox / "s" / "below", 1)
    os.utime(bench.inbox / "s" / "below", (1, time.time() + 1e8))  # as `cp -a` does
    assert bench.sweep().runs


@pytest.mark.parametrize("unit", ["folder", "study", "damaged"])
def test_what_was_changed_in_the_future_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    bench.source = bench.named(unit=unit.replace("damaged", "study"))
    path = material.dicom(bench.inbox / "s" / "a.dcm", study="1.2")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10] if unit == "damaged" else whole)
    with monkeypatch.context() as patch:
        for module in ("units", "sweep"):
            clock = SimpleNamespace(time=lambda: time.time() - 3600, monotonic=time.monotonic)
            patch.setattr(f"tasks.sources.{module}.time", clock)
        for _ in range(2):
            assert not bench.sweep().runs
    (row,) = bench.rows().values()
    assert row.state == "held" and "changed in the future" in row.detail and told(bench) == 1
    path.write_bytes(whole)
    bench.all()
    assert set(bench.states().values()) == {"done"} and delivered(bench) == 1, "when its time has come"


@pytest.mark.parametrize("unit", ["folder", "study"])
@pytest.mark.parametrize("late", ["append", "resend", "hold"])
def test_what_a_share_keeps_back_for_a_moment_is_not_taken_for_a_change(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: str, late: str
) -> None:
    """Nothing of it is dispatched, sent again by force or held, nor forgotten, however long ago it was delivered."""
    bench.source = bench.named(unit=unit, late=late)
    for number in range(3):
        material.dicom(bench.inbox / f"s{number}" / "a.dcm", study=f"1.2.{number}")
    bench.all()
    before = bench.rows()
    assert set(bench.states().values()) == {"done"}
    monkeypatch.setattr("tasks.sources.sweep.KEPT_S", -60.0)
    with monkeypatch.context() as patch:
        unreadable(patch, bench.inbox / "s1")
        for _ in range(2):
            assert not bench.sweep().runs and not bench.asked
        assert {key: row for key, row in bench.rows().items() if key in before} == before and told(bench) == 1
        assert "can't be read: Input/output error" in bench.rows()[inbox.UNREAD].detail
    assert not bench.sweep().runs and bench.rows() == before
    material.dicom(bench.inbox / "s1" / "b.dcm", study="1.2.1")
    bench.sweep()
    assert [asked["force"] for asked in bench.asked.values()] == ([] if late == "hold" else [late == "resend"])


def test_a_share_that_goes_in_the_midst_of_a_sweep_ends_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source = bench.named(unit="folder")
    for number in range(3):
        material.dicom(bench.inbox / f"s{number}" / "a.dcm", study=f"1.2.{number}")
    look = inbox.look

    def goes(path: str, *args: Any, **more: Any) -> Any:
        if path.endswith("s1"):
            bench.inbox.rename(bench.folder / "gone")
            raise OSError(errno.EHOSTDOWN, os.strerror(errno.EHOSTDOWN))
        return look(path, *args, **more)

    monkeypatch.setattr(inbox, "look", goes)
    with pytest.raises(NotFound, match="no such file or folder"):
        bench.sweep()
    assert not bench.asked and not bench.rows()


@pytest.mark.parametrize("unit", ["folder", "study"])
@pytest.mark.parametrize("what", ["a file", "all"])
def test_what_could_not_be_read_while_it_was_sent_is_sent_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: str, what: str
) -> None:
    """A share that hung for a moment left all that was under way to somebody's `source retry`."""
    monkeypatch.setattr(Sqlite, "time", lambda self: time.time() + 0.5)  # as PostgreSQL's clock may be
    bench.source = bench.named(unit=unit, after="delete")
    material.ct(bench.inbox / "s", 3)
    descriptor, away = Plan.descriptor, [True]

    def opened(self: Plan, item: Any, *flags: int) -> int:
        if away[0] and (what == "all" or item.path.endswith("1.dcm")):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return descriptor(self, item, *flags)

    monkeypatch.setattr(Plan, "descriptor", opened)
    done = bench.all()
    ((key, row),) = bench.rows().items()
    assert row.state == "failed" and os.strerror(errno.ESTALE) in row.detail and row.detail.endswith(again.WORDS)
    assert done.waiting == 1 and done.next > time.time() + 60 and told(bench) == 1 and not bench.asked
    monkeypatch.setattr(sweep, "AGAIN_S", 0.0)
    for _ in range(again.MOST):
        bench.sweep()
        assert bench.states() == {key: "dispatched"}
        bench.dispatch()
    bench.sweep()
    assert bench.states() == {key: "failed"} and again.WORDS not in bench.rows()[key].detail
    assert not bench.sweep().runs and not bench.asked and told(bench) == 2, "a bad sector stays one"
    with Ledger(bench.home.ledger) as ledger:
        ledger.sources.forget("box", [key])  # `talaria source retry`
    bench.all()
    away[0] = False
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {key: "done"} and delivered(bench) == 3 and not list(bench.inbox.rglob("*.dcm"))


def test_what_can_not_be_read_is_tried_so_often_also_where_its_times_lie_in_the_future(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for new each time: dispatched, and told, without end."""
    clock, passed = time.time, [-365 * 86_400.0]
    monkeypatch.setattr(time, "time", lambda: clock() + passed[0])
    bench.source = bench.named(unit="folder")
    material.ct(bench.inbox / "s", 1)

    def opened(self: Plan, item: Any, *flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Plan, "descriptor", opened)
    for _ in range(8):
        passed[0] += 400
        bench.all()
    assert len(bench.done) == 1 + again.MOST and bench.states() == {"s": "failed"}
    assert told(bench) == 3, "that it lies in the future, that it failed, and that it did for good"


def test_a_retry_that_fails_as_well_before_a_unit_goes_again_is_seen_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its source was swept each second until then; one that is not watched, until its schedule began a sweep."""
    bench.source = bench.named(unit="folder")
    material.ct(bench.inbox / "s", 1)

    def opened(self: Plan, item: Any, *flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Plan, "descriptor", opened)
    bench.all()
    before = bench.rows()["s"]
    assert before.detail.endswith(again.WORDS)
    with Ledger(bench.home.ledger) as ledger:
        ledger.runs.begins(before.run, "us")
        ledger.runs.ends(before.run)
        assert ledger.sources.run_again() == {"box": {before.run}}
    bench.sweep()
    after = bench.rows()["s"]
    with Ledger(bench.home.ledger) as ledger:
        assert ledger.sources.run_again() == {}
    assert replace(after, time=0.0) == replace(before, time=0.0) and told(bench) == 1


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_what_could_not_be_read_by_its_permissions_goes_when_these_are_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """Of a folder's files neither length nor time changes with that, and it waited for somebody's `source retry`."""
    bench.source = bench.named(unit=unit)
    material.ct(bench.inbox / "s", 2)
    file, descriptor, look = bench.inbox / "s" / "CT0001.dcm", Plan.descriptor, inbox._uid
    file.chmod(0)

    def check(path: str) -> None:
        if not stat.S_IMODE(os.stat(path).st_mode):  # for root, too
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def opened(self: Plan, item: Any, *flags: int) -> int:
        check(str(bench.inbox / "s" / item.path.rpartition("/")[2]))
        return descriptor(self, item, *flags)

    def uid(path: str, source: InboxSource) -> str:
        check(path)
        return look(path, source)

    monkeypatch.setattr(Plan, "descriptor", opened)
    monkeypatch.setattr(inbox, "_uid", uid)
    bench.all()
    bench.all()
    assert len(bench.done) == 1 and told(bench) == 1

    def would_go() -> int:
        office: Any = SimpleNamespace(home=bench.home)
        found = sources._tested(office, bench.source, [bench.source], [*bench.targets.values()], bench.source, {})
        return int(found["units"]["ready"])

    assert would_go() == 0
    file.chmod(0o644)
    assert would_go() == 1, "what a test of the source says is what the next sweep does"
    bench.all()
    bench.all()
    assert len(bench.done) == 2 and set(bench.states().values()) == {"done"} and delivered(bench) == 2


def test_a_link_that_leads_nowhere_is_no_share_that_is_away(bench: Bench) -> None:
    bench.source = bench.named(unit="folder")
    material.ct(bench.inbox / "s", 1)
    (bench.inbox / "s" / "link.dcm").symlink_to("nowhere")
    bench.all()
    assert bench.states() == {"s": "failed"} and again.WORDS not in bench.rows()["s"].detail


def test_a_unit_that_was_away_while_it_was_sent_is_sent_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source = bench.named(unit="folder", after="delete")
    material.ct(bench.inbox / "s", 2)
    bench.sweep()
    (bench.inbox / "s").rename(bench.folder / "away")  # as its share was
    bench.dispatch()
    (bench.folder / "away").rename(bench.inbox / "s")
    monkeypatch.setattr(sweep, "AGAIN_S", 0.0)
    bench.sweep()
    bench.dispatch()
    bench.sweep()
    assert bench.states() == {"s": "done"} and delivered(bench) == 2 and not list(bench.inbox.rglob("*.dcm"))
