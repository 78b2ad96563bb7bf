"""DICOM+TLS: versions, certificates good and bad on both sides, and what each failure is called.

Every failure names what to change: the test asks for the setting, or for whose certificate it is.
"""

from __future__ import annotations

import functools
import json
import os
import ssl
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded, free_port
from tasks.dicom import driver as plain
from tasks.dicom_tls import driver
from tests.servers.certificates import Authority, Leaf
from tests.servers.dcmtk import storescp
from tests.servers.orthanc import orthanc, shared_orthanc
from tests.servers.scp import scp
from tests.servers.steps import Close, Raw, Silence
from tests.targets.dicom import dicom_target
from tests.targets.dicom_tls import KEY_PASSWORD, certificates, tls_target
from transfer.errors import (
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotTrusted,
    Retryable,
    TimedOut,
    Unreachable,
)  # fmt: skip
from transfer.health import Health
from transfer.receipt import State

SLACK_S = 5.0  # a handshake takes milliseconds, ending things in order a little more


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    studies.ct(folder, 3)
    return folder


@dataclass(frozen=True)
class More:
    """Certificates that are wrong in one way each; made once."""

    other: Authority
    expired: Leaf
    wrong_name: Leaf
    stranger: Leaf
    expired_client: Leaf
    stranger_client: Leaf
    plain_client: Leaf


@functools.cache
def more() -> More:
    made = certificates().authority
    folder = Path(tempfile.mkdtemp(dir=made.folder))
    other = Authority(folder / "other", "Another CA")
    return More(
        other,
        expired=made.leaf("expired", expired=True),
        wrong_name=made.leaf("wrong-name", hosts=("pacs.example.org", "192.0.2.7")),
        stranger=other.leaf("stranger"),
        expired_client=made.leaf("expired-client", expired=True),
        stranger_client=other.leaf("stranger-client"),
        plain_client=made.leaf("plain-client"),
    )


@dataclass(frozen=True)
class Server:
    """A TLS server of some kind, and the title by which it is called."""

    port: int
    aet: str
    uids: Callable[[], set[str]]


Start = Callable[..., AbstractContextManager[Server]]


@contextmanager
def _storescp(folder: Path, leaf: Leaf, *, client: bool = True) -> Iterator[Server]:
    with storescp(folder, *(() if client else ("-ic",)), tls=leaf, trusted=certificates().ca) as server:
        yield Server(server.port, server.aet, lambda: set(server.files()))


@contextmanager
def _orthanc(folder: Path, leaf: Leaf, *, client: bool = True) -> Iterator[Server]:
    if client and leaf == certificates().server:  # the usual one: it takes seconds to stop
        server = shared_orthanc(leaf, certificates().ca)
        yield Server(server.dicom_port, server.aet, server.uids)
        return
    with orthanc(folder, tls=leaf, trusted=certificates().ca, client_certificate=client) as server:
        yield Server(server.dicom_port, server.aet, server.uids)


SERVERS: dict[str, Start] = {"storescp": _storescp, "orthanc": _orthanc}
every_server = pytest.mark.parametrize("start", SERVERS.values(), ids=SERVERS)


def failed(health: Health) -> Any:
    return next(probe for probe in health.probes if probe.result == "failed" and not probe.informative)


def refused(
    target: Any, study: Path, error: type[DispatchError] | tuple[type[DispatchError], ...], *words: str
) -> Sent:
    """Push and check; assert that both fail with this error, soon, in these words, with nothing delivered."""
    sent = attempt(target, study)
    assert isinstance(sent.error, error), repr(sent.error)
    assert not sent.outcomes
    assert sent.seconds < as_loaded(SLACK_S)
    begun = time.monotonic()
    health = driver.check(target)
    assert time.monotonic() - begun < as_loaded(SLACK_S)
    assert not health.ok
    assert isinstance(health.error, error), health.to_json("x")
    for word in words:
        assert word in str(sent.error), word
        assert word in failed(health).detail, word
    text = f"{sent.error} {json.dumps(health.to_json('x'))}"
    assert KEY_PASSWORD not in text
    assert "PRIVATE KEY" not in text
    return sent


