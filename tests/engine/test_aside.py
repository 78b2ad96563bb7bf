"""Runs that can't do anything now: who is looked at without a place, and who hears of a pause before they rest."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from blocks.base import Target
from blocks.dicom import DicomTarget
from blocks.folder import FolderTarget
from talaria.engine.aside import Aside
from talaria.testing import studies
from tasks.dispatch import breaker, line, rest, running, slots, waiting
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


class Resting:
    """Runs that are looked at without a place, and rest; those who are called."""

    def __init__(self, ledger: Ledger, home: Path, study: Path) -> None:
        self.ledger = ledger
        self.aside = Aside(cast(Any, None), Home(home), ledger)
        self.asked = {"targets": ["away"], "paths": [str(study)]}
        self.called: list[str] = []

    def run(self) -> FlowRun:
        return FlowRun(id=uuid4(), flow_id=uuid4(), name="a run", parameters=self.asked)

    def look(self, run: FlowRun) -> UnreadRest | None:
        return asyncio.run(self.aside.look(run))


@pytest.fixture
def resting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Resting]:
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)
    monkeypatch.setattr("talaria.engine.aside.flow_run_logger", lambda _: logging.LoggerAdapter(logging.getLogger()))
    monkeypatch.setattr(breaker, "FIRST_S", 0.0)
    studies.ct(tmp_path / "study", 1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        one = Resting(ledger, tmp_path, tmp_path / "study")
        monkeypatch.setattr(line, "_waker", one.called.append)
        yield one


def is_saved(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    async def loaded(*_: Any) -> list[Target]:
        return [target]

    monkeypatch.setattr(waiting, "loaded", loaded)


def has_just_failed(resting: Resting, monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """Save a target that could not be reached when somebody pushed to it."""
    is_saved(monkeypatch, target)
    breaker.failed(resting.ledger, target, Unreachable("no route"), "no route", pushed=True)


@pytest.mark.parametrize("waits_for", ["answer", "slot"])
def test_a_target_that_failed_is_tested_without_a_place_until_all_know_that_it_is_dead(
    resting: Resting, monkeypatch: pytest.MonkeyPatch, waits_for: str
) -> None:
    """Each began for its own test: its flow, and its return, cost as much as a dispatch that is delivered."""
    target, ledger = (
        DicomTarget(host="127.0.0.1", port=1, aet_target="PACS", retry_delay_s=900).named("away"),
        resting.ledger,
    )
    has_just_failed(resting, monkeypatch, target)
    alone, first, second = runs = [resting.run() for _ in range(3)]
    assert asyncio.run(resting.aside.chosen(runs)) == {run.id for run in runs}
    found = resting.look(alone)
    assert found and breaker.read(ledger, target).failures == 2  # nobody else waits for more
    queue = breaker.queue(target)
    stands = queue if waits_for == "answer" else "away"
    ledger.waits.join(stands, str(second.id), ledger.now() + 3600, ledger.now() + 3660)
    found = resting.look(first)
    assert found and breaker.read(ledger, target).opened and not resting.called
    state = found.state(ledger, str(first.id))
    assert "the next attempt at away" in str(state.message) and "attempt 1 of" in str(state.message)
    assert not found.is_over(ledger, str(first.id)) and found.left["away"].attempts == 1
    found = resting.look(second)
    assert found and "away to answer, which it hasn't since" in str(found.state(ledger, str(second.id)).message)
    assert not found.left["away"].attempts and ledger.waits.call(queue, 9) == [str(second.id)]


def test_one_of_those_that_wait_tests_it_and_the_next_is_called(
    resting: Resting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, ledger = FolderTarget(folder=str(tmp_path)).named("away"), resting.ledger
    has_just_failed(resting, monkeypatch, target)
    first, second = resting.run(), resting.run()
    with breaker.testing(Home(tmp_path), ledger, target) as mine:  # another worker
        assert mine
        for run in (first, second):
            found = resting.look(run)
            assert found and "away to answer a test" in str(found.state(ledger, str(run.id)).message)
    assert resting.look(first) is None and not breaker.read(ledger, target).failures  # it answers
    assert str(second.id) in resting.called


def test_a_worker_that_ends_leaves_a_test_that_hangs(
    resting: Resting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, ledger = FolderTarget(folder=str(tmp_path)).named("away"), resting.ledger
    has_just_failed(resting, monkeypatch, target)
    run, behind, free = resting.run(), str(uuid4()), threading.Event()
    ledger.waits.join(breaker.queue(target), behind, ledger.now() + 1, ledger.now() + 60)

    class Hanging:
        """A driver of a target that says nothing."""

        def check(self, _: Target) -> None:
            running.flag(str(run.id)).set()  # as by the second signal
            free.wait(600)

    monkeypatch.setattr("tasks.dispatch.tested.DRIVERS", SimpleNamespace(of=lambda _: Hanging()))
    try:
        with pytest.raises(asyncio.CancelledError):
            resting.look(run)
        assert resting.called == [behind]  # it left the line, and holds up nobody there
        with breaker.testing(Home(tmp_path), ledger, target) as mine:
            assert mine
    finally:
        free.set()
        running.forget(str(run.id))


def test_what_has_one_attempt_begins_for_it_and_ends_with_a_receipt(
    resting: Resting, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = DicomTarget(host="127.0.0.1", port=1, aet_target="PACS", max_attempts=1).named("away")
    has_just_failed(resting, monkeypatch, target)
    assert resting.look(resting.run()) is None and breaker.read(resting.ledger, target).failures == 1


def test_what_comes_while_others_have_long_had_all_slots_rests_without_a_place(
    resting: Resting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target may hang: each would hold a place until it knows that it gets no slot."""
    is_saved(monkeypatch, FolderTarget(folder=str(tmp_path), max_dispatches=2).named("away"))
    long_ago, run = time.monotonic() - 2 * waiting.LONG_S, resting.run()
    held = {uuid4(): (long_ago, 1, 2), uuid4(): (time.monotonic() + 3600, 1, 2)}
    monkeypatch.setattr(slots, "_held", {"away": held})
    assert not asyncio.run(resting.aside.chosen([run])) and resting.look(run) is None  # one was just taken
    held |= dict.fromkeys(held, (long_ago, 1, 2))
    assert asyncio.run(resting.aside.chosen([run])) == {run.id}
    found, run_id = resting.look(run), str(run.id)
    assert found and "a slot at away" in str(found.state(resting.ledger, run_id).message)
    assert not found.is_over(resting.ledger, run_id) and resting.ledger.waits.call("away", 1) == [run_id]
    held.popitem()
    assert found.is_over(resting.ledger, run_id)
