"""Targets that have just failed: one run tests them before anybody reads files for them, and the others wait for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from blocks.base import NO_ORIGIN, Target
from blocks.dicom import DicomTarget
from blocks.folder import FolderTarget
from talaria.engine import called as engine
from tasks.dispatch import breaker, line, looks, slots
from tasks.dispatch.looks import Looks
from transfer.errors import NotFound, TimedOut, Unreachable
from transfer.home import Home
from transfer.ledger import Ledger

LATER = {"retry_delay_s": 3600, "retry_max_delay_s": 86_400, "max_dispatches": 3}


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)
    monkeypatch.setattr("tasks.dispatch.looks.get_run_logger", lambda: logging.getLogger(__name__))
    Home(tmp_path).root.mkdir(exist_ok=True)
    with Ledger(Home(tmp_path).ledger) as one:
        yield one


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that a worker has been told to bring forward."""
    found: list[str] = []
    monkeypatch.setattr(line, "_waker", found.append)
    return found


@pytest.fixture
def dead() -> Target:
    return DicomTarget(host="127.0.0.1", port=1, aet_target="PACS", **LATER).named("dead")


@pytest.fixture
def well(tmp_path: Path) -> Target:
    (tmp_path / "well").mkdir()
    return FolderTarget(folder=str(tmp_path / "well"), **LATER).named("well")


def looked(tmp_path: Path, ledger: Ledger, run: str, target: Target, before: Looks | None = None) -> Looks:
    """Let a run look, for the first time or again."""
    one = Looks(run, Home(tmp_path), ledger, run, "normal", NO_ORIGIN)
    if before:
        one.rest = before.rest
        one.rest.kept = True
    asyncio.run(one.look(target))
    return one


def fails(ledger: Ledger, target: Target) -> None:
    breaker.failed(ledger, target, Unreachable("no route"), "no route", pushed=True)


def test_each_test_counts_until_the_breaker_opens_and_then_all_wait_for_it(
    tmp_path: Path, ledger: Ledger, called: list[str], dead: Target
) -> None:
    assert not looked(tmp_path, ledger, "first", dead).waits  # it pushes
    fails(ledger, dead)
    for number in range(1, breaker.LIMIT):
        one = looked(tmp_path, ledger, f"run{number}", dead)
        assert (one.left(dead).attempts, one.left(dead).error) == (1, "Unreachable") and not one.failed["dead"][1]
        assert "the next attempt at dead" in one.waits["dead"].what
        assert breaker.read(ledger, dead).failures == number + 1
    assert breaker.read(ledger, dead).opened and not ledger.waits.lines()
    last = looked(tmp_path, ledger, "last", dead)
    assert "dead to answer, which it hasn't since" in last.waits["dead"].what and not last.left(dead).attempts


def test_while_one_tests_it_the_others_wait_in_line_and_are_called_in_turn(
    tmp_path: Path, ledger: Ledger, called: list[str], dead: Target
) -> None:
    fails(ledger, dead)
    with breaker.testing(Home(tmp_path), ledger, dead) as mine:
        assert mine
        waiting = {run: looked(tmp_path, ledger, run, dead) for run in ("second", "third")}
    assert breaker.read(ledger, dead).failures == 1
    for one in waiting.values():
        assert "dead to answer a test" in one.waits["dead"].what and not one.failed and not one.left(dead).attempts
    third = looked(tmp_path, ledger, "third", dead, waiting["third"])  # by its time: it is not its turn
    assert "dead to answer a test" in third.waits["dead"].what and not called
    second = looked(tmp_path, ledger, "second", dead, waiting["second"])
    assert second.left(dead).attempts == 1 and called == ["third"]


def test_one_that_answers_is_pushed_to_by_all_at_once(
    tmp_path: Path, ledger: Ledger, called: list[str], well: Target
) -> None:
    fails(ledger, well)
    with breaker.testing(Home(tmp_path), ledger, well) as mine:
        assert mine
        waiting = {f"run{number}": looked(tmp_path, ledger, f"run{number}", well) for number in range(4)}
    assert all("well to answer a test" in one.waits["well"].what for one in waiting.values())
    newcomer = looked(tmp_path, ledger, "newcomer", well)  # it has come last
    assert newcomer.waits

    async def slot(_: Target) -> Any:
        return slot

    first = Looks("run0", Home(tmp_path), ledger, "run0", "normal", NO_ORIGIN)
    first.rest, first.slot = waiting["run0"].rest, slot  # type: ignore[method-assign, assignment]
    asyncio.run(first.look(well))
    assert first.held == {"well": slot} and not first.waits and not first.failed
    assert not breaker.read(ledger, well).failures
    assert {"run1", "run2", "run3"} <= {*called} and "newcomer" not in called[:3]
    assert not looked(tmp_path, ledger, "later", well).waits


