"""Runs that can't do anything now: who is looked at without a place, and who hears of a pause before they rest."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from blocks.dicom import DicomTarget
from blocks.folder import FolderTarget
from talaria.engine.aside import Aside
from talaria.testing import studies
from tasks.dispatch import breaker, line, rest, running, waiting
from tasks.dispatch.run import Dispatch, Paused
from tasks.dispatch.waiting import UnreadRest
from tests.engine.material import later
from transfer import plan
from transfer.errors import Unreachable
from transfer.home import Home
from transfer.ledger import Ledger


def test_what_did_not_come_to_rest_takes_a_place_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be looked at, or belongs to another worker: looked at again and again, it would stop the others."""
    monkeypatch.setattr(waiting, "may_wait", lambda ledger, found: found)
    found = [FlowRun(id=uuid4(), flow_id=uuid4()) for _ in range(2)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        aside = Aside(cast(Any, None), Home(tmp_path), ledger)

        def chosen() -> set[UUID]:
            return asyncio.run(aside.chosen(found))

        aside.runs = chosen()
        assert aside.runs == {one.id for one in found}
        aside.leaves(found[0].id, rests=True)
        aside.leaves(found[1].id, rests=False)
        assert not aside.runs and chosen() == {found[0].id}
        aside.leaves(found[1].id, rests=False)  # it has had its place
        assert chosen() == {one.id for one in found}


@pytest.mark.parametrize("names", [[""], ["pacs", " "], ["dicom/"]])
def test_a_run_to_a_target_without_a_name_begins_and_is_refused(tmp_path: Path, names: list[str]) -> None:
    """A worker that ended of it would find it again, as would all others."""
    found = [FlowRun(id=uuid4(), flow_id=uuid4(), parameters={"targets": names, "paths": ["/study"]})]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.waits.join("pacs", str(uuid4()), 0, ledger.now() + 60)
        assert asyncio.run(Aside(cast(Any, None), Home(tmp_path), ledger).chosen(found)) == set()


@pytest.mark.parametrize("flag", ["paused", "cancelled"])
def test_a_run_hears_of_it_before_it_rests_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(line, "may_rest", lambda: True)
    studies.ct(tmp_path / "study", 1)
    target = FolderTarget(folder=str(tmp_path), window=later(2)).named("archive")
    run_id = str(uuid4())
    (running.pause if flag == "paused" else running.flag)(run_id).set()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        none = cast(Any, SimpleNamespace())
        dispatch = Dispatch(run_id, [target], Home(tmp_path), ledger, none, none, "normal")
        with pytest.raises(Exception, match=f"was {flag} while it waited") as caught:
            asyncio.run(dispatch.goes_on([str(tmp_path / "study")], "", ""))
    assert isinstance(caught.value, Paused) is (flag == "paused")
    running.forget(run_id)


def test_a_source_that_hangs_holds_up_no_look_at_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share is away: each look waited for the one before, for as long as that took."""
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)
    for name in ("share", "disk"):
        studies.ct(tmp_path / name / "study", 1)
    target = DicomTarget(host="127.0.0.1", port=1, aet_target="PACS", retry_delay_s=900).named("away")
    has_files, hangs, free = plan.has_files, asyncio.Event(), threading.Event()

    async def loaded(*_: Any) -> list[DicomTarget]:
        return [target]

    async def look() -> None:
        loop = asyncio.get_running_loop()

        def slow(source: Path, *more: Any) -> bool:
            if source.parent.name == "share":
                loop.call_soon_threadsafe(hangs.set)
                free.wait(600)
            return has_files(source, *more)

        monkeypatch.setattr(plan, "has_files", slow)
        runs = {
            name: FlowRun(
                id=uuid4(), flow_id=uuid4(), parameters={"targets": ["away"], "paths": [str(tmp_path / name / "study")]}
            )
            for name in ("share", "disk")
        }
        aside = Aside(cast(Any, None), Home(tmp_path), ledger)
        silent = asyncio.create_task(aside.look(runs["share"]))
        await hangs.wait()
        assert await aside.look(runs["disk"]) and not silent.done()
        assert await silent is None  # nor is it waited for until it answers: it takes a place, and says so

    monkeypatch.setattr(waiting, "loaded", loaded)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for _ in range(breaker.LIMIT):
            breaker.failed(ledger, target, Unreachable("no route"), "no route")
        try:
            asyncio.run(look())
        finally:
            free.set()


def test_what_comes_back_by_its_time_and_can_t_do_anything_needs_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each took a thread to find that its turn had not come; it keeps its turn, and one that is called gets a place."""
    studies.ct(tmp_path / "study", 1)
    target = FolderTarget(folder=str(tmp_path)).named("archive")
    asked = {"targets": ["archive"], "paths": [str(tmp_path / "study")]}
    runs = [FlowRun(id=uuid4(), flow_id=uuid4(), parameters=asked) for _ in range(3)]

    async def loaded(*_: Any) -> list[FolderTarget]:
        return [target]

    monkeypatch.setattr(waiting, "loaded", loaded)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        aside = Aside(cast(Any, None), Home(tmp_path), ledger)

        def rests(run: FlowRun) -> UnreadRest | None:
            return asyncio.run(aside.look(run))

        first = str(runs[0].id)
        ledger.waits.join("archive", first, ledger.now(), ledger.now() + 60)
        for run in runs[1:]:
            found = rests(run)
            assert found
            found.state(ledger, str(run.id))
        assert asyncio.run(aside.chosen(runs)) == {run.id for run in runs}
        since = [ledger.now(), *(cast(Any, rest.unread(ledger, str(run.id)))["archive"].since for run in runs[1:])]
        again = rests(runs[2])
        assert again and again.left["archive"].since == since[2] > since[1]
        again.state(ledger, str(runs[2].id))
        ledger.waits.leave("archive", first)
        assert rests(runs[1]) is None and rests(runs[2])  # its turn has come
        assert ledger.waits.call("archive", 1) == [str(runs[1].id)]
        assert asyncio.run(aside.chosen(runs)) == {runs[0].id, runs[2].id}
        rest.save(Home(tmp_path), ledger, str(runs[2].id), rest.Rest(document={"dispatch_id": "x"}))
        assert rests(runs[2]) is None  # it has read its files
