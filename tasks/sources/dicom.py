"""The units of a DICOM source: what its listener has received, each with its sender, and with the routes that take it.

A unit goes as a whole to the source's targets and to those of each route that one of its series fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from blocks import Target
from blocks.base import MASK
from blocks.dicom import DicomTarget
from blocks.dicom_source import DicomSource, Route
from blocks.source import Source
from imaging.charset import decoded
from imaging.header import Damaged, NotDicom, read_elements
from protocols.net.tls import Tls
from tasks.names import split
from tasks.sources import again
from tasks.sources.inbox import look
from tasks.sources.ports import clash
from tasks.sources.units import Unit, in_time
from transfer.errors import DispatchError
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.oserrors import words_of
from transfer.plan import Item, Origin
from transfer.spool import FOLDER, ReceivedUnit, Spool, remove

CHARSET, STUDY_DESCRIPTION, SERIES_DESCRIPTION = 0x00080005, 0x00081030, 0x0008103E
NO_ROUTE = "no route takes it: add one that does, or name targets for all"


def root(source: DicomSource) -> str:
    """Return the folder, without links, that what a source receives lies in until it is delivered."""
    return str((Home.current().root / FOLDER / source.name).resolve())


def units(source: DicomSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Yield the units of a DICOM source; as `tasks.sources.units.units`."""
    there = sorted(Spool(Path(root(source))).units(), key=lambda one: one[0].version)
    known, now, held = ledger.sources.units(source.name), time.time(), f":{_mark_of(source)}"
    earlier: dict[ReceivedUnit, tuple[str, ...]] = {}
    for received, folder, changed in there:
        check()
        mark, _ = look(str(folder), source.globs)
        if not mark.files:
            remove(folder)  # all of it was delivered; what comes just now makes it again
            continue
        key, first = Item(folder.name, 0, 0).shown, replace(received, version=1)
        newest, oldest = max(changed, mark.newest_ns / 1e9), mark.oldest_ns / 1e9
        row = known.get(key)
        marks = (str(mark), f"{mark}{held}") if row is not None else ()
        as_before = next((one for one in marks if row and again.is_known(row, one, newest, now)), "")
        if as_before or newest <= now < min(newest + source.settle_s, oldest + source.longest_s):
            # It does not go now, and nobody asks where to: a backlog has hundreds of thousands of files to read.
            targets, unread = () if as_before.endswith(held) else source.reaches, ""
        else:
            targets, unread = _targets(source, received, folder, check)
        after = earlier.get(first, ())
        earlier[first] = (*after, key)
        why = "" if targets else NO_ROUTE
        unit = Unit(
            key=key,
            paths=(str(folder),),
            fingerprint=as_before or _fingerprint(source, str(mark), targets, unread),
            newest=newest,  # the folder's time is kept young while something is coming
            files=mark.files,
            origin=received.origin,
            targets=targets,
            problem=f"an instance that its routes depend on can't be read: {unread}" if unread else why,
            shown=shown(received),
            after=after,
            oldest=oldest,
        )
        yield in_time(unit, source)


def _fingerprint(source: DicomSource, mark: str, targets: tuple[str, ...], unread: str) -> str:
    """Return a unit's fingerprint; another one while it is held, so that it is looked at again when this may end."""
    if unread:
        return f"{mark}:unread"
    return mark if targets else f"{mark}:{_mark_of(source)}"  # other routes may take it


