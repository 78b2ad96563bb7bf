"""The pages of dispatches at a server without a Prefect: many at once, many items, a long log."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.sorting import LogSort

from talaria.engine import runs
from talaria.front.access import Role
from talaria.front.pages import dispatch, dispatches
from talaria.service import Office, jobs, results, timeline
from tests.front.house import House, run
from tests.front.people import fields, words
from transfer.errors import Misconfigured
from transfer.home import Home

LIST = "/talaria/dispatches"


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    made = House(tmp_path / "home")
    made.add("olga", Role.OPERATOR)
    return made


class Runs:
    """Runs that match a filter, the newest first; while they are read, others are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.ids = [str(uuid4()) for _ in range(count)]
        self.acted: list[str] = []
        self.fails: dict[str, Exception] = {}
        monkeypatch.setattr(runs, "jobs", self.jobs)
        monkeypatch.setattr(runs, "count", self.count)
        monkeypatch.setattr(dispatches, "act", self.act)

    async def jobs(self, client: Any, limit: int, offset: int = 0, **_: Any) -> list[Any]:
        page = [SimpleNamespace(id=UUID(one)) for one in self.ids[offset : offset + limit]]
        self.ids.insert(0, str(uuid4()))
        return page

    async def count(self, *_: Any, **__: Any) -> int:
        return len(self.ids)

    async def act(self, office: Any, job: str, action: str, kinds: Any) -> None:
        assert action in ("retry", "cancel")
        self.acted.append(job)
        if job in self.fails:
            raise self.fails.pop(job)


def test_all_that_match_are_retried_each_once_and_the_rest_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Runs(monkeypatch, 12)
    matched = list(there.ids)
    monkeypatch.setattr(dispatches, "PAGE", 5)
    monkeypatch.setattr(dispatches, "MOST", 5)
    there.fails = {matched[1]: Misconfigured("it has ended"), matched[7]: httpx.ConnectError("secret")}

    async def case(client: httpx.AsyncClient) -> None:
        async def press(form: dict[str, str]) -> str:
            answer = await client.post(LIST, data=form)
            assert answer.status_code == 200, words(answer.text)
            return answer.text

        page = await press({"all": "true", "do": "retry", "q": "x"})
        assert "Done: 4. Not possible: 1. 7 are left." in words(page) and "it has ended" in words(page)
        assert "Go on with the next 5" in words(page) and fields(page)["q"] == "x"
        page = await press(fields(page))
        assert "It was stopped here: the Prefect server did not answer" in words(page) and "secret" not in page
        assert "Done: 2. Not possible: 1. 4 are left." in words(page)
        page = await press(fields(page))
        assert "Done: 4. Not possible: 0." in words(page) and "Go on" not in page

    run(house, "olga", case)
    assert there.acted == matched