def test_where_pushes_hang_and_tests_do_not_each_is_tested_and_goes_on(
    tmp_path: Path, ledger: Ledger, called: list[str], well: Target
) -> None:
    breaker.failed(ledger, well, TimedOut("silent"), "silent", pushed=True)

    async def slot(_: Target) -> Any:
        return slot

    for number in range(2):
        one = Looks(f"run{number}", Home(tmp_path), ledger, f"run{number}", "normal", NO_ORIGIN)
        one.slot = slot  # type: ignore[method-assign, assignment]
        asyncio.run(one.look(well))
        assert one.held and not one.waits and not one.failed
    assert breaker.read(ledger, well).failures == 1 and not ledger.waits.lines()


def test_a_test_that_is_broken_off_keeps_nobody_waiting(
    tmp_path: Path, ledger: Ledger, called: list[str], dead: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(ledger, dead)

    async def broken(*_: Any) -> None:
        raise asyncio.CancelledError

    with breaker.testing(Home(tmp_path), ledger, dead) as mine:
        assert mine
        first, second = (looked(tmp_path, ledger, run, dead) for run in ("cancelled", "next"))
    with monkeypatch.context() as patched:
        patched.setattr(Looks, "_tested", broken)
        with pytest.raises(asyncio.CancelledError):
            looked(tmp_path, ledger, "cancelled", dead, first)
    assert called == ["next"]
    assert looked(tmp_path, ledger, "next", dead, second).left(dead).attempts == 1 and not ledger.waits.lines()


def test_a_run_waits_for_a_slot_before_it_reads_its_files(
    tmp_path: Path, ledger: Ledger, called: list[str], well: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a target that hangs, it had read them in vain."""
    held = {uuid4(): (0.0, well.max_dispatches, well.max_dispatches)}
    monkeypatch.setattr(slots, "_held", {"well": held})
    monkeypatch.setattr(looks, "SLOT_S", 0.01)
    assert "a slot at well" in looked(tmp_path, ledger, "first", well).waits["well"].what
    ledger.waits.gone("first")
    monkeypatch.setattr(looks, "SLOT_S", 600)

    async def release(_: Any) -> None:
        """Take the lease back, as the server does."""

    async def freed() -> Looks:
        one = Looks("second", Home(tmp_path), ledger, "second", "normal", NO_ORIGIN)
        looking = asyncio.create_task(one.look(well))
        while not slots._waiting.get(slots.limit_name("well")):  # noqa: ASYNC110 - nothing says that it waits
            await asyncio.sleep(0)
        lease, _ = held.popitem()
        await slots._given_back(cast(Any, SimpleNamespace(release_concurrency_slots_with_lease=release)), well, lease)
        await looking
        return one

    assert not asyncio.run(freed()).waits and not called


def test_what_waits_for_hours_is_called_when_they_are_changed(
    tmp_path: Path, ledger: Ledger, called: list[str], well: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rested until the hours that there had been, which may be a week."""
    opening = datetime.now(UTC) + timedelta(hours=12)
    closed = well.model_copy(update={"window": f"{opening:%H}:00-{opening:%H}:30"}).named("well")
    settings = [closed]

    async def loaded(client: Any, names: list[str]) -> list[Target]:
        assert names == ["well"]
        if not settings:
            raise NotFound("no target named well")
        return settings

    async def unheard(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(engine, "loaded", loaded)
    monkeypatch.setattr(engine, "waits_elsewhere", unheard)

    def look() -> list[str]:
        called.clear()
        asyncio.run(engine.look(cast(Any, None), ledger, (), lambda run: False))
        return sorted(called)

    runs = [str(uuid4()) for _ in range(3)]
    first = {run: looked(tmp_path, ledger, run, closed) for run in runs}
    assert all("the hours of well" in one.waits["well"].what for one in first.values())
    assert look() == [], "as it is"
    settings[0] = well
    assert look() == sorted(runs) and look() == []
    for run in runs[:2]:
        assert not looked(tmp_path, ledger, run, well, first[run]).waits
    assert looked(tmp_path, ledger, runs[2], closed, first[runs[2]]).waits, "somebody has closed it again"
    settings.clear()
    assert look() == [runs[2]], "who waits for a target that was removed says so"
    looked(tmp_path, ledger, runs[2], closed.model_copy(update={"enabled": False}).named("well"), first[runs[2]])
    assert line.of_hours("well") not in ledger.waits.lines()
    assert looked(tmp_path, ledger, str(uuid4()), well).waits == {} and not line.outside_hours(ledger.waits.lines())
