"""Writes a line to the log for each change of a run's state by a worker, with the ids of run and dispatch."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import FlowRun, State

from talaria.engine import runs
from talaria.logs import changed
from tasks.dispatch.asked import asked_list
from transfer.ledger import Ledger


def begins(flow_run: FlowRun) -> None:
    """Say that a run, or a part of one that has waited, begins."""
    changed("run.running", f"run {flow_run.id} begins", **_about(flow_run, runs.dispatch_of(flow_run)))


def ends(flow_run: FlowRun, state: State[Any] | None, ledger: Ledger) -> None:
    """Say in which state a run has ended, or waits. Without its message, which may name paths."""
    name = str(state.name) if state else "unknown"
    kind = state.type.value.lower() if state else "unknown"
    dispatch = ledger.runs.dispatch_of(str(flow_run.id)) or runs.dispatch_of(flow_run)
    until = state.state_details.scheduled_time if state else None
    about = _about(flow_run, dispatch) | {"state": name, "until": until.isoformat() if until else None}
    changed(f"run.{kind}", f"run {flow_run.id} is {name}", **about)


def _about(flow_run: FlowRun, dispatch: str) -> dict[str, Any]:
    asked = flow_run.parameters
    return {
        "run": str(flow_run.id),
        "dispatch": dispatch,
        "kind": "check" if "target" in asked else "batch" if [*asked] == ["source"] else runs.kind_of(flow_run),
        "targets": asked_list(asked, "targets") or None,
        "source": asked.get("source"),
        "part": (flow_run.run_count or 0) + 1,
    }
