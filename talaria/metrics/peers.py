"""When the certificates of targets expire, as they were shown last: kept in the ledger, and asked for once a day.

A check tells too, but nobody need make one: a certificate that was renewed is seen, and one that soon expires is known,
within a day, also after a restart and when the check itself was removed. Only a handshake is made, in a thread of its
own; nothing is sent, and whoever vouches for the certificate does not matter.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from blocks.base import Target
from blocks.dicom_tls import DicomTlsTarget
from protocols.http.origin import WebOrigin
from protocols.net.connection import connect
from protocols.net.tls import Tls, certificate_shown
from transfer.database import LOST
from transfer.errors import DispatchError
from transfer.home import Home
from transfer.ledger import Ledger

DAY_S = 86_400.0
AGAIN_S = 3600.0  # after a handshake that showed nothing
PREFIX = "peer/"  # begins the subject of what stands of a target's certificate
logger = logging.getLogger(__name__)

_lock = threading.Lock()  # held while the targets are asked
_tried: dict[str, float] = {}  # by subject, in seconds since the epoch


@dataclass(frozen=True)
class SeenCertificate:
    """When a certificate expires, and when it was seen; in seconds since the epoch."""

    expires: float
    seen: float


def subject(target: Target) -> str:
    """Return by what the certificate of a target is known: it is another one where its data goes elsewhere."""
    return f"{PREFIX}{target.name}/{target.endpoint_for()}"


def kept(ledger: Ledger) -> dict[str, SeenCertificate]:
    """Return all that are known, by `subject`."""
    found = {}
    for name, state in ledger.happenings.standings(PREFIX).items():
        with suppress(ValueError):
            expires, seen = map(float, state.split())
            found[name] = SeenCertificate(expires, seen)
    return found


def keep(ledger: Ledger, target: Target, one: SeenCertificate) -> None:
    """Keep when a target's certificate expires."""
    ledger.happenings.stands(subject(target), f"{one.expires:.0f} {one.seen:.0f}")


def ask_again(home: Home, targets: Iterable[Target]) -> None:
    """Ask those targets in the background of whose certificates nothing was seen for a day."""
    now = time.time()
    asked = [one for one in targets if one.enabled and _has_one(one) and _tried.get(subject(one), 0.0) <= now - AGAIN_S]
    if asked and not _lock.locked():
        threading.Thread(target=_ask, args=(home, asked), name="certificates", daemon=True).start()


def ask(ledger: Ledger, targets: Iterable[Target]) -> None:
    """Shake hands with the targets of whose certificates nothing was seen for a day; keep what they show."""
    known = kept(ledger)
    for target in targets:
        name, now = subject(target), time.time()
        _tried[name] = now
        if (last := known.get(name)) and last.seen > now - DAY_S:
            continue
        with suppress(DispatchError, OSError, ValueError):
            if found := _shown_by(target):
                expires = datetime.fromisoformat(found["expires"]).timestamp()
                keep(ledger, target, SeenCertificate(expires, now))


def _ask(home: Home, targets: list[Target]) -> None:
    if not _lock.acquire(blocking=False):
        return
    try:
        with Ledger(home.ledger) as ledger:
            ask(ledger, targets)
    except LOST as exc:  # the next look tries again
        logger.warning("certificates of targets can't be kept: %s", type(exc).__name__)
    finally:
        _lock.release()


def _has_one(target: Target) -> bool:
    return isinstance(target, DicomTlsTarget) or _url(target).startswith("https://")


def _url(target: Target) -> str:
    return str(getattr(target, target.host_in, "") or "") if target.host_in else ""


def _shown_by(target: Target) -> dict[str, Any]:
    """Return the certificate that a target shows; {} if it shows none.

    Raises:
        DispatchError, OSError: it can't be reached.
    """
    wait_s = target.connect_timeout_s
    if isinstance(target, DicomTlsTarget):
        return certificate_shown(connect(target.host, target.port, wait_s), target.host, wait_s)
    proxy = getattr(target, "proxy", None)
    way = proxy.get_secret_value() if proxy is not None else ""
    origin = WebOrigin.of(_url(target), Tls(), wait_s, wait_s, way)
    return certificate_shown(origin.reach(lambda: None), origin.host, wait_s)
