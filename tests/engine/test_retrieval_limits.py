"""What holds a retrieval back: the room for what was fetched, studies per hour, hours of the day; and its retry.

The engine by itself, without a server: the dispatch of each study is the test's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Abort
from prefect.states import AwaitingRetry, Cancelled, Completed, Failed

from blocks.base import Target
from imaging.query import Query
from talaria.service.results import settled
from talaria.testing import studies
from talaria.testing.process import until
from tasks.dispatch import audited, leaving, line, rest, running
from tasks.dispatch.report import report
from tasks.dispatch.slots import NoSlot
from tasks.retrieve import moving
from tasks.retrieve import run as engine
from tasks.retrieve.fetch import Fetcher
from tasks.retrieve.job import Job, Stage, Study, folder_of
from tasks.retrieve.report import document
from tasks.retrieve.report import report as report_retrieval
from tasks.retrieve.room import Room
from tasks.retrieve.run import Retrieval
from tasks.retrieve.wish import Wish
from tests.engine.material import alone_with
from tests.servers import steps
from tests.servers.qr import FIND, GET, MOVE, Archive, Instance, Last, Request, Send, Steps, archive, sends
from tests.targets.dicom import dicom_target
from tests.targets.pulling import GETS, only, port_of_moves
from transfer import unitlist
from transfer.audit import Trail, entries
from transfer.errors import DiskFull, LedgerFull
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.receipt import Receipt
from transfer.receipt import State as Ended
from transfer.unitlist import ListedUnit

RUN = "00000000-0000-4000-8000-000000000001"
Sent = Callable[..., Awaitable[State[Any]]]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone_with(RUN, tmp_path / "home", monkeypatch)


def study(accession: str, count: int = 2) -> list[bytes]:
    uid, series = studies.uid(), studies.uid()
    return [studies.encoded(studies.dataset(study=uid, series=series, AccessionNumber=accession)) for _ in range(count)]


def source(peer: Archive, **fields: Any) -> Target:
    return dicom_target(peer.port, aet_target=peer.aet, direction="query", **{"idle_timeout_s": 5, **fields})


async def delivered(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
    return Completed()


def without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of Prefect's server at the end, which a process of its own would be started for."""

    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(engine, "get_client", nullcontext)
    monkeypatch.setattr(engine, "report", nothing)
    monkeypatch.setattr(engine, "end_waiting", nothing)


def made(peer: Archive, send: Sent = delivered, numbers: str = "S1 S2 S3", **wish: Any) -> Retrieval:
    fields = {"targets": ("archive",), "accessions": numbers, **wish}
    of_source = fields.pop("source_fields", {})
    return Retrieval(RUN, Wish("src", **fields), source(peer, **of_source), Home.current(), send)


def stages(one: Retrieval) -> dict[str, Stage]:
    return {study.accession: study.stage for study in one.job.studies.values()}


def goes_on(one: Retrieval) -> Any:
    """When it is to go on; None if it is not."""
    return min((wait.until for wait in one.waits), default=None)


def three() -> list[bytes]:
    return [file for name in ("S1", "S2", "S3") for file in study(name)]


def test_studies_are_fetched_in_the_order_of_the_list() -> None:
    numbers = [f"ACC00{n}" for n in (3, 0, 2, 4, 1, 5)]  # enough to be asked for by a wild card
    with archive([file for n in (1, 2, 3) for file in study(f"ACC00{n}")]) as peer:
        one = made(peer, numbers=" ".join(numbers))
        asyncio.run(one.run())
        assert [*stages(one)] == ["ACC003", "ACC002", "ACC001"] and one.job.missing == ["ACC000", "ACC004", "ACC005"]
        uids = {str(each.ds.StudyInstanceUID): str(each.ds.AccessionNumber) for each in peer.instances}
        assert [uids[str(each.keys.StudyInstanceUID)] for each in peer.asked(GET)] == [*stages(one)]


@pytest.mark.parametrize("numbers", ["OR1 OR2", "OR2 OR1", "OR1 OR2 X1 X2 X3 X4 X5 X6"])
def test_a_number_that_stands_for_a_study_of_another_number_is_not_missing(numbers: str) -> None:
    """Of one examination with two orders, nodes show the number that they are asked for."""
    uid = studies.uid()
    files = [studies.encoded(studies.dataset(study=uid, AccessionNumber=number)) for number in ("OR1", "OR2")]
    with archive(files) as peer:
        one = made(peer, numbers=numbers)
        asyncio.run(one.run())
        first, second, *missing = numbers.split()
        assert stages(one) == {first: Stage.DELIVERED} and one.job.missing == missing
        assert one.job.whole is not bool(missing)
        assert Job.load(Home.current(), RUN, ()).also == {second: uid}
        shown = document(one.job, RUN, "src", "delivered")
        assert (shown["found"], shown["delivered"], shown["missing"]) == (1, 1, missing)
        row = next(row for row in shown["accessions"] if row["accession"] == second)
        assert (row["state"], row["reason"]) == ("delivered", f"stands for the study of {first}")
        assert peer.asked(GET)[0].keys.StudyInstanceUID == uid and len(peer.asked(GET)) == 2


