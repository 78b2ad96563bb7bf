"""The flows that workers run, by name. Nothing else is ever run, whatever a deployment names as its entry point."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_type_hints
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Failed
from pydantic import BaseModel, ValidationError, create_model

from flows.batch import batch
from flows.check import check
from flows.dispatch import dispatch
from flows.find import find
from flows.retrieve import retrieve
from tasks.dispatch.asked import asked_list
from tasks.dispatch.ends import say_unfit
from tasks.targets import TARGETS
from transfer.validation import numbers_only, what_is_wrong

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
            if flow is dispatch:
                await self._say(flow_run, why)
        return None if why else flow

    async def _say(self, flow_run: FlowRun, why: str) -> None:
        """Say of a dispatch that can't begin so that it has failed, at those of its targets that are there."""
        written = asked_list(flow_run.parameters, "targets")
        names = {name.strip().rpartition("/")[2] for name in written} - {""}
        there = {str(one.name) for one in await TARGETS.documents(self._client, names)} if names else set()
        paths = asked_list(flow_run.parameters, "paths")
        await asyncio.to_thread(say_unfit, str(flow_run.id), sorted(there), paths, f"not run: {why}")


def _misfit(flow: Flow[..., Any], given: Mapping[str, Any]) -> str:
    """Return why a flow can't be called with these parameters, in a sentence; "" if it can."""
    own = inspect.signature(flow.fn).parameters
    unknown = sorted(given.keys() - own.keys())
    missing = [name for name, one in own.items() if one.default is one.empty and name not in given]
    if unknown:
        return f"{flow.name} has no parameter {', '.join(unknown)}; it has {', '.join(own)}"
    if missing:
        return f"it needs {', '.join(missing)}"
    model = _model(flow)
    try:
        model.model_validate(numbers_only(dict(given), model.model_fields))
    except ValidationError as exc:
        return what_is_wrong(exc.errors(), model.model_fields)
    return ""


@functools.cache
def _model(flow: Flow[..., Any]) -> type[BaseModel]:
    """Return a flow's parameters as a model: Prefect would make one for each run."""
    hints = get_type_hints(flow.fn)
    own = inspect.signature(flow.fn).parameters.values()
    fields: Any = {one.name: (hints[one.name], ... if one.default is one.empty else one.default) for one in own}
    return create_model(flow.name, **fields)
