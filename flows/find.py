"""The search: what a target that can be queried has."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.dispatch.asked import name_run
from tasks.dispatch.ends import refusal
from tasks.retrieve.asked import query_of
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
        accessions: accession numbers as copied from a list or a spreadsheet: separated by commas, blanks or new lines.
        study_uids: Study Instance UIDs.
        study_date: only studies of this date, as 20240131, or range, as 20240101-20240131, 20240101- or -20240131.
        modality: only studies with series of this modality, as CT, or of one of several, as CT, MR.
        study_descriptions: only studies with one of these descriptions, in the same case.
        series_descriptions: only series with one of these descriptions, in the same case.
        level: what one match is.
    """
    try:
        await name_run(f"query of {source.strip()}")
        query = query_of(
            accessions=numbers(accessions),
            study_uids=study_uids,
            study_date=study_date,
            modality=modality,
            study_descriptions=study_descriptions,
            series_descriptions=series_descriptions,
            level=level,
        )
        return await search(source.strip(), query)
    except DispatchError as error:
        return refusal(error)
