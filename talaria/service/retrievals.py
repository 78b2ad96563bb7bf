"""Queries and retrievals. What a query finds is a patient's data: it goes to the user who asked, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blocks.base import Target
from imaging.match import of_study
from imaging.query import Query, listed
from talaria.service import Office
from talaria.service.queueing import queued
from talaria.service.results import line, result
from talaria.service.searching import SEARCHES
from tasks.dispatch import audited
from tasks.dispatch.asked import retrieval_name
from tasks.dispatch.hours import check_hours
from tasks.retrieve.asked import query_of
from tasks.retrieve.moving import reach_into
from tasks.retrieve.search import SearchResult, found_at
from tasks.targets import UNKNOWN, check_destination, check_origin, check_source, load, origin_of
from transfer.accessions import accessions, pasted
from transfer.errors import Unread

# Without one of these, a retrieval would fetch all that there is.
SELECTIVE = ("accessions", "study_uids", "series_uid", "study_date", "study_descriptions")


def _query(
    accession: str = "",
    study_uid: str = "",
    study_description: Sequence[str] = (),
    series_description: Sequence[str] = (),
    **rest: str,
) -> Query:
    """Return the query for keys that are named as the options of `talaria query`.

    Raises:
        ValueError: the study date is not valid.
    """
    made = query_of(
        accessions=accessions(accession),
        study_uids=[study_uid],
        study_descriptions=study_description,
        series_descriptions=series_description,
        **rest,
    )
    list(of_study(made))
    return made


async def find_matches(office: Office, source: str, **keys: Any) -> dict[str, Any]:
    """Ask a target what it has, at once; the answer is kept nowhere, that somebody asked in the audit trail."""
    query = _query(**keys)
    (target,) = await load(office.client, [source])
    check_source(target)
    found = await _asked(office, target, query)
    return {"matches": [match.to_json() for match in found.matches], "unread": found.unread or None}


async def _asked(office: Office, target: Target, query: Query) -> SearchResult:
    """Ask a target what it has, and note in the audit trail that somebody did."""

    def ask() -> SearchResult:
        found: SearchResult | None = None
        try:
            found = found_at(target, query)
        finally:
            asked = [name for name, value in vars(query).items() if value and name != "level"]
            audited.queried(target, asked, None if found is None else len(found.matches), "", office.user)
        return found

    return await SEARCHES.run(office.user, ask, office.gone)


async def create_query(office: Office, source: str, key: str = "", **keys: Any) -> dict[str, Any]:
    """Put a query into the queue; its result lists UIDs and accession numbers, and no patient.

    Raises:
        ValueError: it asks for a patient: that would be kept with the run.
    """
    query = _query(**keys)
    if query.PatientID or query.PatientName or query.SeriesInstanceUID:
        raise ValueError("what is kept with a run names no patient and no series: ask for matches instead")
    (target,) = await load(office.client, [source], secrets=False)
    check_source(target)
    parameters = {
        "source": source,
        "accessions": pasted(query.AccessionNumber),
        "study_uids": listed(query.StudyInstanceUID),
        "study_date": query.StudyDate,
        "modality": query.Modality,
        "study_descriptions": list(query.StudyDescription),
        "series_descriptions": list(query.SeriesDescription),
        "level": query.level,
    }
    return await _queued(office, "find", parameters, f"query of {source}", "normal", key)


async def create_retrieval(
    office: Office,
    source: str,
    numbers: Sequence[str] = (),
    targets: Sequence[str] = (),
    into: str = "",
    off_peak: bool = False,
    studies_per_hour: int = 0,
    key: str = "",
    **keys: Any,
) -> dict[str, Any]:
    """Put a retrieval into the queue.

    Args:
        numbers: accession numbers, beside those of the keys.
        into: absolute path of a folder on the machine that fetches.

    Raises:
        NotFound, Misconfigured, ValueError: it can't be done, or nothing is asked for.
    """
    wanted = _query(**keys)
    if numbers and not any(one.strip() for one in numbers):  # other keys alone would find more than what was meant
        raise ValueError("numbers: all of them are blank")
    numbers = tuple(dict.fromkeys(one for one in (*wanted.AccessionNumber, *numbers) if one.strip()))
    if bool(targets) == bool(into):
        raise ValueError("give either --to NAME or --into FOLDER")
    parameters: dict[str, Any] = {
        "source": source,
        "accessions": pasted(numbers),
        "targets": list(dict.fromkeys(targets)),
        "into": into,
        "study_uids": listed(wanted.StudyInstanceUID),
        "series_uid": wanted.SeriesInstanceUID,
        "study_date": wanted.StudyDate,
        "modality": wanted.Modality,
        "study_descriptions": list(wanted.StudyDescription),
        "series_descriptions": list(wanted.SeriesDescription),
        "priority": "offpeak" if off_peak else "normal",
        "studies_per_hour": studies_per_hour,
    }
    if into and not Path(into).is_absolute():
        raise ValueError(f"{into}: give the folder's absolute path")
    if into and office.embedded:  # else the folder is another machine's
        await reach_into(into)
    asks = any(one.strip("*?^= ") for one in (wanted.PatientID, wanted.PatientName))  # "*" asks for everybody
    (origin,) = await load(office.client, [source], secrets=asks)
    check_source(origin)
    check_hours(origin, parameters["priority"])
    for target in await load(office.client, parameters["targets"], secrets=False) if targets else ():
        check_destination(target)
        check_origin(target, origin_of(origin), UNKNOWN)
    if asks:  # no patient's name or ID gets into a run's parameters
        query = replace(wanted, AccessionNumber=numbers)
        found = await _asked(office, origin, query)
        if found.unread:
            raise Unread(f"{found.unread}. What was found can be fetched by its study UIDs")
        uids = [match.StudyInstanceUID for match in found.matches]
        if not uids:
            raise ValueError("nothing matches the query")
        parameters["study_uids"] = uids  # the numbers stay: those of no such study are missing
    elif not any(parameters[name] for name in SELECTIVE):
        raise ValueError("nothing to look for: give accession numbers, UIDs, a date, a patient or a description")
    name = retrieval_name(source, parameters["targets"], into)
    return await _queued(office, "retrieve", parameters, name, parameters["priority"], key)


async def _queued(
    office: Office, flow: str, parameters: dict[str, Any], name: str, queue: str, key: str
) -> dict[str, Any]:
    flow_run = await queued(office, flow, parameters, name, queue, key)
    return {"run": line(flow_run)} | await result(office, flow_run)
