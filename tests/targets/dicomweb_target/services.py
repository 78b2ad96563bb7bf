"""DICOMweb targets for a scripted server."""

from __future__ import annotations

from transfer.health import Health

PASSWORD = "pa55word-1234"
TOKEN = "eyJhbGciOiJ.t0ken-5678.sig"


def names(health: Health, result: str) -> list[str]:
    return [probe.name for probe in health.probes if probe.result == result]
