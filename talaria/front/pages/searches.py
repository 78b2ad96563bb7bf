"""Searches that the Query page has started, and what they have found: in memory only, for who asked, for a while.

What a peer answers is patients' data: it is written nowhere, and whoever has not asked does not see it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from talaria.front.api.errors import answer_to
from talaria.front.pages.texts import text
from transfer.errors import Misconfigured

KEPT_S = 900  # after a search has ended; then it is forgotten, whether somebody looks or not
MOST = 50  # of all users
AT_ONCE = 4  # of one user: each may keep a peer busy
UNSEEN_S = 300  # a search that nobody has looked at for so long ends; its page looks by itself, if once a minute only
LOOK_S = 1.0  # between two looks whether somebody has


@dataclass
class Search:
    """A search at a target.

    Attributes:
        asked: the fields of the form that it was asked with, so that it can be changed.
        numbers: accession numbers that were asked for.
        matches: as the peer gave them, with `instances`.
        picked: which of them are to be fetched; at first those that are surely meant.
        unread: why what was not found may be there all the same; "" if it isn't.
        problem: why it found nothing out.
        seen: when somebody looked at it last, by the loop's clock.
    """

    id: str
    by: str
    asked: Mapping[str, str] = field(repr=False)
    numbers: tuple[str, ...]
    matches: list[dict[str, Any]] = field(default_factory=list, repr=False)
    picked: set[int] = field(default_factory=set, repr=False)
    over: bool = False
    unread: str = ""
    problem: str = ""
    seen: float = 0.0
    task: asyncio.Task[None] | None = None

    @property
    def source(self) -> str:
        return self.asked["source"]

    @property
    def level(self) -> str:
        return self.asked["level"]

    @property
    def missing(self) -> list[str]:
        """Accession numbers for which nothing was found."""
        found = {_plain(one.get("AccessionNumber")) for one in self.matches}
        return [number for number in self.numbers if _plain(number) not in found]

    @property
    def doubtful(self) -> set[str]:
        """Accession numbers that several studies have: people have to choose."""
        studies: dict[str, set[str]] = {}
        for one in self.matches:
            studies.setdefault(_plain(one.get("AccessionNumber")), set()).add(str(one.get("StudyInstanceUID")))
        return {number for number, uids in studies.items() if number and len(uids) > 1}

    def sure(self) -> set[int]:
        """Return which matches are what was asked for by their number, where no other study has that number."""
        sure = {_plain(one) for one in self.numbers} - self.doubtful
        return {at for at, one in enumerate(self.matches) if _plain(one.get("AccessionNumber")) in sure}

    def pick(self, first: int, after: int, picked: Iterable[int]) -> None:
        """Note which of a page's matches were picked; those of other pages stay as they are."""
        chosen = {at for at in picked if first <= at < min(after, len(self.matches))}
        self.picked = {at for at in self.picked if not first <= at < after} | chosen


class Searches:
    """The searches of this server."""

    def __init__(self) -> None:
        self._found: dict[str, Search] = {}

    def start(
        self, by: str, asked: Mapping[str, str], numbers: tuple[str, ...], answer: Awaitable[dict[str, Any]]
    ) -> Search:
        """Start a search; returns at once.

        Raises:
            Misconfigured: this user, or all of them, have started many.
        """
        search = Search(secrets.token_urlsafe(16), by, dict(asked), numbers)
        open_ones = [one for one in self._found.values() if not one.over]
        if len(open_ones) >= MOST or sum(one.by == by for one in open_ones) >= AT_ONCE:
            raise Misconfigured(text("query.many"))
        over = [one.id for one in self._found.values() if one.over]
        for key in over[: max(0, len(self._found) + 1 - MOST)]:
            del self._found[key]
        self._found[search.id] = search
        search.task = asyncio.create_task(self._follow(search, answer))
        return search

    def find(self, key: str, by: str) -> Search | None:
        """Return a search of this user; None if there is none (any more)."""
        found = self._found.get(key)
        if found is None or found.by != by:
            return None
        found.seen = asyncio.get_running_loop().time()
        return found

    async def _follow(self, search: Search, answer: Awaitable[dict[str, Any]]) -> None:
        asking = asyncio.ensure_future(answer)
        loop = asyncio.get_running_loop()
        search.seen = loop.time()
        try:
            while not (await asyncio.wait([asking], timeout=LOOK_S))[0]:
                if loop.time() - search.seen > UNSEEN_S:
                    search.problem = text("query.unseen")
                    return
            found = asking.result()
            search.matches, search.unread = found["matches"], found["unread"] or ""
            search.picked = search.sure()
        except Exception as exc:
            search.problem = answer_to(exc)[1]
        finally:
            asking.cancel()
            search.over = True
            asyncio.get_running_loop().call_later(KEPT_S, self._found.pop, search.id, None)


def _plain(number: Any) -> str:
    return str(number or "").strip().casefold()
