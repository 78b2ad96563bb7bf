"""A sweep that runs ends where its source is paused, removed, or no longer to delete: what is left stays as it is."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Running

from blocks.source import Source
from talaria.service import Office, sources
from talaria.testing import studies as material
from talaria.testing.process import until
from tasks.dispatch import running
from tasks.sources import after, run
from tests.sources.bench import Bench
from transfer import live, unitlist
from transfer.errors import Cancelled, NotFound
from transfer.home import locked
from transfer.ledger import Ledger
from transfer.sourcebook import Sourcebook


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start a server
    return Bench(tmp_path, after="delete")


def swept(bench: Bench, monkeypatch: pytest.MonkeyPatch, saved: list[Source], **labels: bool) -> None:
    """Run one sweep as the flow does, of a source that is saved as `saved` has it meanwhile."""

    async def load(client: Any, names: list[str], **asked: Any) -> list[Source]:
        if not saved:
            raise NotFound("no source named box")
        return saved[-1:]

    async def everything(client: Any, name: str) -> tuple[Source, list[Source], list[Any]]:
        return bench.source, [bench.source], list(bench.targets.values())

    @asynccontextmanager
    async def client() -> Any:
        yield object()

    monkeypatch.setattr(run, "get_client", client)
    monkeypatch.setattr(run, "everything", everything)
    monkeypatch.setattr(run.KEPT, "load", load)
    monkeypatch.setattr(run, "PrefectDispatching", lambda *args: bench)
    monkeypatch.setattr(run, "_link", lambda source, done: asyncio.sleep(0))
    with Ledger(bench.home.ledger) as ledger:
        said = {"work_queue_name": "normal", "state": None, "expected_start_time": None, "labels": labels}
        ours = cast(Any, SimpleNamespace(**said))
        asyncio.run(run._swept("box", bench.home, ledger, ours, run._Wish(Event())))


def change(bench: Bench, saved: list[Source], to: list[Source]) -> None:
    """Save a source while a sweep of it runs, as commands and pages do."""
    saved[:] = to
    path = unitlist.changed(bench.home)
    path.parent.mkdir(exist_ok=True)
    path.touch()


@pytest.mark.parametrize(
    ("to", "words"),
    [
        (lambda bench: [bench.named(after="delete", enabled=False)], "the source was paused"),
        (lambda bench: [], "the source was removed"),
        (lambda bench: [bench.named(after="leave")], "was changed: the next sweep goes on"),
        (lambda bench: [bench.named(after="delete", targets=["shelf", "other"])], "its targets were changed"),
        (lambda bench: [bench.named(after="delete", folder=f"{bench.inbox}2")], "its folder was changed"),
        (lambda bench: [bench.named(after="delete", exclude="*.tmp")], "what is left out was changed"),
    ],
    ids=["paused", "removed", "left alone", "targets", "folder", "exclude"],
)
def test_nothing_more_is_deleted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, to: Callable[[Bench], list[Source]], words: str
) -> None:
    for number in range(3):
        material.ct(bench.inbox / f"s{number}", 2)
    bench.sweep()
    bench.dispatch()
    saved, finish, times = [bench.source], after.finish, list[int]()

    def finishing(*given: Any) -> Any:
        done = finish(*given)
        times.append(1)
        change(bench, saved, to(bench))
        check: Callable[[], None] = given[-1]

        def is_over() -> bool:
            try:
                check()
            except Cancelled:
                return True
            return False

        until(is_over)
        return done

    monkeypatch.setattr(after, "finish", finishing)
    with pytest.raises(Cancelled, match=words):
        swept(bench, monkeypatch, saved)
    assert len(times) == 1 and len(list(bench.inbox.rglob("*.dcm"))) == 4
    monkeypatch.setattr(after, "finish", finish)
    saved[:] = [bench.source]
    swept(bench, monkeypatch, saved)
    assert list(bench.inbox.rglob("*.dcm")) == []


def test_nothing_more_is_dispatched_and_what_was_chosen_is_by_the_next_sweep(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    material.ct(bench.inbox / "one", 1)
    saved, close = [bench.source], run.Sweep._close
    wishes: list[run._Wish] = []
    made = run._Wish.__init__

    def wish(self: run._Wish, stopped: Event) -> None:
        made(self, stopped)
        wishes.append(self)

    def closing(self: run.Sweep, batch: Any) -> Any:
        done = close(self, batch)
        change(bench, saved, [bench.named(after="delete", enabled=False)])
        until(lambda: bool(wishes[-1]._over))
        return done

    monkeypatch.setattr(run._Wish, "__init__", wish)
    monkeypatch.setattr(run.Sweep, "_close", closing)
    with pytest.raises(Cancelled, match="the source was paused"):
        swept(bench, monkeypatch, saved)
    assert bench.asked == {} and bench.states() == {"one": "dispatched"}
    monkeypatch.setattr(run.Sweep, "_close", close)
    saved[:] = [bench.source]
    swept(bench, monkeypatch, saved)
    (asked,) = cast("list[Mapping[str, Any]]", list(bench.asked.values()))
    assert asked["targets"] == ["shelf"]


@pytest.mark.parametrize(
    ("fields", "sent", "forced"),
    [
        ({"targets": ["other"]}, {"other": 2}, [False]),
        ({"exclude": "*2.dcm"}, {"shelf": 1}, [False]),
        ({"folder": "{}2"}, {}, []),
        ({"contact": "pacs@example.org"}, {"shelf": 2}, [False]),
        ({"targets": ["other"], "late": "resend"}, {"other": 3}, [True]),
    ],
    ids=["targets", "exclude", "folder", "contact", "late files"],
)
def test_what_was_chosen_goes_where_its_source_sends_it_now(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], sent: dict[str, int], forced: list[bool]
) -> None:
    """A sweep that ended before it had created its runs left them to the next one, to whomever they were for."""
    bench.targets["other"] = bench.target("other")
    bench.source = bench.named(targets=["shelf"], late=fields.pop("late", "append"))
    material.ct(bench.inbox / "one", 1 if forced == [True] else 2)
    if forced == [True]:
        bench.all()
        material.ct(bench.inbox / "one" / "late", 2)
        shutil.rmtree(bench.at("shelf"))
        bench.at("shelf").mkdir()

    async def ended(*asked: Any) -> None:
        raise Cancelled("the source was paused")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "create", ended)
        with pytest.raises(Cancelled):
            bench.sweep()
    if "folder" in fields:
        fields["folder"] = fields["folder"].format(bench.inbox)
        Path(fields["folder"]).mkdir()
    bench.source = bench.named(**{"targets": ["shelf"], "late": bench.source.late, **fields})
    bench.sweep()
    assert [asked["force"] for asked in bench.asked.values()] == forced
    bench.dispatch()
    bench.sweep()
    there = {name: sum(one.is_file() for one in bench.at(name).rglob("*.dcm")) for name in bench.targets}
    assert {name: count for name, count in there.items() if count} == sent


@pytest.mark.parametrize("event", [running.flag, running.pause])
def test_a_sweep_whose_run_is_stopped_or_paused_goes_on_with_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, event: Callable[[str], Event]
) -> None:
    """As on Prefect's pages: one that was paused went on to delete what had been delivered."""

    async def sweeping(name: str, home: Any, ledger: Any, flow_run: Any, wish: run._Wish) -> Any:
        wish.check()
        event(flow_run.id).set()
        wish.check()
        pytest.fail("it goes on")

    context = SimpleNamespace(flow_run=SimpleNamespace(id="r"))
    monkeypatch.setattr(run.FlowRunContext, "get", lambda: context)
    monkeypatch.setattr(run, "name_run", lambda name: asyncio.sleep(0))
    monkeypatch.setattr(run.Home, "current", lambda: bench.home)
    monkeypatch.setattr(run, "_swept", sweeping)
    state = asyncio.run(run.sweep("box"))
    assert state.is_cancelled() and state.message == "the sweep was stopped"
    assert "r" not in running.running()


