"""What people see of a retrieval: a JSON file, a CSV file, an artifact, and progress while it runs.

Names accession numbers and UIDs; no name, ID or birth date of a patient.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.exceptions import ObjectNotFound

from imaging.query import counted
from tasks.dispatch import kept
from tasks.dispatch.progress import Part
from tasks.dispatch.report import has_run_before
from tasks.retrieve.job import Job, Stage, Study
from transfer.home import Home
from transfer.ledger import noted, write_json, write_whole
from transfer.tables import csv_text

COLUMNS = ("accession", "study", "state", "instances", "missing", "bytes", "reason")
UNSEARCHED = "not searched for"
NO_MATCH = "the source has no study that matches"
STANDS = "stands for"  # begins the reason of a number whose study is known by another one
TABLE = "retrieval"  # key of the artifact
SHOWN_ROWS = 2000  # of the artifact; the files have all


def state_of(job: Job) -> str:
    """Return the state: delivered if everything that was asked for was found and sent on."""
    if job.whole:
        return "delivered"
    return "partial" if any(one.stage is Stage.DELIVERED for one in job.studies.values()) else "failed"


def rows(job: Job, state: str) -> list[dict[str, Any]]:
    """Return one row per study, and per accession number or study UID without one.

    Args:
        state: of the retrieval; what is neither fetched nor sent on when that ends waits no more.
    """
    left = "cancelled" if state == "cancelled" else "failed" if job.ended else "waiting"
    found = [_row(one, left, job.error) for one in job.studies.values()]
    by_uid = {one["study"]: one for one in found}
    for number, uid in job.also.items():
        if one := by_uid.get(uid):
            found.append(_of_number(number, one["state"], _also(one)))
    found += [_of_number(number, "missing", NO_MATCH) for number in job.missing]
    found += [_of_number("", "missing", NO_MATCH) | {"study": uid} for uid in job.unknown]
    found += [_of_number(number, "failed", reason) for number, reason in job.failed.items()]
    why = f"{UNSEARCHED} yet" if left == "waiting" else job.error or UNSEARCHED
    found += [_of_number(number, left, why) for number in job.pending]
    return found


def _row(one: Study, left: str, error: str) -> dict[str, Any]:
    state, why = str(one.stage), one.reason or one.doubt
    if one.stage in (Stage.FOUND, Stage.WHOLE):
        state = left
        if left != "waiting":  # it may have said for what it waits
            undone = "not fetched" if one.stage is Stage.FOUND else "fetched, and not sent on"
            why = error if left == "failed" and error else undone
    return {
        "accession": one.accession,
        "study": one.study,
        "state": state,
        "instances": one.instances,
        "missing": one.missing,
        "bytes": one.bytes,
        "reason": why,
    }


def _also(row: dict[str, Any]) -> str:
    """Return what to say of a number that stands for the study of a row, too."""
    of = f"{STANDS} the study of {row['accession']}" if row["accession"] else f"{STANDS} study {row['study']}"
    return "; ".join(filter(None, (of, row["reason"])))


def _of_number(number: str, state: str, reason: str) -> dict[str, Any]:
    return {
        "accession": number, "study": "", "state": state, "instances": 0, "missing": 0, "bytes": 0, "reason": reason,
    }  # fmt: skip


def document(job: Job, flow_run_id: str, source: str, state: str) -> dict[str, Any]:
    """Return the JSON of `retrieve --json`."""
    every = rows(job, state)
    found = [one for one in every if one["study"] in job.studies]
    return {
        "flow_run_id": flow_run_id,
        "source": source,
        "state": state,
        "found": len(found),
        "delivered": sum(one["state"] == "delivered" for one in found),
        "missing": [one["accession"] or one["study"] for one in every if one["state"] == "missing"],
        "partial": [one["accession"] or one["study"] for one in found if one["state"] == "partial"],
        "failed": [one["accession"] or one["study"] for one in every if one["state"] == "failed"],
        "waiting": [one["accession"] or one["study"] for one in every if one["state"] == "waiting"],
        "cancelled": [one["accession"] or one["study"] for one in every if one["state"] == "cancelled"],
        "error": "; ".join(filter(None, (job.error, doubts(job)))) or None,
        "studies": [
            one | {"notes": job.studies[one["study"]].notes, "targets": job.studies[one["study"]].targets}
            for one in found
        ],
        "accessions": [one for one in every if one["study"] not in job.studies],
    }


def doubts(job: Job) -> str:
    """Return once why more may belong to studies than came, and to how many; "" if nothing does."""
    found = Counter(one.doubt for one in job.studies.values() if one.doubt and one.stage is Stage.DELIVERED)
    return "; ".join(f"{counted(count)} may lack something: {why}" for why, count in found.items())


def cancelled(document: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a retrieval that was cancelled while it waited, in which nothing waits any more."""
    found = {name: [_stopped(one) for one in document[name]] for name in ("studies", "accessions")}
    return document | found | {"state": "cancelled", "waiting": [], "cancelled": document["waiting"]}


