"""How the deliveries of runs stood last, in a line each; in SQLite and in PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transfer.deliveries import WHOLE, Standing
from transfer.ledger import Ledger

GOOD = Standing("nas", "delivered", 3, 3, "")
BAD = Standing("pacs", "failed", 3, 0, "nobody answers")


def test_the_last_word_on_each_delivery_is_kept(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.deliveries.stand("r1", "partial", [GOOD, BAD])
        ledger.deliveries.stand("r2", "delivered", [GOOD])
        found = ledger.deliveries.of(["r1", "r2", "r3"])
        assert found["r1"] == {"nas": GOOD, "pacs": BAD, WHOLE: Standing(WHOLE, "partial", 6, 3, "")}
        assert set(found) == {"r1", "r2"} and ledger.deliveries.of([]) == {}
        mended = replace(BAD, state="delivered", arrived=3, words="")
        ledger.deliveries.stand("r1", "delivered", [GOOD, mended])
        assert ledger.deliveries.of(["r1"])["r1"]["pacs"] == mended


def test_runs_are_found_by_how_they_stand(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for run in ("r1", "r2", "r3"):
            ledger.deliveries.stand(run, "partial", [GOOD, BAD])
        ledger.deliveries.stand("r2", "delivered", [GOOD, replace(BAD, state="delivered")])
        for retrieval in ("r4", "r5"):
            ledger.deliveries.stand(retrieval, "partial", [])
        assert (
            set(ledger.deliveries.newest("partial", 9)) == set(ledger.deliveries.newest("partial", 2)) == {"r1", "r3"}
        )
        assert len(ledger.deliveries.newest("partial", 1)) == 1
        assert ledger.deliveries.newest("delivered", 9, "pacs") == ["r2"]
        assert set(ledger.deliveries.newest("partial", 9, since=ledger.now() - 60)) == {"r1", "r3"}
        assert ledger.deliveries.newest("partial", 9, since=ledger.now() + 60) == []


def test_what_is_old_is_forgotten(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.deliveries.stand("r1", "partial", [GOOD, BAD])
        ledger.prune(ledger.now() - 60)
        assert ledger.deliveries.of(["r1"])
        ledger.prune(ledger.now() + 60)
        assert ledger.deliveries.of(["r1"]) == {}


def test_a_ledger_of_the_version_before_gets_the_table(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger._db.execute("DROP TABLE deliveries")
        ledger._db.execute("INSERT INTO runs VALUES ('r1','d1','me',1,2)")
        ledger._db.execute("PRAGMA user_version=5")
    with Ledger(path) as ledger:
        ledger.deliveries.stand("r1", "partial", [GOOD])
        assert ledger.runs.dispatch_of("r1") == "d1"


def test_a_ledger_of_version_6_gets_the_table_of_studies(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger._db.execute("DROP TABLE studies")
        ledger.runs.begins("flood", "me")
        ledger._db.execute("PRAGMA user_version=6")
    with Ledger(path) as ledger:
        ledger.runs.begins_study("flood", "d1")
        assert ledger.runs.unfinished() == {"flood": "me"}


def test_a_ledger_of_version_8_gets_the_table_of_slots(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger._db.execute("DROP TABLE held")
        ledger.runs.begins("run", "me")
        ledger._db.execute("PRAGMA user_version=8")
    with Ledger(path) as ledger:
        ledger.held.note("lease", "pacs", "run", 1)
        assert [one.owner for one in ledger.held.all()] == ["me"]
