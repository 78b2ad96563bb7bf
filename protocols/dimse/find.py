"""C-FIND, and asking a peer which instances it has.

Source: PS3.4 Annex C.4.1 (C-FIND), C.6.2 (Study Root).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pynetdicom.association import Association as PynetdicomAssociation

from protocols.dimse.association import Association, associate
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.query import PENDING, STUDY_ROOT_FIND, refusal
from protocols.dimse.transport import Peer
from protocols.net.connection import SLICE_S
from protocols.net.hiding import forms
from protocols.net.words import clean
from transfer.errors import DispatchError, Retryable

TRIES = 3  # how often a peer is asked for what it doesn't list: archives index what they got with some delay
PAUSE_S = 2.0


def find(
    association: Association, model: str, identifier: Dataset, check: Callable[[], None] = lambda: None
) -> list[Dataset]:
    """Return everything that matches, as the peer gives it.

    Raises:
        Interrupted, TimedOut: the answer is not complete. Busy: the peer has no room for it now.
        Denied: not authorised. Misconfigured: the peer can't do this query; the message has its status.
    """
    begun = time.monotonic()

    def run(assoc: PynetdicomAssociation) -> tuple[list[Dataset], Dataset]:
        matches, status = [], Dataset()
        for status, match in assoc.send_c_find(identifier, model):
            if "Status" in status and status.Status in PENDING and match is not None:
                matches.append(match)
        return matches, status

    matches, status = association.call("C-FIND", run, check)
    if "Status" not in status:
        raise association.lost("C-FIND", begun)
    if status.Status != 0:
        asked = {form for element in identifier for form in forms(str(element.value))}
        comment = clean(str(status.get("ErrorComment", "")), asked)
        raise refusal(f"{association.peer.where}: C-FIND", int(status.Status), comment)
    return matches


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
        CannotList: it doesn't do Study Root C-FIND, or not this one.
        Retryable: the association ended, or there is none now.
    """
    by_series: dict[tuple[str, str], set[str]] = {}
    for one in wanted:
        if not one.study or not one.series:
            raise CannotList("some instances have no Study or Series Instance UID")
        by_series.setdefault((one.study, one.series), set()).add(one.instance)
    if not by_series:
        return set()
    try:
        association = associate(peer, [(STUDY_ROOT_FIND, UNCOMPRESSED)], check)
    except Retryable:
        raise
    except DispatchError as exc:
        raise CannotList(exc.message) from exc
    if not association.accepted:
        raise CannotList("the peer does not do Study Root C-FIND")
    try:
        absent = _missing(association, by_series, check)
    except Retryable:
        association.abort()
        raise
    except DispatchError as exc:
        association.release()
        raise CannotList(exc.message) from exc
    except BaseException:
        association.abort()
        raise
    association.release()
    return absent


def _missing(
    association: Association, by_series: dict[tuple[str, str], set[str]], check: Callable[[], None]
) -> set[str]:
    for attempt in range(TRIES):
        if attempt:
            _pause(PAUSE_S, check)
        by_series = {
            (study, series): absent
            for (study, series), instances in by_series.items()
            if (absent := instances - _listed(association, study, series, check))
        }
        if not by_series:
            break
    return set().union(*by_series.values())


def _listed(association: Association, study: str, series: str, check: Callable[[], None]) -> set[str]:
    query = Dataset()
    query.QueryRetrieveLevel = "IMAGE"
    query.StudyInstanceUID, query.SeriesInstanceUID, query.SOPInstanceUID = study, series, ""
    return {str(match.get("SOPInstanceUID", "")) for match in find(association, STUDY_ROOT_FIND, query, check)}


def _pause(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_S))
        check()
