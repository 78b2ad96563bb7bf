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
from protocols.dimse.transport import Peer
from protocols.net.connection import SLICE_S
from protocols.net.hiding import forms
from protocols.net.words import clean
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, Retryable

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PENDING = (0xFF00, 0xFF01)  # PS3.4 table C.4-1
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
        raise refusal(association, status, identifier)
    return matches


def refusal(association: Association, status: Dataset, identifier: Dataset) -> DispatchError:
    """Classify a final status of C-FIND that is not success; the peer's words lose what was asked for."""
    code = int(status.Status)
    asked = {form for element in identifier for form in forms(str(element.value))}
    comment = clean(str(status.get("ErrorComment", "")), asked)
    text = f"{association.peer.where}: C-FIND answered with status {code:04X}" + (f" ({comment})" if comment else "")
    if code & 0xFF00 == 0xA700 or code == 0x0213:
        return Busy(text)
    if code == 0x0124:
        return Denied(text)
    if code == 0xFE00:
        return Interrupted(text)
    return Misconfigured(text)


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