def _mark_of(source: DicomSource) -> str:
    """Return a mark of a source's routes."""
    text = json.dumps([route.model_dump() for route in source.routes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def problems(source: DicomSource, sources: Iterable[Source]) -> Iterator[str]:
    """Yield why a source can't listen, each reason a sentence; whether its port is free is seen when it does.

    Args:
        sources: all that are saved, or about to be.
    """
    for other in sources:
        if isinstance(other, DicomSource) and other.name != source.name and (why := clash(source, other)):
            yield why
    if source.tls_cert and source.tls_key.get_secret_value() != MASK:
        try:
            security(source).server()
        except DispatchError as exc:
            yield exc.message


def security(source: DicomSource) -> Tls:
    """Return the settings of TLS of a source; it checks no names, as senders come from anywhere."""
    return Tls(
        ca=source.ca_cert,
        cert=source.tls_cert,
        key=source.tls_key.get_secret_value(),
        key_password=source.tls_key_password.get_secret_value(),
        verify_hostname=False,
        profile=str(source.tls_profile),
    )


def shown(unit: ReceivedUnit) -> str:
    """Return what people see of a unit."""
    again = f", version {unit.version}" if unit.version > 1 else ""
    return f"{unit.uid} from {unit.calling} at {unit.host}{again}"


def confirmed(
    source: DicomSource, origin: Origin, uids: Collection[str], targets: Mapping[str, Target], ledger: Ledger
) -> set[str]:
    """Return those of some SOP Instance UIDs that all have confirmed whom a source sends what a sender sends it to.

    Each target must have confirmed them where it is now. Of routes that look into studies nobody knows which took an
    instance that is not there any more: all targets of one of them must have it, if it has no others.

    Args:
        targets: those that are saved, by name.
    """
    routes = [route for route in source.routes if route.fits_titles(origin.sender_aet, origin.receiver_aet)]
    certain = {*source.targets, *(name for route in routes if not route.reads for name in route.targets)}
    either = [set(route.targets) for route in routes] if not certain else [certain]

    def held_by_all(names: Iterable[str]) -> set[str]:
        held = set(uids)
        for name in {split(one)[1] for one in names}:
            target = targets.get(name)
            if target is None or not held:
                return set()
            place = "" if isinstance(target, DicomTarget) else None  # a node is one place, and keeps no names of files
            held = ledger.confirmed_instances(held, name, target.endpoint_for(origin), place)
        return held

    return set[str]().union(*map(held_by_all, either))


def waiting(home: Home, name: str) -> int:
    """Return how many units a DICOM source has received that are not delivered, whether it is there or not."""
    return sum(_holds_something(folder) for _, folder, _ in Spool(home.root / FOLDER / name).units())


def _holds_something(folder: Path) -> bool:
    """Return True if something lies in a unit's folder; a sweep may remove it just now."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False


def orphans(home: Home, names: Collection[str]) -> dict[str, int]:
    """Return how many units lie in the folders of sources that are not there any more, by the names that they had.

    Args:
        names: of all DICOM sources.
    """
    folder = home.root / FOLDER
    there = (
        [one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")]
        if folder.is_dir()
        else []
    )
    return {name: count for name in sorted(there) if name not in names and (count := waiting(home, name))}


def _targets(
    source: DicomSource, unit: ReceivedUnit, folder: Path, check: Callable[[], None]
) -> tuple[tuple[str, ...], str]:
    """Return the targets of a unit, those of the source first, and why nobody knows all of them now; "" if all are."""
    routes = [route for route in source.routes if route.fits_titles(unit.calling, unit.called)]
    taken = [route for route in routes if not route.reads]
    doubtful = [route for route in routes if route.reads]
    fitting, unread = _reading(doubtful, folder, check) if doubtful else ([], "")
    taken += fitting
    in_order = (name for route in routes if route in taken for name in route.targets)
    return tuple(dict.fromkeys((*source.targets, *in_order))), unread


def _reading(routes: list[Route], folder: Path, check: Callable[[], None]) -> tuple[list[Route], str]:
    """Return the routes that one of a unit's instances fits; a look at each series, until all have been found.

    Returns:
        Also why an instance that another route may fit can't be read now; "" if there is none.
    """
    taken: list[Route] = []
    unread = ""
    seen: set[tuple[str, str, str]] = set()
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        check()
        facts = None
        try:
            facts = _facts(folder / name)
        except (FileNotFoundError, Damaged, NotDicom):  # removed meanwhile; the dispatch says what is wrong
            continue
        except OSError as exc:
            unread = words_of(exc)
        if facts is None or facts in seen:
            continue
        seen.add(facts)
        taken += [route for route in routes if route not in taken and route.fits(*facts)]
        if len(taken) == len(routes):
            return taken, ""
    return taken, unread


def _facts(path: Path) -> tuple[str, str, str]:
    """Return an instance's modality, study description and series description."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        header, found = read_elements(fd, os.fstat(fd).st_size, (STUDY_DESCRIPTION, SERIES_DESCRIPTION))
    finally:
        os.close(fd)
    charset = found.get(CHARSET, b"")
    study, series = (
        decoded(found.get(tag, b""), charset).strip(" \0") for tag in (STUDY_DESCRIPTION, SERIES_DESCRIPTION)
    )
    return header.Modality, study, series
