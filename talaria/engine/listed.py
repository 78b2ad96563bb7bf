"""Runs as lists show them, made of what a Prefect server answers without looking at each of its values.

Prefect's client checks and converts fifty fields of each run, which takes longer than the database; that they are of
their types, its server has seen to.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun, State, StateDetails, StateType

_IDS = ("id", "flow_id", "state_id", "deployment_id", "work_queue_id", "work_pool_id", "parent_task_run_id")
_TIMES = ("created", "updated", "expected_start_time", "next_scheduled_start_time", "start_time", "end_time")


def listed(documents: Sequence[dict[str, Any]]) -> list[FlowRun]:
    """Return the runs of an answer. Of fields that lists don't show, some are as JSON has them."""
    return [_run(one) for one in documents]


def _run(one: dict[str, Any]) -> FlowRun:
    made = _converted(one, _IDS, _TIMES)
    if made.get("state_type"):
        made["state_type"] = StateType(made["state_type"])
    if made.get("state"):
        made["state"] = _state(made["state"])
    by = made.get("created_by")
    made["created_by"] = by and by["display_value"]
    return FlowRun.model_construct(**made)


def _state(one: dict[str, Any]) -> State[Any]:
    made = _converted(one, ("id",), ("created", "updated", "timestamp"))
    details = _converted(made.get("state_details") or {}, (), ("scheduled_time",))
    made |= {"type": StateType(made["type"]), "state_details": StateDetails.model_construct(**details)}
    return State.model_construct(**made)


def _converted(one: dict[str, Any], ids: Sequence[str], times: Sequence[str]) -> dict[str, Any]:
    """Return fields of which some are ids and times, in text."""
    made = dict(one)
    for name in ids:
        if made.get(name):
            made[name] = UUID(made[name])
    for name in times:
        if made.get(name):
            made[name] = datetime.fromisoformat(made[name])
    return made
