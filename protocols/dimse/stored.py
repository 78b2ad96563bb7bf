"""Reads how the data set of one instance begins, by C-GET: what an archive has stored, where its answers show less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from protocols.dimse import identifier
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.get import PATIENT_ROOT_GET, getter
from protocols.dimse.offers import USUAL_CLASSES, pairs_for
from protocols.dimse.transport import Peer
from transfer.errors import Permanent
from transfer.throttle import Throttle

BEGINNING = 65_536  # bytes of a data set in which its study is described
UNREADABLE = frozenset(("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"))  # big endian, and deflated


def values(
    peer: Peer, keys: Mapping[str, str], classes: Iterable[str], check: Callable[[], None], charset: str = ""
) -> dict[str, Any] | None:
    """Return the first values of an instance, by keyword; None if the peer gives none.

    Args:
        keys: UIDs of study, series and, where known, instance; of a patient, where the peer needs it.
        classes: SOP classes that it may have; empty if they are not known.
        charset: of the patient's ID.

    Raises:
        Retryable: the peer can't be asked now, or the link broke. Cancelled: by `check`.
    """
    level = "IMAGE" if keys.get("SOPInstanceUID") else "SERIES"
    pairs = [pair for pair in pairs_for(dict.fromkeys(classes or USUAL_CLASSES, ())) if pair[1] not in UNREADABLE]
    try:
        retriever = getter(peer, pairs, check, Throttle(None), lambda count: None)
        if not (retriever.root and retriever.stores):
            retriever.association.release()
            return None
        asked = {key: value for key, value in keys.items() if key != "PatientID" or retriever.root == PATIENT_ROOT_GET}
        with retriever:
            begin, syntax = retriever.beginning(asked | {"QueryRetrieveLevel": level}, BEGINNING, charset)
            retriever.association.abort(until_closed=True)
    except Permanent:  # what it refuses; a link that breaks, or a stop, says nothing about the instance
        return None
    explicit = identifier.EXPLICIT_LITTLE  # as all syntaxes are that compress pixels
    return identifier.read(begin, syntax if syntax in UNCOMPRESSED else explicit) if begin else None
