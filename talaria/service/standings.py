"""How dispatches and retrievals stand, and dispatches at each target, in the words of receipts, and as `running`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from prefect.client.schemas.objects import FlowRun, StateType

from talaria.engine.runs import GIVEN_UP, UNDER_WAY, kind_of
from talaria.service import Office
from talaria.service.overview import names_of
from talaria.service.results import line
from tasks.dispatch import progress, rest, running
from transfer.deliveries import WHOLE, Standing
from transfer.ledger import Ledger
from transfer.receipt import State

ENDED = {StateType.COMPLETED: "delivered", StateType.CANCELLED: "cancelled"}  # any other end is "failed"


async def lines(office: Office, found: Sequence[FlowRun]) -> list[dict[str, Any]]:
    """Return dispatches and retrievals as lists show them, each with `standing`, its state as a whole, `at`, and
    `says`, what else there is to say.

    `at` has for each target of a dispatch its `name`, `state`, `words` (why what is missing is missing) and, under way,
    `percent`. A dispatch whose ledger is another's, or that ended before it could note anything, has what its run says.
    """

    def read() -> tuple[dict[str, dict[str, Standing]], dict[str, dict[str, Any]]]:
        with Ledger(office.home.ledger) as ledger:
            known = ledger.deliveries.of([str(run.id) for run in found])
        looks = {}
        for run in found:
            if run.state_type in UNDER_WAY:
                with suppress(ValueError, OSError):  # it is being replaced
                    looks[str(run.id)] = progress.read(office.home, str(run.id)) or {}
        return known, looks

    known, looks = await asyncio.to_thread(read)
    shown = [line(run) | _standing(run, known.get(str(run.id), {}), looks.get(str(run.id), {})) for run in found]
    for run, entry in zip(found, shown, strict=True):
        # Of a retrieval, and of what names no target, only the run says why.
        said = bool(entry["at"]) and all(part["words"] or part["state"] == "delivered" for part in entry["at"])
        entry["says"] = _awaited(run) if entry["ended"] is None else "" if said else entry["message"]
    return shown


def by_receipt(run: FlowRun, document: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Return how a dispatch or retrieval stands as a whole, and a dispatch at each target of its receipt."""
    targets: Mapping[str, Any] = document.get("targets", {})
    states = {WHOLE: document["state"], **{name: one["state"] for name, one in targets.items()}}
    known = {name: Standing(name, state, 0, 0, "") for name, state in states.items()}
    rests = _rests(known)
    at = {name: str(_at(name, run, known[name], None, rests=rests)["state"]) for name in targets}
    return _whole(run, known), at


def _standing(run: FlowRun, known: Mapping[str, Standing], look: Mapping[str, Any]) -> dict[str, Any]:
    parts: Mapping[str, Any] = look.get("parts", {})
    names = names_of(run) if kind_of(run) == "dispatch" else ()
    rests = _rests(known)
    at = [_at(name, run, known.get(name), parts.get(name), rests=rests) for name in names]
    return {"at": at, "standing": _whole(run, known)}


def _rests(known: Mapping[str, Standing]) -> bool:
    """Return True if a run has noted that it goes on: one that has ended and is tried again has not."""
    return any(one.state == State.WAITING for one in known.values())


def _whole(run: FlowRun, known: Mapping[str, Standing]) -> str:
    whole = known[WHOLE].state if WHOLE in known else ""
    # Of the run's own end, a failure has two meanings; and Completed may have been set by somebody at Prefect.
    counts = whole == State.PARTIAL if run.state_type in GIVEN_UP else run.state_type == StateType.COMPLETED
    if run.state_type == StateType.CANCELLED and kind_of(run) == "retrieval":
        counts = whole == State.DELIVERED  # it was too late to cancel it
    return _now(run, whole if counts else "")


def _at(
    name: str, run: FlowRun, stood: Standing | None, part: Mapping[str, Any] | None, *, rests: bool
) -> dict[str, Any]:
    """Return how a dispatch stands at a target."""
    state, words = (stood.state, stood.words) if stood else ("", "")
    ended = run.state is not None and run.state.is_final()
    if not ended and state != State.DELIVERED and not (rests and state in (State.PARTIAL, State.FAILED)):
        state, words = "", "" if part else words
    found: dict[str, Any] = {"name": name, "state": _now(run, state), "words": words, "percent": None}
    if part and found["state"] == "running":
        found["percent"] = round(float(part["percent"]))
    return found


def _now(run: FlowRun, state: str) -> str:
    """Return a state as it is now: what waited when its run was stopped waits no more, and has not arrived.

    Args:
        state: as it was noted; "" if nothing was, or it counts no more.
    """
    if run.state is not None and run.state.is_final():
        if state not in ("", State.WAITING, "paused"):
            return state
        return "failed" if state and run.state.is_completed() else ENDED.get(run.state.type, "failed")
    if state and state != State.WAITING:
        return state
    if run.state_name == running.PAUSED:
        return "paused"
    return "running" if run.state_type in UNDER_WAY else "waiting"


def _awaited(run: FlowRun) -> str:
    """Return what a run that has not ended waits for, in words; "" if it waits for nothing, or does not say it."""
    words = (run.state.message or "") if run.state and not run.state.is_final() else ""
    return words.partition("; ")[0] if words.startswith((rest.TRIES_AGAIN, rest.WAITS)) else ""
