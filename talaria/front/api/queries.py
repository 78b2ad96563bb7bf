"""Routes that search targets and fetch from them."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import Field

from talaria.front.access import Role, needs
from talaria.front.api import answers
from talaria.front.api.asking import Asked, Key, RequestBody, add


class QueryKeys(RequestBody):
    """What to look for. Empty keys match everything; several must all match."""

    source: str = Field(description="Name of the target to ask.")
    accession: str = Field(default="", description="Accession numbers, separated by commas.")
    patient_id: str = Field(default="", description="Patient ID; * and ? are wild cards.")
    patient_name: str = Field(default="", description="Patient's name; * and ? are wild cards.")
    study_date: str = Field(default="", description="A date, or FROM-TO, FROM- or -TO.")
    modality: str = Field(default="", description="Modality, as in CT.")
    study_uid: str = Field(default="", description="Study Instance UIDs, separated by commas.")
    series_uid: str = Field(default="", description="Series Instance UID.")
    study_description: list[str] = Field(default=[], description="Study descriptions, any of them.")
    series_description: list[str] = Field(default=[], description="Series descriptions, any of them.")


class NewQuery(QueryKeys):
    """A search."""

    level: Literal["study", "series"] = Field(default="study", description="What one match is.")


class NewRetrieval(QueryKeys):
    """Studies to fetch, and where to."""

    numbers: list[str] = Field(default=[], description="Accession numbers, beside those of `accession`.")
    targets: list[str] = Field(default=[], description="Targets to deliver to; or give a folder.")
    into: str = Field(default="", description="Folder on the machine that fetches: an absolute path.")
    off_peak: bool = Field(default=False, description="Fetch within the off-peak hours only.")
    studies_per_hour: int = Field(
        default=0, ge=0, description="Fetch no more studies than this in an hour; 0: no limit."
    )


@needs(Role.OPERATOR)
async def find_matches(asked: Asked, body: NewQuery) -> dict[str, Any]:
    """Ask a target what it has, at once. The answer holds patients' data; it is kept nowhere."""
    from talaria.service import retrievals

    return await retrievals.find_matches(await asked(), **body.model_dump())


@needs(Role.OPERATOR)
async def create_query(asked: Asked, body: NewQuery, idempotency_key: Key = "") -> dict[str, Any]:
    """Put a search into the queue; its result lists UIDs and accession numbers, and can be read later."""
    from talaria.service import retrievals

    return await retrievals.create_query(await asked(), **body.model_dump(), key=idempotency_key)


@needs(Role.OPERATOR)
async def create_retrieval(asked: Asked, body: NewRetrieval, idempotency_key: Key = "") -> dict[str, Any]:
    """Find studies, fetch them, and deliver each as soon as it is whole. It is in the queue when this answers."""
    from talaria.service import retrievals

    return await retrievals.create_retrieval(await asked(), **body.model_dump(), key=idempotency_key)


def add_to(app: FastAPI) -> None:
    """Add the routes."""
    add(app, "POST", "/matches", find_matches, answer=answers.MatchesAnswer)
    add(app, "POST", "/queries", create_query, answer=answers.CreatedQueryAnswer)
    add(app, "POST", "/retrievals", create_retrieval, answer=answers.CreatedRetrievalAnswer)
