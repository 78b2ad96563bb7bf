"""Sources in a share whose server is away: looks at it do not end, and nothing else may wait for that."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blocks.folder import FolderTarget
from blocks.inbox import InboxSource
from blocks.list_source import ListSource
from blocks.source import Source
from talaria.engine.sweeping import _Sweeping
from talaria.front.api.errors import answer_to
from talaria.service import Office, dispatches, jobs
from talaria.service import sources as service
from tasks.dispatch import line, running
from tasks.dispatch.ends import refusal
from tasks.dispatch.run import Dispatch
from tasks.retrieve import moving
from tasks.sources import belonging, elsewhere, run
from tasks.sources.saved import KEPT
from transfer import silent, unitlist
from transfer.errors import Cancelled, Misconfigured, SourceAway
from transfer.home import Home
from transfer.ledger import Ledger

OWN_PLACE = silent._own_place


class Share:
    """A folder that does not answer until `over`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.over, self.looks = folder, threading.Event(), 0
        folder.mkdir()

    def wait(self) -> None:
        self.looks += 1
        self.over.wait(120)


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Share]:
    one, ask = Share(tmp_path / "share"), os.statvfs

    def hangs(path: str) -> os.statvfs_result:
        if str(path).startswith(str(one.folder)):
            one.wait()
        return ask(path)

    monkeypatch.setattr(os, "statvfs", hangs)
    monkeypatch.setattr(silent, "LOOK_S", 0.2)
    monkeypatch.setattr(silent, "_own_place", str)
    yield one
    one.over.set()


def box(folder: Path, **fields: Any) -> InboxSource:
    return InboxSource(folder=str(folder), targets=["shelf"], **fields).named(folder.name)


def sources(tmp_path: Path, share: Path) -> list[Source]:
    moved = box(tmp_path / "box", after="move", move_to=str(share))
    return [box(share), moved, ListSource(file=str(share / "list.txt"), targets=["shelf"]).named("list")]


