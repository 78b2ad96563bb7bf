"""Icons of the types of target come from the front door, whatever name it is reached by; Prefect keeps one address."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from blocks import TYPES
from talaria.front.access import Role
from talaria.front.changed import NOWHERE
from talaria.front.gate import Message, Receive, Send
from tests.front.door import Echo, FrontDoor

ELSEWHERE = "https://cdn.sanity.io/images/x-225x225.png"
LOGOS = {name: str(cls._logo_url) for name, cls in TYPES.items()}
KEPT = LOGOS | {"aws": ELSEWHERE, "plain": None}


class BlockTypes(Echo):
    """Answers with block types, in two pieces, as Prefect's API does."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.asked.append(scope)
        kinds = [{"slug": name, "logo_url": logo} for name, logo in KEPT.items()]
        body = json.dumps(kinds, separators=(",", ":")).encode()
        start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        await send({"type": "http.response.body", "body": body[:60], "more_body": True})
        await send({"type": "http.response.body", "body": body[60:]})


def ask(door: FrontDoor, path: str, headers: dict[str, str], base: str, method: str = "POST") -> Any:
    async def case() -> httpx.Response:
        async with door.browser(base=base) as client:
            return await client.request(method, path, headers={"accept-encoding": "gzip", **headers})

    return asyncio.run(case())


@pytest.mark.parametrize("path", ["block_types/filter", "block_documents/filter", "block_schemas/filter"])
@pytest.mark.parametrize("base", ["http://127.0.0.1:4200", "https://talaria.ward.example"])
def test_people_get_icons_of_the_server_that_they_ask(tmp_path: Path, path: str, base: str) -> None:
    door = FrontDoor(tmp_path / "home", upstream=BlockTypes(), hosts=frozenset({base.split("//")[1]}), tls="s:" in base)
    answer = ask(door, f"/api/{path}", door.token(Role.VIEWER), base)
    logos = {one["slug"]: one["logo_url"] for one in answer.json()}
    icons = f"{base}/talaria/static/icons"
    assert logos == {name: f"{icons}/{name}.svg" for name in TYPES} | dict.fromkeys(
        ("aws", "plain"), f"{icons}/block.svg"
    )
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert b"accept-encoding" not in dict(door.upstream.asked[0]["headers"])  # changed, so never compressed
    for logo in logos.values():
        assert ask(door, logo, {}, base, "GET").headers["content-type"] == "image/svg+xml"


def test_the_product_s_own_processes_get_what_is_kept(tmp_path: Path) -> None:
    """Else each of them would write back another address, on every start."""
    door = FrontDoor(tmp_path / "home", upstream=BlockTypes())
    answer = ask(door, "/api/block_types/filter", door.worker, "http://127.0.0.1:4200")
    assert {one["slug"]: one["logo_url"] for one in answer.json()} == KEPT
    assert all(logo.encode().startswith(NOWHERE) for logo in LOGOS.values())
