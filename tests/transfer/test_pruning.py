"""What is old goes from the ledger some rows a time, and what begins again meanwhile stays."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from transfer import pruning
from transfer.confirmed import Spot
from transfer.database import Database
from transfer.ledger import Ledger
from transfer.outcome import DELIVERED
from transfer.plan import Item, Plan

PORTION = 10
SIZES = {"many": 25, "few": 3, "exactly": 10, "some": 4}  # items of each dispatch


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "PORTION", PORTION)


def filled(ledger: Ledger) -> float:
    """Deliver some dispatches that end; return a time after all that."""
    for name, size in SIZES.items():
        ledger.runs.begins(f"run-{name}", "owner")
        ledger.runs.same_dispatch(f"run-{name}", Plan(name, Path("/x"), ()))
        for number in range(size):
            item = Item(f"{number}.dcm", 1, 1)
            ledger.record(name, "pacs", "endpoint", item, DELIVERED, Spot(f"{name}{number % 4}", item.path))
        ledger.runs.ends(f"run-{name}")
    return ledger.now() + 60


def confirmed(ledger: Ledger) -> int:
    return int(ledger._db.execute("SELECT COUNT(*) FROM confirmed").fetchone()[0])


def test_all_that_is_old_goes(where: Path | str) -> None:
    with Ledger(where) as ledger:
        after = filled(ledger)
        assert confirmed(ledger) == sum(SIZES.values())
        rows = 2 * sum(SIZES.values()) + len(SIZES)  # items, what they confirmed, and runs
        assert ledger.prune(after - 3600) == 0 and ledger.prune(after) == rows
        assert not any(ledger.results(name) for name in SIZES) and not confirmed(ledger)
        assert not any(ledger.runs.dispatch_of(f"run-{name}") for name in SIZES)


def test_no_commit_has_more_than_a_portion(path: Path) -> None:
    with Ledger(path) as ledger:
        after = filled(ledger)
        db: sqlite3.Connection = ledger._db._db  # type: ignore[attr-defined]
        changes = [db.total_changes]
        db.set_trace_callback(lambda said: changes.append(db.total_changes) if said == "COMMIT" else None)
        ledger.prune(after)
        db.set_trace_callback(None)
    each = [late - early for early, late in pairwise(changes)]
    assert sum(each) == 2 * sum(SIZES.values()) + len(SIZES)
    assert max(each) <= PORTION + len(SIZES), each  # of runs, the few of the dispatches that are in it


def test_a_dispatch_that_begins_again_meanwhile_stays(where: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn, turns = pruning._in_turn, list[str]()

    @contextmanager
    def begun_before(db: Database) -> Iterator[None]:
        if not turns:  # all old ones are known by then
            other.runs.begins("again", "owner")
            other.runs.same_dispatch("again", Plan("few", Path("/x"), ()))
            other.record("some", "archive", "elsewhere", Item("new.dcm", 1, 1), DELIVERED)
        turns.append("")
        with in_turn(db):
            yield

    with Ledger(where) as ledger, Ledger(where) as other:
        before = filled(ledger) - 60
        monkeypatch.setattr(pruning, "_in_turn", begun_before)
        ledger.prune(before)
        there = {name: sum(len(found) for found in ledger.results(name).values()) for name in SIZES}
        assert there == {"many": 0, "few": 3, "exactly": 0, "some": 5} and confirmed(ledger) == 7
