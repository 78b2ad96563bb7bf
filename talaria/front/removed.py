"""What people remove through Prefect's pages and API: a target that something uses stays, as on our own pages.

Of one that goes, nobody remembers that it was down.
"""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

from talaria.engine.asgi import Application, Message, Receive, Send, refuse
from talaria.front.access import SCOPE_KEY, Identity, Role
from talaria.front.offered import OfficeOf

_REMOVES = re.compile(r"/api/block_(documents|types|schemas)/([0-9a-fA-F-]{32,36})/?")


class UsedTargets:
    """Prefect's application, here or elsewhere; it is not asked to remove a target that something uses."""

    def __init__(self, app: Application, office_of: OfficeOf) -> None:
        self.app, self.office_of = app, office_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        who: Identity | None = scope.get(SCOPE_KEY)
        removes = scope["type"] == "http" and scope["method"] == "DELETE" and _REMOVES.fullmatch(scope["path"])
        if not removes or who is None or who.role >= Role.WORKER:  # our own processes have looked
            await self.app(scope, receive, send)
            return
        office: Any = await self.office_of(scope)
        gone = await _which(office.client, removes[1], removes[2])
        if why := await _why_not(office.client, gone):
            await refuse(send, 409, why)
            return
        removed = False

        async def sent(message: Message) -> None:
            nonlocal removed
            removed = removed or (message["type"] == "http.response.start" and message["status"] < 300)
            await send(message)

        await self.app(scope, receive, sent)
        if removed:
            from talaria.service.targets import forget_standing

            for name in gone:
                await forget_standing(office, name)


async def _which(client: Any, what: str, number: str) -> list[str]:
    """Return the targets, with their types, that go with a block document, a block type or one of its schemas."""
    from tasks.names import qualified
    from tasks.targets import documents

    try:
        wanted = UUID(number)
    except ValueError:
        return []  # Prefect's to refuse
    return [
        qualified(one)
        for one in await documents(client)
        if wanted == {"documents": one.id, "types": one.block_type_id, "schemas": one.block_schema_id}[what]
    ]


async def _why_not(client: Any, names: list[str]) -> str:
    """Return why targets must stay; "" if they may go."""
    from talaria.service.uses import InUse, check_unused

    try:
        await check_unused(client, names, "removed")
    except InUse as exc:
        return exc.message
    return ""
