"""Keeps names of targets, and of sources, unique, also for Prefect's own pages and clients.

The embedded server refuses a name that is taken, unless the request names what it is saved in the place of
(`tasks.documents`), which is removed after that.
"""

from __future__ import annotations

import asyncio
import json
from uuid import UUID

from blocks.base import Target
from blocks.source import Source
from talaria.engine.asgi import Application, Message, Receive, Send, again, asking, read, refuse, saved_document
from tasks.documents import REPLACES


class UniqueNames:
    """Prefect's application; refuses to create a target, or a source, with the name of one of another type.

    Prefect itself demands unique names only within a type. A name can't be changed later.
    """

    def __init__(self, app: Application) -> None:
        self.app = app
        self._turn = asyncio.Lock()  # between the question and the answer nobody else saves

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if saved_document(scope) != "":
            await self.app(scope, receive, send)
            return
        body = await read(receive, send, "a block document")
        if body is None:
            return
        async with self._turn:
            taken = await self._taken(scope, body)
            if taken:
                await refuse(send, 422, taken)
            else:
                await self.app(scope, again(body, receive), send)

    async def _taken(self, scope: Message, body: bytes) -> str:
        """Return why a block document can't have its name; "" if it can, or is neither."""
        try:
            document = json.loads(body)
            name, type_id = str(document["name"]), UUID(document["block_type_id"])
            schema_id = UUID(document["block_schema_id"])
        except (ValueError, KeyError, TypeError):
            return ""  # Prefect's to refuse, or anonymous
        async with asking(self.app, scope) as client:
            schema = await client.get(f"/block_schemas/{schema_id}")
            able = schema.json()["capabilities"] if schema.status_code == 200 else ()
            kinds = {kind._block_schema_capabilities[0]: kind.word for kind in (Target, Source)}
            capability = next((one for one in kinds if one in able), "")
            if not capability:
                return ""
            asked = {
                "block_schemas": {"block_capabilities": {"all_": [capability]}},
                "block_documents": {"name": {"any_": [name]}, "is_anonymous": {"eq_": False}},
            }
            found = (await client.post("/block_documents/filter", json=asked)).json()
        if any(UUID(one["block_type_id"]) == type_id for one in found):
            return ""  # Prefect's to refuse; who saves it changes that one then
        given = [value.decode("latin-1") for key, value in scope["headers"] if key == REPLACES.lower().encode()]
        replaced = {number for text in given for number in text.split()}
        others = [one["block_type"]["name"] for one in found if one["id"] not in replaced]
        return (
            f"a {kinds[capability]} named {name} is there already, of type {others[0]}: choose another name"
            if others
            else ""
        )
