"""Tests of targets that pages show while they run: each is kept here until some time after its end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from talaria.front.api.errors import answer_to
from talaria.front.pages.site import is_part, render
from talaria.front.pages.texts import TITLES, text
from transfer.errors import Misconfigured

KEPT_S = 900  # after a test has begun; it is followed for seconds
MOST = 200
AT_ONCE = 8  # of one user
HINTS = ("ping",)


@dataclass
class Check:
    """A test of a target.

    Attributes:
        by: who has started it; nobody else is shown it.
        back: path of the page that leads back to the target.
        probes: as they have been made, for the page.
        problem: why it did not run to its end.
        words: makes of what a step says, which may name fields, what people call them.
    """

    id: str
    name: str
    by: str
    back: str
    contact: str = ""
    words: Callable[[str], str] = str
    probes: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False
    ok: bool = False
    problem: str = ""
    begun: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None


class Checks:
    """The tests that have been started from pages of this server."""

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        """`ended` is called when a test has ended."""
        self._found: dict[str, Check] = {}
        self._ended = ended

    def start(
        self,
        name: str,
        by: str,
        back: str,
        contact: str,
        events: AsyncIterator[tuple[str, dict[str, Any]]],
        words: Callable[[str], str] = str,
    ) -> Check:
        """Start a test; returns at once. Arguments as the attributes of a Check.

        Raises:
            Misconfigured: this user has started many that have not ended.
        """
        now = time.monotonic()
        over = [one.id for one in self._found.values() if one.over]
        late = [key for key in over if now - self._found[key].begun > KEPT_S]
        for key in {*late, *over[: max(0, len(self._found) - MOST)]}:
            del self._found[key]
        if sum(1 for one in self._found.values() if one.by == by and not one.over) >= AT_ONCE:
            raise Misconfigured(text("test.many"))
        check = Check(secrets.token_urlsafe(16), name, by, back, contact, words)
        self._found[check.id] = check
        check.task = asyncio.create_task(_follow(check, events, self._ended))
        return check

    def find(self, key: str, by: str) -> Check | None:
        """Return a test of this user; None if there is none."""
        found = self._found.get(key)
        return found if found and found.by == by else None


def begun(request: Request, check: Check) -> Response:
    """Return the answer to a request that has started a test: its section, or the way to its page."""
    return (
        render("check.html", check=check) if is_part(request) else RedirectResponse(f"/talaria/checks/{check.id}", 303)
    )


async def _follow(check: Check, events: AsyncIterator[tuple[str, dict[str, Any]]], ended: Callable[[], None]) -> None:
    try:
        async for kind, document in events:
            if kind == "probe":
                check.probes.append(_shown(document["probe"], check.words))
            elif kind == "result":
                check.ok = bool(document["ok"])
        check.problem = "" if check.probes else "no step was made"
    except Exception as exc:
        check.problem = answer_to(exc)[1]
    finally:
        ended()
        check.over = True


def _shown(probe: dict[str, Any], words: Callable[[str], str] = str) -> dict[str, Any]:
    hint = probe["name"] in HINTS
    kind = "skipped" if hint and probe["result"] == "failed" else probe["result"]
    shown = {"detail": words(probe["detail"]), "remedy": words(probe["remedy"])}
    return {**probe, **shown, "title": TITLES.get(probe["name"], probe["name"]), "hint": hint, "kind": kind}
