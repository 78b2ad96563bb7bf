"""What people remove through Prefect's pages and API: a target that something uses stays, as on our own pages.

So does a source that has received what is not delivered. Of what goes, nobody remembers anything: that a target was
down, a source's schedule and units.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from uuid import UUID

from talaria.engine.asgi import Application, Message, Receive, Send, refuse
from talaria.front.access import SCOPE_KEY, Identity, Role
from talaria.front.offered import OfficeOf
from transfer.errors import Misconfigured

if TYPE_CHECKING:
    from prefect.client.schemas.objects import BlockDocument

    from tasks.documents import Documents

_REMOVES = re.compile(r"/api/block_(documents|types|schemas)/([0-9a-fA-F-]{32,36})/?")


class UsedTargets:
    """Prefect's application, here or elsewhere; it is not asked to remove a target that something uses,
    nor a source for which something waits.
    """

    def __init__(self, app: Application, office_of: OfficeOf) -> None:
        self.app, self.office_of = app, office_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        who: Identity | None = scope.get(SCOPE_KEY)
        removes = scope["type"] == "http" and scope["method"] == "DELETE" and _REMOVES.fullmatch(scope["path"])
        if not removes or who is None or who.role >= Role.WORKER:  # our own processes have looked
            await self.app(scope, receive, send)
            return
        from tasks.names import qualified
        from tasks.sources.saved import KEPT
        from tasks.targets import TARGETS

        office: Any = await self.office_of(scope)
        gone = [qualified(one) for one in await _which(office.client, TARGETS, removes[1], removes[2])]
        sources = await _which(office.client, KEPT, removes[1], removes[2])
        if why := await _why_not(office, gone, sources):
            await refuse(send, 409, why)
            return
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self.app(scope, receive, keep)
        if answer and answer[0]["status"] < 300:
            from talaria.service.sources import forget_source
            from talaria.service.targets import forget_standing

            for name in gone:
                await forget_standing(office, name)
            for one in sources:
                await forget_source(office, str(one.name))
        for message in answer:
            await send(message)


async def _which(client: Any, documents: Documents[Any], what: str, number: str) -> list[BlockDocument]:
    """Return the targets, or sources, that go with a block document, a block type or one of its schemas."""
    try:
        wanted = UUID(number)
    except ValueError:
        return []  # Prefect's to refuse
    return [
        one
        for one in await documents.documents(client)
        if wanted == {"documents": one.id, "types": one.block_type_id, "schemas": one.block_schema_id}[what]
    ]


async def _why_not(office: Any, names: list[str], sources: list[BlockDocument]) -> str:
    """Return why targets or sources must stay; "" if they may go."""
    from talaria.service.sources import check_removal
    from talaria.service.uses import InUse, check_unused
    from tasks.names import type_of

    try:
        await check_unused(office.client, names, "removed")
    except InUse as exc:
        return exc.message
    for one in sources:
        try:
            await check_removal(office, str(one.name), type_of(one))
        except Misconfigured as exc:
            return f"source {one.name}: {exc.message}"
    return ""
