"""The search: what a target that can be queried has."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from imaging.query import Query
from tasks.dispatch.run import refusal
from tasks.retrieve.search import search
from transfer.accessions import accessions as numbers
from transfer.errors import DispatchError


@flow(name="find", persist_result=False)
async def find(
    source: str,
    accessions: str = "",
    study_uids: list[str] = [],  # noqa: B006 - Prefect copies what it passes
    study_date: str = "",
    modality: str = "",
    study_descriptions: list[str] = [],  # noqa: B006
    series_descriptions: list[str] = [],  # noqa: B006
    level: Literal["study", "series"] = "study",
) -> State[Any]:
    """Find studies or series, and list them by UID and accession number: no patient's data leaves the source.

    Args:
        source: name of the target to query.
        accessions: accession numbers, separated by commas, blanks or new lines.
        study_uids: Study Instance UIDs.
        study_date: only studies of this date, or range: FROM-TO, FROM- or -TO.
        modality: only studies with series of this modality.
        study_descriptions: only studies with one of these descriptions.
        series_descriptions: only series with one of these descriptions.
        level: what one match is.
    """
    try:
        query = Query(
            AccessionNumber=numbers(accessions),
            StudyInstanceUID=",".join(study_uids),
            StudyDate=study_date,
            Modality=modality,
            StudyDescription=tuple(study_descriptions),
            SeriesDescription=tuple(series_descriptions),
            level=level,
        )
        return await search(source, query)
    except DispatchError as error:
        return refusal(error)
