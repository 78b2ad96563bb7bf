"""Many studies in one run: each is a dispatch of its own, and none stops another."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest

from blocks.folder import FolderTarget
from blocks.sftp import SftpTarget
from talaria.testing import studies as material
from talaria.testing.process import free_port
from tasks.dispatch import breaker, running
from tasks.dispatch.delivery import HookFailed
from tasks.dispatch.ends import sentence
from tasks.dispatch.flood import Flood, rows
from tasks.dispatch.push import push as push_once
from tasks.dispatch.report import pieces
from tasks.dispatch.rest import Left, Rest
from tasks.dispatch.rows import rows_given_up
from tasks.dispatch.run import Dispatch
from tasks.dispatch.studies import Studies
from tasks.driver import Driver, Facts, HookResult
from tasks.happened import Cause, cause_of
from tasks.sources.ways import failure
from tests.engine.material import dicom, files, folder
from tests.servers.dcmtk import storescp
from tests.servers.scp import scp
from tests.servers.steps import Store
from tests.servers.up import Talaria
from transfer.deadstudies import Letters, listed_or_kept
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotFound,
    NotTrusted,
    Retryable,
    TimedOut,
    Unreachable,
)
from transfer.health import Health
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.lines import ItemResult, document
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import LEADS_OUT, Origin, Plan, scan
from transfer.receipt import PushReport, Receipt, State
from transfer.staging import Way
from transfer.studies import Each, listed

Push = Callable[[FolderTarget, Plan, PushReport], Receipt]


def made(root: Path, count: int, files: int = 2) -> Path:
    for number in range(count):
        material.ct(root / f"s{number}", files)
    return root


class Bench:
    """Floods of the studies below one folder to a driver that does what the test says."""

    def __init__(self, tmp_path: Path, push: Push, **fields: Any) -> None:
        self.root, self.home, self.ledger = tmp_path / "many", Home(tmp_path / "home"), Ledger(tmp_path / "ledger.db")
        self.home.root.mkdir()
        self.driver = Driver(FolderTarget, lambda target: Health(), push, facts=Facts())
        self.target = FolderTarget(folder="/nowhere", **fields)
        self.target.named("shelf")
        self.stop = threading.Event()
        self.staging, self.way = tmp_path / "staging", Way.READ

    def studies(self, sharers: int = 1) -> Studies:
        found = listed([str(self.root)], Each.FOLDER)
        return Studies(found, (), Origin(), self.staging, self.stop, self.way, sharers)

    def flood(self, before: list[dict[str, Any]] | None = None, **more: Any) -> Flood:
        return Flood(
            self.driver, self.target, self.studies(), self.ledger, self.home, self.stop, "run", "", before or [], **more
        )


def all_of_it(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
    for item in plan.pending:
        with plan.open(item):
            report(item, DELIVERED)
    return report.receipt(target.name, plan)


def states(flood: Flood) -> dict[str, str]:
    return {name: str(one.state) for name, one in flood.receipts().items()}


def test_each_study_is_the_dispatch_that_it_would_be_alone(tmp_path: Path) -> None:
    made(tmp_path / "many", 5)
    bench = Bench(tmp_path, all_of_it)
    flood = bench.flood()
    receipt = flood.push()
    assert receipt.state is State.DELIVERED and receipt.counts[Kind.DELIVERED] == 10
    found = rows(flood.studies, [flood], [])
    alone = [scan([bench.root / f"s{number}"]).dispatch_id for number in range(5)]
    assert [row["dispatch_id"] for row in found] == alone
    assert all(row["targets"]["shelf"]["delivered"] == 2 and row["state"] == "delivered" for row in found)
    assert [len(bench.ledger.results(one)["shelf"]) for one in alone] == [2] * 5
    noted = bench.ledger._db.execute("SELECT flow_run_id, dispatch_id FROM studies").fetchall()
    assert sorted(noted) == sorted(("run", one) for one in alone)  # and so not forgotten while it goes on
    assert not list(bench.staging.iterdir())
    again = bench.flood().push()
    assert again.counts[Kind.ALREADY] == 10 and again.counts[Kind.DELIVERED] == 0


def test_a_bad_study_stops_no_other(tmp_path: Path) -> None:
    """Whatever is wrong: nothing in it, a link out of the folder, a file that is refused, a fault of ours."""
    made(tmp_path / "many", 8)
    (tmp_path / "many" / "empty").mkdir()
    material.ct(tmp_path / "elsewhere", 1)
    (tmp_path / "many" / "link").symlink_to(tmp_path / "elsewhere")
    bad = {"s1": Denied("no"), "s4": RuntimeError("a bug"), "s6": Misconfigured("not so")}

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        name = next((name for name, error in bad.items() if plan.dispatch_id == ids[name]), "")
        if name:
            raise bad[name]
        if plan.dispatch_id == ids["s2"]:
            report(plan.items[0], Outcome(Kind.REJECTED, "not this one"))
        for item in plan.pending:
            if item.path not in report.outcomes:
                report(item, DELIVERED)
        return report.receipt(target.name, plan)

    bench = Bench(tmp_path, push, concurrency=1)
    ids = {f"s{number}": scan([bench.root / f"s{number}"]).dispatch_id for number in range(8)}
    flood = bench.flood()
    receipt = flood.push()
    assert receipt.state is State.PARTIAL
    failed = {"s1", "s4", "s6", "empty", "link"}
    assert states(flood) == {
        name: "failed" if name in failed else "partial" if name == "s2" else "delivered"
        for name in (*ids, "empty", "link")
    }
    assert receipt.error == "5 of 10 studies were not delivered, see the notes"
    assert any(note == f"link: {LEADS_OUT}" for note in receipt.notes)
    assert not any("a bug" in note for note in receipt.notes)


def test_a_study_that_fails_is_tried_again_alone(tmp_path: Path) -> None:
    made(tmp_path / "many", 4)
    pushed: Counter[str] = Counter()

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        pushed[plan.dispatch_id] += 1
        if plan.dispatch_id == stubborn and pushed[stubborn] < 3:
            report(plan.pending[0], DELIVERED) if pushed[stubborn] == 1 else None
            raise Interrupted("broke off")
        return all_of_it(target, plan, report)

    bench = Bench(tmp_path, push)
    stubborn = scan([bench.root / "s1"]).dispatch_id
    flood = bench.flood()
    for _ in range(2):
        with pytest.raises(Interrupted):
            flood.push()
    assert flood.may_go_on
    receipt = flood.push()
    assert receipt.state is State.DELIVERED and receipt.attempts == 3
    assert receipt.counts[Kind.DELIVERED] == 8  # what the first attempt sent is not "already" there
    assert pushed == Counter({one: 3 if one == stubborn else 1 for one in pushed}) and len(pushed) == 4


def test_a_study_is_given_up_after_the_attempts_of_its_target(tmp_path: Path) -> None:
    made(tmp_path / "many", 3)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        if plan.dispatch_id == stubborn:
            raise Interrupted("broke off")
        return all_of_it(target, plan, report)

    bench = Bench(tmp_path, push, max_attempts=2)
    stubborn = scan([bench.root / "s2"]).dispatch_id
    flood = bench.flood()
    for _ in range(2):
        assert flood.may_go_on
        with pytest.raises(Interrupted):
            flood.push()
    receipt = flood.receipt()
    assert not flood.may_go_on and receipt.state is State.PARTIAL
    assert receipt.error == "1 of 3 studies were not delivered: broke off"
    assert states(flood) == {"s0": "delivered", "s1": "delivered", "s2": "failed"}


@pytest.mark.parametrize(("error", "most"), [(Unreachable("nobody there"), 1), (Denied("not you"), 3)])
def test_a_dead_target_is_not_asked_for_each_study(tmp_path: Path, error: Exception, most: int) -> None:
    made(tmp_path / "many", 9, files=1)
    asked = []

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        asked.append(plan.dispatch_id)
        raise error

    def check(target: FolderTarget) -> Health:
        health = Health()
        with health.probe("authorize"):
            raise error
        return health

    bench = Bench(tmp_path, push, concurrency=1)
    bench.driver = replace(bench.driver, check=check)
    flood = bench.flood()
    with pytest.raises(type(error)):
        flood.push()
    assert len(asked) == most
    receipt = flood.receipt()
    assert receipt.state is State.FAILED and receipt.unsent >= 6
    assert set(states(flood).values()) == {"failed"}


def test_studies_beside_one_another_that_are_refused_stop_no_other(tmp_path: Path) -> None:
    """Their target is well: it refuses these, and a retry would come to the same ones first."""
    made(tmp_path / "many", 16, files=1)
    asked, checks = [], []

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        asked.append(plan.dispatch_id)
        if len(asked) <= 12:
            raise Denied("this session is locked")
        return all_of_it(target, plan, report)

    def check(target: FolderTarget) -> Health:
        checks.append(target)
        health = Health()
        with health.probe("authorize"):
            pass
        return health

    bench = Bench(tmp_path, push, concurrency=1)
    bench.driver = replace(bench.driver, check=check)
    flood = bench.flood()
    flood.push()
    assert len(asked) == 16 and sorted(states(flood).values()) == ["delivered"] * 4 + ["failed"] * 12
    assert len(checks) == 2  # after three, and after six more
    assert flood.receipt().state is State.PARTIAL


def test_the_next_part_does_only_what_the_last_one_left(tmp_path: Path) -> None:
    made(tmp_path / "many", 6)
    sent: list[str] = []

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        if len(sent) == 3 and not up:
            raise Unreachable("gone")
        sent.append(plan.dispatch_id)
        return all_of_it(target, plan, report)

    up: list[bool] = []
    bench = Bench(tmp_path, push, concurrency=1)
    first = bench.flood(force=True)
    with pytest.raises(Unreachable):
        first.push()
    first.stopped = State.WAITING
    receipt = first.receipt()
    assert receipt.state is State.WAITING and receipt.unsent and receipt.counts[Kind.DELIVERED] == 6
    found = json.loads(json.dumps([*rows(first.studies, [first], [])]))
    assert [row["state"] for row in found].count("waiting") == 3
    up.append(True)
    (bench.root / "s0" / "CT0001.dcm").unlink()  # nobody reads again what is settled
    second = bench.flood(found, force=True)
    second.resume(first.leave(Left()))
    done = second.push()
    assert done.state is State.DELIVERED and done.counts[Kind.DELIVERED] == 12
    assert len(sent) == len(set(sent)) == 6
    assert all(row["dispatch_id"] for row in rows(second.studies, [second], found))


def test_a_flood_stops_between_studies(tmp_path: Path) -> None:
    made(tmp_path / "many", 6)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        report.check()
        done = all_of_it(target, plan, report)
        bench.stop.set()
        return done

    bench = Bench(tmp_path, push, concurrency=1)
    flood = bench.flood()
    with pytest.raises(Cancelled):
        flood.push()
    receipt = flood.receipt()
    assert receipt.state is State.CANCELLED and receipt.counts[Kind.DELIVERED] == 2 and receipt.unsent
    bench.stop.clear()
    bench.driver = Driver(FolderTarget, lambda target: Health(), all_of_it, facts=Facts())
    again = bench.flood().push()
    assert again.state is State.DELIVERED
    assert (again.counts[Kind.ALREADY], again.counts[Kind.DELIVERED]) == (2, 10)


def test_what_a_target_grants_a_dispatch_is_shared_among_the_studies(tmp_path: Path) -> None:
    made(tmp_path / "many", 6, files=1)
    seen: set[tuple[int, int | None]] = set()

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        seen.add((target.concurrency, target.bandwidth_limit))
        return all_of_it(target, plan, report)

    Bench(tmp_path, push, concurrency=8, bandwidth_limit=1_000_000).flood().push()
    assert seen == {(2, 250_000)}


def test_targets_share_what_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "many", 3)
    bench = Bench(tmp_path, all_of_it)
    shared = bench.studies(sharers=2)
    for _ in range(2):
        for study in shared.all:
            with shared.staged(study) as plan:
                assert plan.root.is_dir()
    assert len(list(bench.staging.iterdir())) == 3  # each was staged once
    shutil.rmtree(bench.root)
    with shared.staged(shared.all[0]) as plan:  # and is there as long as somebody may want it
        assert plan.items


def test_a_study_that_is_staged_anew_keeps_its_dispatch(tmp_path: Path) -> None:
    made(tmp_path / "many", 1)
    bench = Bench(tmp_path, all_of_it)
    shared = bench.studies()
    with shared.staged(shared.all[0]) as plan:
        first = plan.dispatch_id
    material.ct(bench.root / "s0", 1, first=9)
    with shared.staged(shared.all[0]) as plan:
        assert plan.dispatch_id == first and len(plan.items) == 3


def test_what_was_linked_of_a_study_that_failed_is_there_when_the_flood_is_over(tmp_path: Path) -> None:
    """Its sender may take it away as soon as it has been read; of what arrived nothing stays."""
    made(tmp_path / "many", 3)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        if plan.dispatch_id == refused:
            shutil.rmtree(bench.root / "s1")
            raise Denied("no")
        return all_of_it(target, plan, report)

    bench = Bench(tmp_path, push, concurrency=1)
    refused = scan([bench.root / "s1"]).dispatch_id
    flood = bench.flood()
    flood.push()
    assert len([*bench.staging.iterdir()]) == 1
    staged, source = flood.studies.left(flood.studies.all[1]) or (None, None)
    assert source == bench.root / "s1" and staged and scan([staged]).dispatch_id == refused
    with pytest.raises(NotFound):
        flood.studies.left(listed([str(tmp_path / "many"), str(tmp_path / "none")], Each.PATH)[1])
    letters = Letters(bench.home, "run")
    letters.keep("s1", staged, source)
    assert letters.save({"s1", "s2"})
    again = listed_or_kept(bench.home, "run", [str(bench.root)], Each.FOLDER, ())
    assert [study.name for study in again] == ["s0", "s2", "s1"]
    assert again[2].read((), Origin()).dispatch_id == refused
    material.ct(bench.root / "s1", 2)  # another one has its name
    again = listed_or_kept(bench.home, "run", [str(bench.root)], Each.FOLDER, ())
    assert [study.name for study in again] == ["s0", "s1", "s2"]
    assert again[1].read((), Origin()).dispatch_id == refused
    shutil.rmtree(bench.root)
    (alone,) = listed_or_kept(bench.home, "run", [str(bench.root)], Each.FOLDER, ())
    assert alone.name == "s1"
    assert not Letters(bench.home, "run").save(set()) and not (bench.home.root / "failed" / "run").exists()
    with pytest.raises(NotFound):
        listed_or_kept(bench.home, "run", [str(bench.root)], Each.FOLDER, ())


def test_the_script_is_run_for_each_study_and_again_where_it_failed(tmp_path: Path) -> None:
    made(tmp_path / "many", 4, files=1)
    bench = Bench(tmp_path, all_of_it)
    bench.target = SftpTarget(host="127.0.0.1", user="u", folder="/in", on_complete=True)
    bench.target.named("shelf")
    ran: Counter[str] = Counter()
    stubborn = scan([bench.root / "s2"]).dispatch_id

    def hook(target: Any, plan: Plan, report: PushReport, done: Any) -> HookResult:
        ran[plan.dispatch_id] += 1
        return HookResult(1 if plan.dispatch_id == stubborn and ran[stubborn] < 3 else 0, "said so")

    bench.driver = Driver(SftpTarget, lambda target: Health(), all_of_it, hook=hook, facts=Facts())
    flood = bench.flood()
    assert flood.push().hook == "failed"
    assert flood.wants_hook
    for _ in range(2):
        with pytest.raises(HookFailed, match="the scripts of 1 studies failed"):
            flood.run_hook()
    assert ran[stubborn] == 2 and flood.receipt().state is State.PARTIAL
    flood.run_hook()
    receipt = flood.receipt()
    assert receipt.hook == "done" and receipt.state is State.DELIVERED and not flood.wants_hook
    assert sorted(ran.values()) == [1, 1, 1, 3] and receipt.counts[Kind.DELIVERED] == 4


def test_a_study_that_is_gone_keeps_no_other_script_from_its_run(tmp_path: Path) -> None:
    made(tmp_path / "many", 3, files=1)
    bench = Bench(tmp_path, all_of_it)
    bench.target = SftpTarget(host="127.0.0.1", user="u", folder="/in", on_complete=True)
    bench.target.named("shelf")
    fails = [1]

    def hook(target: Any, plan: Plan, report: PushReport, done: Any) -> HookResult:
        return HookResult(*fails, "said so")

    bench.driver = Driver(SftpTarget, lambda target: Health(), all_of_it, hook=hook, facts=Facts())
    flood = bench.flood()
    flood.push()
    with pytest.raises(HookFailed, match="the scripts of 3 studies failed"):
        flood.run_hook()
    shutil.rmtree(bench.root / "s0")
    fails[0] = 0
    with pytest.raises(HookFailed, match="the scripts of 1 studies failed"):
        flood.run_hook()
    assert {name: one.hook for name, one in flood.receipts().items()} == {"s0": "failed", "s1": "done", "s2": "done"}


@pytest.mark.parametrize("way", [Way.READ, Way.PLACE], ids=str)
def test_the_clock_of_the_ledger_says_what_this_run_has_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    """That of the files' server may be ahead of it: what it calls changed later than it was sent need not be."""
    made(tmp_path / "many", 1)
    pending: list[int] = []

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        pending.append(len(plan.pending))
        if len(pending) == 1:
            report(plan.pending[0], DELIVERED)
            raise Interrupted("broke off")
        return all_of_it(target, plan, report)

    bench = Bench(tmp_path, push)
    bench.way = way
    monkeypatch.setattr(bench.ledger._db, "time", lambda: time.time() - 3600)
    flood = bench.flood()
    with pytest.raises(Interrupted):
        flood.push()
    assert flood.push().counts[Kind.DELIVERED] == 2
    assert pending == [2, 1]


