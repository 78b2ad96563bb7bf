"""How long certificates are valid, as far as is known: whatever the last check of a target came to, or without one."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import create_server
from typing import Any, cast

import pytest

from blocks.base import Target
from blocks.dicom_source import DicomSource
from blocks.dicom_tls import DicomTlsTarget
from blocks.dicomweb import DicomWebTarget
from blocks.rule import WebhookRule
from talaria.metrics import certificates, peers
from talaria.notify import lookout, sending
from talaria.notify.errors import NotSent
from talaria.testing.process import free_port, until
from tests.servers.certificates import Authority, Leaf
from transfer import silent
from transfer.home import Home
from transfer.ledger import Ledger

NOW = datetime(2026, 11, 1, tzinfo=UTC)


def check(detail: str, time: datetime = NOW) -> dict[str, object]:
    return {"time": time.isoformat(), "probes": [{"name": "tls", "result": "ok", "detail": detail}]}


def pacs(**fields: Any) -> DicomTlsTarget:
    return DicomTlsTarget(**{"host": "pacs.example.org", "aet_target": "PACS", **fields}).named("pacs")


@contextmanager
def shows(leaf: Leaf) -> Iterator[int]:
    """A server that shakes hands and says nothing; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)

    def serve() -> None:
        with suppress(OSError):
            while True:
                sock, _ = server.accept()
                with suppress(OSError), context.wrap_socket(sock, server_side=True) as wrapped:
                    wrapped.recv(1)

    with create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]


def test_a_check_that_fails_before_it_does_not_end_what_is_known(tmp_path: Path) -> None:
    """Nor does its removal, nor the end of the process that saw it."""

    def ends(one: DicomTlsTarget, detail: str) -> list[float]:
        checks = {"pacs": check(detail)} if detail else {}
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            found = certificates.known("", [one], checks, (), ledger)
        return [(cert.expires - NOW.timestamp()) / certificates.DAY_S for cert in found]

    assert ends(pacs(), "connection refused") == []
    assert ends(pacs(), "TLS 1.3; certificate expires in 9 days") == [9]
    assert ends(pacs(), "connection refused") == ends(pacs(), "") == [9]
    assert ends(pacs(host="other.example.org"), "connection refused") == []


def test_what_was_seen_last_counts(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for day, detail, end in (
            (0, "expires in 9 days", 9),
            (2, "the peer's certificate has expired: it must be renewed there", 2),
            (1, "expires in 400 days", 2),
            (3, "expires in 400 days", 403),
        ):
            checks = {"pacs": check(detail, NOW + timedelta(days=day))}
            (found,) = certificates.known("", [pacs()], checks, (), ledger)
            assert (found.expires - NOW.timestamp()) / certificates.DAY_S == end


@pytest.mark.parametrize("web", [False, True])
def test_a_certificate_is_seen_without_a_check_and_a_renewed_one_within_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: bool
) -> None:
    authority, home = Authority(tmp_path / "ca"), Home(tmp_path)
    monkeypatch.setattr(peers, "_tried", {})
    with shows(authority.leaf("old", expired=True)) as old, shows(authority.leaf("new")) as new:

        def target(port: int) -> Target:
            if web:
                return DicomWebTarget(url=f"https://127.0.0.1:{port}/dicom").named("pacs")
            return pacs(host="127.0.0.1", port=port)

        def known(port: int) -> list[float]:
            with Ledger(home.ledger) as ledger:
                return [one.days for one in certificates.known("", [target(port)], {}, (), ledger)]

        peers.ask_again(home, [target(old)])
        until(lambda: bool(known(old)))
        assert known(old)[0] < 0 and known(new) == []
        with Ledger(home.ledger) as ledger:
            mark = peers.subject(target(old))
            monkeypatch.setattr(peers, "subject", lambda one: mark)  # another certificate at the same place
            peers.ask(ledger, [target(new)])
            assert known(new)[0] < 0, "not asked again on the same day"
            seen = peers.kept(ledger)[mark]
            peers.keep(ledger, target(new), peers.SeenCertificate(seen.expires, seen.seen - peers.DAY_S - 60))
            peers.ask(ledger, [target(new)])
            assert 19 < known(new)[0] < 20
            peers.ask(ledger, [target(free_port())])
        assert 19 < known(new)[0] < 20


def test_a_target_that_shows_none_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_tried", {})
    plain = DicomWebTarget(url="http://127.0.0.1:1/dicom").named("plain")
    off = pacs(host="127.0.0.1", port=1, enabled=False)
    peers.ask_again(Home(tmp_path), [plain, off])
    assert not peers._tried and not (tmp_path / "ledger.sqlite").exists()


