"""Queries, and what they match. Keys are DICOM attributes; terms as in PS3.4 Annex C."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MOST = (1 << 31) - 1  # that a value of VR IS can be, PS3.5 table 6.2-1


@dataclass(frozen=True)
class Query:
    """What to look for. Empty keys match everything; several keys must all match.

    Attributes:
        AccessionNumber, StudyDescription, SeriesDescription: exact values, any of them matches.
        StudyDate: one date or a range, `YYYYMMDD`, `FROM-TO`, `-TO` or `FROM-`.
        PatientName, PatientID: `*` and `?` are wild cards.
        level: `study` or `series`: what one match is.
    """

    AccessionNumber: tuple[str, ...] = ()
    PatientID: str = field(default="", repr=False)
    PatientName: str = field(default="", repr=False)
    StudyDate: str = ""
    Modality: str = ""
    StudyInstanceUID: str = ""
    SeriesInstanceUID: str = ""
    StudyDescription: tuple[str, ...] = ()
    SeriesDescription: tuple[str, ...] = ()
    level: str = "study"


@dataclass(frozen=True)
class Match:
    """One study or series that a peer has.

    Attributes:
        attributes: values by DICOM keyword, as the peer gave them.
        instances: how many instances the peer announces; None if it doesn't say.
        note: what people must know of the values, "" if nothing; names no patient.
    """

    attributes: dict[str, Any] = field(repr=False)
    instances: int | None = None
    note: str = ""

    @property
    def StudyInstanceUID(self) -> str:
        return str(self.attributes.get("StudyInstanceUID", ""))

    @property
    def SeriesInstanceUID(self) -> str:
        return str(self.attributes.get("SeriesInstanceUID", ""))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON of one match in `query --json`."""
        return {**self.attributes, "instances": self.instances, **({"note": self.note} if self.note else {})}


def listed(value: str) -> list[str]:
    """Split a list of UIDs or codes at commas and backslashes, which none of them can hold."""
    return [part.strip() for part in value.replace("\\", ",").split(",") if part.strip()]


def text(value: Any) -> str:
    """Return a value as text, several with a backslash between them."""
    return "\\".join(str(one) for one in value) if isinstance(value, list) else "" if value is None else str(value)


def counted(number: int, level: str = "study") -> str:
    """Return a number of studies or series in words."""
    return f"{number} {level if level == 'series' or number == 1 else 'studies'}"


def count(value: Any) -> int | None:
    """Return a number of instances or series; None if a value is none, as -1 is, which some say who don't count."""
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if 0 <= number <= MOST else None
