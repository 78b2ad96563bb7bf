"""The check of a DICOM target."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded, free_port
from tasks.dicom import driver
from tests.servers.scp import scp
from tests.servers.steps import (
    Abort,
)  # fmt: skip
from tests.servers.wire import Context
from tests.targets.dicom import dicom_target
from tests.targets.dicom_peers.peers import CT, IMPLICIT, SLACK_S, target_of, uids
from transfer.errors import (
    TimedOut,
)  # fmt: skip
from transfer.plan import scan
from transfer.receipt import State

JPEG_2000 = "1.2.840.10008.1.2.4.90"


def test_check_tells_what_the_peer_accepts(study: Path) -> None:
    def accept(context: Context) -> str | int:
        return next((syntax for syntax in context.offered if syntax in (IMPLICIT, JPEG_2000)), 4)

    with scp(accept=accept) as peer:
        health = driver.check(target_of(peer))
        assert health.ok, health.to_json("x")
        assert peer.echoes == 1
        assert not peer.stores
        assert peer.wait_closed()
        assert peer.associations[-1].ended == "released"
        text = " ".join(probe.detail for probe in health.probes)
        assert "JPEG 2000" in text
        assert "Explicit VR Little Endian" not in text


@pytest.mark.parametrize("most", [64, 16, 8])
def test_a_peer_that_ends_an_association_with_many_contexts_is_asked_for_few(most: int, study: Path) -> None:
    for number in range(40):
        studies.dicom(study / f"{number:02}.dcm", SOPClassUID=f"2.25.4711.{number}" if number else CT)
    plan = scan([study])
    with scp(on_associate=lambda proposal: Abort() if len(proposal.contexts) > most else None) as peer:
        sent = attempt(target_of(peer), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        aborted = [one for one in peer.associations if one.proposal and len(one.proposal.contexts) > most]
        assert len(aborted) <= 2, "it was not learnt"
        health = driver.check(target_of(peer))
        assert health.ok, health.to_json("x")
        assert "contexts" in " ".join(probe.detail for probe in health.probes)


def test_check_of_an_echo_that_fails(study: Path) -> None:
    with scp(
        accept=lambda context: 3 if context.abstract_syntax == "1.2.840.10008.1.1" else context.offered[0]
    ) as peer:
        health = driver.check(target_of(peer))
        assert not health.ok
        assert next(probe for probe in health.probes if probe.result == "failed").detail


@contextmanager
def silent_after_accept() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        yield listener.getsockname()[1]


def test_check_of_a_hung_peer_is_bounded() -> None:
    """As after `kill -STOP`: the kernel accepts, the program doesn't."""
    with silent_after_accept() as port:
        begun = time.monotonic()
        health = driver.check(dicom_target(port, idle_timeout_s=1))
        assert time.monotonic() - begun < as_loaded(1 + SLACK_S)
    assert isinstance(health.error, TimedOut), health.to_json("x")
