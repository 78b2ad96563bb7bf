"""Pushes to scripted DICOM peers, and what is asserted of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from talaria.testing.harness import Sent, attempt
from tests.servers.scp import Scp
from tests.servers.steps import (
    Script,
    Store,
)  # fmt: skip
from tests.targets.dicom import dicom_target
from transfer.plan import Plan
from transfer.receipt import State

IDLE_S = 2.0  # the targets' idle timeout here
SLACK_S = 4.0  # for a busy machine, and for ending associations in order
CT = "1.2.840.10008.5.1.4.1.1.2"


IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"


VERIFICATION = "1.2.840.10008.1.1"


def target_of(peer: Scp, **settings: Any) -> Any:
    return dicom_target(peer.port, **({"aet_target": peer.aet, "idle_timeout_s": IDLE_S} | settings))


def uids(plan: Plan) -> list[str]:
    return [item.header.SOPInstanceUID for item in plan.items if item.header]


def arrived_uids(sent: Sent) -> set[str]:
    return {item.header.SOPInstanceUID for item in sent.plan.items if item.header and item.path in sent.arrived}


def finish(peer: Scp, plan: Plan, first: Sent, **settings: Any) -> Sent:
    """Push what is missing, to a peer that behaves now; assert that all is there and nothing came twice."""
    assert arrived_uids(first) <= set(peer.kept), "told as delivered, but not there"
    peer.on_connect = peer.on_associate = peer.on_store = peer.on_data = peer.on_release = None
    second = attempt(target_of(peer, **settings), plan, done=first.arrived)
    assert second.require().state is State.DELIVERED
    assert set(peer.kept) == set(uids(plan))
    assert not set(first.arrived) & set(second.outcomes)
    assert not [uid for uid in peer.repeated if uid in arrived_uids(first)], "sent again although it was confirmed"
    return second


def once(at: int, script: Script) -> Callable[[Store], Script]:
    """Err at one C-STORE, counted from 1 over all associations, and behave before and after it."""
    return lambda store: script if store.number == at else 0
