"""What a STOW answer says about each instance, and the meaning of its reasons.

Sources: PS3.18 section 10.5.3 and Annex I.2, PS3.4 Annexes B.2.3 and J.3.4, PS3.7 Annex C; the codes of Azure's
DICOM service are in its conformance statement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from imaging import json as dicomjson
from transfer.outcome import Kind, Outcome

_AZURE_EXISTS = 0xB00E  # 45070
_AZURE_IN_PROGRESS = 0xB00F  # 45071: the same instance is being stored by another request
_PROCESSING_FAILURE = 0x0110
_RESOURCE_LIMITATION = 0x0213

_ACCEPTED, _FAILED, _OTHERS = "00081199", "00081198", "0008119A"

ALREADY = frozenset((0x0111, _AZURE_EXISTS))
# Servers say this of damaged instances and of their own trouble alike.
ONCE_MORE = frozenset((_PROCESSING_FAILURE,))

FAILURES = {
    _PROCESSING_FAILURE: "processing failure",
    0x0111: "duplicate SOP instance",
    0x0112: "no such SOP instance",
    0x0117: "invalid SOP instance",
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    _RESOURCE_LIMITATION: "resource limitation",
    _AZURE_EXISTS: "is there already",
    _AZURE_IN_PROGRESS: "is being stored by another request",
    0xA901: "data set does not match the study or the SOP class",
    0xC122: "transfer syntax not supported",
}
RANGES = (
    (0xA700, 0xA7FF, "out of resources"),
    (0xA900, 0xA9FF, "data set does not match the SOP class"),
    (0xC000, 0xCFFF, "cannot understand the instance"),
)
WARNINGS = {
    0xB000: "data elements were coerced",
    0xB006: "data elements were discarded",
    0xB007: "data set does not match the SOP class",
}


@dataclass(frozen=True)
class Failure:
    """One item of a list of failures: its reason's code, None if there is none, and the server's comment."""

    code: int | None
    comment: str = ""


def is_busy(code: int | None) -> bool:
    """Return True if the server may accept the same instance later."""
    return code is not None and (0xA700 <= code <= 0xA7FF or code in (_AZURE_IN_PROGRESS, _RESOURCE_LIMITATION))


def failure(failed: Failure) -> str:
    """Return a failure's reason in words, with its code."""
    code = failed.code
    if code is None:
        return "refused by the server without a reason"
    text = FAILURES.get(code) or next((text for low, high, text in RANGES if low <= code <= high), "refused")
    return f"{text} ({code:04X})"


def warning(code: int) -> Outcome | None:
    """Return the outcome of an instance that was stored with this warning reason; None for none."""
    if not code:
        return None
    return Outcome(Kind.WARNING, f"{WARNINGS.get(code, 'stored with a warning')} ({code:04X})")


@dataclass
class Lists:
    """The three lists of an answer."""

    accepted: dict[str, int]  # warning reason by SOP instance UID, 0 for none
    failed: dict[str, Failure]
    others: list[Failure]  # failures that belong to no UID
    nameless: int = 0  # accepted instances without a UID

    @classmethod
    def of(cls, content: bytes) -> Lists | None:
        """Return the lists of an answer; None if it has none of them."""
        try:
            answers = dicomjson.parse(content) if content else []
        except ValueError:
            return None
        if not any(tag in answer for answer in answers for tag in (_ACCEPTED, _FAILED, _OTHERS)):
            return None
        found = cls({}, {}, [])
        for answer in answers:
            for one in _items(answer, _ACCEPTED):
                if uid := dicomjson.text(one, "00081155"):
                    found.accepted[uid] = dicomjson.number(one, "00081196") or 0
                else:
                    found.nameless += 1
            for one in _items(answer, _FAILED) + _items(answer, _OTHERS):
                failure = Failure(dicomjson.number(one, "00081197"), _comment(one))
                if uid := dicomjson.text(one, "00081155"):
                    found.failed[uid] = failure
                else:
                    found.others.append(failure)
        return found

    def under_other_uids(self, sent: Iterable[str]) -> int:
        """Return how many instances were accepted under UIDs that were not sent, or under none."""
        return len(self.accepted.keys() - set(sent)) + self.nameless


def _items(answer: dicomjson.Attributes, tag: str) -> list[dicomjson.Attributes]:
    return [one for one in dicomjson.values(answer, tag) if isinstance(one, dict)]


def _comment(failed: dicomjson.Attributes) -> str:
    """Return the server's own words: Error Comment (0000,0902), Google's FailureDetail (0009,0097).

    They are in the item, or in its Failed Attributes Sequence (0074,1048).
    """
    inner = _items(failed, "00741048")
    texts = (dicomjson.text(one, tag) for one in (failed, *inner) for tag in ("00000902", "00090097"))
    return "; ".join(filter(None, dict.fromkeys(texts)))