@pytest.mark.parametrize("begun", [0.0, 1.0])
def test_what_has_failed_is_tried_again_by_a_retry_and_not_by_the_next_part(tmp_path: Path, begun: float) -> None:
    made(tmp_path / "many", 2)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        raise Misconfigured("not so")

    bench = Bench(tmp_path, push, concurrency=1)
    first = bench.flood()
    with pytest.raises(Misconfigured):
        first.push()
    assert first.receipt().error == "2 of 2 studies were not delivered: not so"
    left = Rest(
        {"studies": [*rows(first.studies, [first], [])]}, {"shelf": Left(begun=begun), "other": Left(ended=True)}
    )
    bench.driver = Driver(FolderTarget, lambda target: Health(), all_of_it, facts=Facts())
    again = bench.flood(list(left.studies("shelf")))
    assert again.push().state is (State.FAILED if begun else State.DELIVERED)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (Denied("no"), Cause.REFUSED),
        (NotTrusted("no"), Cause.REFUSED),
        (NotFound("no"), Cause.REFUSED),
        (Unreachable("no"), Cause.OUTAGE),
        (TimedOut("no"), Cause.OUTAGE),
        (Interrupted("no"), Cause.OUTAGE),
        (Busy("no"), Cause.OUTAGE),
        (RuntimeError("no"), Cause.UNEXPECTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_why_few_studies_failed_is_said_as_of_one_that_is_sent_alone(
    tmp_path: Path, error: Exception, cause: Cause, count: int
) -> None:
    """A source's dispatch is mostly of one study."""
    made(tmp_path / "many", count, files=1)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        raise error

    flood = Bench(tmp_path, push, concurrency=1, max_attempts=3).flood()
    for number in range(3):
        assert flood.may_go_on or (number and not isinstance(error, Retryable))
        with pytest.raises(DispatchError):
            flood.push()
        if not isinstance(error, Retryable):
            break
    receipt = flood.receipt()
    assert not flood.may_go_on or not isinstance(error, Retryable)
    assert receipt.state is State.FAILED and cause_of(receipt, flood.reason) is cause
    assert "unexpected RuntimeError" in str(receipt.error) if cause is Cause.UNEXPECTED else "no" in str(receipt.error)
    assert flood.futile == flood.attempts


def test_of_studies_that_failed_beside_others_the_worst_is_the_cause(tmp_path: Path) -> None:
    made(tmp_path / "many", 4, files=1)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        if error := errors.get(plan.dispatch_id):
            raise error
        return all_of_it(target, plan, report)

    bench = Bench(tmp_path, push, concurrency=1, max_attempts=1)
    ids = [scan([bench.root / f"s{number}"]).dispatch_id for number in range(4)]
    errors: dict[str, Exception] = {ids[0]: TimedOut("silent"), ids[1]: Denied("not you")}
    flood = bench.flood()
    receipt = flood.push()  # the target has answered for others: it is not to blame
    assert receipt.state is State.PARTIAL and cause_of(receipt, flood.reason) is Cause.REFUSED
    assert receipt.error == "2 of 4 studies were not delivered, see the notes"
    parts = bench.flood([*rows(flood.studies, [flood], [])])
    parts.resume(Left(**json.loads(json.dumps(asdict(flood.leave(Left()))))))
    assert cause_of(receipt, parts.reason) is Cause.REFUSED  # also after the run has rested
    errors[ids[3]] = RuntimeError("a bug")
    flood = bench.flood(force=True)
    assert cause_of(flood.push(), flood.reason) is Cause.UNEXPECTED


def test_a_share_that_is_away_where_studies_are_read_is_not_the_targets_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "many", 1, files=1)
    flood = Bench(tmp_path, all_of_it).flood()

    def away(*what: Any) -> Plan:
        raise Unreachable("the host is down")

    monkeypatch.setattr(Studies, "_stage", away)
    with pytest.raises(Interrupted, match="the host is down") as raised:
        flood.push()
    assert not isinstance(raised.value, breaker.DEAD)