def shown_by(leaf: Leaf) -> dict[str, Any]:
    """What openssl says of a certificate, as the facts of a check have it."""
    found = {}
    for name in ("subject", "issuer", "fingerprint"):
        asked = ["openssl", "x509", "-in", str(leaf.cert), "-noout", f"-{name}", "-sha256", "-nameopt", "RFC2253"]
        said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
        found[name] = said.strip().partition("=")[2]
    dated = x509.load_pem_x509_certificate(leaf.cert.read_bytes())
    named = dated.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ends = dated.not_valid_after_utc
    days = (ends - datetime.now(UTC)).days
    return found | {"names": [str(one.value) for one in named], "expires": ends.isoformat(), "days": days}


# ---- what works


@every_server
def test_mutual(start: Start, study: Path, tmp_path: Path) -> None:
    with start(tmp_path / "server", certificates().server) as server:
        target = tls_target(server.port, aet_target=server.aet)
        sent = attempt(target, study)
        assert sent.require().state is State.DELIVERED
        assert len(server.uids()) == 3
        health = driver.check(target)
        assert health.ok, health.to_json("x")
        detail = next(probe.detail for probe in health.probes if probe.name == "tls")
        assert "TLSv1.3" in detail or "TLSv1.2" in detail
        assert "server" in detail, "whose certificate it is"
        assert "expires in" in detail
        assert len(server.uids()) == 3
        facts = {name: one for probe in health.probes for name, one in probe.facts.items()}
        assert facts["certificate"] == shown_by(certificates().server)
        assert facts["certificate"]["names"] and facts["certificate"]["days"] > 0
        assert "Explicit VR Little Endian" in facts["transfer_syntaxes"]


@every_server
def test_one_sided(start: Start, study: Path, tmp_path: Path) -> None:
    with start(tmp_path / "server", certificates().server, client=False) as server:
        target = tls_target(server.port, aet_target=server.aet, tls_cert="", tls_key="", tls_key_password="")
        assert attempt(target, study).require().state is State.DELIVERED
        assert len(server.uids()) == 3
        assert driver.check(target).ok


