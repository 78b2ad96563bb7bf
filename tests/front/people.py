"""People who read Talaria's pages without scripts, by forms and links alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from html import unescape
from typing import Any

import httpx

from talaria.front.access import Role
from talaria.front.users import Users
from tests.front.door import PASSWORD
from tests.servers.up import Talaria
from transfer.home import Home


class Person:
    """Somebody who reads pages and sends their forms; nothing is known but what stands in them."""

    def __init__(self, up: Talaria, role: Role, name: str = "") -> None:
        self.home = up.home
        self.base = up.url.removesuffix("/api")
        self.client = httpx.Client(
            base_url=self.base, timeout=120, trust_env=False, headers={"Accept": "text/html", "Origin": self.base}
        )
        name = name or f"{role.label}-{id(self)}"
        Users(Home(up.home)).add(name, role, PASSWORD)
        form = {"user": name, "password": PASSWORD, "next": "/talaria/"}
        assert self.client.post("/talaria/login", data=form).status_code == 303

    def get(self, path: str, status: int = 200) -> str:
        answer = self.client.get(path)
        assert answer.status_code == status, (path, answer.status_code, answer.text[:500])
        return answer.text

    def post(self, path: str, form: dict[str, Any], status: int = 303) -> str:
        """Send a form; return where it leads, or the page that it answers."""
        answer = self.client.post(path, data=form)
        assert answer.status_code == status, (path, answer.status_code, words(answer.text)[:600])
        return str(answer.headers.get("location", answer.text))

    def form(self, path: str) -> dict[str, Any]:
        """Return the fields of a page's form as it is shown."""
        return fields(self.get(path))


def person(up: Talaria, role: Role, name: str = "") -> Iterator[Person]:
    found = Person(up, role, name)
    yield found
    found.client.close()


def fields(page: str) -> dict[str, Any]:
    """Return what a browser sends of a page's forms; of boxes with one name, a list of those that are picked."""
    found: dict[str, Any] = {}
    for tag in re.findall(r"<input [^>]*>", page):
        about = dict(re.findall(r'([a-z-]+)="([^"]*)"', tag))
        if about.get("type") in ("checkbox", "radio") and " checked" not in tag:
            continue
        if "name" in about:
            value, name = unescape(about.get("value", "")), about["name"]
            several = about.get("type") == "checkbox" and name in found
            found[name] = (
                [*(found[name] if isinstance(found[name], list) else [found[name]]), value] if several else value
            )
    for name, body in re.findall(r'<select [^>]*name="([^"]+)"[^>]*>(.*?)</select>', page, re.S):
        chosen = re.search(r'<option(?: value="([^"]*)")? selected>([^<]*)', body)
        if chosen:
            found[name] = unescape(chosen[1] if chosen[1] is not None else chosen[2])
    for name, body in re.findall(r'<textarea [^>]*name="([^"]+)"[^>]*>(.*?)</textarea>', page, re.S):
        found[name] = unescape(body.removeprefix("\n"))  # as browsers read it
    return found


def words(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


async def happens(seen: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until something is so, while what else runs in this loop goes on."""
    while True:
        looked = seen()
        if looked if isinstance(looked, bool) else await looked:
            return
        await asyncio.sleep(0.01)


async def found(client: httpx.AsyncClient, leads: str) -> str:
    """Return the page of a search, once that has ended."""
    page = ""

    async def over() -> bool:
        nonlocal page
        page = (await client.get(leads)).text
        return "Asking" not in words(page)

    await happens(over)
    return page
