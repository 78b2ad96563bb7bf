"""The ledger: what was committed is there, whoever else writes and however the writer ends."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from imaging.header import Header
from talaria.engine import leftovers
from talaria.testing import studies
from talaria.testing.process import as_loaded, until
from tests.servers.postgresql import PostgreSql
from transfer import answers, database, lease
from transfer.confirmed import Spot
from transfer.deliveries import Standing
from transfer.errors import DispatchError, LedgerAway, LedgerFull, Misconfigured
from transfer.home import Home
from transfer.ledger import HookRow, Ledger, write_json
from transfer.outcome import ALREADY, DELIVERED, ELSEWHERE, Kind, Outcome
from transfer.plan import Item, Plan, scan
from transfer.receipt import ItemResult

ITEMS = tuple(Item(f"a/{number}.dcm", 100 + number, 1_700_000_000_000_000_000 + number) for number in range(5))
REJECTED = Outcome(Kind.REJECTED, "A900: data set does not match SOP class")


def rows(where: Path | str, query: str) -> list[Any]:
    """Read what a ledger has, from outside."""
    if isinstance(where, Path):
        with closing(sqlite3.connect(where)) as db:
            return db.execute(query).fetchall()
    with psycopg.connect(where, options="-c search_path=talaria") as connection:
        return connection.execute(query.encode()).fetchall()


def test_keeps_outcomes(where: Path | str) -> None:
    warned = Outcome(Kind.WARNING, "B007: element discarded")
    with Ledger(where) as ledger:
        ledger.begin("d1", "pacs", "e1")
        for item, outcome in zip(ITEMS, (DELIVERED, warned, ALREADY, REJECTED), strict=False):
            ledger.record("d1", "pacs", "e1", item, outcome)
    with Ledger(where) as ledger:
        assert ledger.outcomes("d1", "pacs", ITEMS) == {
            "a/0.dcm": DELIVERED, "a/1.dcm": warned, "a/2.dcm": ALREADY, "a/3.dcm": REJECTED,
        }  # fmt: skip
        assert ledger.outcomes("d2", "pacs", ITEMS) == {}
        assert ledger.outcomes("d1", "archive", ITEMS) == {}
        assert ledger.results("d1")["pacs"][3] == ItemResult("a/3.dcm", "", Kind.REJECTED, REJECTED.detail)


def test_keeps_several_with_one_commit_or_none_of_them(where: Path | str) -> None:
    with Ledger(where) as ledger, Ledger(where) as other:
        with ledger.together():
            for item in ITEMS[:2]:
                ledger.record("d", "pacs", "e", item, DELIVERED)
            assert other.outcomes("d", "pacs", ITEMS) == {}
        assert other.outcomes("d", "pacs", ITEMS) == {"a/0.dcm": DELIVERED, "a/1.dcm": DELIVERED}
        with pytest.raises(RuntimeError, match="midway"), ledger.together():
            ledger.record("d", "pacs", "e", ITEMS[2], DELIVERED)
            raise RuntimeError("midway")
        assert set(ledger.outcomes("d", "pacs", ITEMS)) == {"a/0.dcm", "a/1.dcm"}


def test_a_full_disk_is_said_and_what_follows_is_kept(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger, Ledger(tmp_path / "ledger.sqlite") as other:
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count={pages}")
        many = [Item(f"{number}.dcm", 1, 1) for number in range(2000)]
        with pytest.raises(LedgerFull, match="disk of the state directory is full"), ledger.together():
            for item in many:
                ledger.record("d", "pacs", "e", item, DELIVERED)
        with pytest.raises(LedgerFull):
            for item in many:
                ledger.record("d", "pacs", "e", item, DELIVERED, Spot("", "1.2"))
        ledger._db.execute(f"PRAGMA max_page_count={pages + 1000}")
        ledger.record("d2", "pacs", "e", ITEMS[0], DELIVERED)
        assert other.outcomes("d2", "pacs", ITEMS) == {"a/0.dcm": DELIVERED}


def test_a_disk_that_can_not_be_written_to_is_waited_for(path: Path, tmp_path: Path) -> None:
    """As one that the kernel has made read-only for an input error, or a quota: each dispatch failed."""
    with Ledger(path) as ledger:
        ledger._db.execute("PRAGMA query_only=1")
        with pytest.raises(LedgerAway, match="its file system read-only"), ledger.together():
            ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        ledger._db.execute("PRAGMA query_only=0")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
            with pytest.raises(LedgerAway, match="disk I/O error"), ledger.together():
                for number in range(2000):
                    ledger.record("d", "pacs", "e", Item(f"{number}.dcm", 1, 1), DELIVERED)
            with Ledger(path) as next_one, pytest.raises(LedgerAway, match="quota"):  # before it sends anything
                next_one.check_room()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        ledger.check_room()
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        assert ledger.outcomes("d", "pacs", ITEMS) == {"a/0.dcm": DELIVERED}
    (tmp_path / "ledger").symlink_to(tmp_path / "none" / "ledger")
    with pytest.raises(LedgerAway, match="unable to open"):
        Ledger(tmp_path / "ledger")


def test_a_file_that_may_not_be_written_to_has_no_room(
    open_folder: Path, as_nobody: Callable[[], AbstractContextManager[None]]
) -> None:
    """An instance was sent before that was found, again and again."""
    with Ledger(open_folder / "ledger") as ledger:
        ledger.check_room()
        (open_folder / "ledger").chmod(0o444)
        with as_nobody(), pytest.raises(LedgerAway, match="another user"):
            ledger.check_room()


def test_a_file_that_another_program_holds_is_away_for_that_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    with Ledger(path) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerAway, match="another process has held"):
            ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        with pytest.raises(LedgerAway), ledger.together():
            ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        other.execute("PRAGMA user_version=0")  # an old one, which is to be brought up to date
        other.execute("COMMIT")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerAway):
            Ledger(path)
        other.execute("ROLLBACK")
        ledger.record("d", "pacs", "e", ITEMS[1], DELIVERED)
        assert ledger.outcomes("d", "pacs", ITEMS) == {"a/1.dcm": DELIVERED}


def test_which_instances_a_target_has_confirmed_where_it_is(where: Path | str) -> None:
    outcomes = (
        (DELIVERED, "e"),
        (ALREADY, "e"),
        (REJECTED, "e"),
        (Outcome(Kind.WARNING, ELSEWHERE), "e"),
        (DELIVERED, "x"),
    )
    items = [
        Item(str(number), 1, 1, Header.of("1.2", f"1.{number}", "1.2.840.10008.1.2", "1", "1", 0))
        for number in range(5)
    ]
    with Ledger(where) as ledger:
        for item, (outcome, endpoint) in zip(items, outcomes, strict=True):
            ledger.record("d", "pacs", endpoint, item, outcome)
        uids = [f"1.{n}" for n in range(6)]
        assert ledger.confirmed_instances(uids, "pacs", "e") == {"1.0", "1.1"}
        assert ledger.confirmed_instances(uids[1:], "pacs", "e") == {"1.1"}
        assert ledger.confirmed_instances(uids, "archive", "e") == ledger.confirmed_instances([], "pacs", "e") == set()


def test_what_a_node_was_found_not_to_have_since_is_not_confirmed(where: Path | str) -> None:
    items = [
        Item(str(number), 1, 1, Header.of("1.2", f"1.{number}", "1.2.840.10008.1.2", "1", "1", 0))
        for number in range(4)
    ]
    outcomes = DELIVERED, ALREADY, Outcome(Kind.WARNING, ELSEWHERE), DELIVERED
    with Ledger(where) as ledger:
        for item, outcome in zip(items, outcomes, strict=True):
            ledger.record("d", "pacs", "e", item, outcome, Spot("", item.sop_instance_uid))
        uids = [item.sop_instance_uid for item in items]
        assert ledger.confirmed_instances(uids, "pacs", "e", "") == {"1.0", "1.1", "1.3"}
        assert ledger.confirmed_instances(uids[2:], "pacs", "e", "") == {"1.3"}
        assert ledger.confirmed_instances(uids, "pacs", "x", "") == set()
        ledger.record("d2", "pacs", "e", items[3], REJECTED, Spot("", "1.3"))
        assert ledger.confirmed_instances(uids, "pacs", "e", "") == {"1.0", "1.1"}


def test_a_row_is_about_the_file_as_it_was(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        for changed in (ITEMS[0].but(size=7), ITEMS[0].but(mtime_ns=7), ITEMS[0].but(path="b")):
            assert ledger.outcomes("d", "pacs", (changed,)) == {}
        assert ledger.outcomes("d", "pacs", (ITEMS[0],)) == {"a/0.dcm": DELIVERED}


def test_keys_are_the_names_that_are_no_text(where: Path | str, tmp_path: Path) -> None:
    studies.odd_names(tmp_path / "study")
    studies.write(tmp_path / "study" / "new\\nline.dcm", studies.ct_bytes())  # shown naively, it is new<LF>line.dcm
    plan = scan([tmp_path / "study"])
    same = tuple(item.but(size=1, mtime_ns=1) for item in plan.items)
    with Ledger(where) as ledger:
        for item in same[::2]:
            ledger.record("d", "pacs", "e", item, DELIVERED)
        assert set(ledger.outcomes("d", "pacs", same)) == {item.path for item in same[::2]}


def test_begin_forgets_what_may_be_tried_again(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for item, outcome in zip(ITEMS, (DELIVERED, REJECTED, ALREADY), strict=False):
            ledger.record("d", "pacs", "e", item, outcome)
        ledger.record("d", "archive", "e", ITEMS[0], REJECTED)
        ledger.begin("d", "pacs", "e")
        assert set(ledger.outcomes("d", "pacs", ITEMS)) == {"a/0.dcm", "a/2.dcm"}
        assert set(ledger.outcomes("d", "archive", ITEMS)) == {"a/0.dcm"}


def test_another_endpoint_begins_anew(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d", "pacs", "old place", ITEMS[0], DELIVERED)
        ledger.record_hook("d", "pacs", "old place", "done", 0, "")
        ledger.begin("d", "pacs", "new place")
        assert ledger.outcomes("d", "pacs", ITEMS) == {}
        assert ledger.hook("d", "pacs") is None


def test_force_begins_anew(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        ledger.record("d2", "pacs", "e", ITEMS[0], DELIVERED)
        ledger.record_hook("d", "pacs", "e", "done", 0, "")
        ledger.begin("d", "pacs", "e", force=True)
        assert ledger.outcomes("d", "pacs", ITEMS) == {}
        assert ledger.hook("d", "pacs") is None
        assert ledger.outcomes("d2", "pacs", ITEMS)


def test_a_later_outcome_replaces_an_earlier_one(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        ledger.record("d", "pacs", "e", ITEMS[0], REJECTED)
        assert ledger.outcomes("d", "pacs", ITEMS) == {"a/0.dcm": REJECTED}
        assert rows(where, "SELECT attempts FROM items") == [(2,)]


def test_hooks(where: Path | str) -> None:
    with Ledger(where) as ledger:
        assert ledger.hook("d", "nas") is None
        ledger.record_hook("d", "nas", "e", "failed", 3, "no such queue")
        ledger.record_hook("d", "nas", "e", "done", 0, "ok")
        assert ledger.hook("d", "nas") == HookRow("done", 0, "ok", 2)


def test_runs(where: Path | str) -> None:
    plan = Plan("first", Path("/x"), ITEMS)
    with Ledger(where) as ledger:
        ledger.runs.begins("r1", "owner-1")
        ledger.runs.begins("r2", "owner-2")
        assert ledger.runs.same_dispatch("r1", plan).dispatch_id == "first"
        # Taken up again by another process, after a file has changed: still the same dispatch.
        ledger.runs.begins("r1", "owner-3")
        assert ledger.runs.same_dispatch("r1", replace(plan, dispatch_id="second")).dispatch_id == "first"
        assert ledger.runs.unfinished() == {"r1": "owner-3", "r2": "owner-2"}
        ledger.runs.ends("r1")
        assert [ledger.runs.owner_of(run) for run in ("r1", "r2", "r3")] == [None, "owner-2", None]
        assert ledger.runs.unfinished() == {"r2": "owner-2"}


def test_a_run_that_a_living_process_has_is_nobody_else_s(where: Path | str) -> None:
    living = {"first", "second"}
    with Ledger(where) as ledger, Ledger(where) as other:
        assert ledger.runs.claimed("r", "first", living.__contains__)
        assert not other.runs.claimed("r", "second", living.__contains__)
        assert not ledger.runs.claimed("r", "first", living.__contains__)  # it runs already
        assert other.runs.unfinished() == {"r": "first"}
        living.remove("first")
        assert other.runs.claimed("r", "second", living.__contains__)
        assert ledger.runs.unfinished() == {"r": "second"}
        other.runs.ends("r")
        living.add("third")
        assert ledger.runs.claimed("r", "third", living.__contains__)


def test_a_run_that_has_ended_since_it_was_found_is_nobody_s(
    where: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host had ended it by then; Prefect lets a run that is Completed begin once more."""
    with Ledger(where) as ledger:

        def claimed(seconds_ago: float) -> bool:
            return ledger.runs.claimed("r", "me", lambda owner: owner == "me", time.monotonic() - seconds_ago)

        assert not ledger.runs.is_over("r") and claimed(5)
        assert not ledger.runs.is_over("r")
        ledger.runs.ends("r")
        assert not claimed(5) and ledger.runs.is_over("r") and not ledger.runs.unfinished()
        now = ledger.now()
        monkeypatch.setattr(ledger.runs._db, "time", lambda: now + 10)  # found anew after that, as when it is retried
        assert claimed(5) and ledger.runs.unfinished() == {"r": "me"}
        ledger.runs.ends("r")
        monkeypatch.setattr(ledger.runs._db, "time", lambda: now - 3600)  # the clock was set back
        assert claimed(5)


