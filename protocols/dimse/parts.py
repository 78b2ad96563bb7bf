"""How a search is split where a peer doesn't give all answers at once: by date, time of day, prefix, or modality.

Each splitter returns searches that together find what the original one does, or nothing if it can't split further.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Any

Keys = dict[str, str]
Splitter = Callable[[Keys, Sequence[dict[str, Any]]], list[Keys]]

DAY_S = 86_400
# With what an identifier or a name may begin, or go on; the others are wild cards, or end a value.
SIGNS = string.digits + string.ascii_uppercase + string.ascii_lowercase + "-_./ ^#+:,()=&@'!$%;<>[]{}|~`\""
PREFIXED = ("PatientID", "AccessionNumber", "PatientName")
UID_SIGNS = string.digits + "."
LONGEST, LONGEST_UID = 12, 64  # characters of a prefix
# Defined terms, retired ones too (PS3.3 section C.7.3.1.1.1).
MODALITIES = (
    "CT", "MR", "CR", "DX", "US", "MG", "NM", "PT", "XA", "RF", "OT", "SC", "SR", "PR", "KO", "SEG", "RTSTRUCT",
    "RTPLAN", "RTDOSE", "RTIMAGE", "REG", "ES", "ECG", "IO", "PX", "OP", "OPT", "SM", "GM", "XC", "BMD", "IVUS", "DOC",
    "ANN", "AR", "AS", "ASMT", "AU", "BDUS", "BI", "CD", "CF", "CFM", "CP", "CS", "CTPROTOCOL", "DD", "DF", "DG", "DM",
    "DMS", "DS", "EC", "EEG", "EMG", "EOG", "EPS", "FA", "FID", "FS", "HC", "HD", "IOL", "IVOCT", "KER", "LEN", "LP",
    "LS", "M3D", "MA", "MS", "OAM", "OCT", "OPM", "OPR", "OPTBSV", "OPTENF", "OPV", "OSS", "PA", "PLAN", "POS", "RESP",
    "RG", "RTINTENT", "RTRAD", "RTRECORD", "RTSEGANN", "RWV", "SMR", "SRF", "ST", "STAIN", "TEXTUREMAP", "TG", "VA",
    "VF", "XAPROTOCOL",
)  # fmt: skip
USUAL = date(1900, 1, 1), date(2199, 12, 31)  # where the middle is looked for if nothing says where studies are
LAST_S = DAY_S - 1


def by_date(keys: Keys, found: Sequence[dict[str, Any]]) -> list[Keys]:
    """Halve the dates, in the middle of what was found; a period stays open on the side on which it was."""
    halves = _halves(keys, found)
    return [keys | {"StudyDate": f"{date_text(begin)}-{date_text(end)}"} for begin, end in halves]


def by_closed_date(keys: Keys, found: Sequence[dict[str, Any]]) -> list[Keys]:
    """Halve the dates, for peers that don't accept a period with an open side."""
    halves = _halves(keys, found)
    return [keys | {"StudyDate": closed(f"{date_text(begin)}-{date_text(end)}")} for begin, end in halves]


def closed(period: str) -> str:
    """Return a period with both ends."""
    begin, _, end = period.partition("-")
    return f"{begin or date_text(date.min)}-{end or date_text(date.max)}"


