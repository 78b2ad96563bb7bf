"""The lines of receipts: packed, joined, and read from a document line by line, they are what they were."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from tasks.dispatch.report import pieces
from transfer import lines
from transfer.lines import ItemResult, Joined, Packed
from transfer.outcome import Kind
from transfer.receipt import Receipt, State

SOME = [
    ItemResult("a/1.dcm", "1.2.3", Kind.DELIVERED),
    ItemResult("a/\\xa0 \u00e4.dcm", "1.2.4", Kind.REJECTED, 'no "room", it says: {"path": '),
    ItemResult("notes.txt", "", Kind.SKIPPED, "not DICOM"),
    ItemResult("b", "1.2.5", Kind.UNSENT),
]


def test_packed_and_joined_lines_are_those_that_they_were_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "PACKED_LINES", 3)
    packed = Packed(SOME)
    assert packed == SOME and len(packed) == 4 and packed[-1] == SOME[-1] and packed[1:3] == SOME[1:3]
    assert [*packed.of([Kind.REJECTED, Kind.UNSENT])] == [SOME[1], SOME[3]] and not [*packed.of([Kind.WARNING])]
    joined = Joined([("x", packed), ("y", []), ("z", SOME[:1])])
    assert [one.path for one in joined] == [*(f"x/{one.path}" for one in SOME), "z/a/1.dcm"] and len(joined) == 5
    assert joined.counts() == lines.counts([*joined]) and joined.counts()[Kind.DELIVERED] == 2
    assert [one.path for one in lines.of(joined, [Kind.DELIVERED])] == ["x/a/1.dcm", "z/a/1.dcm"]
    for items in (packed, joined, []):
        receipt = Receipt("pacs", items, error="why", missing=2)
        assert receipt.packed == receipt and receipt.packed.counts == receipt.counts and receipt.packed.unsent > 1


def as_written(document: dict[str, Any]) -> dict[str, Any]:
    """A document with its packed lines as they were."""
    for one in (document, *document.get("studies", ())):
        for receipt in one["targets"].values():
            assert isinstance(receipt["items"], Packed)
            receipt["items"] = [line.to_json() for line in receipt["items"]]
    return document


@pytest.mark.parametrize("studies", [None, [], ["s1", "s2"]])
def test_a_document_is_read_line_by_line_as_it_was_written(studies: list[str] | None) -> None:
    receipts = [Receipt("pacs", SOME, notes=("a note",)), Receipt("none", ()), Receipt("one", SOME[:1], error="no")]
    rows = studies and [
        {"study": name, "dispatch_id": name, "state": "partial", "targets": {one.target: one.to_json(all_items=True)}}
        for name, one in zip(studies, receipts, strict=False)
    ]
    text = b"".join(pieces("d", "r", State.PARTIAL, receipts, studies if rows is None else rows))
    whole = json.loads(text)
    assert as_written(lines.document(io.BytesIO(text))) == whole
    for other in (json.dumps(whole), json.dumps(whole, indent=1)):
        assert as_written(lines.document(io.BytesIO(other.encode()))) == whole
    for broken in (text[: len(text) // 2], text[:-3]):
        with pytest.raises((ValueError, LookupError)):
            lines.document(io.BytesIO(broken))