def test_fetching_waits_for_sending_where_the_spool_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_SPOOL_LIMIT", "1")  # one study fills it
    fetched_at_begin, fetched_at_end = [], []
    waits = asyncio.Event()
    really = Retrieval._room

    async def room(self: Retrieval, study: Study) -> bool:
        waits.set()
        return await really(self, study)

    async def send(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        fetched_at_begin.append(len(peer.asked(GET)))
        if len(fetched_at_begin) < 3:
            await waits.wait()  # the next study has come to where it waits
            await asyncio.sleep(3 * engine.LOOK_S)
        fetched_at_end.append(len(peer.asked(GET)))
        waits.clear()
        return Completed()

    monkeypatch.setattr(Retrieval, "_room", room)
    with archive(three()) as peer:
        one = made(peer, send)
        asyncio.run(one.run())
    assert stages(one) == dict.fromkeys(("S1", "S2", "S3"), Stage.DELIVERED)
    assert fetched_at_begin == fetched_at_end == [1, 2, 3]
    assert not list(one._folders.iterdir())


def in_three_series(accession: str) -> list[bytes]:
    uid = studies.uid()
    return [studies.encoded(studies.dataset(study=uid, AccessionNumber=accession)) for _ in range(3)]


ONE_AND_A_HALF = len(studies.encoded(studies.dataset())) * 3 // 2  # bytes of instances


def test_a_study_that_fills_the_spool_while_it_comes_stops_after_its_series_until_others_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TALARIA_SPOOL_LIMIT", str(ONE_AND_A_HALF))
    halted, fetched = asyncio.Event(), list[int]()
    really = Retrieval._room

    async def room(self: Retrieval, study: Study) -> bool:
        if self.fetcher.halted:
            halted.set()
        return await really(self, study)

    async def send(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        if not fetched:
            await halted.wait()
            await asyncio.sleep(3 * engine.LOOK_S)
        fetched.append(len(peer.asked(GET)))
        return Completed()

    monkeypatch.setattr(Retrieval, "_room", room)
    with archive([*study("S1", 1), *in_three_series("S2")]) as peer:
        one = made(peer, send, numbers="S1 S2", source_fields={"concurrency": 1})
        asyncio.run(asyncio.wait_for(one.run(), 60))
        assert stages(one) == dict.fromkeys(("S1", "S2"), Stage.DELIVERED)
        # S2 is alone then, and goes on though it is larger than the spool.
        assert fetched == [2, 4] and len({str(each.keys.SeriesInstanceUID) for each in peer.asked(GET)}) == 4


def test_a_study_that_fills_the_spool_beside_what_waits_for_a_target_goes_on_when_that_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TALARIA_SPOOL_LIMIT", str(ONE_AND_A_HALF))
    opening = datetime.now(UTC) + timedelta(hours=2)

    async def send(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        return AwaitingRetry(scheduled_time=opening, message="the window opens at ten")

    with archive([*study("S1", 1), *in_three_series("S2")]) as peer:
        one = made(peer, send, numbers="S1 S2", source_fields={"concurrency": 1})
        asyncio.run(asyncio.wait_for(one.run(), 60))
        assert stages(one) == {"S1": Stage.WHOLE, "S2": Stage.FOUND} and goes_on(one) == opening
        assert len(peer.asked(GET)) == 2
        later = made(peer, numbers="S1 S2", source_fields={"concurrency": 1})
        asyncio.run(asyncio.wait_for(later.run(), 60))
        assert stages(later) == dict.fromkeys(("S1", "S2"), Stage.DELIVERED)
        assert len(peer.asked(GET)) == 4


def test_what_waits_for_a_target_fills_the_spool_and_the_run_goes_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_SPOOL_LIMIT", "1")
    opening = datetime.now(UTC) + timedelta(hours=2)

    async def send(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        return AwaitingRetry(scheduled_time=opening, message="the window opens at ten")

    with archive(three()) as peer:
        one = made(peer, send)
        asyncio.run(one.run())
        assert len(peer.asked(GET)) == 1  # no second one before there is room
        assert stages(one) == {"S1": Stage.WHOLE, "S2": Stage.FOUND, "S3": Stage.FOUND}
        assert goes_on(one) == opening
        # Later: what was fetched is sent and not fetched again, the others follow.
        later = made(peer)
        asyncio.run(later.run())
        assert stages(later) == dict.fromkeys(("S1", "S2", "S3"), Stage.DELIVERED)
        assert len(peer.asked(GET)) == 3


def test_what_is_here_of_partial_studies_does_not_keep_their_retry_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_SPOOL_LIMIT", "1")
    files = [*study("S1"), *study("S2")]
    lost = [Instance.of(file).uid for file in files[::2]]

    def script(request: Request, found: list[Instance]) -> Steps:
        there = [one for one in found if one.uid not in lost]
        failed = len(found) - len(there)
        return [*map(Send, there), Last(0xB000 if failed else 0, len(there), failed, 0)]

    with archive(files, on_get=script) as peer:
        first = made(peer, numbers="S1 S2", source_fields={"retry_delay_s": 0})
        asyncio.run(first.run())
        assert stages(first) == dict.fromkeys(("S1", "S2"), Stage.PARTIAL)
        assert [path.suffix for path in first._folders.rglob("*.*")].count(".dcm") == 1  # the first made room
        first.job.ended = True
        first.job.save()
        lost.clear()
        again = made(peer, numbers="S1 S2")
        asyncio.run(again.run())
    assert stages(again) == dict.fromkeys(("S1", "S2"), Stage.DELIVERED) and goes_on(again) is None


def test_what_waits_for_a_target_does_not_keep_the_next_study_from_being_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A source that may be asked by night, a target that may be sent to by day: all come in one night."""
    opening = datetime.now(UTC) + timedelta(hours=2)
    sent: list[str] = []

    async def send(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        sent.append(paths[0])
        state: State[Any] = AwaitingRetry(scheduled_time=opening, message="the window opens at ten")
        return state

    monkeypatch.setenv("TALARIA_OFF_PEAK", window(-0.5))
    with archive(three()) as peer:
        night = made(peer, send, priority="offpeak")
        asyncio.run(night.run())
        assert stages(night) == dict.fromkeys(("S1", "S2", "S3"), Stage.WHOLE)
        assert len(peer.asked(GET)) == len(sent) == 3 and goes_on(night) == opening
        # Taken up while the target still waits: what has been handed on is not handed on again and again.
        sent.clear()
        still = made(peer, send, priority="offpeak")
        asyncio.run(still.run())
        assert 1 <= len(sent) <= engine.DISPATCHES and goes_on(still) == opening
        monkeypatch.setenv("TALARIA_OFF_PEAK", window(2))
        day = made(peer, priority="offpeak")
        asyncio.run(day.run())
        assert stages(day) == dict.fromkeys(("S1", "S2", "S3"), Stage.DELIVERED)
        assert len(peer.asked(GET)) == 3


def test_no_more_studies_in_an_hour_than_allowed() -> None:
    begun: list[float] = []

    def script(request: Request, found: list[Instance]) -> Steps:
        begun.append(time.monotonic())
        return [*(Send(one) for one in found), Last(0, len(found), 0, 0)]

    with archive(three(), on_get=script) as peer:
        one, start = made(peer, studies_per_hour=7200), time.monotonic()
        asyncio.run(one.run())
    assert stages(one) == dict.fromkeys(("S1", "S2", "S3"), Stage.DELIVERED)
    assert all(at - start >= 0.5 * earlier for earlier, at in enumerate(begun))  # a busy machine only makes it later


def test_a_long_wait_for_the_next_study_holds_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with archive(three()) as peer:
        for fetched in (1, 1, 2):  # the second run comes too early: another worker's, after a kill
            one = made(peer, studies_per_hour=2)
            if fetched == 2:
                one.job.next_study = time.time() - 1
            asyncio.run(one.run())
            assert len(peer.asked(GET)) == fetched
            assert list(stages(one).values()).count(Stage.DELIVERED) == fetched
            assert timedelta(minutes=25) < goes_on(one) - datetime.now(UTC) <= timedelta(minutes=30)


def window(hours: float) -> str:
    begin, end = (datetime.now(UTC) + timedelta(hours=h) for h in (hours, hours + 1))
    return f"{begin:%H:%M}-{end:%H:%M}"


@pytest.mark.parametrize("whose", ["the source's window", "off-peak hours"])
def test_outside_of_its_hours_a_source_is_not_even_asked(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wish: dict[str, Any] = {"priority": "offpeak"}
    if whose == "off-peak hours":
        monkeypatch.setenv("TALARIA_OFF_PEAK", window(2))
    else:
        wish = {"source_fields": {"window": window(2)}}
    with archive(three()) as peer:
        one = made(peer, **wish)
        asyncio.run(one.run())
        assert not peer.requests
        assert timedelta(hours=1) < goes_on(one) - datetime.now(UTC) < timedelta(hours=3)
        monkeypatch.setenv("TALARIA_OFF_PEAK", window(-0.5))
        later = made(peer, priority="offpeak")
        asyncio.run(later.run())
        assert stages(later) == dict.fromkeys(("S1", "S2", "S3"), Stage.DELIVERED)


def test_hours_that_end_meanwhile_end_the_fetching_after_the_running_study(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(request: Request, found: list[Instance]) -> Steps:
        monkeypatch.setenv("TALARIA_OFF_PEAK", window(2))
        return [*(Send(one) for one in found), Last(0, len(found), 0, 0)]

    monkeypatch.setenv("TALARIA_OFF_PEAK", window(-0.5))
    with archive(three(), on_get=script) as peer:
        one = made(peer, priority="offpeak")
        asyncio.run(one.run())
        assert stages(one) == {"S1": Stage.DELIVERED, "S2": Stage.FOUND, "S3": Stage.FOUND}
        assert goes_on(one)


def test_deliveries_of_a_retrieval_are_recorded_as_asked_for_by_whom_it_was() -> None:
    """Their runs are parts of its run, and made by the worker."""
    whose: list[str] = []

    async def send(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        whose.append(audited.requester(SimpleNamespace(labels={}, created_by=None)))
        return await delivered(paths, targets)

    with archive(study("S1")) as peer:
        one = made(peer, send, numbers="S1")
        one.who = "anna"
        asyncio.run(one.run())
    assert whose == ["anna"] and audited.requester(SimpleNamespace(labels={})) == ""
    labelled = SimpleNamespace(labels={"talaria.by": "bert"}, created_by=SimpleNamespace(display_value="worker"))
    with audited.on_behalf_of("anna"):
        assert audited.requester(labelled) == "bert"


@pytest.mark.parametrize("came", ["delivered", "cancelled"])
def test_of_a_dispatch_that_others_have_stopped_its_receipt_decides(came: str) -> None:
    """It may have been on the last of its files."""

    async def send(paths: list[str], targets: list[str], begins: Any, **_: Any) -> State[Any]:
        begins(f"stopped-{came}")
        receipt = Home.current().receipt(f"stopped-{came}")
        receipt.parent.mkdir(parents=True, exist_ok=True)
        receipt.write_text(json.dumps({"targets": {"archive": {"state": came}}}))
        return Cancelled(message="cancelled")

    with archive(study("S1")) as peer:
        one = made(peer, send, numbers="S1")
        asyncio.run(one.run())
    assert stages(one) == {"S1": Stage.DELIVERED if came == "delivered" else Stage.FAILED}


def test_a_ledger_that_is_away_at_the_end_costs_a_retrieval_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it brought is there, and the audit trail says so."""

    without_a_server(monkeypatch)
    with archive(study("S1")) as peer:
        one = made(peer, numbers="S1")
        asyncio.run(one.run())
        one.home.ledger.unlink(missing_ok=True)
        one.home.ledger.mkdir()
        state = asyncio.run(one.conclude())
    assert state.is_completed() and one.job.ended, state.message
    ended = [entry for entry in entries(Trail(one.home)) if entry["event"] == "retrieval"]
    assert [entry["details"]["state"] for entry in ended] == ["delivered"]


def test_a_retry_asks_only_for_what_did_not_succeed() -> None:
    failing = ["S2"]

    async def send(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        failed = any(str(one.study) in paths[0] for one in first.job.studies.values() if one.accession in failing)
        return Failed(message="the target is away") if failed else Completed()

    with archive([*study("S1"), *study("S2")]) as peer:
        first = made(peer, send, "S1 S2 S3")
        asyncio.run(first.run())
        assert stages(first) == {"S1": Stage.DELIVERED, "S2": Stage.FAILED} and first.job.missing == ["S3"]
        first.job.ended = True
        first.job.save()
        failing.clear()
        peer.instances += [Instance.of(file) for file in study("S3")]
        before = len(peer.asked(GET)), len(peer.asked(FIND))
        again = made(peer, send, "S1 S2 S3")
        asyncio.run(again.run())
        assert stages(again) == dict.fromkeys(("S1", "S2", "S3"), Stage.DELIVERED)
        assert len(peer.asked(GET)) == before[0] + 1  # S2 lay here whole: only sent again
        asked = {str(request.keys.get("AccessionNumber", "")) for request in peer.asked(FIND)[before[1] :]}
        assert asked <= {"S3", ""}


def test_a_retry_finds_what_a_number_stands_for_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that came in part was sent to the archive anew, under another UID; another one has gone."""
    lost = [Instance.of(file) for file in (study("S1")[0], study("S2")[0])]

    def script(request: Request, found: list[Instance]) -> Steps:
        there = [one for one in found if one.uid not in {one.uid for one in lost}]
        return [*map(Send, there), Last(0xB000, len(there), len(found) - len(there), 0)]

    with archive(study("S3"), on_get=script) as peer:
        lost[:] = [peer_of(peer, study(name))[0] for name in ("S1", "S2")]
        first = made(peer, source_fields={"retry_delay_s": 0})
        asyncio.run(first.run())
        assert stages(first) == {"S1": Stage.PARTIAL, "S2": Stage.PARTIAL, "S3": Stage.DELIVERED}
        first.job.ended = True
        first.job.save()
        peer.instances[:] = [one for one in peer.instances if one.ds.AccessionNumber == "S3"]
        new = peer_of(peer, study("S1"))[0]
        again = made(peer)
        asyncio.run(again.run())
        assert stages(again) == {"S1": Stage.DELIVERED, "S3": Stage.DELIVERED} and again.job.missing == ["S2"]
        assert str(new.ds.StudyInstanceUID) in again.job.studies and not list(again._folders.iterdir())


def test_of_a_study_that_broke_off_it_is_said_how_much_is_missing() -> None:
    def script(request: Request, found: list[Instance]) -> Steps:
        return [*map(Send, found[:1]), Last(0x0124, 1, len(found) - 1, 0)]

    with archive(study("S1", 3), on_get=script) as peer:
        one = made(peer, numbers="S1", source_fields={"max_attempts": 1, "retry_delay_s": 0})
        asyncio.run(one.run())
    [came] = one.job.studies.values()
    assert (came.stage, came.instances, came.missing) == (Stage.PARTIAL, 1, 2)


def test_over_a_link_that_breaks_again_and_again_attempts_that_got_further_are_not_counted() -> None:
    given, refusals = list[str](), [0]

    def script(request: Request, found: list[Instance]) -> Steps:
        left = [one for one in found if one.uid not in given]
        given.extend(one.uid for one in left[:1])
        refusals[0] = 1  # it takes a moment until it is back
        return [*map(Send, left[:1]), steps.Abort()] if left[1:] else sends(found)

    def refuses(_: Any) -> Any:
        refusals[0] -= 1
        return steps.Reject(2, 3, 2) if refusals[0] == 0 else None

    with archive(study("S1", 7), on_get=script) as peer:
        peer.on_associate = refuses
        one = made(peer, numbers="S1", source_fields={"max_attempts": 2, "retry_delay_s": 0, "concurrency": 1})
        asyncio.run(one.run())
    [came] = one.job.studies.values()
    assert (came.stage, came.instances, came.reason) == (Stage.DELIVERED, 7, "")


def peer_of(peer: Archive, files: list[bytes]) -> list[Instance]:
    """Add some files to an archive."""
    made = [Instance.of(file) for file in files]
    peer.instances += made
    return made


def test_a_retry_whose_search_fails_fetches_what_is_known_all_the_same() -> None:
    missing, refused = [Instance.of(study("S1")[0])], [False]

    def script(request: Request, found: list[Instance]) -> Steps:
        there = [one for one in found if one.uid != missing[0].uid]
        return [*map(Send, there), Last(0, len(there), len(found) - len(there), 0)]

    def refuses(request: Request) -> int:
        return 0xA900 if refused[0] and str(request.keys.get("AccessionNumber", "")) else 0

    with archive(study("S1"), on_get=script, refuses=refuses) as peer:
        missing[0] = peer.instances[0]
        first = made(peer, numbers="S1", source_fields={"retry_delay_s": 0})
        asyncio.run(first.run())
        assert stages(first) == {"S1": Stage.PARTIAL}
        first.job.ended = True
        first.job.save()
        missing[0], refused[0] = Instance.of(study("S1")[0]), True
        again = made(peer, numbers="S1")
        asyncio.run(again.run())
        assert stages(again) == {"S1": Stage.DELIVERED} and again.job.whole


def test_a_turn_that_others_have_costs_no_study_of_the_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    really, held = Retrieval._in_a_slot, list[bool]()

    async def in_a_slot(self: Retrieval, work: Callable[[], Any]) -> Any:
        if self.job.studies and not held:
            held.append(True)
            raise NoSlot("src")
        return await really(self, work)

    monkeypatch.setattr(Retrieval, "_in_a_slot", in_a_slot)
    with archive(study("S1")) as peer:
        first = made(peer, numbers="S1", studies_per_hour=1)
        asyncio.run(first.run())
        assert stages(first) == {"S1": Stage.FOUND}
        first.job.save()
        again = made(peer, numbers="S1", studies_per_hour=1)
        asyncio.run(again.run())
        assert stages(again) == {"S1": Stage.DELIVERED}


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_what_a_kill_leaves_of_a_delivery_is_not_fetched_again(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, within and after the moves to the folder, and before that was noted."""
    wish = {"targets": (), "into": str(tmp_path / "into"), "numbers": "S1"}

    async def killed(self: Retrieval, one: Study, folder: Path) -> None:
        moves = iter(range(moved))

        def move(path: Path, final: Path) -> None:
            if next(moves, None) is None:
                raise KeyboardInterrupt
            path.replace(final)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(moving, "_move", move)
            moving.move_into(folder, Path(self.wish.into), one.accession)

    with archive(study("S1")) as peer:
        with monkeypatch.context() as patch:
            patch.setattr(Retrieval, "_hand_on", killed)
            asyncio.run(made(peer, **wish).run())
        assert len(list((tmp_path / "into").rglob("*/*.dcm"))) >= moved
        again = made(peer, **wish)
        asyncio.run(again.run())
        assert stages(again) == {"S1": Stage.DELIVERED} and len(peer.asked(GET)) == 1
        assert len(list((tmp_path / "into" / "S1").rglob("*.dcm"))) == 2
        assert not list(again._folders.glob("*"))


def test_what_was_brought_before_a_folder_was_full_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = tmp_path / "into"
    really, moved = engine.move_into, []

    def full(folder: Path, into: Path, name: str) -> int:
        moved.append(folder)
        first = min(folder.glob("*.dcm"))
        hidden = first.with_suffix(".away")
        first.rename(hidden)
        count = really(folder, into, name)
        hidden.rename(first)
        raise DiskFull(f"can't write to {into}: no space left on device, after {count}")

    with archive(study("S1", 4)) as peer:
        monkeypatch.setattr(engine, "move_into", full)
        one = made(peer, numbers="S1", targets=(), into=str(into))
        asyncio.run(one.run())
        [of_one] = one.job.studies.values()
        assert of_one.stage is Stage.FAILED and "no space" in of_one.reason
        one.job.ended = True
        one.job.save()
        monkeypatch.setattr(engine, "move_into", really)
        again = made(peer, numbers="S1", targets=(), into=str(into))
        asyncio.run(again.run())
        assert stages(again) == {"S1": Stage.DELIVERED} and len(peer.asked(GET)) == 1
        there = {path.stem: path for path in into.rglob("*.dcm")}
        assert there.keys() == {each.uid for each in peer.instances}
        [row] = engine.document(again.job, RUN, "src", "delivered")["studies"]
        assert row["instances"] == 4 and row["bytes"] == sum(path.stat().st_size for path in there.values())


@pytest.mark.parametrize("gone", [1, 2])
@pytest.mark.parametrize("to", ["into", "target"])
def test_what_somebody_removes_before_it_is_handed_on_is_not_delivered(
    gone: int, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what clears old files does; a retry fetches it again."""
    into = tmp_path / "in\nto"
    wish: dict[str, Any] = {"targets": (), "into": str(into)} if to == "into" else {}
    really, removed = Retrieval._hand_on, []

    def clear(folder: Path) -> None:
        removed.extend(sorted(folder.glob("*.dcm"))[:gone])
        for path in removed:
            path.unlink()

    async def cleared(self: Retrieval, one: Study, folder: Path) -> None:
        if one.accession == "S2" and not removed:
            clear(folder)
        await really(self, one, folder)

    monkeypatch.setattr(Retrieval, "_hand_on", cleared)
    with archive(three()) as peer:
        one = made(peer, **wish)
        asyncio.run(one.run())
        assert stages(one) == dict.fromkeys(("S1", "S3"), Stage.DELIVERED) | {"S2": Stage.PARTIAL}
        [partial] = [study for study in one.job.studies.values() if study.accession == "S2"]
        assert partial.missing == gone and f"{gone} of 2 instances that had come are gone" in partial.reason
        one.job.ended = True
        one.job.save()
        again = made(peer, **wish)
        asyncio.run(again.run())
        assert set(stages(again).values()) == {Stage.DELIVERED}
        if to == "into":
            assert {path.stem for path in into.rglob("*.dcm")} == {each.uid for each in peer.instances}


@pytest.mark.mounts
def test_a_full_disk_ends_the_fetching_at_once_and_a_retry_goes_on_there(
    disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not study after study, each with all its attempts: nothing makes room meanwhile."""

    without_a_server(monkeypatch)
    monkeypatch.setattr(audited, "retrieval_ends", lambda *_: None)
    into = disk("size=200k") / "in"  # five of six instances
    wish: dict[str, Any] = {"targets": (), "into": str(into), "source_fields": {"max_attempts": 50}}
    with archive([*three(), *study("S4")]) as peer:
        one = made(peer, numbers="S1 S2 S3 S4", **wish)
        asyncio.run(one.run())
        asyncio.run(one.conclude())
        assert stages(one) == dict.fromkeys(("S1", "S2"), Stage.DELIVERED) | dict.fromkeys(("S3", "S4"), Stage.FOUND)
        assert one.job.ended and "No space left on device: make room" in one.job.error
        asked = len(peer.asked(GET))
        assert 3 <= asked <= 5  # once more for the third study for each other that was still being moved
        for name in ("S1", "S2"):
            shutil.rmtree(into / name)
        again = made(peer, numbers="S1 S2 S3 S4", **wish)
        asyncio.run(again.run())
        assert set(stages(again).values()) == {Stage.DELIVERED} and not again.job.error
        assert {path.name for path in into.iterdir()} == {"S3", "S4", *(p.name for p in into.glob(".talaria-*"))}
        assert [request.level for request in peer.asked(GET)[asked:]] == ["IMAGE", "SERIES"]  # what had come is kept


@pytest.mark.mounts
def test_fetching_goes_on_when_what_is_sent_on_has_made_room(
    disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(disk("size=240k")))

    async def when_it_is_full(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        await asyncio.to_thread(until, lambda: 0xA700 in peer.store_answers)
        return Completed()

    with archive(three()) as peer:
        one = made(peer, when_it_is_full)
        asyncio.run(one.run())
        assert set(stages(one).values()) == {Stage.DELIVERED}
        assert 0xA700 in peer.store_answers


@pytest.mark.mounts
@pytest.mark.parametrize("more", [0, ONE_AND_A_HALF * 2 // 3], ids=["at first", "midway"])
def test_what_others_have_filled_of_the_state_directory_s_disk_is_waited_for(
    more: int, disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several retrievals may keep twenty gigabytes; where they had filled the disk, nothing went on."""
    root = disk("size=4m")
    monkeypatch.setenv("TALARIA_HOME", str(root / "home"))
    with (root / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (4 << 20) - (4 << 20) // 20 - more)
    with archive(in_three_series("S1")) as peer:
        one = made(peer, numbers="S1", source_fields={"concurrency": 1})
        asyncio.run(asyncio.wait_for(one.run(), 60))
        assert stages(one) == {"S1": Stage.FOUND} and len(peer.asked(GET)) in ((1, 2) if more else (0,))
        assert [wait.what for wait in one.waits] == ["room in the state directory"] and not one.job.error
        (root / "other").unlink()
        later = made(peer, numbers="S1", source_fields={"concurrency": 1})
        asyncio.run(asyncio.wait_for(later.run(), 60))
        assert stages(later) == {"S1": Stage.DELIVERED} and len(peer.asked(GET)) == 3


def test_what_others_fill_of_the_disk_while_a_study_comes_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two retrievals that begin together see the same room; neither may take all of it beside the other."""
    there, free, halts = os.statvfs(tmp_path), 10 << 30, list[int]()
    whole = [there.f_bsize, 4096, 100 << 18, 0, 0, *there[5:]]

    def asked(path: Any) -> Any:
        return os.statvfs_result([*whole[:4], free // 4096, *whole[5:]])

    monkeypatch.setattr(os, "statvfs", asked)
    moved = Room(tmp_path / "spool", tmp_path).watch(tmp_path / "spool" / "S1", lambda: halts.append(free))
    moved(1 << 20)
    assert not halts
    free = 1 << 30  # the reserve alone: the others have taken nine
    for _ in range(32):
        moved(1 << 20)
    assert halts == [free]


@pytest.mark.mounts
def test_what_a_full_disk_lets_nobody_note_is_no_fault_of_ours(
    disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dispatch that had delivered everything failed at its receipt."""
    root = disk("size=64k")
    monkeypatch.setenv("TALARIA_HOME", str(root))
    home, receipts = Home.current(), [Receipt("pacs", ())]
    waits = rest.for_the_ledger(LedgerFull("full"))
    assert waits.what == "room in the state directory" and waits.soon
    with (root / "other").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))

    def listed() -> None:
        writer = unitlist.Writer(unitlist.place(home, "inbox", "y"))
        try:
            writer.add(ListedUnit("S1", ("/in/S1",)))
            writer.close()
        finally:
            writer.abandon()

    noted = [
        lambda: asyncio.run(report(home, "id", RUN, Ended.DELIVERED, receipts, {})),
        lambda: asyncio.run(report_retrieval(cast(Any, None), home, Job(folder_of(home, RUN)), RUN, "src", "failed")),
        Job(folder_of(home, RUN)).save,
        lambda: unitlist.keep(unitlist.place(home, "inbox", "x"), {}),
        listed,
    ]
    for note in noted:
        with pytest.raises(LedgerFull, match="the disk of the state directory is full"):
            note()
    assert [path for path in root.rglob("*") if path.is_file()] == [root / "other"]
    (root / "other").unlink()
    noted[2]()
    assert Job.load(home, RUN, ("A1",)).pending == []


def test_a_study_that_can_t_be_noted_waits_for_that(concluded: Callable[[Retrieval], State[Any]]) -> None:
    sent = list[str]()

    async def full(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
        sent.extend(paths)
        if len(sent) == 1:
            raise LedgerFull("the disk of the state directory is full")
        return Completed()

    with archive(study("S1")) as peer:
        state = concluded(made(peer, full, "S1"))
        assert state.name == "AwaitingRetry" and "room in the state directory" in str(state.message)
        assert concluded(made(peer, full, "S1")).is_completed() and len(sent) == 2


def test_a_retrieval_is_cancelled_that_moves_studies_into_a_share_which_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = threading.Event()

    def hangs(folder: Path, into: Path, name: str) -> int:
        one.cancelled.set()
        back.wait(60)
        return 0

    async def whole() -> State[Any]:
        try:
            await one.run()
            return await one.conclude()
        finally:
            assert not back.is_set()
            back.set()  # else the loop would wait for its thread

    without_a_server(monkeypatch)
    monkeypatch.setattr(audited, "retrieval_ends", lambda *_: None)
    monkeypatch.setattr(engine, "move_into", hangs)
    monkeypatch.setattr(engine, "GRACE_S", 0.01)
    with archive(study("S1")) as peer:
        one = made(peer, numbers="S1", targets=(), into=str(tmp_path))
        assert asyncio.run(whole()).is_cancelled()
    assert stages(one) == {"S1": Stage.WHOLE}, "what came stays for a retry"


@pytest.mark.parametrize("where", ["_has_any", "discard", "drop_one", "Room.is_full"])
def test_a_cancelled_retrieval_ends_while_the_share_of_its_studies_hangs(
    concluded: Callable[[Retrieval], State[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A thread that looks there does not end before the share answers: nothing waits for it, least of all its loop."""
    back = threading.Event()

    def hangs(*_: Any) -> None:
        one.cancelled.set()
        back.wait(60)
        if not back.is_set():
            timed_out.append(where)

    timed_out: list[str] = []
    if where == "drop_one":
        monkeypatch.setattr(engine.Room, "is_full", lambda *_: True)
    conclude = Retrieval.conclude

    async def concludes(self: Retrieval) -> State[Any]:
        back.set()  # else the loop would wait for its thread
        return await conclude(self)

    monkeypatch.setattr(Retrieval, "conclude", concludes)
    monkeypatch.setattr(f"tasks.retrieve.run.{where}", hangs)
    with archive(study("S1")) as peer:
        one = made(peer, numbers="S1", targets=(), into=str(tmp_path))
        if where == "_has_any":
            asyncio.run(one._find())
            next(iter(one.job.studies.values())).stage = Stage.WHOLE
        state = concluded(one)
    assert one.cancelled.is_set() and not timed_out
    assert state.is_cancelled() or (where == "discard" and state.is_completed())


def test_the_query_of_a_wish_is_looked_at_before_anything_begins() -> None:
    from transfer.errors import Misconfigured

    with pytest.raises(Misconfigured, match="20240231 is not a date"):
        Wish("src", targets=("a",), filters=Query(StudyDate="20240231")).numbers()
    with pytest.raises(Misconfigured, match="studies an hour: give a number"):  # as a form of Prefect's may have it
        Wish("src", targets=("a",), accessions="A1", studies_per_hour=-5).numbers()


def test_a_process_that_has_lost_its_lease_says_nothing_more_of_the_run(tmp_path: Path) -> None:
    run_id = str(uuid4())
    one = Retrieval(run_id, Wish("pacs", accessions="A1", into=str(tmp_path)), dicom_target(1), Home.current(), Sent)
    running.lose_all()
    try:
        with pytest.raises(Abort, match="lost its lease"):
            asyncio.run(one.conclude())
    finally:
        running.hold_until(math.inf)
        running.regained(run_id)
        running.forget(run_id)
    assert not Home.current().receipt(run_id).exists() and not one.job.ended


@pytest.fixture
def concluded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Retrieval], State[Any]]:
    """Runs a retrieval to its end, which nobody hears of; returns its state."""

    async def whole(one: Retrieval) -> State[Any]:
        await one.run()
        return await one.conclude()

    without_a_server(monkeypatch)
    monkeypatch.setattr(audited, "retrieval_ends", lambda *_: None)
    return lambda one: asyncio.run(whole(one))


def test_a_retry_sends_what_was_being_sent_when_the_retrieval_was_cancelled(
    concluded: Callable[[Retrieval], State[Any]],
) -> None:
    formers: list[str] = []

    async def send(paths: list[str], targets: list[str], former: str, begins: Any, **_: Any) -> State[Any]:
        formers.append(former)
        begins(str(uuid4()))
        if len(formers) > 1:
            return Completed()
        running.flag(RUN).set()
        cancelled: State[Any] = Cancelled(message="archive cancelled: 2 unsent, the dispatch was cancelled")
        return cancelled

    with archive(study("S1")) as peer:
        first = made(peer, send, numbers="S1")
        concluded(first)
        assert stages(first) == {"S1": Stage.WHOLE} and first.job.ended
        running.forget(RUN)
        again = made(peer, send, numbers="S1")
        assert concluded(again).is_completed() and stages(again) == {"S1": Stage.DELIVERED}
        assert formers == ["", ""] and len(peer.asked(GET)) == 1


def by_other_keys(peer: Archive) -> dict[str, Any]:
    return {"numbers": "", "filters": Query(StudyInstanceUID=str(peer.instances[0].ds.StudyInstanceUID))}


def test_a_search_by_other_keys_waits_for_the_hours_of_its_source_too(
    concluded: Callable[[Retrieval], State[Any]],
) -> None:
    with archive(study("S1")) as peer:
        state = concluded(made(peer, source_fields={"window": window(2)}, **by_other_keys(peer)))
        assert state.name == "AwaitingRetry" and "the hours of " in str(state.message) and not peer.requests
        later = made(peer, **by_other_keys(peer))
        assert concluded(later).is_completed() and stages(later) == {"S1": Stage.DELIVERED}


@pytest.mark.parametrize(
    ("fields", "words", "names", "of_name"),
    [
        (lambda: {"enabled": False}, " to be enabled", line.disabled, line.to_be_enabled),
        (lambda: {"window": window(2)}, "the hours of ", line.outside_hours, line.of_hours),
    ],
    ids=["disabled", "outside its hours"],
)
def test_what_waits_for_a_change_of_its_source_stands_in_line_is_called_and_leaves_it(
    fields: Callable[[], dict[str, Any]],
    words: str,
    names: Callable[[set[str]], list[str]],
    of_name: Callable[[str], str],
    concluded: Callable[[Retrieval], State[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    woken: list[str] = []
    monkeypatch.setattr(line, "_waker", woken.append)  # as where a worker runs it
    with archive(three()) as peer, Ledger(Home.current().ledger) as ledger:
        state = concluded(made(peer, source_fields=fields()))
        assert state.name == "AwaitingRetry" and words in str(state.message) and not peer.requests
        [name] = names(ledger.waits.lines())
        line.wake(ledger, of_name(name))
        assert woken == [RUN]
        later = made(peer)
        assert concluded(later).is_completed() and set(stages(later).values()) == {Stage.DELIVERED}
        assert not ledger.waits.lines()


@pytest.mark.parametrize("keys", ["numbers", "uid"])
def test_a_pause_while_the_source_is_away_makes_no_failures_and_resume_goes_on(
    keys: str, concluded: Callable[[Retrieval], State[Any]]
) -> None:
    with archive(study("S1")) as peer:
        wish = by_other_keys(peer) if keys == "uid" else {"numbers": "S1"}
        busy = made(peer, source_fields={"retry_delay_s": 3600, "retry_max_delay_s": 3600}, **wish)

        def refuses(request: Request) -> int:
            busy.paused.set()
            return 0xA700

        peer.refuses = refuses
        assert concluded(busy).name == running.PAUSED
        assert not busy.job.ended and not busy.job.failed and not busy.job.error
        running.forget(RUN)
        peer.refuses = lambda request: 0
        resumed = made(peer, **wish)
        assert concluded(resumed).is_completed() and stages(resumed) == {"S1": Stage.DELIVERED}


@pytest.mark.parametrize("keys", ["numbers", "uid"])
def test_a_pause_ends_a_search_at_once_and_resume_makes_it_anew(
    keys: str, concluded: Callable[[Retrieval], State[Any]]
) -> None:
    with archive(study("S1")) as peer:
        wish = by_other_keys(peer) if keys == "uid" else {"numbers": "S0 S1"}
        slow = made(peer, source_fields={"idle_timeout_s": 300}, **wish)
        paused = threading.Event()

        def waits(request: Request) -> int:  # as an archive that takes long for each answer
            slow.paused.set()
            paused.wait(120)
            return 0

        peer.refuses = waits
        try:
            assert concluded(slow).name == running.PAUSED
        finally:
            paused.set()
        assert len(peer.asked(FIND)) == 1 and not slow.job.missing and not slow.job.error
        running.forget(RUN)
        peer.refuses = lambda request: 0
        resumed = made(peer, **wish)
        concluded(resumed)
        assert stages(resumed) == {"S1": Stage.DELIVERED}
        assert resumed.job.missing == (["S0"] if keys == "numbers" else [])


@pytest.mark.parametrize("asked", [True, False], ids=["cancelled", "stopped"])
def test_a_process_that_ends_says_of_no_retrieval_that_it_was_cancelled(
    asked: bool, concluded: Callable[[Retrieval], State[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    async def by_somebody(run_id: str) -> bool:
        return asked

    monkeypatch.setattr(running, "stopping", lambda: True)
    monkeypatch.setattr(leaving, "is_cancelled", by_somebody)
    monkeypatch.setattr(audited, "retrieval_ends", lambda source, state, *_: said.append(state))
    with archive(study("S1")) as peer:
        one = made(peer)
        one.cancelled.set()
        assert concluded(one).is_cancelled()  # which the engine lets go on, unless somebody asked for it
        assert (one.job.ended, said) == (asked, ["cancelled"] if asked else [])
        running.forget(RUN)


def test_a_retrieval_that_is_cancelled_when_all_is_delivered_is_delivered(
    concluded: Callable[[Retrieval], State[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(audited, "retrieval_ends", lambda source, state, *_: said.append(state))
    with archive(study("S1")) as peer:

        async def too_late(*_: Any, **__: Any) -> State[Any]:
            one.cancelled.set()
            return Completed()

        one = made(peer, too_late, "S1")
        state = concluded(one)
    assert state.is_cancelled()  # Prefect takes nothing else of a run that is to be cancelled
    assert state.message == "1 study found, 1 delivered" and said == ["delivered"]
    document = {"state": "delivered", "waiting": []}
    assert settled(FlowRun(flow_id=uuid4(), state=state), "retrieval", document)["state"] == "delivered"


@pytest.mark.parametrize("answer", [Last(0), Last(0, 2, 0, 0)], ids=["nothing said", "all said"])
def test_a_source_that_sends_elsewhere_is_asked_for_fewer_and_fewer_studies(
    concluded: Callable[[Retrieval], State[Any]], monkeypatch: pytest.MonkeyPatch, answer: Last
) -> None:
    """Each that is asked for takes an idle timeout; all say why nothing came."""
    port_of_moves(monkeypatch)
    numbers = [f"A{number}" for number in range(1, 11)]
    fields = {"idle_timeout_s": 0.3, "max_attempts": 3, "retry_delay_s": 0}
    files = [file for number in numbers for file in study(number, 2)]
    with archive(files, accept=only(GETS), on_move=lambda request, found: [answer]) as peer:
        one = made(peer, numbers=" ".join(numbers), source_fields=fields)
        assert concluded(one).is_failed()
        found = list(one.job.studies.values())
        assert {study.stage for study in found} == {Stage.FAILED}
        assert all("is RECEIVER registered there" in study.reason for study in found)
        asked = [str(request.keys.StudyInstanceUID) for request in peer.asked(MOVE)]
        assert asked == [found[at - 1].study for at in (1, 1, 1, 2, 4, 8)]
        over = [study.reason.startswith("not asked for, as nothing came of other studies: ") for study in found]
        assert [at for at, is_over in enumerate(over, 1) if is_over] == [3, 5, 6, 7, 9, 10]


def test_what_comes_of_one_study_ends_the_suspicion_and_all_others_are_asked_for(
    concluded: Callable[[Retrieval], State[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some lie on tapes: the source says that it has sent them, and will another day."""
    port = port_of_moves(monkeypatch)
    numbers = [f"A{number}" for number in range(1, 9)]
    files = [file for number in numbers for file in study(number, 1)]
    fields = {"idle_timeout_s": 0.3, "max_attempts": 1}

    def move(request: Request, found: list[Instance]) -> Steps:
        return [Last(0)] if found[0].ds.AccessionNumber in ("A1", "A2") else sends(found)

    with archive(files, accept=only(GETS), on_move=move, ports={"RECEIVER": port}) as peer:
        one = made(peer, numbers=" ".join(numbers), source_fields=fields)
        concluded(one)
        assert stages(one) == dict.fromkeys(numbers, Stage.DELIVERED) | dict.fromkeys(("A1", "A2"), Stage.FAILED)
        named = {study.study: study.accession for study in one.job.studies.values()}
        asked = [named[str(request.keys.StudyInstanceUID)] for request in peer.asked(MOVE)]
        assert asked == ["A1", "A2", "A4", "A5", "A6", "A7", "A8", "A3"]


def test_what_one_study_meets_unexpectedly_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    really = Fetcher._fetch

    def fetch(self: Fetcher, study: Study, folder: Path) -> Any:
        if study.accession == "S2":
            raise RuntimeError("a driver's bug, with DOE^JANE in it")
        return really(self, study, folder)

    monkeypatch.setattr(Fetcher, "_fetch", fetch)
    monkeypatch.setattr("tasks.retrieve.fetch.get_run_logger", lambda: logging.getLogger("test"))
    with archive(three()) as peer:
        one = made(peer)
        asyncio.run(one.run())
        assert stages(one) == {"S1": Stage.DELIVERED, "S2": Stage.FAILED, "S3": Stage.DELIVERED}
        [reason] = [each.reason for each in one.job.studies.values() if each.reason]
        assert reason == "unexpected RuntimeError: see the run's log"