@pytest.mark.parametrize("profile", ["bcp195", "bcp195-nondowngrading"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("client", [True, False], ids=["mutual", "one-sided"])
def test_versions(version: ssl.TLSVersion, profile: str, client: bool, study: Path) -> None:
    context = certificates().accepting(client_certificate=client)
    context.minimum_version = context.maximum_version = version
    with scp(tls=context) as peer:
        target = tls_target(peer.port, aet_target=peer.aet, tls_profile=profile)
        assert attempt(target, study).require().state is State.DELIVERED
        assert len(peer.kept) == 3
        health = driver.check(target)
        assert health.ok, health.to_json("x")
        shown = next(probe.detail for probe in health.probes if probe.name == "tls")
        assert {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name] in shown


@pytest.mark.parametrize("option", ["+py", "+px", "+pz"])
@pytest.mark.parametrize("profile", ["bcp195", "bcp195-nondowngrading"])
def test_profiles_of_storescp(option: str, profile: str, study: Path, tmp_path: Path) -> None:
    with storescp(tmp_path / "server", option, tls=certificates().server, trusted=certificates().ca) as server:
        target = tls_target(server.port, aet_target=server.aet, tls_profile=profile)
        assert attempt(target, study).require().state is State.DELIVERED


def test_large_instances_and_several_associations(tmp_path: Path) -> None:
    study = tmp_path / "study"
    studies.ct(study, 40, side=128)
    studies.multiframe(study / "large.dcm", 40)  # 21 MB
    with scp(tls=certificates().accepting(), max_pdu=0) as peer:
        sent = attempt(tls_target(peer.port, aet_target=peer.aet, concurrency=4), study)
        assert sent.require().state is State.DELIVERED
        for item in sent.plan.items:
            assert item.header
            data = sent.plan.file(item).read_bytes()[item.header.dataset_offset :]
            assert peer.kept[item.header.SOPInstanceUID].data == data


def test_settings_as_text(study: Path) -> None:
    """Certificates and keys may be PEM text as well as paths."""
    made = certificates()
    with scp(tls=made.accepting()) as peer:
        target = tls_target(
            peer.port,
            aet_target=peer.aet,
            ca_cert=made.ca.read_text(),
            tls_cert=made.client.cert.read_text(),
            tls_key=made.client.key.read_text(),
        )
        assert attempt(target, study).require().state is State.DELIVERED
        assert made.client.key.read_text().splitlines()[1] not in repr(target) + target.model_dump_json()


def test_key_without_a_password(study: Path) -> None:
    client = more().plain_client
    with scp(tls=certificates().accepting()) as peer:
        target = tls_target(
            peer.port, aet_target=peer.aet, tls_cert=str(client.cert), tls_key=str(client.key), tls_key_password=""
        )
        assert attempt(target, study).require().state is State.DELIVERED


def test_key_and_certificate_in_one_file(study: Path, tmp_path: Path) -> None:
    client = more().plain_client
    both = studies.write(tmp_path / "both.pem", client.cert.read_bytes() + client.key.read_bytes())
    with scp(tls=certificates().accepting()) as peer:
        target = tls_target(peer.port, aet_target=peer.aet, tls_cert=str(both), tls_key="", tls_key_password="")
        assert attempt(target, study).require().state is State.DELIVERED


def test_a_name_that_is_not_verified(study: Path, tmp_path: Path) -> None:
    with storescp(tmp_path / "server", tls=more().wrong_name, trusted=certificates().ca) as server:
        target = tls_target(server.port, aet_target=server.aet, verify_hostname=False)
        assert attempt(target, study).require().state is State.DELIVERED


def test_a_host_name_that_is_in_the_certificate(study: Path, tmp_path: Path) -> None:
    with storescp(tmp_path / "server", tls=certificates().server, trusted=certificates().ca) as server:
        target = tls_target(server.port, aet_target=server.aet, host="localhost")
        assert attempt(target, study).require().state is State.DELIVERED


def test_the_environment_overrides_nothing(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does it take trust away, nor give it."""
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(more().other.ca))
    with storescp(tmp_path / "good", tls=certificates().server, trusted=certificates().ca) as server:
        target = tls_target(server.port, aet_target=server.aet)
        assert attempt(target, study).require().state is State.DELIVERED
    with storescp(tmp_path / "bad", tls=more().stranger, trusted=certificates().ca) as server:
        refused(tls_target(server.port, aet_target=server.aet), study, NotTrusted)


# ---- the peer's certificate


@every_server
def test_unknown_authority(start: Start, study: Path, tmp_path: Path) -> None:
    with start(tmp_path / "server", more().stranger) as server:
        target = tls_target(server.port, aet_target=server.aet)
        refused(target, study, NotTrusted, "ca_cert", "unknown authority")
        assert not server.uids()


@every_server
def test_expired(start: Start, study: Path, tmp_path: Path) -> None:
    with start(tmp_path / "server", more().expired) as server:
        target = tls_target(server.port, aet_target=server.aet)
        refused(target, study, NotTrusted, "expired")
        assert not server.uids()


@every_server
def test_wrong_name(start: Start, study: Path, tmp_path: Path) -> None:
    with start(tmp_path / "server", more().wrong_name) as server:
        target = tls_target(server.port, aet_target=server.aet)
        refused(target, study, NotTrusted, "wrong name", "verify_hostname", "127.0.0.1")
        assert not server.uids()


def test_wrong_host_name(study: Path, tmp_path: Path) -> None:
    with storescp(tmp_path / "server", tls=more().wrong_name, trusted=certificates().ca) as server:
        target = tls_target(server.port, aet_target=server.aet, host="localhost")
        refused(target, study, NotTrusted, "wrong name", "localhost")


def test_without_ca_cert_the_system_decides(study: Path, tmp_path: Path) -> None:
    """A certificate of a private authority is not trusted just because no authority was named."""
    with storescp(tmp_path / "server", tls=certificates().server, trusted=certificates().ca) as server:
        refused(tls_target(server.port, aet_target=server.aet, ca_cert=""), study, NotTrusted, "ca_cert")


# ---- our certificate


@every_server
def test_the_peer_asks_for_a_certificate_and_gets_none(start: Start, study: Path, tmp_path: Path) -> None:
    with start(tmp_path / "server", certificates().server) as server:
        target = tls_target(server.port, aet_target=server.aet, tls_cert="", tls_key="", tls_key_password="")
        refused(target, study, (Misconfigured, Denied), "tls_cert")
        assert not server.uids()


@every_server
@pytest.mark.parametrize("kind", ["stranger_client", "expired_client"])
def test_the_peer_does_not_accept_our_certificate(start: Start, kind: str, study: Path, tmp_path: Path) -> None:
    client: Leaf = getattr(more(), kind)
    with start(tmp_path / "server", certificates().server) as server:
        target = tls_target(
            server.port, aet_target=server.aet, tls_cert=str(client.cert), tls_key=str(client.key), tls_key_password=""
        )
        refused(target, study, Denied, "tls_cert")
        assert not server.uids()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", ["none", "stranger_client", "expired_client"])
def test_our_certificate_in_both_versions(version: ssl.TLSVersion, kind: str, study: Path) -> None:
    """With TLS 1.3 the client's handshake is over before the server has looked at its certificate."""
    context = certificates().accepting()
    context.minimum_version = context.maximum_version = version
    with scp(tls=context) as peer:
        settings: dict[str, Any] = {"tls_cert": "", "tls_key": "", "tls_key_password": ""}
        if kind != "none":
            client: Leaf = getattr(more(), kind)
            settings |= {"tls_cert": str(client.cert), "tls_key": str(client.key)}
        target = tls_target(peer.port, aet_target=peer.aet, **settings)
        refused(target, study, (Misconfigured, Denied) if kind == "none" else Denied, "tls_cert")
        assert not peer.stores


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"tls_key_password": "wrong"}, "tls_key_password"),
        ({"tls_key_password": ""}, "tls_key_password"),
        ({"tls_cert": "/nowhere/cert.pem"}, "tls_cert"),
        ({"tls_key": "/nowhere/key.pem"}, "tls_key"),
        ({"ca_cert": "/nowhere/ca.pem"}, "ca_cert"),
        ({"ca_cert": __file__}, "ca_cert"),
        ({"tls_cert": __file__}, "tls_cert"),
        ({"tls_key": __file__}, "tls_key"),
    ],
    ids=str,
)
def test_wrong_settings_name_themselves(settings: dict[str, str], word: str, study: Path) -> None:
    with scp(tls=certificates().accepting()) as peer:
        refused(tls_target(peer.port, aet_target=peer.aet, **settings), study, Misconfigured, word)
        assert not peer.stores