def given_up(document: dict[str, Any], why: str) -> dict[str, Any]:
    """Return the result of a retrieval that was given up, in which what waited has failed for that reason."""
    found = {
        name: [one | {"state": "failed", "reason": why} if one["state"] == "waiting" else one for one in document[name]]
        for name in ("studies", "accessions")
    }
    left = [*document["failed"], *document["waiting"]]
    return document | found | {"state": "failed", "error": why, "waiting": [], "failed": left}


def _stopped(row: dict[str, Any]) -> dict[str, Any]:
    if row["state"] != "waiting":
        return row
    known = row["study"] or row["reason"].startswith(STANDS)
    return row | {"state": "cancelled", "reason": "" if known else UNSEARCHED}


def sentence(document: dict[str, Any]) -> str:
    """Return such a document in a line, for the state of its run."""
    counts = [f"{counted(document['found'])} found, {document['delivered']} delivered"]
    keys = ("missing", "partial", "failed", "waiting", "cancelled")
    counts += [f"{len(document[key])} {key}" for key in keys if document[key]]
    return "; ".join([", ".join(counts), *([document["error"]] if document["error"] else [])])


def csv_path(home: Home, flow_run_id: str) -> Path:
    """Return the path of a retrieval's CSV file."""
    return home.receipt(flow_run_id).with_suffix(".csv")


async def report(client: PrefectClient, home: Home, job: Job, flow_run_id: str, source: str, state: str) -> None:
    """Save the result: whole at the server, JSON and CSV in the state directory, and an artifact.

    Raises:
        LedgerFull: the disk of the state directory is full.
    """
    whole, path, every = document(job, flow_run_id, source, state), csv_path(home, flow_run_id), rows(job, state)
    with noted():
        write_json(home.receipt(flow_run_id), whole)
        write_whole(path, [csv_text(COLUMNS, every).encode()])
    await kept.keep(client, UUID(flow_run_id), [json.dumps(whole).encode()], again=has_run_before())
    shown = every[:SHOWN_ROWS]
    about = f"retrieval from {source}: {state}; all of it: {path}"
    table = ArtifactCreate(
        type="table", key=TABLE, description=about, data=json.dumps(shown), flow_run_id=UUID(flow_run_id)
    )
    made = await client.create_artifact(table)
    for old in await _tables(client, flow_run_id) if has_run_before() else ():
        if old.id != made.id:  # a list that waits for its source does so part after part, each with a table of all
            with suppress(ObjectNotFound):  # somebody has removed it meanwhile
                await client.delete_artifact(old.id)


async def _tables(client: PrefectClient, flow_run_id: str) -> list[Artifact]:
    return await client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(flow_run_id)]), key=ArtifactFilterKey(any_=[TABLE])
        )
    )


def part_of(job: Job, source: str) -> Part:
    """Return how far a retrieval has come."""
    done = sum(one.stage not in (Stage.FOUND, Stage.WHOLE) for one in job.studies.values())
    done += len(job.missing) + len(job.unknown) + len(job.failed)
    total = len(job.studies) + len(job.missing) + len(job.unknown) + len(job.failed) + len(job.pending)
    percent = 100 * done / total if total else 0.0
    return Part(total, done, 0, 0, percent, f"{done} of {counted(total)} from {source}")


class RetrievalProgress:
    """The progress artifact of a retrieval."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._id: Any = None
        self._shown = (-1.0, "")

    async def show(self, job: Job) -> None:
        part = part_of(job, self._source)
        percent, text = round(part.percent, 1), part.words
        if self._id is None:
            self._id = await acreate_progress_artifact(percent, f"progress-{self._source}", text)
        elif (percent, text) != self._shown:
            await aupdate_progress_artifact(self._id, percent, text)
        self._shown = percent, text
