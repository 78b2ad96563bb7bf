"""What the result of a retrieval says of what it did not come to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Suspended

from talaria.service import results
from tasks.retrieve.job import Job, Stage, Study, folder_of
from tasks.retrieve.report import cancelled, document, part_of, sentence
from transfer.home import Home


def halfway(folder: Path, **fields: object) -> Job:
    """Return a retrieval that has delivered one study, found another, fetched a third, and not looked for a number."""
    studies = [Study("1.1", "A1", Stage.DELIVERED, 3), Study("1.2", "A2"), Study("1.3", "A3", Stage.WHOLE, 4)]
    return Job(folder, pending=["A4"], studies={one.study: one for one in studies}, **fields)  # type: ignore[arg-type]


def test_what_is_still_to_come_waits(tmp_path: Path) -> None:
    result = document(halfway(tmp_path), "run", "pacs", "paused")
    assert result["waiting"] == ["A2", "A3", "A4"] and result["cancelled"] == result["failed"] == []
    assert [one["state"] for one in result["studies"]] == ["delivered", "waiting", "waiting"]
    assert [one["reason"] for one in result["accessions"]] == ["not searched for yet"]
    assert sentence(result) == "3 studies found, 1 delivered, 3 waiting"


@pytest.mark.parametrize(
    ("asked", "stands"),
    [({"accessions": "1", "into": "/x"}, "paused"), ({}, "waiting"), ({"paths": ["/x"]}, "waiting")],
)
@pytest.mark.parametrize("begun", [False, True])
def test_what_is_suspended_on_prefects_pages_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], stands: str, begun: bool
) -> None:
    async def nothing(*_: Any, **__: Any) -> None:
        return None

    async def none(*_: Any, **__: Any) -> list[Any]:
        return []

    monkeypatch.setattr(results.kept, "read", nothing)
    monkeypatch.setattr(results.runs, "table_of", none)
    source = {} if "paths" in asked else {"source": "pacs"}
    run = FlowRun(flow_id=uuid4(), parameters=source | asked, state=Suspended(timeout_seconds=9))
    home = Home(tmp_path)
    if begun and stands == "paused":
        folder_of(home, str(run.id)).mkdir(parents=True)
    found = asyncio.run(results.result(cast(Any, SimpleNamespace(home=home, client=None)), run))
    assert found["state"] == stands


@pytest.mark.parametrize("late", [False, True], ids=["while it ran", "while it waited"])
def test_what_was_to_come_is_cancelled_with_its_retrieval(tmp_path: Path, late: bool) -> None:
    if late:
        result = cancelled(document(halfway(tmp_path), "run", "pacs", "paused"))
    else:
        result = document(halfway(tmp_path, ended=True), "run", "pacs", "cancelled")
    assert result["cancelled"] == ["A2", "A3", "A4"] and result["waiting"] == result["failed"] == []
    rows = [*result["studies"], *result["accessions"]]
    assert [one["state"] for one in rows] == ["delivered", "cancelled", "cancelled", "cancelled"]
    assert not any("yet" in one["reason"] for one in rows)
    assert sentence(result) == "3 studies found, 1 delivered, 3 cancelled"


def test_what_an_end_left_undone_has_failed_and_says_why(tmp_path: Path) -> None:
    result = document(halfway(tmp_path, ended=True, error="the disk is full"), "run", "pacs", "partial")
    assert result["failed"] == ["A2", "A3", "A4"] and not result["waiting"]
    assert {one["reason"] for one in (*result["studies"][1:], *result["accessions"])} == {"the disk is full"}
    result = document(halfway(tmp_path, ended=True), "run", "pacs", "partial")
    assert [one["reason"] for one in result["studies"]] == ["", "not fetched", "fetched, and not sent on"]


def test_one_study_is_not_called_studies(tmp_path: Path) -> None:
    job = Job(tmp_path, studies={"1.1": Study("1.1", "A1")})
    assert sentence(document(job, "run", "pacs", "waiting")) == "1 study found, 0 delivered, 1 waiting"
    assert part_of(job, "pacs").words == "0 of 1 study from pacs"