def test_key_of_another_certificate(study: Path) -> None:
    with scp(tls=certificates().accepting()) as peer:
        target = tls_target(peer.port, aet_target=peer.aet, tls_key=str(more().plain_client.key), tls_key_password="")
        refused(target, study, Misconfigured, "tls_key", "tls_cert")


def test_unreadable_key(study: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root reads everything: a folder in its place is as unreadable
        (tmp_path / "key.pem").mkdir()
    else:
        studies.write(tmp_path / "key.pem", certificates().client.key.read_bytes()).chmod(0)
    with scp(tls=certificates().accepting()) as peer:
        target = tls_target(peer.port, aet_target=peer.aet, tls_key=str(tmp_path / "key.pem"))
        refused(target, study, Misconfigured, "tls_key")


# ---- not what was expected on the port


@pytest.mark.parametrize("kind", ["storescp", "script"])
def test_plain_peer_on_the_tls_port(kind: str, study: Path, tmp_path: Path) -> None:
    if kind == "storescp":
        with storescp(tmp_path / "server") as server:
            refused(tls_target(server.port, aet_target=server.aet), study, (Misconfigured, Interrupted))
            assert not server.names()
            sent = attempt(tls_target(server.port, aet_target=server.aet), study)
            assert "TLS" in str(sent.error)
    else:
        with scp() as peer:
            refused(tls_target(peer.port, aet_target=peer.aet), study, (Misconfigured, Interrupted), "TLS")


def test_web_server_on_the_tls_port(study: Path) -> None:
    answer = Raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    with scp(on_connect=lambda number: [answer, Close()]) as peer:
        refused(tls_target(peer.port), study, Misconfigured, "TLS")


@every_server
def test_plain_target_on_the_tls_port(start: Start, study: Path, tmp_path: Path) -> None:
    with start(tmp_path / "server", certificates().server) as server:
        target = dicom_target(server.port, aet_target=server.aet)
        sent = attempt(target, study)
        assert isinstance(sent.error, Misconfigured), repr(sent.error)
        assert "dicom-tls" in str(sent.error)
        assert sent.seconds < as_loaded(SLACK_S)
        health = plain.check(target)
        assert isinstance(health.error, Misconfigured)
        assert "dicom-tls" in failed(health).detail


def old_peer(version: ssl.TLSVersion, suites: str) -> ssl.SSLContext:
    """What an old PACS accepts."""
    context = certificates().accepting()
    context.set_ciphers(suites)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    return context


OLD = [
    (ssl.TLSVersion.TLSv1_2, "AES128-SHA:AES256-SHA", ["AES256-SHA", "AES128-SHA"]),
    (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0", ["TLSv1.1"]),
    (ssl.TLSVersion.TLSv1, "AES128-SHA:@SECLEVEL=0", ["AES128-SHA", "TLSv1"]),
]


@pytest.mark.parametrize(("version", "suites", "words"), OLD, ids=str)
def test_old_peers_are_refused_with_what_they_offer(
    version: ssl.TLSVersion, suites: str, words: list[str], study: Path
) -> None:
    with scp(tls=old_peer(version, suites)) as peer:
        refused(tls_target(peer.port, aet_target=peer.aet), study, Misconfigured, "legacy", *words)


@pytest.mark.parametrize(("version", "suites", "words"), OLD, ids=str)
def test_the_legacy_profile_takes_them_and_is_named(
    version: ssl.TLSVersion, suites: str, words: list[str], study: Path
) -> None:
    with scp(tls=old_peer(version, suites)) as peer:
        target = tls_target(peer.port, aet_target=peer.aet, tls_profile="legacy")
        receipt = attempt(target, study).require()
        assert receipt.state is State.DELIVERED
        assert any("tls_profile legacy" in note for note in receipt.notes)
        health = driver.check(target)
        assert health.ok, health.to_json("x")
        assert "tls_profile legacy" in " ".join(probe.detail for probe in health.probes)


def test_no_suite_is_named_where_suites_are_not_the_matter(study: Path) -> None:
    context = certificates().accepting()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with scp(tls=context) as peer:
        bare = tls_target(peer.port, aet_target=peer.aet, tls_cert="", tls_key="", tls_key_password="")
        sent = attempt(bare, study)
        assert isinstance(sent.error, Misconfigured | Denied)
        assert "legacy" not in str(sent.error)


def test_silent_peer_is_TimedOut_within_the_connect_timeout(study: Path) -> None:
    tries: list[int] = []

    def silent(number: int) -> Silence:
        tries.append(number)
        return Silence()

    with scp(on_connect=silent) as peer:
        sent = attempt(tls_target(peer.port, connect_timeout_s=1.5), study)
    assert isinstance(sent.error, TimedOut), repr(sent.error)
    assert len(tries) == 2  # the second asks whether it speaks DICOM without TLS
    assert sent.seconds < as_loaded(1.5 + SLACK_S)


def test_closed_port_is_Unreachable(study: Path) -> None:
    refused(tls_target(free_port()), study, Unreachable)


def test_peer_that_closes_during_the_handshake(study: Path) -> None:
    with scp(on_connect=lambda number: Close()) as peer:
        refused(tls_target(peer.port), study, Retryable)


# ---- faults under TLS


def test_silence_at_one_instance_costs_no_other(study: Path) -> None:
    with scp(tls=certificates().accepting(), on_store=lambda store: Silence() if store.number == 2 else 0) as peer:
        target = tls_target(peer.port, aet_target=peer.aet, concurrency=1, idle_timeout_s=1.5)
        assert attempt(target, study).require().state is State.DELIVERED
        assert len(peer.kept) == 3
        assert not peer.repeated


def test_one_byte_at_a_time(study: Path) -> None:
    with scp(tls=certificates().accepting(), write_size=1, split=True) as peer:
        assert attempt(tls_target(peer.port, aet_target=peer.aet), study).require().state is State.DELIVERED
