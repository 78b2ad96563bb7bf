"""How long certificates are still valid: the front door's own, those that we show to peers, and those of peers."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from blocks.base import Target

DAY_S = 86_400.0
FRONT = "front-door"  # what ours is called; no target can have this name and be `whose` "server"
OWN, PEER, SERVER = "own", "peer", "server"  # whose it is
PEER_DAYS = re.compile(r"expires in (-?\d+) days")  # in the probe `tls` of a check (protocols.net.tls.peer_facts)
EXPIRED = "certificate has expired"  # where the check ended with it
MOST_BYTES = 1 << 20  # of a file of certificates


# By target and endpoint: a check that ends before it sees the certificate must not end the alarm about it.
_seen: dict[tuple[str, str], float] = {}


@dataclass(frozen=True)
class KnownCertificate:
    """A certificate that something depends on.

    Attributes:
        of: the target's name, or FRONT.
        whose: OWN is shown by us to that target, PEER by it to us, SERVER by our front door.
        expires: seconds since the epoch; that of a peer is known to a day.
    """

    of: str
    whose: str
    expires: float

    @property
    def days(self) -> float:
        return (self.expires - time.time()) / DAY_S


def known(front: str, targets: Iterable[Target], checks: Mapping[str, Mapping[str, Any]]) -> list[KnownCertificate]:
    """Return all certificates that are known; of what can't be read, the check of its target speaks.

    Args:
        front: file of the front door's certificate, "" for none.
        checks: the last check of each target, by name.
    """
    found = []
    if front and (end := _end(front)) is not None:
        found.append(KnownCertificate(FRONT, SERVER, end))
    for target in targets:
        own = str(getattr(target, "tls_cert", "") or "")
        if own and (end := _end(own)) is not None:
            found.append(KnownCertificate(target.name, OWN, end))
        if (end := _last_end_of_peer(target, checks.get(target.name))) is not None:
            found.append(KnownCertificate(target.name, PEER, end))
    return found


def _end(cert: str) -> float | None:
    """Return when the first of a chain's certificates expires, of a path or PEM text; None if it can't be read."""
    with suppress(OSError, ValueError):
        pem = cert.encode() if "-----BEGIN" in cert else _read(cert)
        chain = x509.load_pem_x509_certificates(pem)
        return min(one.not_valid_after_utc.timestamp() for one in chain)
    return None


def _read(path: str) -> bytes:
    fd = os.open(Path(path).expanduser(), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe has no certificate
    with open(fd, "rb") as file:
        return file.read(MOST_BYTES)


def _last_end_of_peer(target: Target, check: Mapping[str, Any] | None) -> float | None:
    """Return when a peer's certificate expires, as the last check says that came so far, at the same place."""
    key = target.name, target.endpoint_for()
    if (end := _end_of_peer(check)) is not None:
        _seen[key] = end
    return _seen.get(key)


def _end_of_peer(check: Mapping[str, Any] | None) -> float | None:
    for probe in (check or {}).get("probes", ()):
        detail, time_ = str(probe.get("detail", "")), str((check or {})["time"])
        if match := PEER_DAYS.search(detail):
            return datetime.fromisoformat(time_).timestamp() + int(match[1]) * DAY_S
        if EXPIRED in detail:
            return datetime.fromisoformat(time_).timestamp()
    return None
