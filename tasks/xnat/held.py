"""What XNAT has of a study, compared with what it should have."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from protocols.xnat.answers import CatalogEntry, ImageSession
from protocols.xnat.client import XnatClient
from tasks.xnat.names import entry_name
from transfer.plan import Item, header_of

_TELLING = re.compile(r"[0-2](\.\d+){2,}\.dcm")  # the name of a file that was sent under its instance's UID


class Held:
    """What XNAT has of a study.

    The names of files that we sent (or that others named in the same way) show which instances they are. Of other files
    only the number is known: XNAT names what came over DICOM itself, and some servers rename all.

    Args:
        files: series, "" where XNAT gives none, and name of each file.
    """

    def __init__(self, files: Iterable[tuple[str, str]] = ()) -> None:
        self.names: set[str] = set()
        self.counts: Counter[str] = Counter()  # files by series
        self.loose: Counter[str] = Counter()  # of them, those whose names say nothing
        for series, name in files:
            self.names.add(name)
            self.counts[series] += 1
            self.loose[series] += not _TELLING.fullmatch(name)

    def lacks(self, items: Iterable[Item], study: Sequence[Item], before: Held | None = None) -> dict[str, str]:
        """Return the paths of the items that XNAT doesn't have, each with what was seen instead.

        Args:
            items: one for each instance.
            study: all items of the study, one for each instance.
            before: what XNAT had before these items were imported.
        """
        groups = by_series(study)
        if not self.counts.keys() & groups.keys():
            groups = {"": list(study)}  # XNAT gives no series, or a script gave them other UIDs
        wanted = {item.path for item in items}
        missing: dict[str, str] = {}
        for series, members in groups.items():
            unseen = [item for item in members if name_of(item) not in self.names]
            absent = [item.path for item in unseen if item.path in wanted]
            if not absent:
                continue
            loose = self._loose(series)
            if loose == len(unseen) or (before is not None and loose - before._loose(series) >= len(absent)):
                continue  # just as many whose names say nothing as there should be
            count = self.counts[series] if series else self.counts.total()
            what = f"series {series}" if series else "the study"
            seen = f"XNAT has {count} of {len(members)} files of {what}, and not this one"
            missing |= dict.fromkeys(absent, seen)
        return missing

    def _loose(self, series: str) -> int:
        return self.loose[series] if series else self.loose.total()


def held_in_archive(client: XnatClient, project: str, session: ImageSession) -> Held:
    """Return what an archived session has."""
    series = {scan.id: scan.uid for scan in session.scans}
    return Held((series.get(scan, ""), name) for scan, name in client.files(project, session.label))


def held_in_prearchive(client: XnatClient, entry: CatalogEntry) -> Held:
    """Return what an entry of the prearchive has; the prearchive doesn't give series UIDs."""
    return Held(("", name) for name in client.entry_files(entry))


def name_of(item: Item) -> str:
    """Return an item's file name at XNAT."""
    return entry_name(header_of(item).SOPInstanceUID)


def distinct(items: Iterable[Item]) -> list[Item]:
    """Return one item for each instance, the first by path: XNAT keeps a single file of it."""
    return list({name_of(item): item for item in reversed(list(items))}.values())


def by_series(items: Iterable[Item]) -> dict[str, list[Item]]:
    series: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        series[header_of(item).SeriesInstanceUID].append(item)
    return series
