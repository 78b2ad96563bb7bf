"""Copies of instances that are here already: of all that has one UID in a retrieval, one file is kept.

Archives hold series that were copied, or split wrongly, with the UIDs of their instances; and some peers answer a list
of instances with the whole series, on each of several associations.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, MutableMapping
from pathlib import Path

from imaging.header import Header
from protocols.files import instances
from protocols.files.alike import same
from transfer.outcome import ALREADY, Outcome
from transfer.plan import Item

NAMED_S = 3.0  # for a file that is just getting its name
LOOK_S = 0.05


class Copies:
    """What has come in one retrieval, of all its series and associations.

    Args:
        here: what is in the folder, by UID.
        counts: called with the UID of a series when an instance of it is here in another one.

    Attributes:
        uids: of what has its name, or is about to get it.
        lock: of these.
        elsewhere: by series, its instances that are here in another series.
    """

    def __init__(
        self, folder: Path, here: MutableMapping[str, Item], counts: Callable[[str], None], check: Callable[[], None]
    ) -> None:
        self.uids: set[str] = set()
        self.lock = threading.Lock()
        self.elsewhere: defaultdict[str, set[str]] = defaultdict(set)
        self._folder, self._here, self._counts, self._check = folder, here, counts, check

    def look(self, wanted: Collection[str], counts: Counter[str], report: Callable[[Item, Outcome], None]) -> None:
        """Find the instances of some series that are in the folder already; count them by series, and report them."""
        for uid, series, item in instances.here(self._folder, wanted, self._check):
            self._here[uid] = item
            self.uids.add(uid)
            counts[series] += 1
            report(item, ALREADY)

    def has(self, series: str, uid: str) -> bool:
        """Return True if an instance of a series is here, in that series or in another one."""
        item = self._here.get(uid)
        if item is None or item.shared is None:
            return False
        return item.shared.SeriesInstanceUID == series or uid in self.elsewhere[series]

    def second(self, series: str, fd: int, header: Header) -> str:
        """Return why a copy is not taken; "" if the instance that is here serves for it.

        Args:
            series: UID of the series that was asked for.
            fd: of a file that holds the copy, which has no name yet.
        """
        uid, end = header.SOPInstanceUID, time.monotonic() + NAMED_S
        while (first := self._here.get(uid)) is None:
            if uid not in self.uids or time.monotonic() > end:
                return "another one of the same UID could not be kept"
            time.sleep(LOOK_S)
            self._check()
        if first.header is None:
            return ""
        here = first.header.SeriesInstanceUID == series
        if here and first.header.TransferSyntaxUID != header.TransferSyntaxUID:
            return ""  # asked for anew, it comes as this association has it
        with (self._folder / first.path).open("rb") as file:
            if not same(file.fileno(), first.header, fd, header, self._check):
                where = "came before" if here else f"is in series {first.header.SeriesInstanceUID}"
                return f"another instance of the same UID {where}"
        if here:
            return ""
        with self.lock:
            new = uid not in self.elsewhere[series]
            self.elsewhere[series].add(uid)
        if new:
            self._counts(series)
        return ""
