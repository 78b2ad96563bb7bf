"""The retrieval: studies from a target that can be queried, to other targets or into a folder."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from flows.dispatch import dispatch
from imaging.query import Query
from tasks.dispatch.run import refusal
from tasks.retrieve.run import Wish, retrieving
from transfer.errors import DispatchError


@flow(name="retrieve", persist_result=False)
async def retrieve(
    source: str,
    accessions: str = "",
    targets: list[str] = [],  # noqa: B006 - Prefect copies what it passes
    into: str = "",
    study_uids: list[str] = [],  # noqa: B006
    series_uid: str = "",
    study_date: str = "",
    modality: str = "",
    study_descriptions: list[str] = [],  # noqa: B006
    series_descriptions: list[str] = [],  # noqa: B006
    priority: Literal["normal", "offpeak"] = "normal",
    studies_per_hour: int = 0,
) -> State[Any]:
    """Find studies, fetch them one after another, and deliver each as soon as it is whole.

    Run again (Retry in the UI), it fetches and delivers only what is missing.

    Args:
        source: name of the target to query and pull from.
        accessions: accession numbers, separated by commas, blanks or new lines.
        targets: names of the targets to deliver to; leave empty to use a folder.
        into: folder on the worker's machine, for `<accession>/<series>/<instance>.dcm`; leave empty to use targets.
        study_uids: Study Instance UIDs, instead of accession numbers.
        series_uid: only this series.
        study_date: only studies of this date, or range: FROM-TO, FROM- or -TO.
        modality: only series of this modality.
        study_descriptions: only studies with one of these descriptions.
        series_descriptions: only series with one of these descriptions.
        priority: `offpeak` fetches within the off-peak hours only.
        studies_per_hour: fetch no more studies than this in an hour; 0 for no limit.
    """
    filters = Query(
        StudyInstanceUID=",".join(study_uids),
        SeriesInstanceUID=series_uid,
        StudyDate=study_date,
        Modality=modality,
        StudyDescription=tuple(study_descriptions),
        SeriesDescription=tuple(series_descriptions),
    )
    wish = Wish(source, tuple(targets), into, accessions, filters, priority, studies_per_hour)
    try:
        async with retrieving(wish, dispatch) as running:
            await running.run()
            return await running.conclude()
    except DispatchError as error:
        return refusal(error)
