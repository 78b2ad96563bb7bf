"""Peers that refuse an association over one SOP class, one transfer syntax, or the number of contexts.

What such a peer would take by itself is delivered, in the first attempt; what it would not is rejected with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tests.servers.scp import Scp, scp
from tests.servers.steps import Abort, Close, Raw, Reject, Reset, Script, Silence
from tests.servers.wire import EXPLICIT, IMPLICIT, Proposal
from tests.targets.dicom import dicom_target
from transfer.errors import Busy, DispatchError, Misconfigured, TimedOut
from transfer.plan import Plan, scan
from transfer.receipt import State

IDLE_S = 1.0
SLACK_S = 8.0  # for a busy machine, and pauses before a request is made again
PRIVATE = "1.2.826.0.1.3680043.8.498.4711"
OTHER = "1.2.826.0.1.3680043.8.498.4712"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
ENDS: dict[str, tuple[Script, str]] = {
    "permanent": (Reject(1, 1, 1), "no reason given"),
    "unheard-of": (Reject(1, 2, 9), "source 2, reason 9"),
    "transient": (Reject(2, 1, 1), "rejected for now"),
    "limit": (Reject(2, 3, 2), "local limit exceeded"),
    "silence": (Silence(), "no answer to the association request"),
    "abort": (Abort(), "aborted"),
    "close": (Close(), "the connection"),
    "reset": (Reset(), "the connection"),
    "nonsense": ([Raw(b"\2\0\0\0\0\4junk"), Close()], "makes no sense"),
}


def target_of(peer: Scp, **more: Any) -> Any:
    return dicom_target(peer.port, **({"aet_target": peer.aet, "idle_timeout_s": IDLE_S} | more))


def over(end: Script, *bad: str) -> Callable[[Proposal], Script]:
    """End a request that holds one of these SOP classes or transfer syntaxes."""

    def script(proposal: Proposal) -> Script:
        asked = {uid for context in proposal.contexts for uid in (context.abstract_syntax, *context.offered)}
        return end if asked & set(bad) else None

    return script


def mixed(folder: Path, *private: str) -> Plan:
    """Instances of three usual classes, and of private ones, which come first and last."""
    studies.ct(folder, 5)
    studies.dicom(folder / "M.dcm", "MR_small.dcm")
    studies.dicom(folder / "R.dcm", "rtplan.dcm")
    for number, uid in enumerate(private):
        studies.dicom(folder / f"{'0x'[number % 2]}{number}.dcm", SOPClassUID=uid)
    return scan([folder])


@pytest.mark.parametrize("concurrency", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("end", ENDS)
def test_a_class_costs_itself_alone(end: str, concurrency: int, tmp_path: Path) -> None:
    plan = mixed(tmp_path, PRIVATE, OTHER)
    script, words = ENDS[end]
    with scp(on_associate=over(script, PRIVATE, OTHER)) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert sent.require().state is State.PARTIAL
        assert set(sent.rejected) == {"00.dcm", "x1.dcm"}
        assert len(peer.kept) == len(plan.items) - 2
        assert all(words in detail for detail in sent.rejected.values()), sent.rejected
        assert PRIVATE in sent.rejected["00.dcm"]
        assert sent.seconds < as_loaded(2 * IDLE_S + SLACK_S)
        assert not peer.repeated


@pytest.mark.parametrize("end", ["permanent", "silence", "abort"])
def test_a_transfer_syntax_costs_itself_alone(end: str, tmp_path: Path) -> None:
    """Where it may be converted it isn't even that: the instance goes uncompressed."""
    studies.ct(tmp_path, 3)
    studies.dicom(tmp_path / "J.dcm", "JPEG2000.dcm")
    studies.dicom(tmp_path / "M.dcm", "MR_small.dcm")
    plan = scan([tmp_path])
    [bad] = {item.header.TransferSyntaxUID for item in plan.items if item.header and item.path == "J.dcm"}
    script, words = ENDS[end]
    with scp(on_associate=over(script, bad, JPEG_2000)) as peer:
        sent = attempt(target_of(peer, transcode="never"), plan)
        assert set(sent.rejected) == {"J.dcm"}
        assert words in sent.rejected["J.dcm"] and "JPEG 2000" in sent.rejected["J.dcm"]
        assert len(peer.kept) == 4
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)
    with scp(on_associate=over(script, bad, JPEG_2000)) as peer:
        sent = attempt(target_of(peer, transcode="any"), plan)
        assert sent.require().state is State.DELIVERED
        assert {store.syntax for store in peer.kept.values()} <= {EXPLICIT, IMPLICIT}


