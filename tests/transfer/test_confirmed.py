"""What a place holds: what it confirmed last, whichever dispatch sent it, and what becomes of older ledgers."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from transfer import confirmed, database
from transfer.confirmed import Confirmation, Spot
from transfer.errors import Misconfigured
from transfer.ledger import VERSION, HookRow, Ledger
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item
from transfer.receipt import PushReport

SPOT = Spot("", "1.2.3")
A = Item("a.dcm", 100, 1_700_000_000_123_456_789)
B = A.but(mtime_ns=A.mtime_ns + 1)
REJECTED = Outcome(Kind.REJECTED, "C000: no")
# The tables as they were before they had a version.
OLD = """
CREATE TABLE items (dispatch_id TEXT NOT NULL, destination TEXT NOT NULL, path TEXT NOT NULL,
  endpoint TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sop_instance_uid TEXT NOT NULL,
  outcome TEXT NOT NULL, detail TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL,
  PRIMARY KEY (dispatch_id, destination, path)) WITHOUT ROWID;
CREATE TABLE hooks (dispatch_id TEXT NOT NULL, destination TEXT NOT NULL, endpoint TEXT NOT NULL,
  outcome TEXT NOT NULL, exit_code INTEGER, output TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL,
  PRIMARY KEY (dispatch_id, destination)) WITHOUT ROWID;
CREATE TABLE runs (flow_run_id TEXT PRIMARY KEY, dispatch_id TEXT NOT NULL, owner TEXT NOT NULL, begun REAL NOT NULL,
  ended REAL) WITHOUT ROWID;
