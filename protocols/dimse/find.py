"""Asks a peer which instances it has.

Source: PS3.4 Annex C.6.2 (Study Root C-FIND).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.direct import associate
from protocols.dimse.query import STUDY_ROOT_FIND, Finder
from protocols.dimse.transport import Peer
from protocols.net.connection import SLICE_S
from transfer.errors import Cancelled, DispatchError, Retryable

TRIES = 3  # how often a peer is asked for what it doesn't list: archives index what they got with some delay
PAUSE_S = 2.0


@dataclass(frozen=True)
class Stored:
    """An instance that a peer should have."""

    study: str
    series: str
    instance: str


class CannotList(Exception):
    """The peer can't be asked what it has; the text says why."""


def missing(peer: Peer, wanted: Iterable[Stored], check: Callable[[], None] = lambda: None) -> set[str]:
    """Return which of these SOP instance UIDs the peer does not list, having asked it several times.

    Asks at IMAGE level, series by series, for the UIDs of all instances.

    Raises:
        CannotList: it doesn't support Study Root C-FIND, or not this query.
        Retryable: the association ended, or there is none now. Cancelled: by `check`.
    """
    by_series: dict[tuple[str, str], set[str]] = {}
    for one in wanted:
        if not one.study or not one.series:
            raise CannotList("some instances have no Study or Series Instance UID")
        if not (one.study.isascii() and one.series.isascii()):
            raise CannotList("some instances have a Study or Series Instance UID that is not valid")
        by_series.setdefault((one.study, one.series), set()).add(one.instance)
    if not by_series:
        return set()
    try:
        association = associate(peer, [(STUDY_ROOT_FIND, UNCOMPRESSED)], check)
    except (Retryable, Cancelled):
        raise
    except DispatchError as exc:
        raise CannotList(exc.message) from exc
    if not association.accepted:
        raise CannotList("the peer does not support Study Root C-FIND")
    try:
        with Finder(association, check) as asked:
            return _missing(asked, by_series, check)
    except (Retryable, Cancelled):
        raise
    except DispatchError as exc:
        raise CannotList(exc.message) from exc


def _missing(asked: Finder, by_series: dict[tuple[str, str], set[str]], check: Callable[[], None]) -> set[str]:
    for attempt in range(TRIES):
        if attempt:
            _pause(PAUSE_S, check)
        by_series = {
            (study, series): absent
            for (study, series), instances in by_series.items()
            if (absent := instances - _listed(asked, study, series))
        }
        if not by_series:
            break
    return set().union(*by_series.values())


def _listed(asked: Finder, study: str, series: str) -> set[str]:
    keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series}
    return {str(match.get("SOPInstanceUID", "")) for match in asked.ask_for("IMAGE", keys, ("SOPInstanceUID",))}


def _pause(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_S))
        check()
