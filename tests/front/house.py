"""Our pages without a Prefect behind them, and people who have logged in there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from talaria.front import pages
from talaria.front.access import Role
from talaria.front.api import shared
from talaria.front.api.asking import Reach
from tests.front.door import PASSWORD, Echo, FrontDoor
from transfer.audit import Trail, entries
from transfer.home import Home

BASE = "http://127.0.0.1:4200"


class House:
    """A front door without a Prefect, and browsers of people who have logged in."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        reach = Reach(shared(Echo()), Home(folder), embedded=True, url="")
        self.door = FrontDoor(folder, pages.routes(reach))

    def add(self, name: str, role: Role) -> None:
        self.door.keys.users.add(name, role, PASSWORD)

    async def log_in(self, client: httpx.AsyncClient, name: str, password: str = PASSWORD) -> int:
        form = {"user": name, "password": password, "next": "/talaria/settings"}
        return (await client.post("/talaria/login", data=form)).status_code

    def audit(self) -> list[dict[str, Any]]:
        return [one for one in entries(Trail(self.door.home)) if one["event"] == "user-changed"]


def run(house: House, name: str, case: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        async with house.door.browser() as client:
            client.headers.update({"Accept": "text/html", "Origin": BASE})
            assert await house.log_in(client, name) == 303
            await case(client)

    asyncio.run(whole())