def test_a_silent_target_is_dead_after_as_many_dispatches_of_one_study_as_of_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever attempts a dispatch has: none of them counts as an answer."""
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start a server
    monkeypatch.setattr("tasks.dispatch.push.get_run_logger", lambda: logging.getLogger(__name__))
    made(tmp_path / "many", 1, files=1)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        raise TimedOut("silent")

    bench = Bench(tmp_path, push, max_attempts=2)
    for _ in range(3):
        flood = bench.flood()
        while flood.may_go_on:
            with pytest.raises(TimedOut):
                asyncio.run(push_once.fn(flood))
    found = breaker.read(bench.ledger, bench.target)
    assert found.failures == 6 and found.opened
    bench.driver = Driver(FolderTarget, lambda target: Health(), all_of_it, facts=Facts())
    asyncio.run(push_once.fn(bench.flood()))
    assert not breaker.read(bench.ledger, bench.target).failures


# ---- what is a study


def test_folders_are_studies_and_the_files_beside_them_one_more(tmp_path: Path) -> None:
    made(tmp_path / "many", 2)
    material.ct(tmp_path / "many", 2)
    (tmp_path / "many" / ".talaria-x").mkdir()
    (tmp_path / "many" / "out").mkdir()
    (tmp_path / "many" / "passwd").symlink_to("/etc/passwd")
    found = {one.name: one for one in listed([str(tmp_path / "many")], Each.FOLDER, ("out",))}
    assert set(found) == {"s0", "s1", "many/*", "passwd"}
    assert len(found["many/*"].read((), Origin()).items) == 2
    assert found["passwd"].problem == LEADS_OUT
    two = listed([str(tmp_path / "many"), str(tmp_path / "many")], Each.FOLDER)
    assert len(two) == len(found) + 1


def test_a_folder_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    made(tmp_path / "many", 1)
    material.ct(tmp_path / "elsewhere", 1)
    (study,) = listed([str(tmp_path / "many")], Each.FOLDER)
    shutil.rmtree(tmp_path / "many" / "s0")
    (tmp_path / "many" / "s0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match=LEADS_OUT):
        study.read((), Origin())


def test_a_list_names_studies_line_by_line(tmp_path: Path) -> None:
    made(tmp_path / "many", 2)
    text = f"﻿# tonight\n\nmany/s0\r\n{tmp_path}/many/s1\nmany/s0\n  gone \n"
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    found = listed([str(tmp_path / "list.txt")], Each.LINE)
    assert [one.name for one in found] == ["many/s0", f"{tmp_path}/many/s1", "gone"]
    assert len(found[0].read((), Origin()).items) == 2
    with pytest.raises(NotFound):
        found[2].read((), Origin())


def test_a_list_names_folders_of_any_name(tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x85d", "e\x0cf", os.fsdecode(b"g\xff")]
    for name in names:
        material.ct(tmp_path / name, 1)
    (tmp_path / "list.txt").write_bytes(b"\r".join(map(os.fsencode, names)))
    found = listed([str(tmp_path / "list.txt")], Each.LINE)
    assert [len(one.read((), Origin()).items) for one in found] == [1, 1, 1, 1]


def test_a_link_that_leads_nowhere_stops_no_file_beside_it(tmp_path: Path) -> None:
    material.ct(tmp_path / "many", 2)
    (tmp_path / "many" / "gone").symlink_to("nowhere")
    link, files = listed([str(tmp_path / "many")], Each.FOLDER)
    assert (link.name, link.problem) == ("gone", "a symbolic link that leads nowhere")
    assert len(files.read((), Origin()).items) == 2


def test_studies_that_share_a_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for one in ("x", "y"):
        material.ct(tmp_path / one / "a", 1)
        (tmp_path / one / "list.txt").write_text(f"a\n{tmp_path}/x/a\n./{one}\n")
    found = listed([str(tmp_path / one / "list.txt") for one in ("x", "y")], Each.LINE)
    assert [one.name for one in found] == [f"{tmp_path}/x/a", "./x", f"{tmp_path}/y/a", "./y"]
    assert [one.paths for one in found[::2]] == [(f"{tmp_path}/x/a",), (f"{tmp_path}/y/a",)]


def test_a_folder_whose_name_is_a_star_is_not_the_files_beside_it(tmp_path: Path) -> None:
    for one in ("x", "y"):
        material.ct(tmp_path / one, 2)
        material.ct(tmp_path / one / "*", 1)
    found = listed([str(tmp_path / one) for one in ("x", "y")], Each.FOLDER)
    assert [len(one.paths) for one in found] == [1, 2, 1, 2]
    assert len({one.name for one in found}) == 4


def test_what_is_no_list_and_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "nothing").mkdir()
    for path, each in (("empty.txt", Each.LINE), ("nothing", Each.FOLDER)):
        with pytest.raises(Misconfigured, match="no study in"):
            listed([str(tmp_path / path)], each)
    for path, each in (("nothing", Each.LINE), ("empty.txt", Each.FOLDER)):
        with pytest.raises(Misconfigured, match="is not a"):
            listed([str(tmp_path / path)], each)
    with pytest.raises(NotFound):
        listed([str(tmp_path / "gone")], Each.FOLDER)
    monkeypatch.setenv("TALARIA_SOURCES", str(tmp_path / "nothing"))
    for each in (Each.LINE, Each.FOLDER):
        with pytest.raises(Exception, match="lies below no folder of TALARIA_SOURCES"):
            listed([str(tmp_path / "empty.txt")], each)


def test_rows_of_a_part_that_read_nothing_are_written_as_they_were(tmp_path: Path) -> None:
    """They come from the receipts of the part before, whose lines are packed."""
    items = [ItemResult(f"{number}.dcm", f"1.2.{number}", kind, "wrong") for number, kind in enumerate(Kind)]
    off = Receipt("off", items, stopped=State.WAITING)
    row = {"study": "s0", "dispatch_id": "d0", "state": "waiting", "targets": {"off": off.to_json(all_items=True)}}
    first = b"".join(pieces("d", "run", State.WAITING, [off], [row]))
    read = document(first.splitlines(keepends=True))
    assert b"".join(pieces("d", "run", State.WAITING, [off], read["studies"])) == first


def test_a_target_that_is_given_up_before_anything_is_read_says_why_of_each_study() -> None:
    """Seen: a source, and the report of a list, said `pacs: waiting` of what had failed."""
    off, here = (
        Receipt("off", (), stopped=State.WAITING, missing=1),
        Receipt("here", (ItemResult("1", "1.2", Kind.DELIVERED),)),
    )
    row = {"study": "s0", "dispatch_id": "d0", "state": "waiting", "targets": {}}
    row["targets"] = {one.target: one.to_json(all_items=True) for one in (off, here)}
    (now,) = rows_given_up([row], {"off": "nobody there", "other": "gone"})
    assert now["state"] == "partial" and now["targets"]["here"] == row["targets"]["here"]
    assert now["targets"]["off"] == row["targets"]["off"] | {"state": "failed", "error": "nobody there"}
    assert failure(now, "") == "off: nobody there"
    assert sentence(off) == "off waiting: 1 unsent"  # of which it said "nothing"
    assert rows_given_up([row], {}) == [row]


def test_why_a_target_was_given_up_is_also_said_where_the_run_goes_on_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "many", 2)
    bench, off = Bench(tmp_path, all_of_it), FolderTarget(folder="/off").named("off")
    waits = Receipt("off", (), stopped=State.WAITING, missing=1).to_json(all_items=True)
    before = [{"study": f"s{at}", "dispatch_id": "d", "state": "waiting", "targets": {"off": waits}} for at in range(2)]
    said: list[dict[str, Any]] = []

    async def report(*what: Any, studies: Any, **more: Any) -> None:
        said.extend(studies)
        raise ZeroDivisionError

    monkeypatch.setattr("tasks.dispatch.run.report", report)
    flood = bench.flood()
    flood.push()
    run = Dispatch("run", [off, bench.target], bench.home, bench.ledger, cast(Any, None), cast(Any, None), "normal")
    run.studies, run.deliveries = flood.studies, [flood]
    run.looks.rest = Rest({"dispatch_id": "f", "targets": {"off": waits}, "studies": before}, {"off": Left()})
    run.looks.failed = {"off": ("nobody there", True)}
    running.forget("run")  # else the server would be asked for it, as for any that this process runs
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run.conclude("f", [flood.receipt()]))
    assert [failure(row, "") for row in said] == ["off: nobody there"] * 2
    assert {row["state"] for row in said} == {"partial"}


# ---- as people send them


@pytest.mark.timeout(600)
def test_a_folder_of_studies_goes_as_one_run(up: Talaria, tmp_path: Path) -> None:
    """To a PACS and an archive; a bad one fails alone, and a retry does only what is missing."""
    many = made(tmp_path / "many", 12, files=3)
    (many / "empty").mkdir()
    with storescp(tmp_path / "pacs") as pacs:
        up.apply(pacs=dicom(pacs.port), archive=folder(tmp_path / "archive"))
        what = str(many), "--each", "folder", "--to", "pacs,archive"
        plan = up.told("send", *what, "--dry-run")
        assert len(plan["studies"]) == 13 and plan["targets"]["pacs"]["files"] == 36
        result = up.json("send", *what, code=1)
        rows = {row["study"]: row for row in result["studies"]}
        assert result["state"] == "partial" and len(pacs.files()) == 36
        assert {name for name, row in rows.items() if row["state"] != "delivered"} == {"empty"}
        assert "nothing to send" in rows["empty"]["targets"]["pacs"]["error"]
        assert {row["study"]: row["dispatch_id"] for row in plan["studies"]} == {
            name: row["dispatch_id"] for name, row in rows.items()
        }
        for name, row in rows.items():
            if name != "empty":
                arrived = files(tmp_path / "archive" / row["dispatch_id"])
                assert arrived.pop(".complete") == b""
                assert arrived == files(many / name)
        assert result["targets"]["pacs"]["delivered"] == 36 and result["targets"]["pacs"]["items"] == []
        assert up.told("jobs", "show", result["flow_run_id"])["studies"] == result["studies"]
        shown = up.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [result["flow_run_id"]]}})
        (table,) = [one for one in shown if one["key"] == "receipt-studies"]
        assert len(json.loads(table["data"])) == 26 and "12 of 13 studies delivered" in table["description"]
        trail = up.told("audit", "show", "--last", "1000")["entries"]
        ended = [one["details"] for one in trail if one["event"] == "delivery" and one["result"] == "success"]
        assert {row["dispatch_id"] for row in rows.values()} - {""} <= {one["dispatch"] for one in ended}
        each = [str(many / name) for name in ("none", "s0", "empty")]
        some = up.told("send", *each, "--each", "path", "--to", "archive", code=1)  # nor does one stop others here
        assert [row["state"] for row in some["studies"]] == ["failed", "delivered", "failed"]
        assert "no such file or folder" in some["studies"][0]["targets"]["archive"]["error"]
        assert "no such file or folder" in up.here("send", each[0], "--each", "path", "--to", "archive").stderr
        assert "nothing to send" in up.here("send", each[2], "--each", "path", "--to", "archive").stderr
        material.ct(many / "empty", 1)
        once = up.told("jobs", "retry", result["flow_run_id"], "--only", "pacs", code=None)
        assert (once["targets"]["pacs"]["already"], once["targets"]["pacs"]["delivered"]) == (36, 1)
        assert once["targets"]["archive"] == result["targets"]["archive"]
        assert {row["study"]: row["targets"]["archive"]["state"] for row in once["studies"]} == {
            row["study"]: row["targets"]["archive"]["state"] for row in result["studies"]
        }
        assert len(pacs.files()) == 37 and once["state"] == "partial"
        up.told("jobs", "retry", result["flow_run_id"])
        up.until(lambda: up.run(result["flow_run_id"])["state"]["name"] == "Completed")
        again = up.told("jobs", "show", result["flow_run_id"])
        assert (again["targets"]["pacs"]["already"], again["targets"]["pacs"]["delivered"]) == (37, 0)
        assert (again["targets"]["archive"]["already"], again["targets"]["archive"]["delivered"]) == (36, 1)
        assert again["dispatch_id"] == result["dispatch_id"] and len(pacs.files()) == 37
    assert not list((up.home / "staging").iterdir())


@pytest.mark.timeout(600)
def test_a_flood_that_was_given_up_needs_its_source_no_more(up: Talaria, tmp_path: Path) -> None:
    """Seen: what was linked of its studies was kept for nobody; one of a single study keeps it for two weeks."""
    many = made(tmp_path / "many", 3, files=1)
    up.apply(off=dicom(free_port(), max_attempts=1), kept=folder(tmp_path / "kept"))
    result = up.json("send", str(many), "--each", "folder", "--to", "off,kept", code=1)
    run_id = result["flow_run_id"]
    shutil.rmtree(many / "s1")
    up.apply(elsewhere=folder(tmp_path / "elsewhere"))
    sent = up.told("jobs", "send", run_id, "--to", "elsewhere")
    assert sent["state"] == "delivered" and [row["study"] for row in sent["studies"]] == ["s0", "s1", "s2"]
    assert [row["dispatch_id"] for row in sent["studies"]] == [row["dispatch_id"] for row in result["studies"]]
    shutil.rmtree(many)
    with storescp(tmp_path / "pacs") as pacs:
        up.apply(off=dicom(pacs.port, max_attempts=1))
        done = up.told("jobs", "retry", run_id, "--only", "off")
        assert len(pacs.files()) == 3
    assert done["state"] == "delivered" and done["targets"]["kept"] == result["targets"]["kept"]
    assert [row["study"] for row in done["studies"]] == ["s0", "s1", "s2"]
    assert not (up.home / "failed" / run_id).exists()


@pytest.mark.timeout(600)
def test_a_flood_waits_for_a_dead_target_and_goes_on_where_it_was(up: Talaria, tmp_path: Path) -> None:
    """Seen: a part that found it dead once more, before it read anything, could not write its receipts, and failed."""
    many = made(tmp_path / "many", 6, files=1)
    waits = {"max_attempts": 50, "retry_delay_s": 1, "retry_max_delay_s": 3}
    up.apply(away=dicom(free_port(), **waits), beside=folder(tmp_path / "archive"))
    run_id = up.told("send", str(many), "--each", "folder", "--to", "away,beside", "--no-wait")["flow_run_id"]

    def state() -> str:
        return str(up.run(run_id)["state"]["name"])

    up.until(lambda: state() == "AwaitingRetry")
    shown = up.told("jobs", "show", run_id)
    assert shown["targets"]["beside"]["delivered"] == 6 and shown["targets"]["away"]["state"] == "waiting"
    assert {row["targets"]["away"]["state"] for row in shown["studies"]} == {"waiting"}
    assert not list((up.home / "staging").iterdir())
    up.until(lambda: up.told("jobs", "show", run_id)["targets"]["away"]["attempts"] > 1)
    assert state() in ("AwaitingRetry", "Running", "Pending")
    with storescp(tmp_path / "pacs") as pacs:
        up.apply(away=dicom(pacs.port, **waits))
        up.until(lambda: state() == "Completed")
        assert len(pacs.files()) == 6
    done = up.told("jobs", "show", run_id)
    assert done["targets"]["beside"]["delivered"] == done["targets"]["away"]["delivered"] == 6
    assert {row["state"] for row in done["studies"]} == {"delivered"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_flood_is_paused_resumed_killed_and_cancelled(up: Talaria, tmp_path: Path) -> None:
    """Nothing that was confirmed is sent twice, and what had not begun is not lost."""
    many = made(tmp_path / "many", 60, files=2)
    got: Counter[str] = Counter()
    quick = threading.Event()

    def keep(store: Store) -> int:
        got[store.SOPInstanceUID] += 1
        quick.wait(1.0)  # so that each of these comes while some are under way
        return 0

    with scp(on_store=keep, keep_data=False) as pacs:
        up.apply(slow=dicom(pacs.port, aet_target=pacs.aet, concurrency=2))
        run_id = up.json("send", str(many), "--each", "folder", "--to", "slow", "--no-wait")["flow_run_id"]

        def state() -> str:
            return str(up.run(run_id)["state"]["name"])

        up.until(lambda: len(got) >= 4)
        up.told("jobs", "pause", run_id)
        up.until(lambda: state() == "Paused")
        paused = len(got)
        assert paused < 120
        up.told("jobs", "resume", run_id, "--no-wait")
        up.until(lambda: len(got) >= paused + 6)
        up.child("talaria.engine.worker").kill()
        up.until(lambda: len(got) >= paused + 12)
        up.told("jobs", "cancel", run_id)
        up.until(lambda: state() == "Cancelled")
        cancelled = up.told("jobs", "show", run_id)["targets"]["slow"]
        assert cancelled["state"] == "cancelled" and cancelled["unsent"]
        quick.set()
        up.told("jobs", "retry", run_id, "--no-wait")
        up.until(lambda: state() == "Completed")
        done = up.told("jobs", "show", run_id)["targets"]["slow"]
        assert done["already"] + done["delivered"] == 120 == len(got)
    # Only what was under way at the kill and the cancellation, with no answer known, went out twice.
    assert sum(got.values()) - 120 <= 2 * 2
