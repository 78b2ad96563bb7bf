"""What people see of a retrieval: a JSON file, a CSV file, an artifact, and progress while it runs.

Names accession numbers and UIDs; no name, ID or birth date of a patient.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.artifacts import acreate_progress_artifact, acreate_table_artifact, aupdate_progress_artifact

from tasks.dispatch import kept
from tasks.dispatch.progress import Part
from tasks.dispatch.report import has_run_before
from tasks.retrieve.job import Job, Stage, Study
from transfer.home import Home
from transfer.ledger import write_json
from transfer.tables import csv_text

COLUMNS = ("accession", "study", "state", "instances", "missing", "bytes", "reason")
NO_MATCH = "the source has no study that matches"
SHOWN_ROWS = 2000  # of the artifact; the files have all


def state_of(job: Job) -> str:
    """Return the state: delivered if everything that was asked for was found and sent on."""
    if job.whole:
        return "delivered"
    return "partial" if any(one.stage is Stage.DELIVERED for one in job.studies.values()) else "failed"


def rows(job: Job) -> list[dict[str, Any]]:
    """Return one row per study, and per accession number or study UID without one."""
    found = [_row(one) for one in job.studies.values()]
    found += [_of_number(number, "missing", NO_MATCH) for number in job.missing]
    found += [_of_number("", "missing", NO_MATCH) | {"study": uid} for uid in job.unknown]
    found += [_of_number(number, "failed", reason) for number, reason in job.failed.items()]
    found += [_of_number(number, "waiting", "not searched for yet") for number in job.pending]
    return found


def _row(one: Study) -> dict[str, Any]:
    state = "waiting" if one.stage in (Stage.FOUND, Stage.WHOLE) else str(one.stage)
    return {
        "accession": one.accession,
        "study": one.study,
        "state": state,
        "instances": one.instances,
        "missing": one.missing,
        "bytes": one.bytes,
        "reason": one.reason,
    }


def _of_number(number: str, state: str, reason: str) -> dict[str, Any]:
    return {
        "accession": number, "study": "", "state": state, "instances": 0, "missing": 0, "bytes": 0, "reason": reason,
    }  # fmt: skip


def document(job: Job, flow_run_id: str, source: str, state: str) -> dict[str, Any]:
    """Return the JSON of `retrieve --json`."""
    every = rows(job)
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
        "error": job.error or None,
        "studies": [
            one | {"notes": job.studies[one["study"]].notes, "targets": job.studies[one["study"]].targets}
            for one in found
        ],
        "accessions": [one for one in every if one["study"] not in job.studies],
    }


def csv_path(home: Home, flow_run_id: str) -> Path:
    """Return the path of a retrieval's CSV file."""
    return home.receipt(flow_run_id).with_suffix(".csv")


async def report(home: Home, job: Job, flow_run_id: str, source: str, state: str) -> None:
    """Save the result: whole at the server, JSON and CSV in the state directory, and an artifact."""
    whole = document(job, flow_run_id, source, state)
    write_json(home.receipt(flow_run_id), whole)
    async with get_client() as client:
        await kept.keep(client, UUID(flow_run_id), [json.dumps(whole).encode()], again=has_run_before())
    path = csv_path(home, flow_run_id)
    _write(path, csv_text(COLUMNS, rows(job)))
    shown = rows(job)[:SHOWN_ROWS]
    await acreate_table_artifact(shown, "retrieval", f"retrieval from {source}: {state}; all of it: {path}")


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def part_of(job: Job, source: str) -> Part:
    """Return how far a retrieval has come."""
    done = sum(one.stage not in (Stage.FOUND, Stage.WHOLE) for one in job.studies.values())
    done += len(job.missing) + len(job.unknown) + len(job.failed)
    total = len(job.studies) + len(job.missing) + len(job.unknown) + len(job.failed) + len(job.pending)
    percent = 100 * done / total if total else 0.0
    return Part(total, done, 0, 0, percent, f"{done} of {total} studies from {source}")


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
