"""What is known of sources, in both homes of the ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transfer.ledger import Ledger
from transfer.sourcebook import UnitRow, UnitState


def test_a_run_that_has_ended_once_more_since_its_unit_failed(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.run_begins("r", "one")
        ledger.run_ends("r")
        row = UnitRow("u", "u", UnitState.FAILED, "f", run="r")
        ledger.sources.save("box", [row])
        assert ledger.sources.run_again() == {}
        ledger.run_begins("r", "one")
        assert ledger.sources.run_again() == {}, "it is under way"
        ledger.run_ends("r")
        assert ledger.sources.run_again() == {"box": {"r"}}
        ledger.sources.save("box", [row])  # seen, and it has failed again
        assert ledger.sources.run_again() == {}
        ledger.run_begins("r", "one")
        ledger.run_ends("r")
        ledger.sources.save("box", [replace(row, state=UnitState.DONE)])
        assert ledger.sources.run_again() == {}
