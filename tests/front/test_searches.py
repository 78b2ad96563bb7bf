"""Searches that somebody waits for: a few at once of each user, and none that nobody waits for. Without a Prefect."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from blocks.dicom import DicomTarget
from talaria.front.access import Role
from talaria.front.api.errors import answer_to
from talaria.front.pages import querying, searches
from talaria.service import Office, retrievals, searching
from tasks.retrieve import search
from tests.front.house import House, run
from tests.front.people import found, happens, words
from transfer import stopping
from transfer.errors import Busy, Cancelled, DispatchError
from transfer.home import Home


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Searches at a peer that doesn't answer until it is let."""
    peer = SimpleNamespace(answers=threading.Event(), asked=threading.Semaphore(0), stopped=threading.Semaphore(0))

    async def load(*_: Any) -> list[Any]:
        return [DicomTarget(host="pacs", port=104, aet_target="PACS", direction="query").named("pacs")]

    def find(*_: Any) -> list[Any]:
        peer.asked.release()
        try:
            while not peer.answers.wait(0.01):
                stopping.check()
        except DispatchError:
            peer.stopped.release()
            raise
        return []

    monkeypatch.setattr(retrievals, "load", load)
    monkeypatch.setattr(retrievals, "check_source", lambda _: None)
    monkeypatch.setattr(search, "DRIVERS", SimpleNamespace(of=lambda _: SimpleNamespace(find=find)))
    monkeypatch.setattr(retrievals.audited, "queried", lambda *_: None)
    monkeypatch.setattr(retrievals, "SEARCHES", searching.Searching(most=4, most_of_one=3))
    yield peer
    peer.answers.set()


def office_of(user: str, tmp_path: Path, **more: Any) -> Office:
    return Office(None, Home(tmp_path), user=user, **more)  # type: ignore[arg-type]


async def taken(semaphore: threading.Semaphore, count: int) -> None:
    """Wait until a semaphore has been released so many times."""
    for _ in range(count):
        await happens(lambda: semaphore.acquire(blocking=False))


def test_searches_at_a_silent_peer_keep_nobody_else_waiting(
    asking: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna, otto = office_of("anna", tmp_path), office_of("otto", tmp_path)

    async def case() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))
        searches = [asyncio.create_task(retrievals.find_matches(anna, "pacs", study_uid="1.2")) for _ in range(3)]
        await taken(asking.asked, 3)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: True), 60)
        monkeypatch.setattr(searching, "PATIENCE_S", 0.0)
        with pytest.raises(Busy, match=r"^3 searches of yours are running here"):
            await retrievals.find_matches(anna, "pacs", study_uid="1.2")
        searches.append(asyncio.create_task(retrievals.find_matches(otto, "pacs", study_uid="1.2")))
        await taken(asking.asked, 1)
        with pytest.raises(Busy, match=r"^4 searches are running here") as refused:
            await retrievals.find_matches(office_of("olga", tmp_path), "pacs", study_uid="1.2")
        assert answer_to(refused.value)[0] == 503
        monkeypatch.setattr(searching, "PATIENCE_S", 60.0)
        searches.append(asyncio.create_task(retrievals.find_matches(anna, "pacs", study_uid="1.2")))
        asking.answers.set()
        assert await asyncio.gather(*searches) == [{"matches": [], "unread": None}] * 5

    asyncio.run(case())


def test_a_search_that_nobody_waits_for_stops_and_gives_its_place_back(
    asking: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def case() -> None:
        leaves = asyncio.Event()
        waited = office_of("anna", tmp_path), office_of("anna", tmp_path, gone=leaves.wait)
        for _ in range(2):  # there are three places
            searches = [asyncio.create_task(retrievals.find_matches(waited[n > 0], "pacs")) for n in range(3)]
            await taken(asking.asked, 3)
            assert not asking.stopped.acquire(blocking=False)
            searches[0].cancel()
            leaves.set()
            await taken(asking.stopped, 3)
            ended = await asyncio.gather(*searches, return_exceptions=True)
            assert [type(one) for one in ended] == [asyncio.CancelledError, Cancelled, Cancelled]
            leaves.clear()
        monkeypatch.setattr(searching, "LONGEST_S", 0.0)
        with pytest.raises(Cancelled, match="the longest: narrow it down"):
            await retrievals.find_matches(waited[0], "pacs")

    asyncio.run(case())


def test_a_search_ends_when_nobody_looks_at_it_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    house = House(tmp_path / "home")
    house.add("olga", Role.OPERATOR)
    ended: list[str] = []

    async def find(_: Any, source: str, **__: Any) -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(source)
        return {"matches": [], "unread": None}

    async def none(*_: Any) -> list[Any]:
        return []

    monkeypatch.setattr(searches, "LOOK_S", 0.01)
    monkeypatch.setattr(retrievals, "find_matches", find)
    monkeypatch.setattr(querying.Site, "rows", none)

    async def case(client: httpx.AsyncClient) -> None:
        form = {"source": "src", "accessions": "A1", "do": "search"}
        leads = (await client.post("/talaria/query", data=form)).headers["location"]
        for _ in range(3):
            assert "Asking src" in words((await client.get(leads)).text) and not ended
        monkeypatch.setattr(searches, "UNSEEN_S", 0.0)
        await happens(lambda: bool(ended))
        assert "nobody has looked at this search for five minutes" in words(await found(client, leads))

    run(house, "olga", case)
