"""The flows that workers run, by name. Nothing else is ever run, whatever a deployment names as its entry point."""

from __future__ import annotations

from typing import Any

from prefect import Flow

from flows.batch import batch
from flows.check import check
from flows.dispatch import dispatch
from flows.find import find
from flows.retrieve import retrieve

FLOWS: dict[str, tuple[Flow[..., Any], str]] = {
    "dispatch": (dispatch, "flows.dispatch:dispatch"),
    "check": (check, "flows.check:check"),
    "find": (find, "flows.find:find"),
    "retrieve": (retrieve, "flows.retrieve:retrieve"),
}
# Those that have a deployment for each source, instead of one for all (`talaria.engine.batches`).
OF_SOURCES: dict[str, tuple[Flow[..., Any], str]] = {"batch": (batch, "flows.batch:batch")}


def flow_at(entrypoint: str) -> Flow[..., Any] | None:
    """Return the flow that an entry point names; None if it is not one of ours."""
    return next((flow for flow, ours in (*FLOWS.values(), *OF_SOURCES.values()) if ours == entrypoint), None)
