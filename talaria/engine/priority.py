"""Puts runs into the queue of their priority, and names dispatches, also for Prefect's own pages and clients.

These name no queue, or another; and a name that a run has from its beginning is one call less when it begins, or rests.
So it is with Prefect's automations, which call its application, and with its schedules, which write runs themselves.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from talaria.engine import hosts
from talaria.engine.asgi import Application, Message, Receive, Send, again, asking, read, with_body
from talaria.engine.registry import CHECKS, QUEUES
from talaria.settings import POOL
from tasks.dispatch.asked import name_for, unplanned

KNOWN_S = 30.0  # for which a deployment is taken for ours, or not: somebody may give it another pool
ENFORCES = "enforce_parameter_schema"  # by which Prefect's pages, too, let a run be made with what does not fit
PRIORITIES = QUEUES.keys() - {CHECKS}
_CREATES = re.compile(r"/api(/deployments/[0-9a-fA-F-]{32,36})/create_flow_run(?:/bulk)?/?")


@dataclass(frozen=True)
class _Deployment:
    """What a deployment of ours gives a run that says neither: a priority, "" if its flow has none, and a queue."""

    priority: str
    queue: str


class QueueOfPriority:
    """Prefect's application; a run of ours that is created goes into the queue that its parameter `priority` names.

    So does one that has it from its deployment, unless it is for a queue that is none of ours, which people have made.
    One that names a host's queue goes into that host's: what its paths mean on another host may be another patient's.
    A dispatch gets a name that says where to.
    """

    def __init__(self, app: Application) -> None:
        self.app = app
        self._known: dict[
            str, tuple[float, _Deployment | None]
        ] = {}  # by id, until when; None for one that is not ours

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        creates = _CREATES.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if creates is None:
            await self.app(scope, receive, send)
            return
        body = await read(receive, send, "runs")
        if body is None:
            return
        ours = await self._ours(scope, creates[1])
        changed = _put_right(body, ours) if ours else None
        if changed is not None:
            body = changed
            scope = with_body(scope, body)
        await self.app(scope, again(body, receive), send)

    async def _ours(self, scope: Message, deployment: str) -> _Deployment | None:
        now = time.monotonic()
        until, ours = self._known.get(deployment, (0.0, None))
        if until > now:
            return ours
        async with asking(self.app, scope) as client:
            answer = await client.get(deployment)
        if answer.status_code != 200:  # it may be there for others, or soon
            return None
        found = answer.json()
        if found.get("work_pool_name") == POOL:
            fields = (found.get("parameter_openapi_schema") or {}).get("properties") or {}
            given = (found.get("parameters") or {}).get("priority") or fields.get("priority", {}).get("default")
            ours = _Deployment(str(given or ""), str(found.get("work_queue_name") or ""))
        else:
            ours = None
        self._known = {key: known for key, known in self._known.items() if known[0] > now}
        self._known[deployment] = now + KNOWN_S, ours
        return ours


def put_scheduled_right() -> None:
    """Let Prefect's scheduler, too, write runs of ours into the queue of their priority."""
    from prefect.server.models import deployments

    theirs = deployments._insert_scheduled_flow_runs  # a private name: tests/engine/test_due.py fails when it changes
    if isinstance(theirs, _Inserting):
        return
    deployments._insert_scheduled_flow_runs = _Inserting(theirs)


class _Inserting:
    """What writes runs of schedules, which have the queue of their deployment."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    async def __call__(self, *, session: Any, runs: list[dict[str, Any]]) -> Any:
        from prefect.server.models import workers

        queues: Any = workers
        for run in runs:
            try:
                wanted = _queue(run)
            except (AttributeError, TypeError):  # not what a priority may be: the run is refused when it begins
                continue
            if wanted == run.get("work_queue_name") or run.get("work_queue_id") is None:
                continue
            named = await queues.read_work_queue(session=session, work_queue_id=run["work_queue_id"])
            if named is None or named.work_pool.name != POOL:
                continue
            right = await queues.read_work_queue_by_name(session=session, work_pool_name=POOL, work_queue_name=wanted)
            if right is not None:
                run.update(work_queue_name=right.name, work_queue_id=right.id)
        return await self._theirs(session=session, runs=runs)


def _put_right(body: bytes, ours: _Deployment) -> bytes | None:
    """Return the body with each run's queue and name, its parameters to be checked; None if it is right, or no JSON."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    wrong = False
    for run in document if isinstance(document, list) else [document]:
        if not isinstance(run, dict):
            continue
        # Parameters of any type would end whatever lists runs: our deployments' own setting holds.
        right: dict[str, Any] = {ENFORCES: None} if ENFORCES in run else {}
        with suppress(AttributeError, TypeError):
            right |= {"work_queue_name": _queue(run, ours), "name": _name(run)}
        for key, value in right.items():
            if run.get(key) != value:
                run[key], wrong = value, True
    return json.dumps(document).encode() if wrong else None


def _queue(run: Any, ours: _Deployment | None = None) -> Any:
    """Return the queue that a run belongs in: of its priority, and its host; that which it names if it has none.

    Args:
        ours: its deployment, which gives it what it does not say.
    """
    named, priority = run.get("work_queue_name"), (run.get("parameters") or {}).get("priority")
    queue = named or (ours.queue if ours else None)
    if priority is None and ours and str(queue).partition(hosts.AT)[0] in PRIORITIES:
        priority = ours.priority
    if priority not in PRIORITIES:
        return named
    host = hosts.of_queue(queue)
    return f"{priority}{hosts.AT}{host}" if host else priority


def _name(run: Any) -> Any:
    """Return the name of a run: for a dispatch one that says where to, else that which it has."""
    own, parameters = run.get("name"), run.get("parameters") or {}
    paths, targets = parameters.get("paths"), parameters.get("targets")
    if not isinstance(paths, list) or not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        return own
    name = unplanned(targets)
    return name_for(own, name) or own if isinstance(own, str) and own else name