def test_another_change_does_not_end_a_sweep(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    material.ct(bench.inbox / "one", 1)
    asked, saved, close = list[bool](), [bench.source], run.Sweep._close
    why_over = run._why_over

    async def asking(client: Any, source: Source) -> str:
        found = await why_over(client, source)
        asked.append(True)
        return found

    def closing(self: run.Sweep, batch: Any) -> Any:
        change(bench, saved, [bench.named(after="delete", description="another")])
        until(lambda: bool(asked))
        return close(self, batch)

    monkeypatch.setattr(run, "_why_over", asking)
    monkeypatch.setattr(run.Sweep, "_close", closing)
    swept(bench, monkeypatch, saved)
    assert len(bench.asked) == 1


def test_an_inbox_that_is_not_watched_is_looked_through_by_its_schedule_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its dispatches end, what they have delivered is deleted, and nothing else is dispatched by day."""
    bench.source = bench.named(after="delete", watch=False, cron="0 2 * * *")
    saved: list[Source] = [bench.source]
    material.ct(bench.inbox / "one", 1)
    swept(bench, monkeypatch, saved)
    bench.dispatch()
    material.ct(bench.inbox / "two", 1)
    with Ledger(bench.home.ledger) as ledger:
        before = ledger.sources.sweep("box")
    swept(bench, monkeypatch, saved, **{live.SETTLES: True})
    assert bench.states() == {"one": "done"} and bench.asked == {} and not (bench.inbox / "one").exists()
    with Ledger(bench.home.ledger) as ledger:
        assert ledger.sources.sweep("box") == before, "when it was looked through"
    with locked(unitlist.sweeping(bench.home, "box"), fcntl.LOCK_EX) as mine:
        assert mine is not None and Path(mine.name).read_bytes() == run.SETTLING
        begun = Thread(target=swept, args=(bench, monkeypatch, saved))  # by its schedule: it is not missed
        begun.start()
        begun.join(0.2)
        assert begun.is_alive()
    begun.join(60)
    assert bench.states() == {"one": "done", "two": "dispatched"}


def test_lists_of_a_sweep_stay_when_its_source_is_removed_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    material.ct(bench.inbox / "one", 1)
    office, save = Office(cast(Any, None), bench.home), Sourcebook.save
    forgetting = Thread(target=sources._forget, args=(office, "box"))

    def saving(self: Sourcebook, source: str, rows: Any) -> None:
        forgetting.start()  # the list is written, and no row is known that has it
        forgetting.join(0.5)
        save(self, source, rows)

    monkeypatch.setattr(Sourcebook, "save", saving)
    swept(bench, monkeypatch, [bench.source])
    forgetting.join(60)
    bench.dispatch()
    ((end,),) = [bench.done.values()]
    assert not end.message and end.study("one")
    assert bench.states() == {"one": "dispatched"}


@pytest.mark.parametrize("late_s", [5, 7200])
def test_a_late_sweep_looks_for_all_that_are_due(late_s: int) -> None:
    """A schedule goes on while workers are away: hundreds of sweeps looked for nothing, and dispatches waited."""
    asked: list[Any] = []

    async def request(method: str, path: str, json: Any) -> None:
        asked.append((method, path, json))

    begun = datetime(2026, 11, 30, 8, tzinfo=UTC)
    ours = FlowRun(
        flow_id=uuid4(),
        deployment_id=uuid4(),
        expected_start_time=begun - timedelta(seconds=late_s),
        state=Running(timestamp=begun),
    )
    asyncio.run(run._end_others(cast("Any", SimpleNamespace(request=request)), ours))
    if late_s == 5:
        assert asked == []
        return
    ((method, path, body),) = asked
    assert (method, path) == ("POST", "/flow_runs/bulk_set_state") and body["state"]["type"] == "COMPLETED"
    assert body["flow_runs"]["deployment_id"]["any_"] == [str(ours.deployment_id)]
    assert body["flow_runs"]["expected_start_time"]["before_"].startswith("2026-11-30T08:00:00")
    assert body["flow_runs"]["state"]["type"]["any_"] == ["SCHEDULED"]
