"""C-STORE without an answer, or with a wrong one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tests.servers.scp import scp
from tests.servers.steps import (
    Abort,
    Answer,
    Close,
    Partly,
    Raw,
    Reset,
    Script,
    Silence,
    Wait,
)  # fmt: skip
from tests.targets.dicom_peers.peers import IDLE_S, SLACK_S, finish, once, target_of, uids
from transfer.errors import (
    Interrupted,
)  # fmt: skip
from transfer.plan import scan
from transfer.receipt import State

FAULTS: list[Script] = [
    Abort(0, 0),
    Abort(2, 6),
    Close(),
    Reset(),
    Partly(3),
    Partly(20),
    Silence(),
    [Raw(b"\x04\x00\x00\x00"), Silence()],  # stays silent in the middle of a PDU
    Answer(message_id=4711, kept=False),
    Answer(status=None, kept=False),
    Answer(bare=True, kept=False),
    [Raw(b"\x04\x00\xff\xff\xff\xff\x00\x00"), Silence()],  # a PDU of 4 GB is announced
    [Raw(b"\x99\x00\x00\x00\x00\x04abcd"), Silence()],  # a PDU of no known type
    [Raw(struct.pack(">BBIIBB", 4, 0, 6, 0xFFFFFFFF, 1, 3)), Silence()],  # a PDV longer than its PDU
]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("script", FAULTS, ids=lambda value: str(value)[:60])
def test_a_fault_that_passes_costs_nothing(script: Script, concurrency: int, study: Path) -> None:
    """What was outstanding goes out again, last and after a pause; nothing that was confirmed does."""
    studies.ct(study, 10)
    plan = scan([study])
    with scp(on_store=once(5, script)) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)
        faulty = peer.stores[4].SOPInstanceUID
        assert [store.SOPInstanceUID for store in peer.stores].count(faulty) == 2
        assert peer.stores[-1].SOPInstanceUID == faulty
        assert len(peer.stores) == 11
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated


@pytest.mark.parametrize("script", [Abort(), Close(), Reset(), Wait(60)], ids=str)
def test_fault_in_the_middle_of_an_instance(script: Script, study: Path) -> None:
    """It ends, or stops reading, while data comes."""
    studies.ct(study, 2)
    studies.multiframe(study / "large.dcm", 60)  # 31 MB: more than both sockets hold
    plan = scan([study])
    with scp(on_data=lambda association, size: script if size > 1_000_000 else None) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert sent.require().state is State.PARTIAL
        assert sent.seconds < as_loaded(2 * IDLE_S + SLACK_S)
        assert set(sent.rejected) == {"large.dcm"}
        assert "times" in sent.rejected["large.dcm"]
        assert set(peer.kept) == {uid for uid, item in zip(uids(plan), plan.items, strict=True) if item.size < 1 << 20}


def test_a_single_instance_that_breaks_the_association_is_not_called_bad(study: Path) -> None:
    """Nothing says that the peer would take another one."""
    studies.ct(study, 1)
    plan = scan([study])
    with scp(on_store=lambda store: Abort()) as peer:
        sent = attempt(target_of(peer), plan)
        assert type(sent.error) is Interrupted
        assert "aborted" in str(sent.error)
        assert not sent.outcomes
        finish(peer, plan, sent)


def test_a_response_with_a_coerced_uid_confirms_its_message(study: Path) -> None:
    """The message ID tells what is confirmed (PS3.7 section 9.1.1.1.2); some peers change UIDs, or leave them out."""
    studies.ct(study, 3)
    with scp(on_store=once(2, Answer(uid="1.2.3.4"))) as peer:
        sent = attempt(target_of(peer, concurrency=1), study)
        assert sent.require().state is State.DELIVERED


def test_silence_at_release_delays_nothing_for_long(study: Path) -> None:
    studies.ct(study, 4)
    with scp(on_release=lambda number: Silence()) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)


@pytest.mark.parametrize("script", [Abort(), Close(), Reset()], ids=str)
def test_a_rude_end_after_everything_changes_nothing(script: Script, study: Path) -> None:
    studies.ct(study, 4)
    with scp(on_release=lambda number: script) as peer:
        assert attempt(target_of(peer), study).require().state is State.DELIVERED
