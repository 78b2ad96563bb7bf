"""What the server must hold after a push, and assertions that it does."""

from __future__ import annotations

import io
from pathlib import Path

import pydicom

from talaria.testing import studies
from talaria.testing.harness import Harness, Sent, attempt
from transfer.outcome import Kind
from transfer.plan import Item, Plan
from transfer.receipt import Level, State

MARKER = ".complete"
LEVELS = tuple(Level)  # from the weakest to the strongest


def expected(harness: Harness, sent: Sent) -> dict[str, bytes]:
    """What the server must hold after a plan arrived whole, keyed as `read_back` keys it."""
    return {key(harness, item): sent.plan.file(item).read_bytes() for item in sent.plan.items}


def key(harness: Harness, item: Item) -> str:
    if harness.driver.facts.keeps_names:
        return item.path
    assert item.header, f"{item.shown} is not DICOM and must not reach this driver"
    return item.header.SOPInstanceUID


def assert_equal(harness: Harness, sent: Sent) -> None:
    """Assert that the server holds exactly what was sent."""
    assert_same(harness, expected(harness, sent), harness.read_back(sent.plan))


def assert_same(harness: Harness, wanted: dict[str, bytes], got: dict[str, bytes]) -> None:
    assert set(got) == set(wanted)
    for key, data in wanted.items():
        if harness.driver.facts.keeps_names:
            assert got[key] == data, f"{key!r} is not what was sent"
        else:
            assert_same_instance(data, got[key])


def assert_same_instance(sent: bytes, got: bytes) -> None:
    """Assert equal data sets: a DICOM peer may write its own file meta information, but no other content."""
    with studies.quiet():
        a, b = pydicom.dcmread(io.BytesIO(sent)), pydicom.dcmread(io.BytesIO(got))
        assert b.SOPInstanceUID == a.SOPInstanceUID
        assert b.file_meta.MediaStorageSOPInstanceUID == a.SOPInstanceUID
        assert b.StudyInstanceUID == a.StudyInstanceUID
        assert b.SOPClassUID == a.SOPClassUID
        assert ("PixelData" in b) == ("PixelData" in a)
        if "PixelData" not in a:
            return
        if a.file_meta.TransferSyntaxUID == b.file_meta.TransferSyntaxUID:
            assert b.PixelData.rstrip(b"\0") == a.PixelData.rstrip(b"\0")
        else:
            assert (b.pixel_array == a.pixel_array).all()


def assert_delivered(harness: Harness, sent: Sent) -> None:
    """Assert that every item has arrived, that the receipt says so, and that the bytes are there."""
    receipt = sent.require()
    pending = {item.path for item in sent.plan.pending}
    assert set(sent.outcomes) == pending
    assert sent.arrived == pending, sent.rejected
    # A file that is damaged isn't handed to the driver, and is missing all the same.
    damaged = any(outcome.kind is Kind.REJECTED for outcome in sent.refused.values())
    assert receipt.state is (State.PARTIAL if damaged else State.DELIVERED)
    assert receipt.unsent == 0
    assert receipt.target == harness.target.name
    assert len(receipt.items) == len(sent.plan.items) + len(sent.refused)
    assert receipt.verified in harness.driver.facts.verifies_by
    assert_equal(harness, sent)
    if harness.driver.facts.keeps_names:
        assert markers(harness), "every file is there, but not the completion marker"


def markers(harness: Harness) -> set[str]:
    return {name for name in harness.names() if name.rsplit("/", 1)[-1] == MARKER and harness.final(name)}


def send(harness: Harness, source: Path | Plan) -> Sent:
    """Push the whole and assert that it arrived."""
    sent = attempt(harness.target, source)
    assert_delivered(harness, sent)
    return sent
