"""Deployments' forms in Prefect's pages: they offer the names of the targets that there are.

The names are put into the answer, not into the deployment: no list is ever older than the targets, and a run may name a
target that was added a moment ago.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

from talaria.engine.asgi import Application, Message, Receive, Send
from talaria.front.access import SCOPE_KEY, Identity, Role
from talaria.front.changed import changed

_SHOWS = re.compile(r"/api/deployments/([0-9a-fA-F-]{32,36})/?")
OfficeOf = Callable[[Message], Any]  # returns an awaitable of the office of whoever asks


class OfferedNames:
    """Prefect's application, here or elsewhere; its forms of our deployments offer names to choose from."""

    def __init__(self, app: Application, office_of: OfficeOf) -> None:
        self.app, self.office_of = app, office_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        who: Identity | None = scope.get(SCOPE_KEY)
        if scope["type"] != "http" or who is None or who.role >= Role.WORKER:  # no people
            await self.app(scope, receive, send)
            return
        shows = _SHOWS.fullmatch(scope["path"]) if scope["method"] == "GET" else None
        names = await self._names(scope, shows[1]) if shows else {}
        if names:
            headers = [one for one in scope["headers"] if one[0] != b"accept-encoding"]
            scope, send = {**scope, "headers": headers}, changed(send, lambda answer: _with_names(answer, names))
        await self.app(scope, receive, send)

    async def _names(self, scope: Message, deployment: str) -> dict[str, list[str]]:
        """Return the names that each parameter of a deployment may be given; {} if it is none of ours."""
        from prefect.exceptions import ObjectNotFound

        from talaria.engine.table import flow_at
        from talaria.service.names import names_for

        office = await self.office_of(scope)
        try:
            found = await office.client.read_deployment(UUID(deployment))
        except (ValueError, ObjectNotFound):
            return {}
        flow = flow_at(found.entrypoint or "")
        return await names_for(office, flow.name) if flow else {}


def _with_names(answer: bytes, names: dict[str, list[str]]) -> bytes:
    """Return a deployment whose form offers the names of targets."""
    document = json.loads(answer)
    fields = (document.get("parameter_openapi_schema") or {}).get("properties") or {}
    for parameter, known in names.items():
        field = fields.get(parameter)
        if field is not None and known:
            (field.setdefault("items", {}) if field.get("type") == "array" else field)["enum"] = known
    return json.dumps(document).encode()
