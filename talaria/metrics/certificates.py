"""How long certificates are still valid: the front door's and listeners', those that we show to peers, peers', and
those of the authorities that are trusted to vouch for them.

Where a file lies on a share whose server is away, nothing is known of its certificate.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509

from blocks import Source, Target
from protocols.net.tls import is_pem
from talaria.metrics import peers
from talaria.metrics.peers import DAY_S, SeenCertificate
from transfer import silent
from transfer.ledger import Ledger

FRONT = "front-door"  # what ours is called; no target can have this name and be `whose` "server"
OWN, PEER, SERVER, LISTENER = "own", "peer", "server", "listener"  # whose it is
AUTHORITY, SENDERS = "authority", "senders"  # or whom `ca_cert` of a target, or of a source, trusts
OF_SOURCES = (LISTENER, SENDERS)
PEER_DAYS = re.compile(r"expires in (-?\d+) days")  # in the probe `tls` of a check (protocols.net.tls.peer_facts)
EXPIRED = "certificate has expired"  # where the check ended with it
MOST_BYTES = 1 << 20  # of a file of certificates


@dataclass(frozen=True)
class KnownCertificate:
    """A certificate that something depends on.

    Attributes:
        of: the target's or source's name, or FRONT.
        whose: OWN is shown by us to that target, PEER by it to us, SERVER by our front door, LISTENER by that source.
            AUTHORITY is the last that may vouch for that target, SENDERS for who sends to that source.
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

    Not to be called in a thread that runs an event loop.

    Args:
        front: file of the front door's certificate, "" for none.
        checks: the last check of each target, by name; a later one that saw no certificate does not end what is known.
        ledger: keeps what peers showed; without it, only the checks are known.
    """
    targets, sources = list(targets), list(sources)
    owners = [*((OWN, AUTHORITY, one) for one in targets), *((LISTENER, SENDERS, one) for one in sources)]
    named = [[str(getattr(one, name, "") or "") for name in ("tls_cert", "ca_cert")] for _, _, one in owners]
    files = _contents([front, *(text for texts in named for text in texts)])
    found = []
    if (end := _end(files.get(front))) is not None:
        found.append(KnownCertificate(FRONT, SERVER, end))
    trusted = dict[str, float | None]()  # many targets name the same file
    for (whose, whom, one), (own, ca) in zip(owners, named, strict=True):
        if (end := _end(files.get(own))) is not None:
            found.append(KnownCertificate(one.name, whose, end))
        if ca not in trusted:
            # Of an authority's old and new certificate, and of a list of all authorities, the last one to end counts.
            trusted[ca] = _end(files.get(ca), max)
        if (end := trusted[ca]) is not None:
            found.append(KnownCertificate(one.name, whom, end))
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


def _contents(given: Iterable[str]) -> dict[str, bytes]:
    """Return what stands in certificates, each a path or PEM text; nothing of a file that can't be read."""
    texts = {one: one.encode() for one in given if is_pem(one)}
    paths = {one: os.path.expanduser(one) for one in given if one and one not in texts}  # noqa: PTH111 - Path's raises
    read = asyncio.run(silent.looked(_read, paths.values())) if paths else {}
    return texts | {one: content for one, path in paths.items() if (content := read.get(path))}


def _end(pem: bytes | None, which: Callable[[Iterable[float]], float] = min) -> float | None:
    """Return when the first of a chain's certificates expires; None if that is not known.

    Args:
        which: that one of their ends which counts.
    """
    with suppress(ValueError):
        return which(one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(pem or b""))
    return None


def _read(path: str) -> bytes:
    """Return what a file holds; nothing of one that can't be read, of a folder of authorities, or of a pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        with open(fd, "rb", closefd=False) as file:
            return file.read(MOST_BYTES)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _seen_by(check: Mapping[str, Any] | None) -> SeenCertificate | None:
    """Return what a check says of its target's certificate; None if it saw none."""
    for probe in (check or {}).get("probes", ()):
        detail, seen = str(probe.get("detail", "")), datetime.fromisoformat(str((check or {})["time"])).timestamp()
        if match := PEER_DAYS.search(detail):
            return SeenCertificate(seen + int(match[1]) * DAY_S, seen)
        if EXPIRED in detail:
            return SeenCertificate(seen, seen)
    return None