@pytest.mark.parametrize("number", range(3), ids=["inbox", "move_to", "list"])
def test_a_sweep_ends_in_words_and_goes_on_when_the_share_is_back(
    tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source = sources(tmp_path, share.folder)[number]

    async def ask() -> None:
        monkeypatch.setattr(silent, "ANSWER_S", 0.0)
        for _ in range(3):
            with pytest.raises(SourceAway, match="does not answer"):
                await run._answers(source)
        assert share.looks == 1  # one thread waits there, and not one more for each sweep
        monkeypatch.setattr(silent, "ANSWER_S", 120.0)
        waits = asyncio.create_task(run._answers(source))
        share.over.set()
        await waits

    asyncio.run(ask())


def test_who_applies_or_tests_a_source_is_told(tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a share of the source's own; others' are known by their names then."""
    monkeypatch.setattr("talaria.service.sources.ANSWER_S", 0.0)
    (tmp_path / "box").mkdir()
    own, other = box(share.folder), box(tmp_path / "box")
    shelf = FolderTarget(folder=str(share.folder / "shelf")).named("shelf")
    with pytest.raises(SourceAway, match="does not answer"):
        asyncio.run(service._mute([own], [own, other], [shelf]))
    assert asyncio.run(service._mute([other], [own, other], [shelf])) == {own.folder, shelf.folder}
    assert share.looks == 1


def test_a_retrieval_into_the_share_rests_until_it_answers(
    tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker's thread would wait there, with the place of the run, and hear of no cancellation."""
    monkeypatch.setattr(line, "_waker", lambda run_id: None)
    monkeypatch.setattr(moving, "ANSWER_S", 0.0)

    async def ask() -> None:
        with pytest.raises(SourceAway) as away:
            await moving.reach_into(str(share.folder / "new"))
        assert refusal(away.value).is_scheduled()
        monkeypatch.setattr(moving, "ANSWER_S", 120.0)
        share.over.set()
        await moving.reach_into(str(share.folder / "new"))
        with pytest.raises(Misconfigured, match="there is no folder"):
            await moving.reach_into(str(tmp_path / "not" / "there"))

    asyncio.run(ask())


@pytest.mark.parametrize("each", ["", "unit"])
def test_a_dispatch_rests_until_the_share_answers(
    tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch, each: str
) -> None:
    monkeypatch.setattr(line, "_waker", lambda run_id: None)
    monkeypatch.setattr(silent, "ANSWER_S", 0.0)
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    home, path = Home.current(), str(share.folder / "study")
    if each:
        writer = unitlist.Writer(unitlist.place(home, "box", "mark"))
        writer.add(unitlist.ListedUnit("study", (path,), str(share.folder)))
        writer.close()
        path = str(writer.path)

    async def ask() -> None:
        with Ledger(home.ledger) as ledger:
            dispatch = Dispatch("run", [], home, ledger, cast(Any, None), cast(Any, None), "normal")
            with pytest.raises(SourceAway) as away:
                await dispatch.goes_on([path], "", each)
            state = refusal(away.value)
            assert state.is_scheduled() and "the share of its files to answer" in (state.message or "")
            monkeypatch.setattr(silent, "ANSWER_S", 120.0)
            share.over.set()
            await dispatch._answer([path], each)

    try:
        asyncio.run(ask())
    finally:
        running.forget("run")


def test_who_asks_for_a_dispatch_is_told(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatches, "ANSWER_S", 0.0)

    async def none(*_: Any, **__: Any) -> list[Any]:
        return []

    monkeypatch.setattr(dispatches, "load", none)
    office = Office(cast(Any, None), Home(share.folder.parent))
    for ask in (dispatches.create_dispatch, dispatches.plan_dispatch):
        with pytest.raises(SourceAway, match="does not answer") as away:
            asyncio.run(ask(office, [str(share.folder / "study")], ["shelf"]))
        assert answer_to(away.value)[0] == 503
    assert share.looks == 1


@pytest.mark.parametrize("each", ["", "folder", "unit"])
def test_who_sends_a_dispatch_to_other_targets_is_told(
    tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch, each: str
) -> None:
    """Its files are looked at before the other dispatch is made: nobody was answered, and a thread waited there."""
    path = str(tmp_path / "gone" / "units.jsonl") if each == "unit" else str(share.folder / "study")
    asked = {"paths": [path], "targets": ["shelf"], "each": each}
    job = SimpleNamespace(id="run", parameters=asked, labels={}, tags=[])

    def returns(value: Any) -> Any:
        async def found(*_: Any, **__: Any) -> Any:
            return value

        return found

    monkeypatch.setattr(jobs, "found", returns(job))
    monkeypatch.setattr(jobs, "load", returns([]))
    monkeypatch.setattr(jobs, "result", returns({"studies": [{"study": "study"}]}))
    monkeypatch.setattr(jobs.runs, "kind_of", lambda _: "dispatch")
    monkeypatch.setattr(jobs.hosts, "where_it_waits", lambda _: "")
    monkeypatch.setattr(KEPT, "load", returns([box(share.folder)]))
    monkeypatch.setattr(elsewhere.unitlist, "source_of", lambda _: "box")
    for name in ("lent_studies", "deadletters.lend"):
        monkeypatch.setattr(f"talaria.service.jobs.{name}", lambda *_: share.wait())
    monkeypatch.setattr(elsewhere, "_lent", lambda *_: share.wait())
    monkeypatch.setattr(dispatches, "ANSWER_S", 0.0)
    monkeypatch.setattr(elsewhere, "ANSWER_S", 0.0)
    with pytest.raises(SourceAway, match="does not answer"):
        asyncio.run(jobs.send_job(Office(cast(Any, None), Home(tmp_path / "home")), "run", ["shelf"]))
    assert share.looks == 1


def test_a_sweep_that_is_stopped_is_not_held_up(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.dispatch.stoppable.GRACE_S", 0.01)
    stopped = threading.Event()

    async def stop() -> None:
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def hang() -> None:
            loop.call_soon_threadsafe(begun.set)
            share.wait()

        sweep = asyncio.create_task(run._while(run._Wish(stopped), asyncio.to_thread(hang)))
        await begun.wait()
        stopped.set()
        with pytest.raises(Cancelled):
            await sweep
        share.over.set()  # else the loop would wait for its thread

    asyncio.run(stop())


def test_a_sweep_ends_where_the_share_hangs_while_it_is_read(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    """It held a place of the worker's until the share was back."""
    monkeypatch.setattr("tasks.dispatch.stoppable.GRACE_S", 0.01)
    monkeypatch.setattr(silent, "BESIDE_S", 0.01)

    async def hangs() -> None:
        wish = run._Wish(threading.Event())
        look = asyncio.create_task(wish.end_if_away(box(share.folder)))
        with pytest.raises(SourceAway, match="does not answer"):
            await run._while(wish, asyncio.to_thread(share.wait))
        with pytest.raises(SourceAway):  # as it is for its threads
            wish.check()
        await look
        share.over.set()

    asyncio.run(asyncio.wait_for(hangs(), 60))


def test_others_are_watched_and_the_share_is_when_it_is_back(
    tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "z").mkdir()
    both = [box(share.folder), box(tmp_path / "z")]

    async def every(client: Any) -> list[Source]:
        return [*both]

    async def nowhere(client: Any) -> dict[str, str]:
        return {}

    def watches(self: Any, source: Source, *, is_here: bool) -> list[Any]:
        if source.name == "share" and not share.over.is_set():
            share.wait()  # as inotify_add_watch(2) does
        return theirs(self, source, is_here=is_here)

    theirs = _Sweeping._watches
    monkeypatch.setattr(_Sweeping, "_watches", watches)
    monkeypatch.setattr(type(KEPT), "all", lambda self, client: every(client))
    monkeypatch.setattr(belonging, "elsewhere", nowhere)

    async def look() -> None:
        sweeping = _Sweeping(cast(Any, None), Home(tmp_path), cast(Any, None))
        await sweeping._read_sources()
        await sweeping._read_sources()
        assert [len(one.folders) for one in sweeping.watched.values()] == [0, 1]
        share.over.set()
        assert not await silent.mute([str(share.folder)], 60)
        await sweeping._read_sources()
        assert [len(one.folders) for one in sweeping.watched.values()] == [1, 1]

    asyncio.run(asyncio.wait_for(look(), 60))


def test_each_path_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: all of them for each of them, a million times for a thousand."""
    paths, asked = [f"/nowhere/{number}" for number in range(40)], list[str]()

    def ask(path: str) -> None:
        asked.append(path)
        raise FileNotFoundError

    monkeypatch.setattr(os, "statvfs", ask)
    assert asyncio.run(silent.mute(paths, 60)) == []
    assert asked == paths


def test_one_look_is_enough_for_all_that_lies_in_the_share_itself(
    tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mounts := tmp_path / "mounts").write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/export {share.folder} nfs rw 0 0\n")
    monkeypatch.setattr(silent, "MOUNTS", str(mounts))
    monkeypatch.setattr(silent, "_own_place", OWN_PLACE)
    paths = [str(share.folder / f"{number}.dcm") for number in range(9)]
    assert asyncio.run(silent.mute(paths, 0.0)) == paths
    assert share.looks == 1
    assert [silent._own_place(one) for one in ("/link", "/data/a")] == ["/link", "/data/a"]


def test_how_long_a_path_is_silent_counts_from_when_it_was_asked() -> None:
    """Not from when thousands before it were."""
    seen: list[float] = []
    one = silent._Look(lambda path: seen.append(one.since), ["/a", "/b"])
    one.since = -1.0
    one._main()
    assert seen[0] == -1.0 < seen[1] <= one.since
