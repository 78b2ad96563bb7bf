"""Pushes over several associations."""

from __future__ import annotations

from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tests.servers.scp import scp
from tests.servers.steps import (
    Abort,
    Reject,
    Reset,
    Wait,
)  # fmt: skip
from tests.targets.dicom_peers.peers import IDLE_S, SLACK_S, finish, once, target_of, uids
from transfer.errors import (
    Busy,
)  # fmt: skip
from transfer.plan import scan
from transfer.receipt import State


def test_as_many_associations_as_asked_for(study: Path) -> None:
    studies.ct(study, 40)
    plan = scan([study])
    with scp(on_store=lambda store: [Wait(0.02), 0]) as peer:
        assert attempt(target_of(peer, concurrency=3), plan).require().state is State.DELIVERED
        assert peer.most_open == 3
        assert peer.wait_closed()
        assert {one.ended for one in peer.associations} == {"released"}
        # Within each association the plan's order is kept.
        order = {uid: place for place, uid in enumerate(uids(plan))}
        for association in {store.association for store in peer.stores}:
            places = [order[store.SOPInstanceUID] for store in peer.stores if store.association == association]
            assert places == sorted(places)


def test_no_more_associations_than_instances(study: Path) -> None:
    studies.ct(study, 2)
    with scp() as peer:
        assert attempt(target_of(peer, concurrency=16), study).require()
        assert len(peer.associations) <= 2


def test_a_peer_that_takes_one_association_at_a_time(study: Path) -> None:
    """It rejects the others for now: everything goes over the one that it granted, and people are told."""
    studies.ct(study, 30)
    with scp(on_store=lambda store: [Wait(0.01), 0]) as peer:
        peer.on_associate = lambda proposal: Reject(2, 3, 2) if peer.open > 1 else None
        receipt = attempt(target_of(peer, concurrency=4), study).require()
        assert receipt.state is State.DELIVERED
        assert not peer.repeated


@pytest.mark.parametrize("reason", [Reject(1, 1, 1), Reject(1, 3, 2)], ids=str)
def test_a_link_that_breaks_beside_a_peer_that_takes_one_association(study: Path, reason: Reject) -> None:
    """That it refuses the others for good is no reason to give up what the one has not sent."""
    studies.ct(study, 30)
    with scp(on_store=lambda store: Abort() if store.number == 10 else [Wait(0.01), 0]) as peer:
        peer.on_associate = lambda proposal: reason if peer.open > 1 else None
        assert attempt(target_of(peer, concurrency=4), study).require().state is State.DELIVERED
        assert len(peer.kept) == 30


def test_a_peer_that_grants_no_association_after_a_break_is_tried_again_later(study: Path) -> None:
    studies.ct(study, 10)
    plan = scan([study])
    with scp(on_store=once(4, Abort())) as peer:
        peer.on_associate = lambda proposal: Reject(2, 3, 1) if proposal.association > 1 else None
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert type(sent.error) is Busy
        assert "congestion" in str(sent.error)
        assert len(sent.arrived) == 3
        assert not sent.rejected
        assert sent.seconds < as_loaded(SLACK_S + 2)
        finish(peer, plan, sent)


def test_a_further_association_of_which_nothing_is_granted_rejects_nothing(study: Path) -> None:
    studies.ct(study, 30)
    with scp(on_store=lambda store: [Wait(0.01), 0]) as peer:
        peer.accept = lambda context: context.offered[0] if len(peer.associations) < 2 else 3
        receipt = attempt(target_of(peer, concurrency=2), study).require()
        assert receipt.state is State.DELIVERED


def test_a_peer_that_lets_the_others_wait(study: Path) -> None:
    """As `storescp` without --fork: it accepts connections, but serves one association after the other."""
    studies.ct(study, 30)
    with scp(on_store=lambda store: [Wait(0.02), 0]) as peer:
        peer.on_associate = lambda proposal: Wait(30) if proposal.association > 1 else None
        sent = attempt(target_of(peer, concurrency=4), study)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S + 1)
        assert len(peer.kept) == 30


def test_one_association_of_several_breaks(study: Path) -> None:
    studies.ct(study, 40)
    plan = scan([study])
    with scp(on_store=lambda store: Reset() if store.association == 2 else [Wait(0.02), 0]) as peer:
        sent = attempt(target_of(peer, concurrency=3), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated
