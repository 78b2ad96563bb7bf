"""XNAT behind TLS."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.xnat import check
from tests.servers.certificates import Authority
from tests.servers.xnat import xnat
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import fails
from transfer.errors import (
    NotTrusted,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def _tls(authority: Authority, name: str, **settings: Any) -> ssl.SSLContext:
    leaf = authority.leaf(name, **settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)
    return context


def test_tls(authority: Authority, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(study, 3)
    studies.multiframe(study / "large.dcm", 8)
    with xnat(tmp_path / "xnat", tls=_tls(authority, "good")) as server:
        settings = {"user": "lab", "password": "lab"}
        for ca in (str(authority.ca), authority.ca.read_text()):
            target = xnat_target(server.url, ca_cert=ca, **settings)
            sent = attempt(target, study)
            assert sent.arrived == {item.path for item in sent.plan.items}
            health = check(target)
            assert health.ok, health.to_json("x")
            assert "TLSv1.3" in next(probe.detail for probe in health.probes if probe.name == "tls")
        assert len(server.instances()) == 4
        # The environment's trust changes nothing of a target's own.
        other = Authority(tmp_path / "other")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.ca))
        fails(attempt(xnat_target(server.url, ca_cert=str(other.ca), **settings), study), NotTrusted)
        assert type(check(xnat_target(server.url, ca_cert=str(other.ca), **settings)).error) is NotTrusted


@pytest.mark.parametrize("settings", [{"expired": True}, {"hosts": ("elsewhere.example",)}])
def test_bad_certificates_are_NotTrusted(
    authority: Authority, study: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    studies.ct(study, 1)
    with xnat(tmp_path / "xnat", tls=_tls(authority, "bad", **settings)) as server:
        fails(attempt(xnat_target(server.url, ca_cert=str(authority.ca)), study), NotTrusted)
