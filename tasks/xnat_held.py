"""What XNAT has of a study, compared with what it should have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocols.xnat import Client
from protocols.xnat_answers import Entry, Session
from tasks.xnat_names import entry_name, header_of
from transfer.plan import Item


@dataclass(frozen=True)
class Held:
    """What XNAT has of a study.

    Attributes:
        names: of its files.
        counts: files by series; None where XNAT tells only how many there are in all.
        total: files in all.
    """

    names: set[str]
    counts: dict[str, int] | None
    total: int

    def lacks(self, items: Sequence[Item]) -> dict[Item, str]:
        """The items that XNAT doesn't have, each with what was seen.

        A server that gives the files names of its own (or a session that came another way) is compared by count:
        series by series where it can be.
        """
        missing: dict[Item, str] = {}
        for uid, members in by_series(items).items():
            absent = [item for item in members if name_of(item) not in self.names]
            if not absent:
                continue
            if self.counts is None:
                count, wanted, what = self.total, len(items), "the study"
            else:
                count, wanted, what = self.counts.get(uid, 0), len(members), f"series {uid}"
            if len(absent) == len(members) and count >= wanted:
                continue  # as many as there should be, under names of XNAT's own
            seen = f"XNAT has {count} of {wanted} files of {what}"
            for item in absent:
                missing[item] = seen if len(absent) == len(members) else f"{seen}, and not this one"
        return missing


def held_in_archive(client: Client, project: str, session: Session) -> Held:
    """What an archived session has."""
    counts: dict[str, int] = defaultdict(int)
    for scan in session.scans:
        counts[scan.uid] += scan.files
    return Held(client.files(project, session.label), counts, sum(counts.values()))


def held_in_prearchive(client: Client, entry: Entry) -> Held:
    """What an entry of the prearchive has; the prearchive doesn't tell the UIDs of series."""
    names, total = client.entry_files(entry)
    return Held(names, None, total)


def name_of(item: Item) -> str:
    """What an item is called at XNAT."""
    return entry_name(header_of(item).SOPInstanceUID)


def distinct(items: Iterable[Item]) -> list[Item]:
    """One item for each instance, the first by path: XNAT keeps a single file of it."""
    return list({name_of(item): item for item in reversed(list(items))}.values())


def by_series(items: Iterable[Item]) -> dict[str, list[Item]]:
    series: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        series[header_of(item).SeriesInstanceUID].append(item)
    return series
