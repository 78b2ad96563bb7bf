"""What needs somebody besides targets and dispatches: sources that are stuck, certificates soon over, disks low."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from blocks import Source, Target
from talaria.metrics import certificates, disks
from talaria.service import Office, sources
from tasks.checking import last_checks
from tasks.documents import Broken
from tasks.sources.saved import KEPT
from transfer.ledger import Ledger

DAYS = 30  # before the end of a certificate
FREE_PERCENT = 10.0  # of a disk; as rules have it where nothing else is set
ATTENDED = ("failed", "held")  # states of units that wait for somebody


class Need(StrEnum):
    """Why something needs somebody."""

    SOURCE_BROKEN = "source.broken"
    SOURCE_STUCK = "source.stuck"
    SOURCE_UNITS = "source.units"
    SOURCE_CERTIFICATE = "source.certificate"
    SOURCE_AUTHORITY = "source.authority"
    CERTIFICATE_OWN = "certificate.own"
    CERTIFICATE_PEER = "certificate.peer"
    CERTIFICATE_AUTHORITY = "certificate.authority"
    CERTIFICATE_SERVER = "certificate.server"
    DISK = "disk"


@dataclass(frozen=True)
class Attention:
    """Something that needs somebody.

    Attributes:
        name: of the source or target; "" for this server itself.
        why: in a sentence, of a source that is broken or stuck.
        count: of units, or days until a certificate ends (less than 0: since then).
        percent, free: of a disk, in percent and bytes.
    """

    need: Need
    name: str
    why: str = ""
    count: int = 0
    percent: float = 0.0
    free: int = 0


async def needed(office: Office, saved: Sequence[Target | Broken], certificate: str) -> list[Attention]:
    """Return what needs somebody, sources first.

    Args:
        saved: all targets.
        certificate: file of the front door's certificate, "" for none.
    """
    rows = (await sources.list_sources(office))["sources"]
    checks = await last_checks(office.client, saved)
    targets = [one for one in saved if isinstance(one, Target)]
    there = [one for one in await KEPT.all(office.client) if isinstance(one, Source)]

    def looked() -> list[Attention]:
        found = [*_sources(rows)]
        with Ledger(office.home.ledger) as ledger:
            known = certificates.known(certificate, targets, checks, there, ledger)
        found += sorted(_certificates(known), key=lambda one: one.count)
        return [*found, *_disks(disks.spaces(office.home, targets))]

    return await asyncio.to_thread(looked)


def _sources(rows: Sequence[dict[str, Any]]) -> Iterator[Attention]:
    for row in rows:
        if row["broken"]:
            yield Attention(Need.SOURCE_BROKEN, row["name"], why=row["broken"])
            continue
        if not row["enabled"]:  # somebody has paused it, and knows
            continue
        if row["problem"]:
            yield Attention(Need.SOURCE_STUCK, row["name"], why=row["problem"])
        if count := sum(row["units"][state] for state in ATTENDED):
            yield Attention(Need.SOURCE_UNITS, row["name"], count=count)


def _certificates(known: Sequence[certificates.KnownCertificate]) -> Iterator[Attention]:
    needs = {
        certificates.OWN: Need.CERTIFICATE_OWN,
        certificates.PEER: Need.CERTIFICATE_PEER,
        certificates.SERVER: Need.CERTIFICATE_SERVER,
        certificates.AUTHORITY: Need.CERTIFICATE_AUTHORITY,
        certificates.LISTENER: Need.SOURCE_CERTIFICATE,
        certificates.SENDERS: Need.SOURCE_AUTHORITY,
    }
    for one in known:
        if one.days <= DAYS:
            server = one.whose == certificates.SERVER
            yield Attention(needs[one.whose], "" if server else one.of, count=int(one.days // 1))


def _disks(spaces: Sequence[disks.DiskSpace]) -> Iterator[Attention]:
    for one in spaces:
        if one.percent < FREE_PERCENT:
            name = "" if one.of == disks.STATE else one.of
            yield Attention(Need.DISK, name, percent=one.percent, free=one.free)
