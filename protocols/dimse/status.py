"""What the status of a C-STORE response means for a delivery.

Sources: PS3.4 Annex B.2.3 (Storage), PS3.7 Annex C (general), PS3.7 section 9.1.1.1.9.
"""

from __future__ import annotations

from enum import Enum


class Meaning(Enum):
    """What to do about a status."""

    SUCCESS = "stored"
    WARNING = "stored, with a warning"
    ALREADY = "already there"
    BUSY = "come back later"
    DENIED = "not authorised"
    FAILURE = "refused, this instance only"


# Status: meaning and the standard's words. Ranges are in `meaning`.
_KNOWN: dict[int, tuple[Meaning, str]] = {
    0x0000: (Meaning.SUCCESS, "success"),
    0x0001: (Meaning.WARNING, "requested optional attributes are not supported"),
    0x0107: (Meaning.WARNING, "attribute list error"),
    0x0110: (Meaning.FAILURE, "processing failure"),
    0x0111: (Meaning.ALREADY, "duplicate SOP instance"),
    0x0115: (Meaning.FAILURE, "invalid argument value"),
    0x0116: (Meaning.WARNING, "attribute value out of range"),
    0x0117: (Meaning.FAILURE, "invalid SOP instance"),
    0x0118: (Meaning.FAILURE, "no such SOP class"),
    0x0119: (Meaning.FAILURE, "class-instance conflict"),
    0x0120: (Meaning.FAILURE, "missing attribute"),
    0x0122: (Meaning.FAILURE, "SOP class not supported"),
    0x0124: (Meaning.DENIED, "not authorised"),
    0x0210: (Meaning.FAILURE, "duplicate invocation"),
    0x0211: (Meaning.FAILURE, "unrecognised operation"),
    0x0212: (Meaning.FAILURE, "mistyped argument"),
    0x0213: (Meaning.BUSY, "resource limitation"),
    0xB000: (Meaning.WARNING, "coercion of data elements"),
    0xB006: (Meaning.WARNING, "elements discarded"),
    0xB007: (Meaning.WARNING, "data set does not match SOP class"),
}


def meaning(status: int) -> tuple[Meaning, str]:
    """Return the meaning of a C-STORE status, and its words.

    A status that no clause defines counts as a failure of its instance: PS3.7 Annex C has no other final statuses than
    success, warning and failure, and only the first two mean that the instance was kept.
    """
    if status in _KNOWN:
        return _KNOWN[status]
    high = status & 0xFF00
    if status & 0xF000 == 0xB000:
        return Meaning.WARNING, "warning"
    if high == 0xA700:
        return Meaning.BUSY, "refused: out of resources"
    if high == 0xA900:
        return Meaning.FAILURE, "data set does not match SOP class"
    if status & 0xF000 == 0xC000:
        return Meaning.FAILURE, "cannot understand"
    return Meaning.FAILURE, "unknown status"