def test_whether_to_cancel_all_that_match_is_asked_with_their_number(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Runs(monkeypatch, 8)
    matched = list(there.ids)
    monkeypatch.setattr(dispatches, "MOST_LEFT", 6)

    async def case(client: httpx.AsyncClient) -> None:
        page = (await client.post(LIST, data={"all": "true", "do": "cancel"})).text
        assert "6 dispatches are cancelled" in words(page) and there.acted == []
        assert "more match: pick again" in words(page)
        page = (await client.post(LIST, data=fields(page))).text
        assert "Done: 6. Not possible: 0." in words(page)
        await client.post(LIST, data={"pick": [matched[6], matched[6]], "do": "cancel"})

    run(house, "olga", case)
    assert there.acted == matched[:7]


def receipt(count: int) -> dict[str, Any]:
    item = {"sop_instance_uid": "1.2", "outcome": "rejected", "detail": "no image"}
    items = [{"path": f"{number}.dcm"} | item for number in range(count)]
    part = {"state": "waiting", "items": items, "attempts": 1, "bytes": 1}
    return {"flow_run_id": str(uuid4()), "dispatch_id": "d1", "state": "waiting", "error": None, "targets": {"a": part}}


def test_items_are_made_once_beside_the_loop_and_not_for_a_part(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real, line = list[bool](), dispatch._items, {"id": str(uuid4()), "ended": None, "targets": ["a"]}
    line |= {"state": "Running", "dispatch_id": "d1", "paths": [], "by": "", "begun": None, "message": ""}

    def items(document: Any) -> list[dict[str, Any]]:
        made.append(threading.current_thread() is threading.main_thread())
        return real(document)

    def answering(value: Any) -> Callable[..., Any]:
        async def answer(*_: Any, **__: Any) -> Any:
            return value

        return answer

    run_now = SimpleNamespace(id=uuid4(), state_id=uuid4(), state=None, state_type=None, state_name="Running")
    read = list[str]()

    async def result(*_: Any) -> dict[str, Any]:
        read.append(str(run_now.state_id))
        return receipt(3)

    monkeypatch.setattr(dispatch, "_items", items)
    monkeypatch.setattr(jobs, "found", answering(run_now))
    monkeypatch.setattr(results, "line", lambda _: line)
    monkeypatch.setattr(results, "result", result)
    monkeypatch.setattr(jobs, "job_receipt", answering(receipt(3)))
    monkeypatch.setattr(jobs, "how_far", answering({}))
    monkeypatch.setattr(timeline, "timeline", answering(([], True)))
    monkeypatch.setattr(dispatch.Site, "rows", answering([]))

    async def case(client: httpx.AsyncClient) -> None:
        page = words((await client.get(f"{LIST}/d1")).text)
        assert "2.dcm" in page and "Items: 3" in page and "Earlier entries are in Prefect." in page
        assert made == [False]
        part = (await client.get(f"{LIST}/d1", headers={"HX-Request": "true"})).text
        assert "no image" in part and "2.dcm" not in part and made == [False]
        assert 'id="items"' not in part  # what is filtered there stays while it runs
        # The next look finds the run in the same state: its receipt is not read again until that changes.
        assert (await client.get(f"{LIST}/d1", headers={"HX-Request": "true"})).text == part and len(read) == 2
        run_now.state_id = uuid4()
        assert "no image" in (await client.get(f"{LIST}/d1", headers={"HX-Request": "true"})).text and len(read) == 3
        line["ended"] = "2026-01-01T00:00:00+00:00"
        over = (await client.get(f"{LIST}/d1", headers={"HX-Request": "true"})).text
        assert 'id="items"' in over and "2.dcm" in over  # as the receipt has them at the end
        made.pop()
        assert "2.dcm" in (await client.get(f"{LIST}/d1/receipt.csv")).text
        assert "2.dcm" in (await client.get(f"{LIST}/d1/receipt")).text
        assert made == [False, False]

    run(house, "olga", case)


def test_of_a_long_log_the_newest_lines_are_shown(tmp_path: Path) -> None:
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    log = [
        SimpleNamespace(timestamp=begun + timedelta(seconds=number), level=20, message=f"line {number}")
        for number in range(1500)
    ]
    state = SimpleNamespace(timestamp=begun, type=SimpleNamespace(value="RUNNING"), name="Running", message=None)

    async def states(_: UUID) -> list[Any]:
        return [state]

    async def logs(_: Any, limit: int, sort: LogSort, offset: int = 0) -> list[Any]:
        assert limit <= 200  # as Prefect has it
        return sorted(log, key=lambda one: one.timestamp, reverse=sort == LogSort.TIMESTAMP_DESC)[offset:][:limit]

    client = SimpleNamespace(read_flow_run_states=states, read_logs=logs)
    office = Office(client, Home(tmp_path))  # type: ignore[arg-type]
    events, cut = asyncio.run(timeline.timeline(office, str(uuid4())))
    assert events[0]["words"] == "Running" and cut
    assert [one["more"] for one in events[1:]] == [f"line {number}" for number in range(1300, 1500)]
    del log[7:]
    events, cut = asyncio.run(timeline.timeline(office, str(uuid4())))
    assert len(events) == 8 and not cut