def test_a_claim_whose_answer_got_lost_is_a_claim(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.runs.begins("r", "gone")

        def alive(owner: str) -> bool:
            ledger.runs.begins("r", "me")  # as the first attempt has left it
            return owner == "me"

        assert ledger.runs.claimed("r", "me", alive)
        assert ledger.runs.unfinished() == {"r": "me"}


def test_prune_forgets_whole_dispatches_that_are_over(where: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(where) as ledger:
        now = time.time()
        for dispatch, age in (("old", 50), ("new", 1), ("mixed", 50), ("running", 50)):
            monkeypatch.setattr(Ledger, "now", lambda self, age=age: now - age)
            ledger.record(dispatch, "pacs", "e", ITEMS[0], DELIVERED)
        monkeypatch.setattr(Ledger, "now", lambda self: now)
        ledger.record("mixed", "pacs", "e", ITEMS[1], DELIVERED)
        ledger.runs.begins("r", "owner")
        ledger.runs.same_dispatch("r", Plan("running", Path("/x"), ()))
        assert ledger.prune(now - 10) == 1
        assert not ledger.results("old")
        assert all(ledger.results(dispatch) for dispatch in ("new", "mixed", "running"))
        assert len(ledger.results("mixed")["pacs"]) == 2


def test_prune_forgets_runs_of_whose_dispatch_nothing_is_kept(
    where: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks, what never sent anything, and floods, whose own id has no items."""
    with Ledger(where) as ledger:
        now = time.time()
        for run, dispatch, age, over in (
            ("check", "", 50, True),
            ("new check", "", 1, True),
            ("running", "", 50, False),
            ("never sent", "d", 50, True),
            ("waits", "", 50, True),
            ("has sent", "s", 50, True),
        ):
            monkeypatch.setattr(ledger._db, "time", lambda age=age: now - age)
            ledger.runs.begins(run, "owner")
            if dispatch:
                ledger.runs.same_dispatch(run, Plan(dispatch, Path("/x"), ()))
            if over:
                ledger.runs.ends(run)
        monkeypatch.setattr(ledger._db, "time", lambda: now - 1)
        ledger.record("s", "pacs", "e", ITEMS[0], DELIVERED)
        assert ledger.prune(now - 10, ["waits"]) == 2
        left = {row[0] for row in ledger._db.execute("SELECT flow_run_id FROM runs")}
        assert left == {"new check", "running", "waits", "has sent"}
        assert ledger.prune(now - 10, ["waits"]) == 0 and ledger.runs.newest() == now - 1
        ledger.prune(now + 10)
        assert {row[0] for row in ledger._db.execute("SELECT flow_run_id FROM runs")} == {"running"}


def test_prune_keeps_what_a_flood_has_sent_that_goes_on(where: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(where) as ledger:
        now = time.time()
        monkeypatch.setattr(ledger._db, "time", lambda: now - 50)
        for flood in ("runs", "rests", "over"):
            ledger.runs.begins(flood, "owner")
            ledger.runs.same_dispatch(flood, Plan(f"all of {flood}", Path("/x"), ()))
            for study in ("first", "second", "first"):
                ledger.runs.begins_study(flood, f"{flood} {study}")
                ledger.record(f"{flood} {study}", "pacs", "e", ITEMS[0], DELIVERED)
            ledger.deliveries.stand(flood, "waiting", [Standing("pacs", "waiting", 3, 2, "")])
        for flood in ("rests", "over"):
            ledger.runs.ends(flood)
        monkeypatch.setattr(ledger._db, "time", lambda: now)
        ledger.prune(now - 10, ["rests", "runs"])
        assert all(ledger.results(f"{flood} {study}") for flood in ("runs", "rests") for study in ("first", "second"))
        assert not ledger.results("over first") and not ledger.deliveries.of(["over"])
        assert ledger.deliveries.of(["rests", "runs"]).keys() == {"rests", "runs"}
        assert not [row for row in ledger._db.execute("SELECT * FROM studies") if row[0] == "over"]
        ledger.runs.ends("runs")
        ledger.prune(now + 10)
        assert not ledger._db.execute("SELECT * FROM studies").fetchall() and not ledger.results("runs first")


def test_only_its_owner_may_read_it(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_damaged_file_is_an_error_not_an_empty_ledger(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Ledger(path)


def test_threads_share_it(where: Path | str) -> None:
    with Ledger(where) as ledger:

        def work(thread: int) -> None:
            for number in range(100):
                ledger.record("d", f"t{thread}", "e", Item(str(number), 1, 1), DELIVERED)
                ledger.outcomes("d", f"t{thread}", ITEMS)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {name: len(rows) for name, rows in ledger.results("d").items()} == {f"t{n}": 100 for n in range(6)}


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from transfer.ledger import Ledger
    from transfer.plan import Item
    from transfer.outcome import DELIVERED

    path, destination, count = sys.argv[1:]
    with Ledger(path if "://" in path else Path(path)) as ledger:
        for number in range(int(count)):
            ledger.record("d", destination, "e", Item(f"{number}.dcm", number, number), DELIVERED)
            print(number, flush=True)
""")


def writer(where: Path | str, destination: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(where), destination, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_processes_share_it(where: Path | str) -> None:
    """All at once, from the moment where the file isn't there."""
    writers = [writer(where, f"t{number}", 150) for number in range(3)]
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    with Ledger(where) as ledger:
        assert {name: len(rows) for name, rows in ledger.results("d").items()} == {f"t{n}": 150 for n in range(3)}


def test_a_new_file_that_another_process_changes_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = list[str]()

    class Busy(sqlite3.Connection):
        def execute(self, statement: str, *given: Any) -> sqlite3.Cursor:
            if "journal_mode" in statement and len(refused) < 2:
                refused.append(statement)
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY_RECOVERY
                raise error
            return super().execute(statement, *given)

    monkeypatch.setattr(database.sqlite3, "connect", partial(sqlite3.connect, factory=Busy))
    with Ledger(path) as ledger:
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
    assert len(refused) == 2 and rows(path, "PRAGMA journal_mode") == [("wal",)]


@pytest.mark.parametrize("after", [1, 333])
def test_a_killed_writer_loses_nothing_that_it_committed(where: Path | str, after: int) -> None:
    process = writer(where, "pacs", 1_000_000)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().splitlines() if line]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    with Ledger(where) as ledger:
        there = {row.path for row in ledger.results("d")["pacs"]}
        assert {f"{number}.dcm" for number in said} <= there
        assert len(there) - len(said) <= 1, "committed, and killed before it could say so"
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)


def test_a_reader_is_not_held_up_by_a_writer(where: Path | str) -> None:
    with Ledger(where) as ledger, Ledger(where) as other:
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        with ledger.together():
            ledger.record("d", "pacs", "e", ITEMS[0], REJECTED)
            begun = time.monotonic()
            assert other.outcomes("d", "pacs", ITEMS[:1]) == {"a/0.dcm": DELIVERED}
            assert time.monotonic() - begun < as_loaded(1)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "receipts" / "r.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}'
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": object()})
    assert path.read_text() == '{\n "a": 1\n}'
    assert os.listdir(path.parent) == ["r.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_second_process_that_closes_the_ledger_leaves_it_to_the_first(path: Path) -> None:
    """POSIX drops the locks of a process that closes any descriptor of a file: SQLite's must stay."""
    with Ledger(path) as worker, Ledger(path) as run:
        run.runs.begins("run", "owner")
        subprocess.run([sys.executable, "-c", CLOSES, str(path)], check=True)
        with Ledger(path) as next_run:
            next_run.runs.begins("next", "owner")
            subprocess.run([sys.executable, "-c", CLOSES, str(path)], check=True)
            run.runs.ends("run")
        assert worker.runs.unfinished() == {"next": "owner"}
    with Ledger(path) as ledger:
        assert ledger.runs.unfinished() == {"next": "owner"}


CLOSES = "import sys; from pathlib import Path; from transfer.ledger import Ledger; Ledger(Path(sys.argv[1])).close()"


@pytest.mark.parametrize(
    "url", ["postgresql://lab:hunter2@{}/d", "postgresql://lab:hunter2@{}x/d", "mysql://lab:hunter2@{}/d"]
)
def test_no_error_shows_the_password_of_its_database(url: str, postgres: PostgreSql) -> None:
    with pytest.raises(DispatchError) as raised:
        Ledger(url.format(f"127.0.0.1:{postgres.port}"))
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))
    assert isinstance(raised.value, Misconfigured) or "password authentication failed" in str(raised.value)


