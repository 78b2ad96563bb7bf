"""The retrieval: studies from a target that can be queried, to other targets or into a folder."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from flows.dispatch import dispatch
from tasks.dispatch.asked import name_run, retrieval_name
from tasks.retrieve.asked import given, query_of
from tasks.retrieve.beginning import retrieving
from tasks.retrieve.dispatches import dispatched
from tasks.retrieve.ending import refused
from tasks.retrieve.wish import Wish
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
        accessions: accession numbers as copied from a list or a spreadsheet: separated by commas, blanks or new lines.
        targets: names of the targets to deliver to; leave empty to use a folder.
        into: folder on the worker's machine, for <accession>/<series>/<instance>.dcm; leave empty to use targets.
        study_uids: Study Instance UIDs, instead of accession numbers.
        series_uid: only this series.
        study_date: only studies of this date, as 20240131, or range, as 20240101-20240131, 20240101- or -20240131.
        modality: only series of this modality, as CT, or of one of several, as CT, MR.
        study_descriptions: only studies with one of these descriptions, in the same case.
        series_descriptions: only series with one of these descriptions, in the same case.
        priority: offpeak fetches within the off-peak hours only.
        studies_per_hour: fetch no more studies than this in an hour; 0 for no limit.
    """
    try:
        filters = query_of(
            study_uids=study_uids,
            series_uid=series_uid,
            study_date=study_date,
            modality=modality,
            study_descriptions=study_descriptions,
            series_descriptions=series_descriptions,
        )
        names = dict.fromkeys(given(targets))
        wish = Wish(source.strip(), tuple(names), into.strip(), accessions, filters, priority, studies_per_hour)
        await name_run(retrieval_name(wish.source, wish.targets, wish.into))
        async with retrieving(wish, partial(dispatched, dispatch)) as running:
            await running.run()
            return await running.conclude()
    except DispatchError as error:
        return await refused(error)
