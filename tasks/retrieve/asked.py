"""What a person asks for, in the form of a run or with the options of a command, as a query. Blanks ask nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imaging.query import Query


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
    """Return the query for what was filled in; UIDs may be pasted as a list, descriptions are taken as they are."""
    return Query(
        AccessionNumber=accessions,
        PatientID=patient_id.strip(),
        PatientName=patient_name.strip(),
        StudyInstanceUID=_uids(study_uids),
        SeriesInstanceUID=_uids([series_uid]),
        StudyDate=study_date.strip(),
        Modality=modality.strip(),
        StudyDescription=tuple(one for one in study_descriptions if one.strip()),
        SeriesDescription=tuple(one for one in series_descriptions if one.strip()),
        level=level,
    )


def _uids(given: Iterable[str]) -> str:
    return ",".join(uid for line in given for uid in line.replace(",", " ").split())
