"""Since when a dispatch is late: since somebody has asked for it, the last time. And which sweeps nobody begins, and
which dead targets are back.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed, Pending, Running, Scheduled

from blocks.dicom import DicomTarget
from blocks.rule import WebhookRule
from talaria.notify import dead, lookout
from talaria.notify.lookout import asked_for, late_from
from talaria.testing.process import free_port, until
from tasks.dispatch import breaker, rest
from tasks.dispatch.running import PAUSED
from tests.servers.scp import scp
from transfer.errors import TimedOut, Unreachable
from transfer.home import Home
from transfer.ledger import Ledger

T = datetime(2026, 11, 29, 8, tzinfo=UTC)
NINE = T + timedelta(hours=9)


def waits(until: datetime) -> State[Any]:
    """The state of a run that waits for hours that people have set."""
    return AwaitingRetry(scheduled_time=until, message=f"{rest.WAITS} until 17:00:00 UTC: the hours of s3; nothing")


def history(*states: State[Any]) -> list[State[Any]]:
    """States that came an hour after each other, in any order."""
    for number, one in enumerate(states):
        one.timestamp = T + timedelta(hours=number)
        if one.state_details.scheduled_time != NINE:
            one.state_details.scheduled_time = None
    return [*states[1:], states[0]]


@pytest.mark.parametrize(
    ("states", "hours"),
    [
        ([Scheduled(), Pending(), Running()], None),
        ([Scheduled(), Running(), AwaitingRetry(), Running()], None),
        ([Scheduled(), Running(), Failed(), AwaitingRetry(), Running(), AwaitingRetry()], 3),
        ([Scheduled(), Running(), Failed(), AwaitingRetry(), Running(), Failed(), AwaitingRetry()], 6),
        ([Scheduled(), Cancelled(), AwaitingRetry()], 2),
        ([Scheduled(), Running(), Crashed(), AwaitingRetry(), Running()], None),
        ([Scheduled(), Running(), Scheduled(name=PAUSED), AwaitingRetry(), Running()], 3),
        ([Scheduled(), Running(), Failed(), AwaitingRetry(scheduled_time=NINE)], 9),
        ([Scheduled(), waits(NINE), Running()], 2),
        ([*(Scheduled() for _ in range(9)), waits(NINE), Running(), AwaitingRetry()], 9),
    ],
    ids=["first", "rests", "retried", "again", "cancelled", "crashed", "resumed", "later", "let go", "opened"],
)
def test_late_counts_from_when_it_was_asked_for(states: list[State[Any]], hours: int | None) -> None:
    assert asked_for(history(*states)) == (None if hours is None else T + timedelta(hours=hours))


def run(state: State[Any], count: int = 1, priority: str = "offpeak") -> FlowRun:
    return FlowRun(flow_id=uuid4(), state=state, run_count=count, parameters={"priority": priority})


@pytest.mark.parametrize(
    ("one", "hours"),
    [
        (run(Running()), 0),
        (run(AwaitingRetry(scheduled_time=NINE, message=f"{rest.TRIES_AGAIN} at 17:00:00 UTC: an attempt")), 0),
        (run(waits(T + timedelta(hours=14))), None),
        (run(waits(NINE), priority="normal"), 9),  # the hours have come, and it has not begun
        (run(Scheduled(), 0, "normal"), 0),
    ],
    ids=["runs", "tries", "waits", "opened", "normal"],
)
def test_late_counts_while_no_hours_that_people_have_set_are_waited_for(one: FlowRun, hours: int | None) -> None:
    assert late_from(one, T, T + timedelta(hours=12)) == (None if hours is None else T + timedelta(hours=hours))


def test_what_has_not_begun_is_late_from_the_first_off_peak_hours_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_OFF_PEAK", "17:00-18:00")
    one = run(Scheduled(), 0)
    assert late_from(one, T, NINE - timedelta(minutes=1)) is None
    assert late_from(one, T, NINE + timedelta(hours=3)) == NINE  # also when they are over


def test_a_sweep_that_no_worker_begins_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a source whose host is dead; not while a worker that has just started may be about to take it."""
    runs = [
        FlowRun(
            flow_id=uuid4(),
            state=Scheduled(),
            parameters={"source": name},
            work_queue_name="normal@ct-host" if name == "night" else "normal",
            expected_start_time=T + timedelta(minutes=minute),
        )
        for minute, name in enumerate(("night", "night", "box"))
    ]

    class Server:
        async def read_flow_runs(self, **asked: Any) -> list[FlowRun]:
            assert asked["flow_filter"].name.any_ == ["batch"]
            return runs

    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start a server
    with Ledger(tmp_path / "ledger.sqlite") as ledger:

        def said() -> list[tuple[str, str]]:
            asyncio.run(lookout._say_unswept(cast("Any", Server()), ledger))
            return [(one.about["source"], one.about["words"]) for one in ledger.happenings.waiting(10)]

        assert said() == []
        monkeypatch.setattr(lookout, "SURE_S", 0.0)
        words = "its sweep of 2026-11-29 08:0{} UTC has not begun: no worker{} takes it"
        told = [("night", words.format(0, " of ct-host")), ("box", words.format(2, ""))]
        assert said() == told and said() == told
        runs.clear()
        said()
        assert lookout._unswept == {}


