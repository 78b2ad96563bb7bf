"""How long certificates are still valid: the front door's and listeners', those that we show to peers, and peers'."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from blocks import Source, Target
from talaria.metrics import peers
from talaria.metrics.peers import DAY_S, SeenCertificate
from transfer.ledger import Ledger

FRONT = "front-door"  # what ours is called; no target can have this name and be `whose` "server"
OWN, PEER, SERVER, LISTENER = "own", "peer", "server", "listener"  # whose it is
PEER_DAYS = re.compile(r"expires in (-?\d+) days")  # in the probe `tls` of a check (protocols.net.tls.peer_facts)
EXPIRED = "certificate has expired"  # where the check ended with it
MOST_BYTES = 1 << 20  # of a file of certificates


@dataclass(frozen=True)
class KnownCertificate:
    """A certificate that something depends on.

    Attributes:
        of: the target's or source's name, or FRONT.
        whose: OWN is shown by us to that target, PEER by it to us, SERVER by our front door, LISTENER by that source.
        expires: seconds since the epoch; that of a peer is known to a day.
    """

    of: str
    whose: str
    expires: float

    @property
    def days(self) -> float:
        return (self.expires - time.time()) / DAY_S


def known(
    front: str,
    targets: Iterable[Target],
    checks: Mapping[str, Mapping[str, Any]],
    sources: Iterable[Source] = (),
    ledger: Ledger | None = None,
) -> list[KnownCertificate]:
    """Return all certificates that are known; of what can't be read, the check of its target speaks.

    Args:
        front: file of the front door's certificate, "" for none.
        checks: the last check of each target, by name; a later one that saw no certificate does not end what is known.
        ledger: keeps what peers showed; without it, only the checks are known.
    """
    found = []
    if front and (end := _end(front)) is not None:
        found.append(KnownCertificate(FRONT, SERVER, end))
    for whose, one in [*((OWN, one) for one in targets), *((LISTENER, one) for one in sources)]:
        own = str(getattr(one, "tls_cert", "") or "")
        if own and (end := _end(own)) is not None:
            found.append(KnownCertificate(one.name, whose, end))
    return [*found, *_of_peers(targets, checks, ledger)]


def _of_peers(
    targets: Iterable[Target], checks: Mapping[str, Mapping[str, Any]], ledger: Ledger | None
) -> Iterator[KnownCertificate]:
    """Yield what was seen last of each target's: by a check, or by whatever is kept."""
    before = peers.kept(ledger) if ledger is not None else {}
    for target in targets:
        last, checked = before.get(peers.subject(target)), _seen_by(checks.get(target.name))
        if checked and (last is None or checked.seen > last.seen):
            last = checked
            if ledger is not None:
                peers.keep(ledger, target, checked)
        if last:
            yield KnownCertificate(target.name, PEER, last.expires)


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


def _seen_by(check: Mapping[str, Any] | None) -> SeenCertificate | None:
    """Return what a check says of its target's certificate; None if it saw none."""
    for probe in (check or {}).get("probes", ()):
        detail, seen = str(probe.get("detail", "")), datetime.fromisoformat(str((check or {})["time"])).timestamp()
        if match := PEER_DAYS.search(detail):
            return SeenCertificate(seen + int(match[1]) * DAY_S, seen)
        if EXPIRED in detail:
            return SeenCertificate(seen, seen)
    return None
