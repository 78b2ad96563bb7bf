"""Peers that are slow or odd, but right."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.dicom import driver
from tests.servers.scp import scp
from tests.servers.steps import (
    Abort,
    Wait,
)  # fmt: skip
from tests.targets.dicom_peers.peers import arrived_uids, once, target_of, uids
from transfer.plan import scan
from transfer.receipt import State


def test_one_byte_at_a_time(study: Path) -> None:
    studies.ct(study, 6)
    with scp(write_size=1, split=True) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.DELIVERED
        assert driver.check(target_of(peer)).ok


def test_slow_answers_are_no_silence(study: Path) -> None:
    """Each answer comes within the idle timeout, all together take longer."""
    studies.ct(study, 4)
    with scp(on_store=lambda store: [Wait(0.7), 0]) as peer:
        sent = attempt(target_of(peer, concurrency=1, idle_timeout_s=1.2), study)
    assert sent.require().state is State.DELIVERED
    assert sent.seconds > 2.8


@pytest.mark.parametrize("max_pdu", [4096, 4097, 16_384, 65_536, 131_072, 0])
def test_granted_pdu_size_is_kept(max_pdu: int, study: Path) -> None:
    """The scripted peer fails the test if a PDU is longer than it granted."""
    studies.ct(study, 3, side=64)
    studies.multiframe(study / "large.dcm", 10)  # 5 MB
    plan = scan([study])
    with scp(max_pdu=max_pdu) as peer:
        sent = attempt(target_of(peer), plan)
        assert sent.require().state is State.DELIVERED
        for uid, item in zip(uids(plan), plan.items, strict=True):
            assert item.header
            assert peer.kept[uid].data == plan.file(item).read_bytes()[item.header.dataset_offset :]


@pytest.mark.parametrize("max_pdu", [0, 4096, 16_384])
def test_our_own_limit_of_pdus_is_announced_and_kept(max_pdu: int, study: Path) -> None:
    studies.ct(study, 2, side=128)
    sizes: list[int] = []
    with scp(max_pdu=0, on_data=lambda association, size: sizes.append(size)) as peer:
        assert attempt(target_of(peer, max_pdu=max_pdu), study).require().state is State.DELIVERED
        assert {one.proposal.max_pdu for one in peer.associations if one.proposal} == {max_pdu}
    if max_pdu:
        steps = [after - before for before, after in pairwise(sizes) if after > before]
        assert max(steps) <= max_pdu


def test_without_a_window_one_request_at_a_time(study: Path) -> None:
    studies.ct(study, 8)
    with scp(watch=True) as peer:
        assert attempt(target_of(peer), study).require().state is State.DELIVERED
        assert peer.early == 0, "a request came before the one before it was answered"


@pytest.mark.parametrize("window", [(1, 1), (2, 1), (4, 1), (0, 0), (100, 100)])
def test_asynchronous_window(window: tuple[int, int], study: Path) -> None:
    """As many requests are outstanding as were granted, and answers are matched by message ID in any order."""
    studies.ct(study, 17)
    plan = scan([study])
    outstanding = 1 if window == (1, 1) else 2
    refused = set(uids(plan)[5:7])
    with scp(
        window=window, reverse=outstanding, on_store=lambda store: 0xC000 if store.SOPInstanceUID in refused else 0
    ) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        sent.require()
        assert set(peer.kept) == set(uids(plan)) - refused
        assert arrived_uids(sent) == set(uids(plan)) - refused
        assert set(sent.rejected) == {item.path for item in plan.items[5:7]}
        ids = [store.message_id for store in peer.stores]
        assert len(set(ids)) == len(ids)


def test_abort_with_several_outstanding(study: Path) -> None:
    studies.ct(study, 24)
    plan = scan([study])
    with scp(window=(8, 1), reverse=4, on_store=once(9, Abort())) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated
