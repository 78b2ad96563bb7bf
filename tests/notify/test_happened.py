"""What is said of a dispatch to everybody names no path and no file, and tells outages from rejections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks import happened
from tasks.happened import Cause, cause_of, dispatch_ended, dispatch_refused, target_stands
from transfer.errors import Busy, Denied, DispatchError, Interrupted, NotTrusted, TimedOut, Unreachable
from transfer.ledger import Ledger
from transfer.outcome import Kind
from transfer.receipt import ItemResult, Receipt, State

ITEMS = (
    ItemResult("in/DOE_JOHN.dcm", "1.2", Kind.REJECTED, "A900"),
    ItemResult("in/ROE  JANE.dcm", "1.4", Kind.ALREADY, "A900"),
    ItemResult("in/M\udcfcller.dcm", "1.5", Kind.ALREADY, "A900"),
    ItemResult("in/b.dcm", "1.3", Kind.DELIVERED),
)
OUTAGES = (Unreachable, TimedOut, Busy, Interrupted)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The payloads of events for Prefect."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(happened, "emit_event", lambda event, resource, related, payload: found.append(payload))
    return found


@pytest.mark.parametrize(
    ("error", "plain"),
    [
        ("connection refused", True),
        ("no answer within 60 s: pacs.example.org:104", True),
        ("/data/in/DOE^JOHN: no space left", False),
        ("can't read a\\DOE\\1", False),
        ("DOE_JOHN.dcm has changed", False),
        ("study-4711 is not there", False),
        ("https://xnat.example.org/data/subjects/DOE answers 404", False),
        ("ROE JANE.dcm has changed", False),
        ("M\\xfcller.dcm has changed", False),
        (f"{'x' * 290} DOE_JOHN.dcm", False),
    ],
)
def test_a_sentence_that_may_name_a_path_or_a_file_is_not_for_everybody(
    tmp_path: Path, said: list[dict[str, Any]], error: str, plain: bool
) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        receipt = Receipt("pacs", ITEMS, error=error)
        dispatch_ended(ledger, "r1", "d1", receipt, Cause.OUTAGE, ["/data/study-4711"])
        (one,) = ledger.happenings.waiting(9)
    assert one.about["plain"] is plain and one.about["words"] == error[:300]
    assert not {"paths", "words", "plain"} & said[0].keys() and "DOE" not in str(said[0])
    assert (one.event, said[0]["rejected"], said[0]["delivered"]) == ("dispatch.partial", 1, 1)


@pytest.mark.parametrize(
    ("receipt", "error", "cause"),
    [
        (Receipt("pacs", ITEMS[3:]), None, Cause.NONE),
        (Receipt("pacs", ITEMS), None, Cause.REJECTED),
        (Receipt("pacs", ITEMS[3:], hook="failed"), None, Cause.SCRIPT),
        (Receipt("pacs", (), stopped=State.CANCELLED), None, Cause.NONE),
        *[
            (Receipt("pacs", ITEMS, error="x"), one("x"), Cause.OUTAGE)
            for one in (Unreachable, TimedOut, Busy, Interrupted)
        ],
        *[(Receipt("pacs", (), error="x"), one("x"), Cause.REFUSED) for one in (Denied, NotTrusted)],
        (Receipt("pacs", (), error="x"), DispatchError("x"), Cause.UNEXPECTED),
    ],
)
def test_the_cause_tells_an_outage_from_a_rejection(receipt: Receipt, error: Exception | None, cause: Cause) -> None:
    assert cause_of(receipt, error) is cause


def test_what_could_not_begin_and_what_is_dead_are_said_once(tmp_path: Path, said: list[dict[str, Any]]) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for _ in range(2):
            dispatch_refused(ledger, "r1", ["pacs", "archive"], Denied("no"), ["/in"])
            target_stands(ledger, "pacs", up=False, about={"failures": 5})
        for _ in range(2):
            target_stands(ledger, "pacs", up=True, about={})
        target_stands(ledger, "archive", up=True, about={})  # it was never down
        events = [(one.event, one.about["target"]) for one in ledger.happenings.waiting(99)]
    assert sorted(events) == [
        ("dispatch.failed", "archive"), ("dispatch.failed", "pacs"), ("target.down", "pacs"), ("target.up", "pacs"),
    ]  # fmt: skip
    assert [one["cause"] for one in said] == ["refused", "refused", "outage", ""]