def _halves(keys: Keys, found: Sequence[dict[str, Any]]) -> list[tuple[date | None, date | None]]:
    dates = sorted(str(one.get("StudyDate", "")) for one in found)
    if not all(day_of(value) for value in dates):
        return []  # what has no date is in no range
    first, dash, last = keys.get("StudyDate", "-").partition("-")
    if not dash:
        return []
    low, high = day_of(first), day_of(last)
    if (low and high and low >= high) or high == date.min:
        return []
    usual_low, usual_high = low or min(USUAL[0], high or USUAL[0]), high or max(USUAL[1], low or USUAL[1])
    middle = day_of(dates[(len(dates) - 1) // 2]) if dates else usual_low + (usual_high - usual_low) // 2
    middle = max(middle or usual_low, low or date.min)
    middle = min(middle, (high or date.max) - timedelta(days=1))
    return [(low, middle), (middle + timedelta(days=1), high)]


def by_time(keys: Keys, found: Sequence[dict[str, Any]]) -> list[Keys]:
    """Halve the time of day within a day, so that peers which compare text or drop fractions find each time once."""
    first, dash, last = keys.get("StudyDate", "-").partition("-")
    if (dash and first != last) or not all(str(one.get("StudyTime", "")) for one in found):
        return []
    begin, _, end = keys.get("StudyTime", "-").partition("-")
    low, high = seconds(begin), seconds(end) if end else LAST_S
    if low >= high:
        return []
    middle = (low + high) // 2
    return [
        keys | {"StudyTime": f"{begin}-{clock(middle)}.999999"},
        keys | {"StudyTime": f"{shortest(middle + 1)}-{end}"},
    ]


def by_prefix(key: str, signs: str = SIGNS, longest: int = LONGEST) -> Splitter:
    """Return a splitter by the next character of an identifier."""

    def split(keys: Keys, found: Sequence[dict[str, Any]]) -> list[Keys]:
        value = keys.get(key, "*")
        if not value.endswith("*") or value.count("*") > 1 or "?" in value or len(value) > longest:
            return []
        prefix = value[:-1]
        exact = [keys | {key: prefix}] if prefix else []
        return exact + [keys | {key: f"{prefix}{sign}*"} for sign in signs]

    return split


def by_modality(keys: Keys, found: Sequence[dict[str, Any]]) -> list[Keys]:
    """Split by modality."""
    if "ModalitiesInStudy" in keys:
        return []
    return [keys | {"ModalitiesInStudy": modality} for modality in MODALITIES]


SPLITTERS: tuple[Splitter, ...] = (by_date, by_closed_date, by_time, by_modality, *map(by_prefix, PREFIXED))
BY_UID = by_prefix("StudyInstanceUID", UID_SIGNS, LONGEST_UID)  # the last resort: few peers take wild cards in UIDs


def outside(part: Keys, whole: Keys, found: Sequence[dict[str, Any]]) -> bool:
    """Return True if answers don't belong to the part of a search: the peer ignores the key."""
    return any(
        one.get(key) not in (None, "") and not _is_in(key, value, one[key])
        for key, value in part.items()
        if value != whole.get(key)
        for one in found
    )


def _is_in(key: str, wanted: str, value: Any) -> bool:
    values = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if key in ("StudyDate", "StudyTime"):
        if key == "StudyDate" and not any(map(day_of, values)):
            return True  # where a peer finds what is no date is its own affair
        low, _, high = wanted.partition("-")
        return any(low <= each and (not high or each[: len(high)] <= high) for each in values)
    if wanted.endswith("*"):
        return any(each.casefold().startswith(wanted[:-1].casefold()) for each in values)
    return wanted.casefold() in {each.casefold() for each in values}


def day_of(text: str) -> date | None:
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:8])) if len(text) == 8 else None
    except ValueError:
        return None


def date_text(day: date | None) -> str:
    return f"{day.year:04}{day:%m%d}" if day else ""


def seconds(text: str) -> int:
    """Return the whole seconds of a time of day, which may lack its last parts (PS3.5 section 6.2, TM)."""
    text = text.partition(".")[0][:6].ljust(6, "0")  # of peers that leave out a zero, as in 12345.0, any time will do
    return int(text[:2]) * 3600 + int(text[2:4]) * 60 + int(text[4:6])


def clock(seconds: int) -> str:
    return f"{seconds // 3600:02}{seconds // 60 % 60:02}{seconds % 60:02}"


def shortest(seconds: int) -> str:
    """As `_clock`, without the zeros at its end: as text, 1000 comes before 100000."""
    text = clock(seconds)
    return text[:2] if text.endswith("0000") else text[:4] if text.endswith("00") else text
