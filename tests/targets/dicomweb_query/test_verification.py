"""Verification of what was stored, by QIDO-RS and WADO-RS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.servers.dicomweb import Reply, Request, Scripted
from tests.targets.dicomweb import dicomweb_target
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, State


def verified(server: Scripted, tmp_path: Path, level: Level, **settings: Any) -> Any:
    studies.sample(tmp_path / "study", others=False)
    plan = scan([tmp_path / "study"])
    return attempt(dicomweb_target(server.url, verify=level, **settings), plan)


@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_verified(server: Scripted, tmp_path: Path, level: Level) -> None:
    receipt = verified(server, tmp_path, level).require()
    assert receipt.verified is level
    assert receipt.state is State.DELIVERED


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_accepted_but_not_there(server: Scripted, tmp_path: Path, level: Level) -> None:
    lost: list[str] = []
    usual = server._store

    def store(request: Request) -> Reply:
        reply = usual(request)
        if not lost:
            lost.append(request.uids[0])
            del server.stored[lost[0]]
        return reply

    server._store = store  # type: ignore[method-assign]
    sent = verified(server, tmp_path, level)
    receipt = sent.require()
    assert receipt.state is State.PARTIAL
    (missing,) = [item for item in receipt.items if item.outcome is Kind.REJECTED]
    assert missing.sop_instance_uid == lost[0]
    assert "not listed" in missing.detail
    assert receipt.verified is level


def test_listed_a_little_later(server: Scripted, tmp_path: Path) -> None:
    usual = server._search
    looks: list[int] = []

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        looks.append(1)
        return Reply(204) if len(looks) < 20 else usual(segments, query)

    server._search = search  # type: ignore[method-assign]
    receipt = verified(server, tmp_path, Level.LISTED).require()
    assert receipt.state is State.DELIVERED
    assert receipt.verified is Level.LISTED


@pytest.mark.parametrize("status", [404, 501, 403, 400])
def test_no_search_to_verify_by(server: Scripted, tmp_path: Path, status: int) -> None:
    server._search = lambda segments, query: Reply(status)  # type: ignore[method-assign]
    receipt = verified(server, tmp_path, Level.LISTED).require()
    assert receipt.verified is Level.ACCEPTED
    assert receipt.state is State.DELIVERED
    assert any("can't be verified by listing" in note for note in receipt.notes)


def test_proven_without_search(server: Scripted, tmp_path: Path) -> None:
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    assert verified(server, tmp_path, Level.PROVEN).require().verified is Level.PROVEN


def changed(server: Scripted, change: Any) -> None:
    """Let the server change what it stored, once, after it was stored."""
    usual = server._store

    def store(request: Request) -> Reply:
        reply = usual(request)
        for uid, data in list(server.stored.items()):
            server.stored[uid] = change(data)
        return reply

    server._store = store  # type: ignore[method-assign]


def test_proven_though_the_header_was_changed(server: Scripted, tmp_path: Path) -> None:
    def coerce(data: bytes) -> bytes:
        return data.replace(studies.PATIENT_ID.encode() + b" ", b"PHI-4712-XQ ")

    changed(server, coerce)
    sent = verified(server, tmp_path, Level.PROVEN)
    receipt = sent.require()
    assert receipt.state is State.DELIVERED
    # A report has no pixel data to compare, so this one proves nothing.
    assert receipt.verified is Level.LISTED
    assert any("1 instance(s) can't be proven" in note and "SR/report" in note for note in receipt.notes)


def test_other_pixels_are_taken_back(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 5)
    plan = scan([tmp_path / "study"])
    victim = plan.items[2]
    original = plan.file(victim).read_bytes()

    def flip(data: bytes) -> bytes:
        return data[:-10] + b"0123456789" if data == original else data

    changed(server, flip)
    sent = attempt(dicomweb_target(server.url, verify=Level.PROVEN), plan)
    receipt = sent.require()
    assert receipt.state is State.PARTIAL
    assert "other pixel data" in sent.outcomes[victim.path].detail
    assert sent.outcomes[victim.path].kind is Kind.REJECTED