def test_the_certificate_of_a_listener_is_known_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start a server
    leaf = Authority(tmp_path / "ca").leaf("router")
    fields = {"tls_cert": str(leaf.cert), "tls_key": str(leaf.key)}
    source = DicomSource(aet="ROUTER", targets=["pacs"], **fields).named("ct")
    rule = WebhookRule(url="http://h/", on=["certificate.expires"], sources=["ct"]).named("ops")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        known = certificates.known("", [], {}, [source], ledger)
        assert [(one.of, one.whose) for one in known] == [("ct", certificates.LISTENER)] and 19 < known[0].days < 20
        lookout._expiring(ledger, known)
        lookout._expiring(ledger, known)
        (one,) = ledger.happenings.waiting(9)
    assert one.about | {"source": "ct", "whose": "listener", "days": 19} == one.about
    assert rule.hears(one.event, one.about)


def test_the_authority_that_ca_cert_trusts_is_known_and_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the old one and the new one that takes its place, the new one counts."""
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start a server
    ca = Authority(tmp_path / "ca")
    leaf = ca.leaf("router")
    fields = {"tls_cert": str(leaf.cert), "tls_key": str(leaf.key)}
    source = DicomSource(aet="ROUTER", targets=["pacs"], ca_cert=str(ca.ca), **fields).named("ct")
    target = pacs(ca_cert=ca.ca.read_text())
    both = pacs(ca_cert=ca.ca.read_text() + leaf.cert.read_text()).named("both")
    gone = pacs(ca_cert=str(tmp_path / "none.pem")).named("gone")
    known = {(one.of, one.whose): one for one in certificates.known("", [target, both, gone], {}, [source])}
    assert known.keys() == {
        ("pacs", "authority"), ("both", "authority"), ("ct", "senders"), ("ct", "listener"),
    }  # fmt: skip
    ends = {name: one.expires for name, one in known.items()}
    assert ends["pacs", "authority"] == ends["ct", "senders"] != ends["ct", "listener"]
    assert ends["both", "authority"] == max(ends.values())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        expired = [certificates.KnownCertificate(*name, ends["pacs", "authority"] - 1e9) for name in known]
        lookout._expiring(ledger, expired)
        told = [one.about for one in ledger.happenings.waiting(9)]
    assert {(one.get("target") or one.get("source"), one["whose"]) for one in told} == set(known)
    assert [one["source"] for one in told if one["whose"] == "senders"] == ["ct"]


def test_a_folder_of_authorities_is_left_alone_and_nothing_stays_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    assert certificates.known("", [pacs(ca_cert=str(tmp_path))], {}) == []
    assert os.listdir("/proc/self/fd") == before


def test_a_certificate_that_is_renewed_for_a_month_is_told_of_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
    told = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for days in (29.5, 6.5, 0.5, 29.9, 6.5, 6.4, 20, 0.9, -1, 60, 29):
            now = lookout.certificates.time.time()
            lookout._expiring(ledger, [certificates.KnownCertificate("pacs", "peer", now + days * peers.DAY_S)])
            told.append(len(ledger.happenings.waiting(99)))
    assert told == [1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6]


def test_a_share_that_does_not_answer_hides_its_own_certificates_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a file on a share whose server is away does, for ever: metrics and the home page never came."""
    leaf, over = Authority(tmp_path / "authority").leaf("node"), threading.Event()
    opened, share = os.open, tmp_path / "share"
    share.mkdir()

    def hangs(path: Any, *args: Any, **more: Any) -> int:
        if str(path).startswith(str(share)):
            over.wait(120)
        return opened(path, *args, **more)

    monkeypatch.setattr(os, "open", hangs)
    monkeypatch.setattr(silent, "LOOK_S", 0.2)
    own = DicomTlsTarget(host="h", aet_target="A", tls_cert=str(leaf.cert), tls_key=str(leaf.key)).named("own")
    away = [
        DicomTlsTarget(host="h", aet_target="A", ca_cert=f"{share}/{name}.pem").named(f"away-{name}") for name in "ab"
    ]
    try:
        for _ in range(2):
            found = certificates.known(f"{share}/front.pem", [*away, own], {})
            assert [(one.of, one.whose) for one in found] == [("own", certificates.OWN)]
        assert caplog.text.count("does not answer") == 1
        rule = WebhookRule(url="http://127.0.0.1:9/", ca_cert=f"{share}/a.pem").named("ops")
        with pytest.raises(NotSent, match="its file system does not answer"):
            asyncio.run(sending.send(rule, cast("Any", None)))
    finally:
        over.set()
    (share / "front.pem").write_bytes(Path(leaf.cert).read_bytes())
    until(lambda: len(certificates.known(f"{share}/front.pem", [], {})) == 1)
