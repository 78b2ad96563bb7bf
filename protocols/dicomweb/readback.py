"""Verifies what a DICOMweb server was sent: asks it what it has (QIDO), or reads it back and compares (WADO).

Servers may write file meta information of their own, and may change the header (merge patients, coerce elements), so an
instance counts as the same if its pixel data is the same in the same transfer syntax, or, without pixel data, if the
whole data set is.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from enum import Enum
from pathlib import Path

from imaging.header import Header
from protocols.dicomweb import qido, wado_request
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.pages import Archive, CutShort
from protocols.dicomweb.service import Service
from protocols.dicomweb.stow_body import uid_of
from protocols.files.alike import equal, pixel_data
from transfer.errors import Cancelled, Denied, DispatchError, Misconfigured, NotFound, Rejected
from transfer.fanout import each
from transfer.plan import Item, Plan

LISTED_WAIT_S = 20.0  # how long a server may take until what it took shows up in its searches
FIRST_WAIT_S = 0.25  # doubles with each look


class Unverifiable(Exception):
    """The server doesn't answer what verification asks; the text says why."""


class Verdict(Enum):
    """What reading an instance back showed."""

    SAME = "the same"
    CHANGED = "changed by the server, except for the pixel data"
    UNLIKE = "can't be compared"
    OTHER = "read back with other pixel data"
    MISSING = "accepted, but can't be read back"


def unlisted(
    service: Service, items: Iterable[Item], check: Callable[[], None], wait_s: float | None = None
) -> list[Item]:
    """Return the items that the server doesn't list; those that appear a little later count as listed.

    Args:
        wait_s: the longest time for that; None for `LISTED_WAIT_S`.

    Raises:
        Unverifiable: it can't be searched. DispatchError: it can't be reached just now.
    """
    by_series: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        if item.header:
            by_series[item.header.StudyInstanceUID, item.header.SeriesInstanceUID].append(item)
    archive = Archive(service)
    wait_s = LISTED_WAIT_S if wait_s is None else wait_s
    end, wait = time.monotonic() + wait_s, FIRST_WAIT_S
    while True:
        for key, wanted in list(by_series.items()):
            check()
            by_series[key] = _unlisted(archive, key, wanted, check)
            if not by_series[key]:
                del by_series[key]
        if not by_series or time.monotonic() > end:
            return [item for left in by_series.values() for item in left]
        dicomweb.pause(wait, check)
        wait *= 2


def listed(service: Service, items: Iterable[Item], check: Callable[[], None]) -> list[Item]:
    """Return the items that the server lists, with one search for each series; none if it can't be searched."""
    archive, found = Archive(service), set[str]()
    wanted = [item for item in items if item.header]
    for series in {(item.header.StudyInstanceUID, item.header.SeriesInstanceUID) for item in wanted if item.header}:
        check()
        try:
            found.update(qido.instances(archive, *series))
        except Cancelled:
            raise
        except DispatchError:
            continue
    return [item for item in wanted if uid_of(item) in found]


def _unlisted(archive: Archive, series: tuple[str, str], wanted: list[Item], check: Callable[[], None]) -> list[Item]:
    """Return the items of a series that the server neither lists nor has when it is asked for each."""
    listed: set[str] = set()
    whole = True
    try:
        try:
            listed.update(qido.instances(archive, *series))
        except NotFound:
            qido.probe(archive.service)  # raises if it is the whole service that isn't there
        except CutShort:
            whole = False
        missing = [item for item in wanted if uid_of(item) not in listed]
        found = {}
        for item in missing:
            check()
            found[item.path] = qido.holds(archive, *series, uid_of(item))
    except (NotFound, Misconfigured, Denied) as exc:
        raise Unverifiable(exc.message) from exc
    if not whole and None in found.values():
        raise Unverifiable(f"{archive.service.where}: lists only some of the instances of a series")
    return [item for item in missing if not found[item.path]]


def read_back(
    service: Service,
    plan: Plan,
    items: Iterable[Item],
    *,
    concurrency: int,
    check: Callable[[], None],
    judged: Callable[[Item, Verdict], None],
) -> None:
    """Fetch items again and report how each compares with what was sent.

    Raises:
        Unverifiable: the server gives nothing back. DispatchError: it can't be reached just now.
    """
    with tempfile.TemporaryDirectory(prefix="talaria-") as folder:

        def work(item: Item) -> None:
            check()
            judged(item, _compare(service, plan, item, Path(folder), check))

        each(items, work, concurrency, "read-back")


def _compare(service: Service, plan: Plan, item: Item, folder: Path, check: Callable[[], None]) -> Verdict:
    if item.header is None:
        return Verdict.UNLIKE
    sent = item.header
    uids = (sent.StudyInstanceUID, sent.SeriesInstanceUID, sent.SOPInstanceUID)
    try:
        with closing(wado_request.fetch(service, uids, lambda count: check())) as contents:
            for content in contents:
                with wado_request.spooled(content, folder) as (file, got):
                    if got.SOPInstanceUID == sent.SOPInstanceUID:
                        with plan.open(item) as ours, file.open("rb") as theirs:
                            return _verdict(ours, sent, theirs.fileno(), got, check)
    except NotFound:
        return Verdict.MISSING
    except Rejected:  # theirs is damaged, or ours is not what it was
        return Verdict.UNLIKE
    except (Misconfigured, Denied) as exc:
        raise Unverifiable(exc.message) from exc
    return Verdict.MISSING


def _verdict(ours: int, sent: Header, theirs: int, got: Header, check: Callable[[], None]) -> Verdict:
    if got.TransferSyntaxUID != sent.TransferSyntaxUID:
        return Verdict.UNLIKE
    if equal(ours, sent.dataset_offset, theirs, got.dataset_offset, check):
        return Verdict.SAME
    pixels = [pixel_data(fd, header) for fd, header in ((ours, sent), (theirs, got))]
    if pixels[0] is None or pixels[1] is None:
        return Verdict.UNLIKE
    return Verdict.CHANGED if equal(ours, pixels[0], theirs, pixels[1], check) else Verdict.OTHER
