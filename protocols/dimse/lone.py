"""Finds the studies of series that are asked for without them.

PS3.4 section C.4.1.2.1 has series searched for within their study; most peers search all that they have, others refuse
that or find nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from protocols.dimse.query import Finder
from protocols.dimse.sample import Sampler
from transfer.errors import Busy, Misconfigured


def studies_of(finder: Finder, series: Iterable[str]) -> list[str] | None:
    """Return the studies that series belong to; None if the peer can't search for series without their study.

    Where it finds nothing, a series that it has shows whether it can.
    """
    try:
        found, is_heeded = _asked(finder, series)
        if found or not is_heeded:
            return found or None
        sample = Sampler(finder, datetime.now(UTC).date()).find()
        if sample is None:
            return None
        found, is_heeded = _asked(finder, [sample.series.uid])
        return [] if is_heeded and sample.series.study in found else None
    except (Misconfigured, Busy):
        return None


def _asked(finder: Finder, series: Iterable[str]) -> tuple[list[str], bool]:
    """Return the studies of what the peer finds, and whether that is only what it was asked for."""
    found, is_heeded = dict[str, None](), True
    for uid in series:
        for one in finder.ask_for("SERIES", {"SeriesInstanceUID": uid}, ("StudyInstanceUID",)):
            if one.get("SeriesInstanceUID") == uid:
                found[str(one.get("StudyInstanceUID", ""))] = None
            else:
                is_heeded = False
    found.pop("", None)
    return list(found), is_heeded
