"""What people save of sources through Prefect's pages and API is followed as on ours: by its schedule, and at once.

A source that can't be used is refused (a folder that another one has, a target that is not there).
"""

from __future__ import annotations

import json
import logging
from typing import Any
from uuid import UUID

from blocks import SOURCES, Source
from talaria.engine.asgi import Application, Message, Receive, Send, again, read, refuse, saved_document
from talaria.front.access import SCOPE_KEY, Identity, Role
from talaria.front.offered import OfficeOf
from talaria.front.saved import is_given, merged

_logger = logging.getLogger("talaria.front")


class FollowedSources:
    """Prefect's application, here or elsewhere; what is saved there of a source is what it does from then on."""

    def __init__(self, app: Application, office_of: OfficeOf) -> None:
        self.app, self.office_of = app, office_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        who: Identity | None = scope.get(SCOPE_KEY)
        document = saved_document(scope)
        if document is None or who is None or who.role >= Role.WORKER:  # our own processes have looked
            await self.app(scope, receive, send)
            return
        body = await read(receive, send, "a block document")
        if body is None:
            return
        office: Any = await self.office_of(scope)
        try:
            given = json.loads(body)
            source, before = await (_changed(office, document, given) if document else _created(office, given))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            source = before = None  # not valid: for others to refuse
        if source is None:
            await self.app(scope, again(body, receive), send)
            return
        from talaria.service.sources import problems_of

        if wrong := await problems_of(office, source):
            await refuse(send, 422, f"the source can't be used: {'; '.join(wrong)}")
            return
        await self._save(office, source, before, (scope, again(body, receive), send))

    async def _save(
        self, office: Any, source: Source, before: Source | None, request: tuple[Message, Receive, Send]
    ) -> None:
        """Let Prefect save a source; its answer comes when all is done that follows from it."""
        from talaria.service.sources import follow

        scope, receive, send = request
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self.app(scope, receive, keep)
        if answer and answer[0]["status"] < 300:
            try:
                await follow(office, source, before, "updated" if before else "created")
            except Exception:  # it is saved; when Talaria starts, what is missing is made
                _logger.exception("source %s was saved, and its schedule may be the old one", source.name)
        for message in answer:
            await send(message)


async def _created(office: Any, given: Any) -> tuple[Source | None, Source | None]:
    from prefect.exceptions import ObjectNotFound

    try:
        number = {"id": UUID(given["block_type_id"])}
        found = (await office.client.request("GET", "/block_types/{id}", path_params=number)).json()
    except ObjectNotFound:
        return None, None
    cls = _type_of(str(found["slug"]))
    if cls is None or given.get("is_anonymous") or not is_given(data := given.get("data") or {}):
        return None, None
    return cls(**_values(data)).named(str(given["name"])), None


async def _changed(office: Any, number: str, given: Any) -> tuple[Source | None, Source | None]:
    from prefect.exceptions import ObjectNotFound

    from tasks.sources.saved import KEPT
    from transfer.errors import Misconfigured

    try:
        document = await office.client.read_block_document(UUID(number), include_secrets=True)
    except ObjectNotFound:
        return None, None
    cls = _type_of(document.block_type.slug if document.block_type else "")
    if cls is None or not isinstance(given.get("data"), dict) or not is_given(given["data"]):
        return None, None
    data, _ = merged(cls, document.data, given)
    try:
        before = KEPT.made_of(document)
    except Misconfigured:  # what was saved is broken
        before = None
    return cls(**_values(data)).named(str(document.name)), before if isinstance(before, Source) else None


def _type_of(slug: str) -> type[Source] | None:
    return next((cls for cls in SOURCES.values() if cls.get_block_type_slug() == slug), None)


def _values(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "block_type_slug"}