INSERT INTO items VALUES ('d1','pacs','a.dcm','e',100,1700000000123456789,'1.2.3','delivered','',1,10.0);
INSERT INTO items VALUES ('d2','pacs','a.dcm','e',100,1700000000123456790,'1.2.3','delivered','',1,20.0);
INSERT INTO items VALUES ('d2','pacs','b.dcm','e',200,1700000000123456789,'1.2.4','rejected','C000',1,20.0);
INSERT INTO items VALUES ('d2','pacs','c.dcm','e',100,1700000000123456789,'1.2.3','skipped','',1,30.0);
INSERT INTO items VALUES ('d1','pacs','d.dcm','e',100,1700000000123456789,'1.2.5','delivered','',1,10.0);
INSERT INTO items VALUES ('d2','pacs','d.dcm','e',100,1700000000123456789,'1.2.5','rejected','C000',1,20.0);
INSERT INTO items VALUES ('d2','nas','notes','f',300,1700000000123456789,'','delivered','',1,20.0);
INSERT INTO hooks VALUES ('d1','nas','f','done',0,'ok',1,10.0);
INSERT INTO hooks VALUES ('d1','nas/0123','f','failed',1,'no',1,10.0);
INSERT INTO hooks VALUES ('d2','nas/0123','f','done',0,'',2,20.0);
"""


def old_ledger(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with sqlite3.connect(path) as db:
        db.executescript(OLD)
    db.close()


def held(ledger: Ledger, item: Item, spot: Spot = SPOT, endpoint: str = "e") -> bool:
    return confirmed.same(ledger.confirmed(endpoint, (spot,)).get(spot, []), item, iter(())) is not None


def test_what_one_dispatch_delivered_is_there_for_every_other(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, Outcome(Kind.WARNING, "B007"), SPOT)
        assert ledger.confirmed("e", (SPOT, Spot("", "9"))) == {
            SPOT: [Confirmation(A.size, A.mtime_ns, "", Outcome(Kind.WARNING, "B007"))]
        }
        assert not held(ledger, A, endpoint="another")
        assert not held(ledger, A, Spot("place", SPOT.name))
        assert not held(ledger, B)


def test_another_content_takes_the_place_of_the_first(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for item, other in ((A, B), (B, A), (A, B)):
            ledger.record(f"d{item.mtime_ns}", "pacs", "e", item, DELIVERED, SPOT, since=float("inf"))
            assert held(ledger, item)
            assert not held(ledger, other)


def test_a_peer_that_says_it_has_the_other_content_as_well_keeps_both(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT)
        ledger.record("d2", "pacs", "e", B, ALREADY, SPOT)
        assert held(ledger, A)
        assert held(ledger, B)


@pytest.mark.parametrize("tries", [0, 1])
def test_a_peer_that_knows_instances_by_uid_does_not_confirm_another_content(where: Path | str, tries: int) -> None:
    """Not after a try without an answer either, which the peer may not have carried out."""
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT, by_uid=True)

        def record(item: Item, outcome: Outcome) -> None:
            ledger.record("d2", "pacs", "e", item, outcome, SPOT, since=float("inf"), by_uid=True)

        report = PushReport(record, unanswered=Counter(dict.fromkeys([B.path], tries)) if tries else None)
        report(B, ALREADY)
        assert report.outcomes[B.path].kind is (Kind.DELIVERED if tries else Kind.ALREADY)
        assert held(ledger, A)
        assert not held(ledger, B)


def test_files_of_one_dispatch_that_hold_the_same_instance_do_not_replace_each_other(where: Path | str) -> None:
    other = B.but(path="copy.dcm")
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", other, ALREADY, SPOT)
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT, since=float("inf"))
        assert held(ledger, A)
        assert held(ledger, other)


def test_of_two_contents_delivered_at_the_same_time_neither_is_known_to_be_there(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT, since=1.0)
        ledger.record("d2", "pacs", "e", B, DELIVERED, SPOT, since=1.0)
        assert not held(ledger, A)
        assert not held(ledger, B)
        assert SPOT in ledger.confirmed("e", (SPOT,)), "that something happened there is known"
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT, since=1.0)
        assert held(ledger, A)


def test_what_turned_out_not_to_be_there_is_not(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT)
        ledger.record("d2", "pacs", "e", B, REJECTED, SPOT)  # another content, refused
        assert held(ledger, A)
        ledger.record("d1", "pacs", "e", A, REJECTED, SPOT)  # revoked
        assert not held(ledger, A)


def test_force_forgets_what_others_brought(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT)
        ledger.begin("d2", "pacs", "e", force=True, spots=[SPOT])
        assert not held(ledger, A)


def test_a_time_in_whole_seconds_proves_nothing_but_a_sum_does(where: Path | str) -> None:
    coarse = A.but(mtime_ns=1_700_000_000_000_000_000)
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", coarse, DELIVERED, SPOT)
        ledger.sum_up("e", "d1", [(SPOT, coarse, "5f")])
        there = ledger.confirmed("e", (SPOT,))[SPOT]
        for item in (coarse, B):
            assert confirmed.same(there, item, iter(())) is None
            assert confirmed.same(there, item, iter(("5e",))) is None
            assert confirmed.same(there, item, iter(("5f",)))
        assert confirmed.same(there, B.but(size=1), iter(("5f",))) is None
        ledger.record("d2", "pacs", "e", coarse, ALREADY, SPOT)
        assert ledger.confirmed("e", (SPOT,))[SPOT][0].sha256 == "5f"


def test_a_sum_is_of_the_dispatch_that_was_confirmed_last(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for dispatch in ("d1", "d2"):
            ledger.record(dispatch, "pacs", "e", A, DELIVERED, SPOT, since=float("inf"))
        ledger.sum_up("e", "d1", [(SPOT, A, "5f")])
        assert [one.sha256 for one in ledger.confirmed("e", (SPOT,))[SPOT]] == [""]


@pytest.mark.parametrize("meanwhile", ["replaced", "withdrawn", "summed up"])
def test_what_was_found_counts_only_if_it_is_still_there(where: Path | str, meanwhile: str) -> None:
    """Between the look and the note of it, files are read, which takes its time."""
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT)
        (found,) = ledger.confirmed("e", (SPOT,))[SPOT]
        if meanwhile == "replaced":
            ledger.record("d3", "pacs", "e", B, DELIVERED, SPOT, since=float("inf"))
        elif meanwhile == "withdrawn":
            ledger.begin("d3", "pacs", "e", force=True, spots=[SPOT])
        else:
            ledger.sum_up("e", "d1", [(SPOT, A, "5f")])
        still = meanwhile == "summed up"
        before = ledger.confirmed("e", (SPOT,))
        assert ledger.settle("d2", "pacs", "e", [(A, ALREADY, SPOT, found)], []) == (set() if still else {A.path})
        assert held(ledger, A) is still
        assert (ledger.outcomes("d2", "pacs", (A,)) != {}) is still
        assert still or ledger.confirmed("e", (SPOT,)) == before


def test_what_is_recorded_together_is_there_as_a_whole_or_not_at_all(where: Path | str) -> None:
    with Ledger(where) as ledger:
        with pytest.raises(RuntimeError), ledger.together():
            ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT)
            ledger.record("d1", "pacs", "e", B, DELIVERED, Spot("", "2"))
            raise RuntimeError("killed")
        assert not ledger.confirmed("e", (SPOT, Spot("", "2"))) and not ledger.results("d1")
        with ledger.together():
            ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT)
            ledger.record("d1", "pacs", "e", B.but(path="b.dcm"), DELIVERED, Spot("", "2"))
        assert len(ledger.confirmed("e", (SPOT, Spot("", "2")))) == len(ledger.results("d1")["pacs"]) == 2


def test_what_was_confirmed_long_ago_is_forgotten_with_its_dispatch(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.record("old", "pacs", "e", A, DELIVERED, SPOT)
        ledger.record("waiting", "pacs", "e", A, DELIVERED, Spot("", "2"))
        ledger.runs.begins("run", "me")
        ledger._db.execute("UPDATE runs SET dispatch_id='waiting'")
        ledger.prune(ledger.now() + 60)
        assert not held(ledger, A)
        assert held(ledger, A, Spot("", "2"))


# ---- ledgers of before


def test_an_old_ledger_is_brought_up_to_date(path: Path) -> None:
    old_ledger(path)
    for _ in range(2):
        with Ledger(path) as ledger:
            assert held(ledger, B), "the last content of an instance counts"
            assert not held(ledger, A)
            assert not ledger.confirmed("e", (Spot("", "1.2.4"), Spot("", "1.2.5"))), (
                "what was refused since is not there"
            )
            assert not ledger.confirmed("f", (Spot("", ""),))
            assert ledger.outcomes("d1", "pacs", (A,), "e") == {"a.dcm": DELIVERED}
            assert ledger.hook("d1", "nas") == HookRow("done", 0, "ok", 1)
            assert ledger.hook("at f", "nas/0123") == HookRow("done", 0, "", 2)
            assert ledger.hook("d1", "nas/0123") is None


def test_a_newer_ledger_is_refused_and_left_as_it_is(where: Path | str) -> None:
    newer = VERSION + 1
    with Ledger(where) as ledger:
        ledger.record("d1", "pacs", "e", A, DELIVERED, SPOT)
        sqlite = isinstance(where, Path)
        ledger._db.execute(f"PRAGMA user_version={newer}" if sqlite else f"INSERT INTO version VALUES ({newer})")
        before = list(ledger._db.execute("SELECT * FROM items"))
        database._known.clear()  # as in another process
        with pytest.raises(Misconfigured, match="made by a newer Talaria"):
            Ledger(where)
        assert list(ledger._db.execute("SELECT * FROM items")) == before


def test_a_killed_update_leaves_the_old_ledger_whole(path: Path) -> None:
    old_ledger(path)
    code = """
        import os, signal, sqlite3, sys
        from pathlib import Path

        class Connection(sqlite3.Connection):
            def execute(self, statement, *more):
                if statement.startswith("PRAGMA user_version="):
                    os.kill(os.getpid(), signal.SIGKILL)  # the last step before the commit
                return super().execute(statement, *more)

        connect = sqlite3.connect
        sqlite3.connect = lambda *one, **more: connect(*one, **more, factory=Connection)
        from transfer.ledger import Ledger
        Ledger(Path(sys.argv[1]))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), path], check=False)
    assert killed.returncode == -signal.SIGKILL
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM hooks").fetchone() == (3,)
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name='confirmed'").fetchone()
    db.close()
    test_an_old_ledger_is_brought_up_to_date(path.with_name("fresh.sqlite"))
    with Ledger(path) as ledger:
        assert held(ledger, B)
