"""Association requests that peers reject, abort or leave unanswered."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tasks.dicom import driver
from tests.servers.scp import scp
from tests.servers.steps import (
    Abort,
    Close,
    Raw,
    Reject,
    Reset,
    Script,
    Silence,
)  # fmt: skip
from tests.servers.wire import Proposal
from tests.targets.dicom import dicom_target
from tests.targets.dicom_peers.peers import IDLE_S, SLACK_S, finish, target_of
from transfer.errors import (
    Busy,
    DispatchError,
    Interrupted,
    Misconfigured,
    TimedOut,
    Unreachable,
)  # fmt: skip
from transfer.plan import Origin, scan
from transfer.receipt import State

REJECTIONS: list[tuple[Reject, type[DispatchError], str]] = [
    (Reject(1, 1, 1), Misconfigured, "no reason given"),
    (Reject(1, 1, 2), Misconfigured, "application context name not supported"),
    (Reject(1, 1, 3), Misconfigured, "calling AE title not recognised"),
    (Reject(1, 1, 7), Misconfigured, "called AE title not recognised"),
    (Reject(1, 2, 1), Misconfigured, "no reason given"),
    (Reject(1, 2, 2), Misconfigured, "protocol version not supported"),
    (Reject(1, 1, 10), Misconfigured, "reason 10"),
    (Reject(2, 1, 1), Busy, "no reason given"),
    (Reject(2, 3, 1), Busy, "temporary congestion"),
    (Reject(2, 3, 2), Busy, "local limit exceeded"),
    (Reject(2, 1, 3), Busy, "calling AE title not recognised"),
]


@pytest.mark.parametrize(("rejection", "error", "words"), REJECTIONS, ids=lambda value: str(value)[:40])
def test_association_rejected(rejection: Reject, error: type[DispatchError], words: str, study: Path) -> None:
    studies.ct(study, 6)
    plan = scan([study])
    with scp(on_associate=lambda proposal: rejection) as peer:
        sent = attempt(target_of(peer), plan)
        assert type(sent.error) is error
        assert words in str(sent.error)
        assert not sent.outcomes
        assert sent.seconds < as_loaded(SLACK_S)
        # A peer that refuses us does so once, not once per association; where that may be over what we asked for, it
        # is asked once for less.
        asked = [len(one.proposal.contexts) for one in peer.associations if one.proposal]
        of_us = (rejection.source, rejection.reason) in ((1, 2), (1, 3), (1, 7), (2, 2))
        assert asked[1:] == ([] if of_us else [2])
        health = driver.check(target_of(peer))
        assert not health.ok
        assert type(health.error) is error
        assert any(words in probe.detail for probe in health.probes if probe.result == "failed")
        finish(peer, plan, sent)


def test_rejection_of_a_title_says_which_setting(study: Path) -> None:
    studies.ct(study, 1)
    for reason, setting in ((3, "aet_source"), (7, "aet_target")):
        with scp(on_associate=lambda proposal, reason=reason: Reject(1, 1, reason)) as peer:
            assert setting in str(attempt(target_of(peer), study).error)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Abort(0, 0), Interrupted),
        (Abort(2, 1), Interrupted),
        (Close(), Interrupted),
        (Reset(), Interrupted),
        (Silence(), TimedOut),
        ([Raw(b"\x02\x00\x00\x00\x01"), Silence()], TimedOut),  # the head of a PDU, and no more
        ([Raw(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"), Close()], Misconfigured),
        ([Raw(struct.pack(">BBI", 2, 0, 4) + b"junk"), Silence()], DispatchError),
    ],
    ids=str,
)
def test_no_answer_to_the_association_request(script: Script, error: type[DispatchError], study: Path) -> None:
    studies.ct(study, 3)
    plan = scan([study])
    with scp(on_associate=lambda proposal: script) as peer:
        sent = attempt(target_of(peer), plan)
        assert isinstance(sent.error, error), repr(sent.error)
        assert not sent.outcomes
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)
        health = driver.check(target_of(peer))
        assert not health.ok
        assert isinstance(health.error, error)
        finish(peer, plan, sent)


def test_accepts_the_connection_and_nothing_else(study: Path) -> None:
    studies.ct(study, 3)
    with scp(on_connect=lambda number: Silence()) as peer:
        sent = attempt(target_of(peer), study)
    assert isinstance(sent.error, TimedOut), repr(sent.error)
    assert sent.seconds < as_loaded(IDLE_S + SLACK_S)


def test_the_connection_itself_times_out(study: Path) -> None:
    """A listener with a full queue drops what wants to connect, as a firewall does."""
    studies.ct(study, 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = []
        for _ in range(3):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(address)
            waiting.append(one)
        time.sleep(0.2)
        try:
            sent = attempt(dicom_target(address[1], connect_timeout_s=1), study)
        finally:
            for one in waiting:
                one.close()
    assert isinstance(sent.error, Unreachable), repr(sent.error)
    assert 0.9 < sent.seconds < as_loaded(1 + SLACK_S)


def test_the_name_is_not_known(study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(dicom_target(104, host="no-such-host.invalid"), study)
    assert isinstance(sent.error, Unreachable), repr(sent.error)
    assert "no-such-host.invalid" in str(sent.error)
    health = driver.check(dicom_target(104, host="no-such-host.invalid"))
    assert [probe.result for probe in health.probes][:2] == ["failed", "skipped"]


def test_ipv6(study: Path) -> None:
    studies.ct(study, 3)
    with scp(host="::1") as peer:
        assert attempt(target_of(peer, host="::1"), study).require().state is State.DELIVERED
        assert attempt(target_of(peer, host="[::1]"), study).require().state is State.DELIVERED


def test_titles_and_pass_through(study: Path) -> None:
    studies.ct(study, 1)
    seen: list[Proposal] = []
    with scp(on_associate=seen.append) as peer:
        assert attempt(target_of(peer, aet_target="A B.C-16 CHARS!!", aet_source="me too"), study).require()
        origin = Origin("MODALITY1", "CALLED2", "127.0.0.1")
        plan = scan([study], origin=origin)
        passing = target_of(peer, pass_sender_aet=True, pass_receiver_aet=True, host="sender")
        assert attempt(passing, plan).require()
        bare = attempt(passing, scan([study]))
    assert [(one.called, one.calling) for one in seen] == [
        ("A B.C-16 CHARS!!", "me too"),
        ("CALLED2", "MODALITY1"),
    ]
    assert isinstance(bare.error, Misconfigured), repr(bare.error)
