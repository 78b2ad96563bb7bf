"""The flows that workers run, by name. Nothing else is ever run, whatever a deployment names as its entry point."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Failed

from flows.batch import batch
from flows.check import check
from flows.dispatch import dispatch
from flows.find import find
from flows.retrieve import retrieve

DEPLOYED_S = 60.0  # how long it is known which flow a deployment is of
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


class Flows:
    """Which flow each run is of, as deployments say."""

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        self._known: dict[UUID, tuple[float, Flow[..., Any] | None, str]] = {}  # by deployment, with the time

    async def of(self, flow_run: FlowRun) -> Flow[..., Any] | None:
        """Return the flow to run; if its deployment names none of ours, or it can't begin so, fail the run.

        Returns:
            None for a run that was failed.
        """
        deployment_id = flow_run.deployment_id
        known = self._known.get(deployment_id) if deployment_id else None
        if known is None or known[0] < time.monotonic() - DEPLOYED_S:
            entrypoint = "none"
            with suppress(ObjectNotFound):
                if deployment_id:
                    entrypoint = str((await self._client.read_deployment(deployment_id)).entrypoint)
            known = time.monotonic(), flow_at(entrypoint), entrypoint
            if deployment_id:
                self._known[deployment_id] = known
        _, flow, entrypoint = known
        if flow is None:
            # To be allowed to create deployments must not mean to run code of one's own on this machine.
            why = f"its deployment's entry point, {entrypoint}, is not one of Talaria's flows"
        else:  # Prefect would raise outside of the run, which would crash again and again
            why = _misfit(flow, flow_run.parameters)
        if why:
            await self._client.set_flow_run_state(flow_run.id, Failed(message=f"Not run: {why}."), force=True)
        return None if why else flow


def _misfit(flow: Flow[..., Any], given: Mapping[str, Any]) -> str:
    """Return why a flow can't be called with these parameters, in a sentence; "" if it can."""
    own = inspect.signature(flow.fn).parameters
    unknown = sorted(given.keys() - own.keys())
    missing = [name for name, one in own.items() if one.default is one.empty and name not in given]
    if unknown:
        return f"{flow.name} has no parameter {', '.join(unknown)}; it has {', '.join(own)}"
    return f"it needs {', '.join(missing)}" if missing else ""
