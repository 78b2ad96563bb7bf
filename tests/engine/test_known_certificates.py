"""How long a peer's certificate is known to be valid, whatever its last check came to."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from blocks.dicom_tls import DicomTlsTarget
from talaria.metrics import certificates

NOW = datetime(2026, 11, 1, tzinfo=UTC)


def check(detail: str) -> dict[str, object]:
    return {"time": NOW.isoformat(), "probes": [{"name": "tls", "result": "ok", "detail": detail}]}


def test_a_check_that_fails_before_it_does_not_end_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_seen", {})
    target = DicomTlsTarget(host="pacs.example.org", port=2762, aet_target="PACS").named("pacs")

    def ends(one: DicomTlsTarget, detail: str) -> list[float]:
        found = certificates.known("", [one], {"pacs": check(detail)})
        return [(cert.expires - NOW.timestamp()) / certificates.DAY_S for cert in found]

    assert ends(target, "connection refused") == []
    assert ends(target, "TLS 1.3; certificate expires in 9 days") == [9]
    assert ends(target, "connection refused") == [9]
    assert ends(target, "the peer's certificate has expired: it must be renewed there") == [0]
    elsewhere = DicomTlsTarget(host="other.example.org", port=2762, aet_target="PACS").named("pacs")
    assert ends(elsewhere, "connection refused") == []