def backend(ledger: Ledger) -> int:
    """The server's process for the ledger's connection."""
    (pid,) = ledger._db.execute("SELECT pg_backend_pid()").fetchone()
    return int(pid)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still during the block: its socket takes what comes, and nobody answers."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_connection_on_which_the_server_is_silent_is_left_for_another(postgres: PostgreSql) -> None:
    with Ledger(postgres.new(), answer_s=0.2) as ledger:
        ledger.runs.begins("r", "owner")
        with stopped(silent := backend(ledger)):
            assert ledger.runs.owner_of("r") == "owner"
            assert backend(ledger) != silent
        with ExitStack() as held, pytest.raises(LedgerAway, match="no answer for 0 seconds"), ledger.together():
            ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
            held.enter_context(stopped(backend(ledger)))
            ledger.record("d", "pacs", "e", ITEMS[1], DELIVERED)
        assert ledger.outcomes("d", "pacs", ITEMS) == {}
        with ExitStack() as held:
            with ledger.exclusive("push", lambda: None):
                ((lock,),) = ledger._db.execute("SELECT pid FROM pg_locks WHERE locktype='advisory'").fetchall()
                held.enter_context(stopped(lock))
            assert ledger.runs.owner_of("r") == "owner"


def test_what_looks_through_all_rows_may_take_longer_than_other_answers(
    postgres: PostgreSql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a ledger with millions of rows, nothing would ever be forgotten."""
    url, forgotten = postgres.new(), list[leftovers.Forgotten]()
    monkeypatch.setenv("TALARIA_LEDGER", url)
    monkeypatch.setattr(leftovers, "Ledger", lambda where, answer_s=0.2: Ledger(where, answer_s))
    monkeypatch.setattr(database, "BUSY_S", 0)
    Ledger(url).close()
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type='Lock' AND now() - query_start > interval '0.5 s'"
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE talaria.items")
        looking = threading.Thread(target=lambda: forgotten.append(leftovers.forget(Home(tmp_path), 0, (), 0, 0)))
        looking.start()
        until(lambda: not looking.is_alive() or rows(url, waits))
    looking.join()
    assert forgotten
    with closing(database._engine(url).raw_connection()) as free:  # whoever takes it next is asked by it at once
        assert free.driver_connection and free.driver_connection.answer_s == answers.ANSWER_S


def test_a_database_that_may_only_be_read_is_away_until_it_may_be_written_again(
    postgres: PostgreSql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a standby, or as hosters set it when its disk is nearly full."""
    monkeypatch.setattr(database, "BUSY_S", 0)
    url = postgres.new()
    name = url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only=on")
    with pytest.raises(LedgerAway, match="read-only transaction"):
        Ledger(url)
    postgres.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with Ledger(url) as ledger:
        ledger.record("d", "pacs", "e", ITEMS[0], DELIVERED)
        ledger._db.execute("SET default_transaction_read_only=on")
        with pytest.raises(LedgerAway, match=r"can't be used now: .*read-only transaction"):
            ledger.record("d", "pacs", "e", ITEMS[1], DELIVERED)
        ledger.record("d", "pacs", "e", ITEMS[2], DELIVERED)  # on a connection that has been made since
        assert ledger.outcomes("d", "pacs", ITEMS) == {"a/0.dcm": DELIVERED, "a/2.dcm": DELIVERED}


def test_the_server_gives_back_the_locks_of_a_host_that_lost_power_before_its_lease_ends(postgres: PostgreSql) -> None:
    """Not before such a host, if it is only cut off, has stopped sending; nor two hours later, as systems do."""
    url = postgres.new()
    Ledger(url).close()
    with database._engine(url).connect() as connection:
        shown = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
        idle, each, count, unanswered = (
            int(connection.exec_driver_sql(f"SELECT setting FROM pg_settings WHERE name='{one}'").scalar_one())
            for one in shown
        )
    assert database.lease_s() * lease.USED <= each * count
    assert idle + each * count <= database.lease_s() and unanswered == (idle + each * count) * 1000


def test_a_process_holds_as_many_locks_as_it_pushes_at_once(postgres: PostgreSql) -> None:
    """Eight floods to two targets each, which take four studies at once, beside what records them."""
    with Ledger(postgres.new()) as ledger, ExitStack() as held:
        for number in range(8 * 2 * 4 + 8):
            held.enter_context(ledger.exclusive(f"push {number}", lambda: None))
        assert ledger.now() > 0


def test_one_host_at_a_time_does_the_same_for_a_dispatch(postgres: PostgreSql) -> None:
    """By a lock of the shared database: it goes with its holder's connection."""
    url = postgres.new()
    order: list[str] = []

    def second() -> None:
        with Ledger(url) as ledger, ledger.exclusive("push", lambda: order.append("waits")):
            order.append("second")

    class GivenUp(Exception):
        pass

    def give_up() -> None:
        raise GivenUp

    with Ledger(url) as ledger:
        with ledger.exclusive("push", give_up):
            thread = threading.Thread(target=second)
            thread.start()
            while "waits" not in order:
                assert thread.is_alive()
            with Ledger(url) as other, pytest.raises(GivenUp), other.exclusive("push", give_up):
                pass
            with Ledger(url) as other, other.exclusive("hook", give_up):
                order.append("another lock")
            order.append("first")
        thread.join(30)
        assert [one for one in order if one != "waits"] == ["another lock", "first", "second"]
        # A holder that dies keeps nobody out.
        script = f"""
            import os
            from transfer.ledger import Ledger
            with Ledger({url!r}).exclusive("push", lambda: None):
                os._exit(9)
        """
        ran = subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(script)], check=False)
        assert ran.returncode == 9
        end = time.monotonic() + 30

        def not_for_ever() -> None:
            assert time.monotonic() < end

        with ledger.exclusive("push", not_for_ever):
            pass


def test_what_runs_leave_behind_is_kept_until_it_is_old(where: Path | str) -> None:
    with Ledger(where) as ledger:
        assert ledger.rests.of("r") is None and ledger.rests.runs() == set()
        for number in range(2):
            ledger.rests.keep("r", "home", str(number))
        ledger.rests.keep("s", "home", "{}")
        assert ledger.rests.of("r") == ("home", "1") and ledger.rests.runs() == {"r", "s"}
        later = ledger.now() + 60
        assert ledger.rests.prune(0.0) == 0 and ledger.rests.prune(later, ["s"]) == 1
        ledger.rests.forget("s")
        assert ledger.rests.runs() == set()
