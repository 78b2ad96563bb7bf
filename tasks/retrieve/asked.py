"""What a person fills into the forms of searches and retrievals, as a query. A line left blank asks nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imaging.query import Query


def given(values: Iterable[str]) -> list[str]:
    """Return the values that are not blank, without blanks around them."""
    return [value.strip() for value in values if value.strip()]


def query_of(
    *,
    accessions: tuple[str, ...] = (),
    study_uids: Sequence[str] = (),
    series_uid: str = "",
    study_date: str = "",
    modality: str = "",
    study_descriptions: Sequence[str] = (),
    series_descriptions: Sequence[str] = (),
    level: str = "study",
) -> Query:
    """Return the query that a filled form makes; UIDs may be pasted as a list, descriptions are taken as they are."""
    return Query(
        AccessionNumber=accessions,
        StudyInstanceUID=",".join(uid for line in study_uids for uid in line.replace(",", " ").split()),
        SeriesInstanceUID=series_uid.strip(),
        StudyDate=study_date.strip(),
        Modality=modality.strip(),
        StudyDescription=tuple(one for one in study_descriptions if one.strip()),
        SeriesDescription=tuple(one for one in series_descriptions if one.strip()),
        level=level,
    )
