"""When a sweep begins, and on which host."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed, Running, Scheduled

from blocks.inbox import InboxSource
from talaria.engine import batches
from talaria.engine import sweeping as module
from talaria.engine.folderwatch import FolderWatch
from talaria.engine.sweeping import _Sweeping, _Watched
from transfer import live
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.sourcebook import UnitRow, UnitState

NEVER = float("inf")


class Server:
    """What is asked of a server about a run, and about the deployment of a source."""

    def __init__(self, run: UUID | None = None) -> None:
        self.run, self.state = run, cast(State[Any] | None, None)
        self.created: dict[str, Any] = {}

    async def read_flow_runs(self, **asked: Any) -> list[FlowRun]:
        return [FlowRun(id=self.run, flow_id=uuid4(), state=self.state)] if self.run and self.state else []

    async def read_deployment_by_name(self, name: str) -> Any:
        raise ObjectNotFound(KeyError(name))

    async def create_flow(self, flow: Any) -> UUID:
        return uuid4()

    async def create_deployment(self, *, schedules: list[DeploymentScheduleCreate], **fields: Any) -> UUID:
        self.created = fields
        return uuid4()


def box(folder: Path) -> InboxSource:
    return InboxSource(folder=str(folder), targets=["shelf"]).named("box")


def test_a_run_that_goes_on_begins_no_sweep_when_a_part_of_it_ends(tmp_path: Path) -> None:
    run = uuid4()
    server = Server(run)
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.runs.begins(str(run), "somebody")
        ledger.sources.save("box", [UnitRow("s", "s", UnitState.FAILED, "1:1", run=str(run))])
        sweeping = _Sweeping(cast(Any, server), Home(tmp_path), ledger)
        watched = sweeping.watched["box"] = _Watched(box(tmp_path), due=NEVER)

        def is_due(state: State[Any] | None) -> bool:
            server.state, watched.due = state, NEVER
            asyncio.run(sweeping._see_ends())
            return watched.due < NEVER

        assert not is_due(Failed()), "its end was seen"
        ledger.runs.ends(str(run), goes_on=True)  # somebody retried it, and it waits for its hours
        assert not is_due(Scheduled()) and not is_due(Running())
        assert is_due(Failed()) and is_due(Completed()), "it has ended once more"
        assert is_due(None), "it was removed"


def test_a_sweep_that_could_not_be_begun_is_due_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: what came while the server was started again lay there for ten minutes."""
    answers: list[Any] = [httpx.ConnectError("refused"), SimpleNamespace(id=uuid4())]

    async def start(*_: Any, **__: Any) -> Any:
        if isinstance(one := answers.pop(0), Exception):
            raise one
        return one

    monkeypatch.setattr(module.batches, "start", start)
    with Ledger(tmp_path / "ledger") as ledger:
        sweeping, watched = _Sweeping(cast(Any, Server()), Home(tmp_path), ledger), _Watched(box(tmp_path), due=0.0)
        with pytest.raises(httpx.ConnectError):
            asyncio.run(sweeping._begin("box", watched))
        assert watched.due <= time.monotonic() and watched.run is None
        asyncio.run(sweeping._begin("box", watched))
        assert watched.due > time.monotonic() and watched.run


@pytest.mark.parametrize("error", [httpx.ReadTimeout("a busy server"), ValueError("an answer that is none")])
def test_a_source_whose_sweep_can_not_be_begun_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It stays due, and would be the first again and again."""
    asked: list[str] = []

    async def start(client: Any, name: str, **_: Any) -> Any:
        asked.append(name)
        if name == "bad":
            raise error
        return SimpleNamespace(id=uuid4())

    monkeypatch.setattr(module.batches, "start", start)
    monkeypatch.setattr(_Sweeping, "_read_sources", lambda self: asyncio.sleep(0))
    with Ledger(tmp_path / "ledger") as ledger:
        sweeping = _Sweeping(cast(Any, Server()), Home(tmp_path), ledger)
        sweeping.watched = {name: _Watched(box(tmp_path), due=0.0) for name in ("bad", "good")}
        with pytest.raises(type(error)):
            asyncio.run(sweeping._look())
        assert asked == ["bad", "good"] and sweeping.watched["bad"].due <= time.monotonic()


@pytest.mark.parametrize("how", ["renamed", "gone", "late"])
def test_a_folder_that_was_made_again_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A mount over it is the same to us: another folder of that name."""
    inbox, saved = tmp_path / "inbox", [box(tmp_path / "inbox")]

    async def every(client: Any) -> list[Any]:
        return saved

    monkeypatch.setattr("tasks.sources.saved.KEPT.all", every)
    if how != "late":
        inbox.mkdir()
    with Ledger(tmp_path / "ledger") as ledger:
        sweeping = _Sweeping(cast(Any, Server()), Home(tmp_path), ledger)

        def read() -> _Watched:
            asyncio.run(sweeping._read_sources())
            return sweeping.watched["box"]

        first = read()
        first.due = NEVER
        assert read() is first and first.due == NEVER
        if how == "renamed":
            inbox.rename(tmp_path / "old")
        elif how == "gone":
            (tmp_path / "other").mkdir()  # else the new one may get the number of the old one
            inbox.rmdir()
            (tmp_path / "other").rename(inbox)
        inbox.mkdir(exist_ok=True)
        now = read()
        assert now.due < NEVER, "what has come meanwhile is looked at"
        now.due = NEVER
        (inbox / "study").mkdir()
        sweeping._listen(now)
        assert now.due < NEVER and not any(one.blind for one in now.folders)
        assert read() is now


