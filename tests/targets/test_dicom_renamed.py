"""Peers that store instances under UIDs of their own, and say so in the response: de-identifying gateways, for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocols.dimse import find
from talaria.testing import studies
from talaria.testing.harness import attempt, sending
from tests.servers.scp import Scp, scp
from tests.servers.steps import Abort, Answer, Reject, Script, Store
from tests.targets.dicom import dicom_target
from transfer.outcome import Kind, Outcome
from transfer.plan import scan
from transfer.receipt import Level, State


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again at once for what a peer does not list: it will not come."""
    monkeypatch.setattr(find, "PAUSE_S", 0.0)


def target_of(peer: Scp, **more: Any) -> Any:
    return dicom_target(peer.port, **({"aet_target": peer.aet, "idle_timeout_s": 2, "concurrency": 1} | more))


def renamed(store: Store) -> Script:
    return Answer(uid=f"1.2.3.{store.number}", kept=False)


@pytest.mark.parametrize("level", Level)
def test_it_is_delivered_with_a_warning_in_every_attempt_and_run(level: Level, tmp_path: Path) -> None:
    studies.ct(tmp_path, 6)
    plan = scan([tmp_path])
    with scp(on_store=lambda store: renamed(store) if store.number <= 3 else Abort()) as peer:
        target = target_of(peer, verify=level)
        peer.on_associate = lambda proposal: Reject(2, 3, 1) if proposal.association > 1 else None
        with sending(target, plan) as sender:
            first = sender.attempt()
            assert first.error is not None and len(first.arrived) == 3
            peer.on_store, peer.on_associate = renamed, None
            receipt = sender.attempt().require()
        assert receipt.state is State.DELIVERED
        assert receipt.counts[Kind.WARNING] == 6
        assert receipt.verified is Level.ACCEPTED
        assert all("another UID" in row.detail for row in receipt.items)
        known = {row.path: Outcome(row.outcome, row.detail) for row in receipt.items}
        stores = len(peer.stores)
        again = attempt(target, plan, done=known).require()
        assert again.state is State.DELIVERED and again.counts[Kind.ALREADY] == 6
        assert all("another UID" in row.detail for row in again.items)
        assert len(peer.stores) == stores


@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_what_is_there_under_its_own_uid_after_all_is_verified(level: Level, tmp_path: Path) -> None:
    studies.ct(tmp_path, 3)
    with scp(on_store=lambda store: Answer(uid="1.2.3") if store.number == 2 else 0) as peer:
        receipt = attempt(target_of(peer, verify=level), tmp_path).require()
        assert receipt.state is State.DELIVERED
        assert receipt.verified is Level.LISTED or not any("can't be verified" in note for note in receipt.notes)


def test_what_is_lost_is_still_found_beside_it(tmp_path: Path) -> None:
    studies.ct(tmp_path, 4)
    answers = {1: Answer(uid="1.2.3", kept=False), 2: Answer(kept=False)}
    with scp(on_store=lambda store: answers.get(store.number, 0)) as peer:
        sent = attempt(target_of(peer, verify="listed"), tmp_path)
        assert sent.require().state is State.PARTIAL
        assert [row.outcome for row in sent.require().items] == [
            Kind.WARNING, Kind.REJECTED, Kind.DELIVERED, Kind.DELIVERED,
        ]  # fmt: skip


@pytest.mark.parametrize("uid", ["", "no UID", "1.2.3\\1.2.4"])
def test_what_is_no_uid_says_nothing(uid: str, tmp_path: Path) -> None:
    studies.ct(tmp_path, 1)
    with scp(on_store=lambda store: Answer(uid=uid)) as peer:
        [row] = attempt(target_of(peer), tmp_path).require().items
        assert row.outcome is Kind.DELIVERED and not row.detail
