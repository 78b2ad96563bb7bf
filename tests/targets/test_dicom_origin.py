"""Targets whose place depends on where the study came from: what went back to one sender is not with another."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from tasks import DRIVERS
from tasks.dispatch.delivery import Delivery
from tests.servers.scp import Scp, scp
from tests.servers.steps import Abort, Reject
from tests.targets.dicom import dicom_target
from transfer.errors import Busy
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import Kind
from transfer.plan import Origin, scan
from transfer.receipt import Receipt, State


class Dispatches:
    """Dispatches of one study to one target, which share a ledger as those of a worker do."""

    def __init__(self, folder: Path, ledger: Ledger, target: Any) -> None:
        self.folder, self.ledger, self.target = folder, ledger, target
        studies.ct(folder / "study", 3)

    def make(self, origin: Origin) -> Delivery:
        """One more dispatch."""
        plan = scan([self.folder / "study"], origin=origin)
        home = Home(self.folder / "home")
        home.root.mkdir(exist_ok=True)
        return Delivery(DRIVERS.of(self.target), self.target, plan, self.ledger, home, threading.Event())

    def send(self, origin: Origin) -> Receipt:
        return self.make(origin).push()


def kinds(receipt: Receipt) -> set[Kind]:
    return {item.outcome for item in receipt.items}


def titles(peer: Scp) -> list[str]:
    return [association.proposal.called for association in peer.associations if association.proposal]


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


def test_another_sender_gets_the_same_study_too(tmp_path: Path, ledger: Ledger) -> None:
    with scp() as one, scp(port=one.port, host="127.0.0.2") as other:
        dispatches = Dispatches(tmp_path, ledger, dicom_target(one.port, host="sender"))
        assert kinds(dispatches.send(Origin(sender_host="127.0.0.1"))) == {Kind.DELIVERED}
        assert kinds(dispatches.send(Origin(sender_host="127.0.0.2"))) == {Kind.DELIVERED}
        assert len(one.kept) == len(other.kept) == 3
        assert kinds(dispatches.send(Origin(sender_host="127.0.0.2"))) == {Kind.ALREADY}
        assert not other.repeated


def test_another_called_title_is_another_place(tmp_path: Path, ledger: Ledger) -> None:
    with scp() as peer:
        dispatches = Dispatches(tmp_path, ledger, dicom_target(peer.port, pass_receiver_aet=True))
        assert kinds(dispatches.send(Origin(receiver_aet="ARCHIVE1"))) == {Kind.DELIVERED}
        assert kinds(dispatches.send(Origin(receiver_aet="ARCHIVE2"))) == {Kind.DELIVERED}
        assert set(titles(peer)) == {"ARCHIVE1", "ARCHIVE2"}
        assert kinds(dispatches.send(Origin(receiver_aet="ARCHIVE2"))) == {Kind.ALREADY}


def test_where_a_study_came_from_matters_to_no_other_target(tmp_path: Path, ledger: Ledger) -> None:
    with scp() as peer:
        dispatches = Dispatches(tmp_path, ledger, dicom_target(peer.port, aet_target=peer.aet, pass_sender_aet=True))
        assert kinds(dispatches.send(Origin("MODALITY1", "US", "127.0.0.1"))) == {Kind.DELIVERED}
        assert kinds(dispatches.send(Origin("MODALITY2", "US TOO", "127.0.0.2"))) == {Kind.ALREADY}
        assert len(peer.stores) == 3
        # Rows of before this mattered still count.
        assert dispatches.target.endpoint_for() == dispatches.target.endpoint_for(
            Origin("MODALITY2", "US", "127.0.0.2")
        )


def test_two_senders_at_once_take_nothing_of_each_other_for_their_own(tmp_path: Path, ledger: Ledger) -> None:
    """While one waits for its next attempt, the other one delivers everything."""
    with scp() as one, scp(port=one.port, host="127.0.0.2") as other:
        dispatches = Dispatches(tmp_path, ledger, dicom_target(one.port, host="sender", concurrency=1))
        one.on_store = lambda store: Abort() if store.number == 2 else 0
        one.on_associate = lambda proposal: Reject(2, 3, 1) if proposal.association > 1 else None
        first = dispatches.make(Origin(sender_host="127.0.0.1"))
        with pytest.raises(Busy):
            first.push()
        dispatches.send(Origin(sender_host="127.0.0.2"))
        one.on_associate = None
        receipt = first.push()
        assert receipt.state is State.DELIVERED
        assert len(one.kept) == len(other.kept) == 3