@pytest.mark.parametrize("end", ENDS)
def test_a_transfer_syntax_that_is_only_offered_costs_nothing(end: str, tmp_path: Path) -> None:
    """As what files could be converted to, where a node doesn't take their own; all are of one class and syntax."""
    studies.ct(tmp_path, 3)
    with scp(on_associate=over(ENDS[end][0], JPEG_2000)) as peer:
        sent = attempt(target_of(peer), tmp_path)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)


@pytest.mark.parametrize("most", [64, 16, 8])
@pytest.mark.parametrize("end", ["permanent", "limit", "silence", "close"])
def test_too_many_contexts(end: str, most: int, tmp_path: Path) -> None:
    for number in range(30):
        studies.dicom(tmp_path / f"{number:02}.dcm", SOPClassUID=f"2.25.4711.{number}")
    plan = scan([tmp_path])
    script, _ = ENDS[end]
    with scp(on_associate=lambda proposal: script if len(proposal.contexts) > most else None) as peer:
        sent = attempt(target_of(peer, transcode="never"), plan)
        assert sent.require().state is State.DELIVERED
        assert len(peer.kept) == 30
        refused = [one for one in peer.associations if one.proposal and len(one.proposal.contexts) > most]
        assert len(refused) <= 2, "it was not learnt"


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (Reject(1, 1, 7), Misconfigured),
        (Reject(1, 1, 3), Misconfigured),
        (Reject(1, 1, 1), Misconfigured),
        (Reject(2, 3, 2), Busy),
        (Reject(2, 3, 1), Busy),
        (Silence(), TimedOut),
        (Close(), DispatchError),
    ],
    ids=str,
)
def test_a_peer_that_refuses_us_is_asked_once_for_less(end: Script, error: type[DispatchError], tmp_path: Path) -> None:
    plan = mixed(tmp_path, PRIVATE)
    with scp(on_associate=lambda proposal: end) as peer:
        sent = attempt(target_of(peer), plan)
        assert isinstance(sent.error, error), repr(sent.error)
        assert not sent.outcomes
        titles = isinstance(end, Reject) and end.reason in (3, 7)
        asked = [len(one.proposal.contexts) for one in peer.associations if one.proposal]
        assert asked[1:] == ([] if titles else [1])
        assert sent.seconds < as_loaded(2 * IDLE_S + SLACK_S)


def test_a_peer_that_grants_nothing_but_c_echo_is_left_in_peace(tmp_path: Path) -> None:
    plan = mixed(tmp_path, PRIVATE)
    classes = [item.header.SOPClassUID for item in plan.items if item.header]
    with scp(on_associate=over(Reject(2, 1, 1), *classes)) as peer:
        sent = attempt(target_of(peer), plan)
        assert type(sent.error) is Busy
        assert not sent.outcomes


@pytest.mark.parametrize("end", ["permanent", "silence"])
def test_a_class_after_others_were_delivered(end: str, tmp_path: Path) -> None:
    """It is in the second group of contexts: that the peer answers is known by then."""
    for number in range(25):
        studies.dicom(tmp_path / f"{number:02}.dcm", SOPClassUID=f"2.25.4711.{number}")
    studies.dicom(tmp_path / "99.dcm", SOPClassUID=PRIVATE)
    plan = scan([tmp_path])
    script, words = ENDS[end]
    with scp(on_associate=over(script, PRIVATE)) as peer:
        sent = attempt(target_of(peer), plan)
        assert set(sent.rejected) == {"99.dcm"}
        assert words in sent.rejected["99.dcm"]
        assert len(peer.kept) == 25
        assert sent.seconds < as_loaded(IDLE_S + SLACK_S)


@pytest.mark.parametrize("end", ["permanent", "limit", "silence"])
def test_a_check_of_a_peer_that_refuses_many_contexts(end: str, tmp_path: Path) -> None:
    from tasks.dicom import check

    script, _ = ENDS[end]
    with scp(on_associate=lambda proposal: script if len(proposal.contexts) > 16 else None) as peer:
        health = check(target_of(peer))
        assert health.ok, health.to_json("x")
        assert "contexts" in " ".join(probe.detail for probe in health.probes)