def test_a_dead_target_that_no_run_waits_for_is_asked_whether_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, port = Home(tmp_path / "home"), free_port()
    home.root.mkdir()
    pacs, hangs, off = (
        DicomTarget(host="127.0.0.1", port=port, aet_target="PACS", retry_delay_s=0, enabled=name != "off").named(name)
        for name in ("pacs", "hangs", "off")
    )

    async def load(client: Any, names: list[str]) -> list[DicomTarget]:
        return [one for one in (pacs, hangs, off) if one.name in names]

    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
    monkeypatch.setattr(dead, "load", load)
    with Ledger(home.ledger) as ledger:
        for _ in range(breaker.LIMIT):
            for one in (pacs, off):
                breaker.failed(ledger, one, Unreachable("gone", one.name), "gone")
            breaker.failed(ledger, hangs, TimedOut("silent", hangs.name), "silent", pushed=True)

        def said() -> list[tuple[str, str]]:
            return [(one.event, one.about["target"]) for one in ledger.happenings.waiting(10)]

        down = {("target.down", name) for name in ("pacs", "hangs", "off")}
        until(lambda: dead._due(ledger, [pacs, hangs]) == ["pacs"])  # a check of one that hangs in pushes says nothing
        dead.ask(home, ledger, [pacs])
        assert set(said()) == down
        with scp(port=port, aet="PACS"):

            def is_back() -> bool:
                asyncio.run(dead.ask_again(cast("Any", None), home, ledger, [pacs, hangs, off]))
                return len(said()) > len(down)

            until(is_back)
        assert set(said()) - down == {("target.up", "pacs")}


def test_a_target_that_is_back_is_heard_of_while_others_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many that are dead, each takes its time-out: asked one after another, the last one is heard of late."""
    home = Home(tmp_path / "home")
    home.root.mkdir()
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
    with scp(aet="PACS") as peer, Ledger(home.ledger) as ledger:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            ports = {"silent": int(silent.getsockname()[1]), "back": peer.port}
            targets = [
                DicomTarget(host="127.0.0.1", port=port, aet_target="PACS", retry_delay_s=0).named(name)
                for name, port in ports.items()
            ]
            for one in targets * breaker.LIMIT:
                breaker.failed(ledger, one, Unreachable("gone", one.name), "gone")
            asking = threading.Thread(target=dead.ask, args=(home, ledger, targets))
            asking.start()
            until(lambda: "target.up" in [one.event for one in ledger.happenings.waiting(10)])
            assert asking.is_alive()
        asking.join()


def test_a_look_that_never_ends_keeps_nobody_from_hearing_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the certificate of a target on a share that is silent."""
    begun = list[None]()

    async def never(*args: Any) -> None:
        begun.append(None)
        await asyncio.Event().wait()

    async def none(*args: Any) -> list[Any]:
        return []

    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
    monkeypatch.setattr(lookout, "_say_expiring", never)
    monkeypatch.setattr(lookout, "all_targets", none)
    monkeypatch.setattr(lookout, "APART_S", 0.01)
    rule = WebhookRule(url="http://h/", on=["certificate.expires", "disk.low"], free_percent=99.9999).named("ops")

    async def look() -> None:
        for _ in range(2):
            await lookout.look(cast(Any, None), Home(tmp_path), ledger, [rule], "")
            await lookout._looks[lookout.RuleEvent.DISK]

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(look())
        assert [one.event for one in ledger.happenings.waiting(10)] == ["disk.low"]
    assert len(begun) == 1


def test_a_look_that_fails_keeps_nobody_from_hearing_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def late(*args: Any) -> None:
        raise TypeError("odd parameters")

    async def none(*args: Any) -> list[Any]:
        return []

    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)
    monkeypatch.setattr(lookout, "_late", late)
    monkeypatch.setattr(lookout, "all_targets", none)
    rule = WebhookRule(url="http://h/", on=["dispatch.late", "disk.low"], free_percent=99.9999).named("ops")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(lookout.look(cast(Any, None), Home(tmp_path), ledger, [rule], ""))
        (one,) = ledger.happenings.waiting(9)
    assert rule.hears(one.event, one.about) and one.event == "disk.low"
    assert "dispatch.late can't be looked for" in caplog.text
