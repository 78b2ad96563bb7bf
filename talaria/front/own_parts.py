"""What people remove through Prefect's pages and API: the parts that Talaria itself works with stay.

With its work pool, or one of its queues, goes the place of what waits there; with a flow or its deployment, Prefect
removes what has yet to begin, or all runs. What people have made besides is theirs, also in our pool.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import httpx

from talaria.engine import hosts
from talaria.engine.asgi import Application, Message, Receive, Send, again, read, refuse
from talaria.front.access import SCOPE_KEY, Identity, Role
from talaria.front.offered import OfficeOf
from talaria.settings import POOL

_ID = "[0-9a-fA-F-]{32,36}"
_POOL = re.compile(rf"/api/work_pools/{POOL}(?:/queues/([^/]+))?/?")
_BY_ID = re.compile(rf"/api/(flows|deployments|work_queues)/({_ID})/?")
_MANY = re.compile(r"/api/(flows|deployments)/bulk_delete/?")
MOST = 200  # that are removed at once
OURS = "talaria"  # name of a deployment that `talaria up` makes of a flow


class OwnParts:
    """Prefect's application, here or elsewhere; it is not asked to remove what Talaria works with."""

    def __init__(self, app: Application, office_of: OfficeOf) -> None:
        self.app, self.office_of = app, office_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        who: Identity | None = scope.get(SCOPE_KEY)
        removes = _removes(scope)
        if not removes or who is None or who.role >= Role.WORKER:
            await self.app(scope, receive, send)
            return
        body = b""
        if _MANY.fullmatch(scope["path"]):
            given = await read(receive, send, "what is to be removed")
            if given is None:
                return
            body, receive = given, again(given, receive)
        office: Any = await self.office_of(scope)
        if why := await _why_not(office.client, scope["path"], body):
            await refuse(send, 409, why)
            return
        await self.app(scope, receive, send)


def _removes(scope: Message) -> bool:
    if scope["type"] != "http":
        return False
    method, path = scope["method"], scope["path"]
    if method == "POST":
        return bool(_MANY.fullmatch(path))
    return method == "DELETE" and bool(_POOL.fullmatch(path) or _BY_ID.fullmatch(path))


async def _why_not(client: Any, path: str, body: bytes) -> str:
    """Return why what a path names must stay; "" if it may go, or is Prefect's to refuse."""
    if pool := _POOL.fullmatch(path):
        return await _of_queue(client, pool[1]) if pool[1] else f"all runs of Talaria stand in the work pool {POOL}"
    if many := _MANY.fullmatch(path):
        try:
            return await _of_many(client, many[1], json.loads(body).get(many[1]) or {})
        except (ValueError, AttributeError, RecursionError):
            return ""
    one = _BY_ID.fullmatch(path)
    if one is None or one[1] != "work_queues":
        return await _of_many(client, one[1], {"id": {"any_": [one[2]]}}) if one else ""
    try:
        queue = (await client.request("GET", "/work_queues/{id}", path_params={"id": one[2]})).json()
    except httpx.HTTPStatusError:  # there is none
        return ""
    return await _of_queue(client, queue["name"]) if queue.get("work_pool_name") == POOL else ""


async def _of_queue(client: Any, name: str) -> str:
    """Return why a queue of our pool must stay; one of a host that is gone may go when nothing waits there."""
    from talaria.engine.registry import QUEUES, waiting

    if name in QUEUES:
        return f"runs of Talaria come into the queue {name}"
    if not hosts.of_queue(name):
        return ""
    answer = await client.request("POST", "/flow_runs/count", json=waiting(datetime.now(UTC), any_=[name]))
    count = int(answer.json())
    return f"in the queue {name}, {count} runs wait for its host: cancel them first" if count else ""


async def _of_many(client: Any, kind: str, wanted: dict[str, Any]) -> str:
    """Return why one of some flows, or deployments, must stay."""
    from talaria.engine.table import FLOWS, OF_SOURCES, flow_at
    from tasks.sources.saved import KEPT

    try:
        answer = await client.request("POST", f"/{kind}/filter", json={kind: wanted, "limit": MOST})
    except httpx.HTTPStatusError as exc:
        if exc.response.status_code != httpx.codes.UNPROCESSABLE_ENTITY:
            raise
        return ""  # Prefect's to refuse
    for one in answer.json():
        name = str(one["name"])
        if kind == "flows":
            if name in FLOWS | OF_SOURCES:
                return f"the flow {name} is Talaria's own: with it, all of its runs would go"
            continue
        flow = flow_at(one["entrypoint"] or "")
        if flow and flow.name in FLOWS and name == OURS:
            return f"the deployment {flow.name}/{name} is Talaria's own: with it, what has yet to begin would go"
        if flow and flow.name in OF_SOURCES and name in {one.name for one in await KEPT.documents(client)}:
            return f"the deployment {flow.name}/{name} sweeps the source {name}: pause, or remove, that one"
    return ""
