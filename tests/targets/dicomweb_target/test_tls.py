"""DICOMweb behind TLS."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from blocks.dicomweb import DicomWebTarget
from talaria.testing import process, studies
from talaria.testing.harness import attempt
from tasks.dicomweb import check
from tests.servers.certificates import Authority, Leaf
from tests.servers.dicomweb import Reply, Scripted, scripted
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_target.services import PASSWORD
from transfer.errors import (
    REMEDIES,
    Busy,
    Denied,
    Misconfigured,
    NotTrusted,
)
from transfer.plan import Plan, scan
from transfer.receipt import State


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def context_of(leaf: Leaf, client_ca: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context


def https(server: Scripted, **settings: Any) -> DicomWebTarget:
    return dicomweb_target(server.url.replace("http:", "https:"), **settings)


@pytest.mark.parametrize("as_text", [False, True])
def test_tls_with_client_certificate(ca: Authority, plan: Plan, as_text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the environment names must not come before what the target names.
    for name in process.AMBIENT_TRUST:
        monkeypatch.setenv(name, "/nonexistent.pem")
    client = ca.leaf("client", password="k3y-pass")
    values = [path.read_text() if as_text else str(path) for path in (ca.ca, client.cert, client.key)]
    trust = dict(zip(("ca_cert", "tls_cert", "tls_key"), values, strict=True)) | {"tls_key_password": "k3y-pass"}
    with scripted(context_of(ca.leaf("server"), ca.ca)) as server:
        target = https(server, **trust)
        assert attempt(target, plan).require().state is State.DELIVERED
        health = check(target)
        assert health.ok
        (tls,) = [probe for probe in health.probes if probe.name == "tls"]
        assert "TLSv1.3" in tls.detail
        assert "expires in" in tls.detail
        refused = attempt(https(server, ca_cert=str(ca.ca)), plan)
        assert isinstance(refused.error, Misconfigured | Denied)
        assert "certificate" in refused.error.message


@pytest.mark.parametrize("kind", ["unknown", "expired", "name"])
def test_tls_not_trusted(ca: Authority, plan: Plan, tmp_path: Path, kind: str) -> None:
    if kind == "unknown":
        leaf = Authority(tmp_path / "rogue").leaf("server")
    elif kind == "expired":
        leaf = ca.leaf("expired", expired=True)
    else:
        leaf = ca.leaf("elsewhere", hosts=("elsewhere.example",))
    with scripted(context_of(leaf)) as server:
        target = https(server, ca_cert=str(ca.ca), http_user="lab", http_password=PASSWORD)
        sent = attempt(target, plan)
        assert type(sent.error) is NotTrusted
        health = check(target)
        assert type(health.error) is NotTrusted
        (failed,) = [probe for probe in health.probes if probe.result == "failed"]
        assert (failed.name, failed.error, failed.remedy) == ("tls", "NotTrusted", REMEDIES[NotTrusted])
        # It is shown all the same, for people to compare; nothing was sent there for that.
        shown = failed.facts["certificate"]
        assert shown["names"] == ["elsewhere.example"] if kind == "name" else "127.0.0.1" in shown["names"]
        assert (shown["days"] < 0) is (kind == "expired")
        assert not server.requests


def test_a_token_is_fetched_with_certificates_that_have_been_renewed(ca: Authority, plan: Plan, tmp_path: Path) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(Authority(tmp_path / "old").ca.read_bytes())
    with scripted() as server, scripted(context_of(ca.leaf("server"))) as tokens:
        server.authorization = lambda given: given in [f"Bearer {one}" for one in tokens.tokens]
        client, secret = tokens.client
        target = dicomweb_target(
            server.url,
            ca_cert=str(trusted),
            token_url=f"https://127.0.0.1:{tokens.port}/token",
            client_id=client,
            client_secret=secret,
        )
        assert type(attempt(target, plan).error) is NotTrusted
        trusted.write_bytes(ca.ca.read_bytes())
        assert attempt(target, plan).require().state is State.DELIVERED
        assert attempt(target, plan).require().state is State.DELIVERED
        assert len(tokens.tokens) == 1


def test_tls_large_upload_and_early_answer(ca: Authority, tmp_path: Path) -> None:
    studies.multiframe(tmp_path / "large.dcm", 20)
    plan = scan([tmp_path])
    with scripted(context_of(ca.leaf("server"))) as server:
        target = https(server, ca_cert=str(ca.ca))
        assert attempt(target, plan).require().state is State.DELIVERED
        server.continues = False
        server.script = [Reply(503, reads=100_000, headers={"Retry-After": "2"})]
        sent = attempt(target, plan)
        assert isinstance(sent.error, Busy)
        assert sent.error.retry_after == 2


def test_tls_port_without_tls(server: Scripted, plan: Plan, ca: Authority) -> None:
    sent = attempt(https(server, ca_cert=str(ca.ca)), plan)
    assert isinstance(sent.error, Misconfigured)
