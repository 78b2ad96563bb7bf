"""What people remove through Prefect's pages and API: a target that something uses stays, as on our own pages."""

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
        if why := await self._why_not(scope, removes[1], removes[2]):
            await refuse(send, 409, why)
        else:
            await self.app(scope, receive, send)

    async def _why_not(self, scope: Message, what: str, number: str) -> str:
        """Return why a block document, or all of a block type or of one of its schemas, must stay; "" if it may go."""
        from talaria.service.uses import InUse, check_unused
        from tasks.targets import documents

        office: Any = await self.office_of(scope)
        try:
            wanted = UUID(number)
        except ValueError:
            return ""  # Prefect's to refuse
        gone = [
            one
            for one in await documents(office.client)
            if wanted == {"documents": one.id, "types": one.block_type_id, "schemas": one.block_schema_id}[what]
        ]
        try:
            await check_unused(office.client, [str(one.name) for one in gone], "removed")
        except InUse as exc:
            return exc.message
        return ""
