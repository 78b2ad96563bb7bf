"""What is known of sources is kept, and found again; in SQLite and in PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from transfer import sourcebook
from transfer.ledger import Ledger
from transfer.sourcebook import LooseFile, SweepRow, UnitRow, UnitState


def row(unit: str, state: UnitState = UnitState.DISPATCHED, **more: str) -> UnitRow:
    return UnitRow(unit, unit, state, "1:ab", 1, **more)


def test_units_and_their_states(where: Path | str) -> None:
    with Ledger(where) as ledger:
        book = ledger.sources
        book.save("box", [row("a", batch="b1"), row("b", batch="b1"), row("c", UnitState.FAILED, run="r0")])
        book.save("other", [row("a", UnitState.DONE)])
        assert book.under_way() == {"box": {""}}
        book.run_created("box", "b1", "r1")
        assert book.under_way() == {"box": {"r1"}}
        assert set(book.units("box", UnitState.DISPATCHED)) == {"a", "b"} and set(book.units("box")) == {"a", "b", "c"}
        book.save("box", [book.units("box")["a"].now(UnitState.DONE, "1 files stay", fingerprint="0:0")])
        assert book.counts() == {"box": {"dispatched": 1, "done": 1, "failed": 1}, "other": {"done": 1}}
        kept = book.units("box")["a"]
        assert (kept.detail, kept.fingerprint, kept.run) == ("1 files stay", "0:0", "r1") and kept.time > 0
        assert book.forget("box", ["a", "nothing"]) == 1
        assert book.forget("box") == 1 and set(book.units("box")) == {"b"}, "what is under way"
        assert "a" in book.units("other")


def test_headers_are_paged_by_uid(where: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sourcebook, "PAGE", 3)
    with Ledger(where) as ledger:
        book = ledger.sources
        for folder in ("", "x", "x/y"):
            files = [LooseFile(f"{n}.dcm", n, 1, 1, "" if n == 4 else f"1.{n % 2}") for n in range(5)]
            book.note("box", folder, files, ())
        assert book.folders("box") == {"", "x", "x/y"} and len(book.files("box", "x")) == 5
        found = [(one.uid, one.folder, one.name) for one in book.by_uid("box")]
        assert found == sorted(found) and len(found) == 12 and {uid for uid, *_ in found} == {"1.0", "1.1"}
        book.note("box", "x", [LooseFile("0.dcm", 9, 9, 9, "2.0")], ["1.dcm"])
        assert book.files("box", "x")["0.dcm"].uid == "2.0" and "1.dcm" not in book.files("box", "x")
        book.forget("box")
        assert not book.folders("box")


def test_the_last_sweep(where: Path | str) -> None:
    with Ledger(where) as ledger:
        book = ledger.sources
        assert book.sweep("box") == SweepRow()
        book.swept("box", SweepRow("ext4 /dev/sda1 /", 0.0, 12.5, 3, ""))
        book.swept("box", SweepRow("ext4 /dev/sda1 /", 7.0, 0.0, 0, "gone"))
        assert book.sweep("box") == SweepRow("ext4 /dev/sda1 /", 7.0, 0.0, 0, "gone")
        book.moved("box")
        assert book.sweep("box").mount == ""
