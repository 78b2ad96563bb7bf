"""Puts runs into the queue of their priority, also for Prefect's own pages and clients, which name none, or another."""

from __future__ import annotations

import json
import re
from typing import Any

from talaria.engine import hosts
from talaria.engine.asgi import BODY_BYTES, Application, Message, Receive, Send, again, asking, read, refuse
from talaria.engine.registry import CHECKS, QUEUES
from talaria.settings import POOL

PRIORITIES = QUEUES.keys() - {CHECKS}
_CREATES = re.compile(r"/api(/deployments/[0-9a-fA-F-]{32,36})/create_flow_run(?:/bulk)?/?")


class QueueOfPriority:
    """Prefect's application; a run of ours that is created goes into the queue that its parameter `priority` names.

    One that names a host's queue goes into that host's: what its paths mean on another host may be another patient's.
    """

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        creates = _CREATES.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if creates is None:
            await self.app(scope, receive, send)
            return
        body = await read(receive)
        if body is None:
            await refuse(send, 413, f"runs of more than {BODY_BYTES} bytes")
            return
        changed = _queued(body)
        if changed is not None and await self._is_ours(scope, creates[1]):
            body = changed
            headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        await self.app(scope, again(body, receive), send)

    async def _is_ours(self, scope: Message, deployment: str) -> bool:
        async with asking(self.app, scope) as client:
            found = await client.get(deployment)
        return found.status_code == 200 and found.json().get("work_pool_name") == POOL


def _queued(body: bytes) -> bytes | None:
    """Return the body with the queue of each run's priority; None if it is right as it is, or Prefect's to refuse."""
    try:
        document = json.loads(body)
        runs: list[Any] = document if isinstance(document, list) else [document]
        queues = [_queue(run) for run in runs]
    except (ValueError, AttributeError, TypeError):
        return None
    wrong = [(run, queue) for run, queue in zip(runs, queues, strict=True) if run.get("work_queue_name") != queue]
    for run, queue in wrong:
        run["work_queue_name"] = queue
    return json.dumps(document).encode() if wrong else None


def _queue(run: Any) -> Any:
    """Return the queue that a run belongs in: of its priority, and its host; that which it names if it has none."""
    named, priority = run.get("work_queue_name"), (run.get("parameters") or {}).get("priority")
    if priority not in PRIORITIES:
        return named
    host = hosts.of_queue(named)
    return f"{priority}{hosts.AT}{host}" if host else priority
