"""What a search has found, page by page: what was picked on each stays picked. At a server without a Prefect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from talaria.front.access import Role
from talaria.front.pages import querying
from talaria.front.pages.searches import Search
from talaria.service import retrievals
from tests.front.house import House, run
from tests.front.people import fields, found, words


def match(number: int, accession: str = "") -> dict[str, Any]:
    return {"StudyInstanceUID": f"1.2.{number}", "AccessionNumber": accession or f"A{number}", "instances": 1}


def ticks(page: str) -> list[int]:
    return [int(one) for one in re.findall(r'name="pick" value="(\d+)" checked', page)]


def test_what_is_picked_on_each_of_many_pages_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    house = House(tmp_path / "home")
    house.add("olga", Role.OPERATOR)
    asked: list[dict[str, Any]] = []

    async def find(*_: Any, **__: Any) -> dict[str, Any]:
        return {"matches": [match(number) for number in range(8)], "unread": "a folder can't be read"}

    async def create(_: Any, source: str, **keys: Any) -> dict[str, Any]:
        asked.append(keys)
        return {"flow_run_id": "r1"}

    async def none(*_: Any) -> list[Any]:
        return []

    monkeypatch.setattr(querying, "SHOWN", 3)
    monkeypatch.setattr(retrievals, "find_matches", find)
    monkeypatch.setattr(retrievals, "create_retrieval", create)
    monkeypatch.setattr(querying.Site, "rows", none)

    async def case(client: httpx.AsyncClient) -> None:
        form = {"source": "src", "accessions": "A1 A7 A9", "do": "search"}
        leads = (await client.post("/talaria/query", data=form)).headers["location"]
        page = await found(client, leads)
        assert "src could not be searched in full: a folder can't be read" in words(page)
        assert "Not found so far: A9" in words(page)
        assert "Found: 8. 1 to 3 are shown" in words(page) and ticks(page) == [1]
        assert "Picked on other pages: 1" in words(page)  # A7, which was asked for by its number

        async def press(shown: str, picks: list[int], **more: str) -> httpx.Response:
            return await client.post(leads, data={**fields(shown), "pick": [str(one) for one in picks], **more})

        page = (await press(page, [0, 2], page="3", into="/srv/in")).text
        assert "4 to 6 are shown" in words(page) and ticks(page) == [] and fields(page)["into"] == "/srv/in"
        page = (await press(page, [5], page="6")).text
        assert "7 to 8 are shown" in words(page) and ticks(page) == [7]
        assert "Picked on other pages: 3" in words(page) and "Those after" not in words(page)
        page = (await press(page, [], page="0")).text
        assert ticks(page) == [0, 2]
        assert (await press(page, [0], do="picked", into="/srv/in")).status_code == 303
        assert asked.pop()["study_uid"] == "1.2.0,1.2.5"
        assert (await press(page, [], do="all", into="/srv/in")).status_code == 303
        assert len(asked.pop()["study_uid"].split(",")) == 8

    run(house, "olga", case)


def test_of_many_matches_those_that_are_surely_meant_are_known() -> None:
    matches = [match(number) for number in range(20_000)] + [match(-1, "A5")]
    search = Search("x", "olga", {}, tuple(f"A{number}" for number in range(0, 20_000, 5)), matches)
    assert len(search.sure()) == 3999 and 5 not in search.sure()  # two studies have its number