def test_an_inbox_that_can_not_be_watched_is_looked_through_each_minute_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def every(client: Any) -> list[Any]:
        return [box(tmp_path)]

    monkeypatch.setattr("tasks.sources.saved.KEPT.all", every)
    monkeypatch.setattr("talaria.engine.folderwatch.opened", lambda owner: -1)  # as from the 129th on
    caplog.set_level("WARNING", "talaria.sources")
    with Ledger(tmp_path / "ledger") as ledger:
        sweeping = _Sweeping(cast(Any, Server()), Home(tmp_path), ledger)
        asyncio.run(sweeping._read_sources())
        asyncio.run(sweeping._read_sources())
        watched = sweeping.watched["box"]
        watched.due = NEVER
        sweeping._listen(watched)
    assert watched.due < NEVER
    (said,) = caplog.messages
    assert said.startswith("box: the system grants no more watches") and "each 60 s" in said


def test_an_inbox_that_is_a_link_is_watched(tmp_path: Path) -> None:
    """It was looked through each minute only. What is a link in it belongs to nobody's study."""
    for name in ("real", "next", "outside"):
        (tmp_path / name).mkdir()
    inbox = tmp_path / "inbox"
    inbox.symlink_to("real")
    (inbox / "outside").symlink_to(tmp_path / "outside")
    watch = FolderWatch(str(inbox))
    (tmp_path / "outside" / "file").touch()
    assert watch.names() == [] and not watch.blind
    (tmp_path / "real" / "study").mkdir()
    assert watch.names() == ["study"] and not watch.is_stale
    (tmp_path / "now").symlink_to("next")
    (tmp_path / "now").rename(inbox)
    assert watch.is_stale


def test_a_share_that_hangs_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over, looks = threading.Event(), list[int]()

    class Hangs(FolderWatch):
        @property
        def is_stale(self) -> bool:
            looks.append(1)
            return over.wait(120)

    async def ask() -> None:
        watched = _Watched(box(tmp_path), [Hangs(str(tmp_path))])
        for _ in range(3):
            assert not await watched.is_stale()
        assert len(looks) == 1
        monkeypatch.setattr(module, "STALE_S", 120.0)
        over.set()
        assert await watched.is_stale()

    monkeypatch.setattr(module, "STALE_S", 0.01)
    asyncio.run(ask())


@pytest.mark.parametrize(("ledger", "queue"), [("postgresql://database/talaria", "normal@here"), ("", "normal")])
def test_sweeps_stay_on_the_host_that_has_their_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ledger: str, queue: str
) -> None:
    monkeypatch.setenv("TALARIA_LEDGER", ledger)
    monkeypatch.setenv("TALARIA_HOST_NAME", "here")
    monkeypatch.setenv("TALARIA_SHARED_SOURCES", str(tmp_path))
    server = Server()
    asyncio.run(batches.deploy(cast(Any, server), box(tmp_path)))
    assert server.created["work_queue_name"] == queue


def test_what_is_not_watched_is_swept_at_the_end_of_a_dispatch_for_that_alone(tmp_path: Path) -> None:
    class Deployed(Server):
        """Has the source's deployment, and keeps the sweeps that are created."""

        def __init__(self) -> None:
            super().__init__()
            self.waiting: list[FlowRun] = []

        async def read_flow_runs(self, **asked: Any) -> list[FlowRun]:
            return self.waiting

        async def read_deployment_by_name(self, name: str) -> Any:
            return SimpleNamespace(id=uuid4())

        async def create_flow_run_from_deployment(self, number: UUID, **fields: Any) -> FlowRun:
            self.waiting.insert(0, FlowRun(flow_id=uuid4(), labels=fields["labels"]))
            return self.waiting[0]

    server = cast(Any, Deployed())
    night = InboxSource(folder=str(tmp_path), targets=["shelf"], watch=False, cron="0 2 * * *").named("night")
    with Ledger(tmp_path / "ledger") as ledger:
        sweeping = _Sweeping(server, Home(tmp_path), ledger)
        for _ in range(2):
            asyncio.run(sweeping._begin("night", _Watched(night)))
        (settling,) = server.waiting
        assert settling.labels == {live.SETTLES: True}
        whole = asyncio.run(batches.start(server, "night", "anna"))
        assert whole is not settling and live.SETTLES not in whole.labels
        assert asyncio.run(batches.start(server, "night", "bert")) is whole
        asyncio.run(sweeping._begin("night", _Watched(night)))
        server.waiting.clear()
        asyncio.run(sweeping._begin("box", _Watched(box(tmp_path))))
        assert [one.labels for one in server.waiting] == [{}]
