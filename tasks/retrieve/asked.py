"""What a person asks for, in the form of a run or with the options of a command, as a query. Blanks ask nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from imaging.header import UID
from imaging.query import Query
from transfer.accessions import UNSEEN
from transfer.columns import BETWEEN
from transfer.errors import Misconfigured

MOST_CHARS = 1000  # of a value; DICOM's own limits are lower, and archives exceed them
_CODES = re.compile(r"[\s,;/\\|+&\u3001\uff0c]+")  # between several; no modality's code holds any of them
_DASHES = re.compile(r"\s*[-\u2010-\u2015\u2212]\s*")


def given(values: Iterable[str]) -> list[str]:
    """Return the values that are not blank, without blanks around them."""
    return [value.strip() for value in values if value.strip()]


def query_of(
    *,
    accessions: tuple[str, ...] = (),
    patient_id: str = "",
    patient_name: str = "",
    study_uids: Sequence[str] = (),
    series_uid: str = "",
    study_date: str = "",
    modality: str = "",
    study_descriptions: Sequence[str] = (),
    series_descriptions: Sequence[str] = (),
    level: str = "study",
) -> Query:
    """Return the query for what was filled in; UIDs may be pasted as a list, descriptions are taken as they are.

    Raises:
        Misconfigured: a value can't be what its field is for.
    """
    codes = _text(modality, "a modality")
    if not codes.isascii():
        raise Misconfigured("a modality is a code in Latin letters, as CT: one of these letters is none, or not seen")
    return Query(
        AccessionNumber=accessions,
        PatientID=_text(patient_id, "a patient's ID"),
        PatientName=_text(patient_name, "a patient's name"),
        StudyInstanceUID=_uids(study_uids),
        SeriesInstanceUID=_uids([series_uid]),
        # As it is pasted, with another dash or between blanks, and as it is typed in Japanese.
        StudyDate=_DASHES.sub("-", unicodedata.normalize("NFKC", _text(study_date, "a study date"))),
        Modality=",".join(filter(None, _CODES.split(codes))),
        StudyDescription=tuple(one for one in study_descriptions if _text(one, "a description")),
        SeriesDescription=tuple(one for one in series_descriptions if _text(one, "a description")),
        level=level,
    )


def _text(value: str, what: str) -> str:
    """Return a value without blanks around it, and without marks for the direction of writing.

    Raises:
        Misconfigured: it can't be one.
    """
    value = UNSEEN.sub("", value).strip()
    if len(value) > MOST_CHARS or not value.isprintable():
        raise Misconfigured(f"{what} has at most {MOST_CHARS} characters, and none that can't be printed")
    return value


def _uids(given: Iterable[str]) -> str:
    found = [uid for line in given for uid in BETWEEN.split(UNSEEN.sub("", line)) if uid]
    if not all(UID.fullmatch(uid) for uid in found):
        raise Misconfigured("a UID has digits and dots only, at most 64: one of those that are asked for is none")
    return ",".join(found)
