"""Targets with other TLS settings at one address: each is answered with its own on the ports that all share.

A peer that opens a connection shows its address alone before the handshake.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imaging.query import Query
from protocols.dimse.turns import Turns
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import free_port, until
from tasks import DRIVERS
from tasks import dicom as driver_of_dicom
from tests.servers.certificates import Authority
from tests.servers.qr import MOVE, Instance, Request, Steps, archive, sends
from tests.servers.scp import scp
from tests.servers.steps import Commit, Report, Script
from tests.targets.dicom_tls import tls_target
from tests.targets.pulling import AET, GETS, datasets, only, port_of_moves, study
from transfer.plan import scan
from transfer.receipt import Level, PushReport, Receipt, State


@dataclass
class Side:
    """A peer that trusts its own authority alone, and the settings of a target that it takes."""

    tls: ssl.SSLContext
    report_tls: ssl.SSLContext
    settings: dict[str, Any]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> list[Side]:
    made = []
    for name in ("a", "b"):
        authority = Authority(tmp_path_factory.mktemp(name))
        theirs, ours = authority.leaf("peer"), authority.leaf("ours")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(theirs.cert, theirs.key)
        context.load_verify_locations(authority.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        report = ssl.create_default_context(cafile=str(authority.ca))
        report.load_cert_chain(theirs.cert, theirs.key)
        keys = {"ca_cert": str(authority.ca), "tls_cert": str(ours.cert), "tls_key": str(ours.key)}
        made.append(Side(context, report, keys | {"tls_key_password": ""}))
    return made


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when somebody has to wait for his turn."""
    found, really = threading.Event(), Turns._begins

    def begins(turns: Turns, one: Any) -> bool:
        is_ours = really(turns, one)
        if not is_ours:
            found.set()
        return is_ours

    monkeypatch.setattr(Turns, "_begins", begins)
    return found


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def pull(port: int, side: Side, into: Path, report: PushReport | None = None) -> Receipt:
    target = tls_target(port, aet_target="ARCHIVE", direction="query", **side.settings)
    retrieve = DRIVERS["dicom-tls"].retrieve
    assert retrieve is not None
    return retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), into, report or PushReport())


def holding(until_then: Callable[[], bool]) -> Callable[[Request, list[Instance]], Steps]:
    """Return a script of a move that begins when something is true."""

    def move(request: Request, found: list[Instance]) -> Steps:
        until(until_then)
        return sends(found)

    return move


@pytest.mark.parametrize("paused", [False, True])
def test_moves_from_two_nodes_at_one_address_take_turns(
    paused: bool,
    tmp_path: Path,
    sides: list[Side],
    waits: threading.Event,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports, files = {AET: port_of_moves(monkeypatch)}, [study(2, 1), study(2, 1)]
    pausing, over = threading.Event(), threading.Event()
    script = holding(over.is_set if paused else waits.is_set)
    common: dict[str, Any] = {"accept": only(GETS), "ports": ports}
    first_side, second_side = ({"tls": one.tls, "report_tls": one.report_tls} for one in sides)
    with (
        archive(files[0], on_move=script, **common, **first_side) as first,
        archive(files[1], **common, **second_side) as second,
    ):
        one = threads.submit(pull, first.port, sides[0], tmp_path / "a")
        until(lambda: bool(first.asked(MOVE)))
        other = threads.submit(pull, second.port, sides[1], tmp_path / "b", PushReport(pausing=pausing))
        if paused:
            assert waits.wait(60)
            pausing.set()
            assert other.result(60).state is not State.DELIVERED and not second.asked(MOVE)
            over.set()
        else:
            assert other.result(60).state is State.DELIVERED
            assert datasets(tmp_path / "b").keys() == {each.uid for each in second.instances}
        assert one.result(60).state is State.DELIVERED


@pytest.mark.parametrize("patient", [True, False])
def test_reports_of_commitment_to_two_targets_at_one_address_take_turns_or_say_why_not(
    patient: bool,
    tmp_path: Path,
    sides: list[Side],
    waits: threading.Event,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not patient:
        monkeypatch.setattr(driver_of_dicom, "LISTEN_S", 0.3)
    studies.ct(tmp_path / "study", 2)
    plan, port, over, asked = scan([tmp_path / "study"]), free_port(), threading.Event(), threading.Event()

    def held(commit: Commit) -> Script:
        asked.set()
        until((waits if patient else over).is_set)
        return [0, Report(port=port)]

    def push(at: int, side: Side) -> Receipt:
        target = tls_target(
            at,
            aet_target="PARROT",
            verify="proven",
            storage_commitment_port=port,
            storage_commitment_host="127.0.0.1",
            storage_commitment_wait_s=60 if patient else 5,
            **side.settings,
        )
        return attempt(target, plan).require()

    first_side, second_side = ({"tls": one.tls, "report_tls": one.report_tls} for one in sides)
    with (
        scp(on_commit=held, **first_side) as first,
        scp(on_commit=lambda commit: [0, Report(port=port if patient else None)], **second_side) as second,
    ):
        one = threads.submit(push, first.port, sides[0])
        assert asked.wait(60)
        other = threads.submit(push, second.port, sides[1]).result(60)
        over.set()
        assert (other.state, other.verified) == (State.DELIVERED, Level.PROVEN), other.notes
        words = "another target at 127.0.0.1 has other TLS settings, and awaits reports on port"
        assert any(words in note for note in other.notes) is not patient
        assert one.result(60).verified is Level.PROVEN
