"""What a server gives in pieces is read to its end; what it gets is not read without end."""

from __future__ import annotations

import asyncio

import pytest

from talaria.engine.asgi import BODY_BYTES, Message
from talaria.engine.unique import UniqueNames
from tasks.paging import PAGE, every


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
def test_every_page_is_asked_for(count: int) -> None:
    async def ask(name: str, limit: int, offset: int) -> list[str]:
        return [f"{name}{number}" for number in range(count)][offset : offset + limit]

    assert asyncio.run(every(ask, name="run")) == [f"run{number}" for number in range(count)]


def test_a_document_without_end_is_refused_before_it_is_whole() -> None:
    sent: list[Message] = []

    async def never(*_: object) -> None:
        raise AssertionError("the application must not see it")

    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(BODY_BYTES // 4 + 1), "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/block_documents/", "headers": []}
    asyncio.run(UniqueNames(never)(scope, receive, send))
    assert sent[0]["status"] == 413
