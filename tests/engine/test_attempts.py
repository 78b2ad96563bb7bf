"""How often a push is tried: attempts that got further are not counted, and the receipt tells of all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.client.schemas.objects import State as RunState
from prefect.client.schemas.objects import StateType, TaskRun

from blocks.folder import FolderTarget
from blocks.sftp import SftpTarget
from talaria.testing import studies
from tasks.dispatch import delivery as engine
from tasks.dispatch.delivery import Delivery
from tasks.dispatch.push import push_task
from tasks.dispatch.rest import LEDGER_S, Left
from tasks.driver import Driver, Facts
from transfer import writable
from transfer.errors import Busy, DispatchError, Interrupted, LedgerAway, LedgerFull, Misconfigured
from transfer.health import Health
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Plan, scan
from transfer.receipt import PushReport, Receipt, State

PLAIN = Facts()
Push = Callable[[FolderTarget, Plan, PushReport], Receipt]


@contextmanager
def delivery(
    tmp_path: Path, push: Push, *, files: int = 6, facts: Facts = PLAIN, **fields: float
) -> Iterator[Delivery]:
    """A delivery by a driver that does what the test says."""
    studies.ct(tmp_path / "study", files, side=64)
    target = FolderTarget(folder="/nowhere", retry_delay_s=10, retry_max_delay_s=100, **fields)
    target.named("shelf")
    home = Home(tmp_path / "home")
    home.root.mkdir()
    with Ledger(home.ledger) as ledger:
        driver = Driver(FolderTarget, lambda target: Health(), push, facts=facts)
        yield Delivery(driver, target, scan([tmp_path / "study"]), ledger, home, threading.Event())


def run(one: Delivery) -> list[float]:
    """Push as the task does, without waiting; return the delays that it would have waited."""
    task, delays = push_task(one), []
    while True:
        try:
            one.push()
            return delays
        except DispatchError as error:
            state: RunState = RunState(type=StateType.FAILED, data=error)
            count = TaskRun(task_key="push", dynamic_key="0", flow_run_id=None, run_count=one.attempts)
            assert task.retry_condition_fn is not None
            if len(delays) >= task.retries or not task.retry_condition_fn(task, count, state):
                return delays
            delays += task.retry_delay_seconds


def after(count: int) -> Push:
    """Deliver this many items, then lose the link."""

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        for number, item in enumerate(plan.pending):
            if number == count:
                raise Interrupted("the link broke")
            report(item, DELIVERED)
        return report.receipt(target.name, plan)

    return push


def test_an_attempt_that_got_further_is_not_counted(tmp_path: Path) -> None:
    with delivery(tmp_path, after(1), max_attempts=1) as one:
        delays = run(one)
        receipt = one.receipt()
    assert receipt.state is State.DELIVERED and receipt.attempts == 6 and receipt.bytes == one.plan.size
    assert all(0 <= delay <= 10 for delay in delays), "each waits as the first retry does"
    assert receipt.notes == (
        "attempt 1 of 2 failed: the link broke",
        "… 3 more like it",
        "attempt 5 of 6 failed: the link broke",
    )


def test_what_gets_no_further_ends_after_max_attempts(tmp_path: Path) -> None:
    with delivery(tmp_path, after(0), max_attempts=3) as one:
        assert len(run(one)) == 2
        receipt = one.receipt()
    assert receipt.state is State.FAILED and receipt.attempts == 3 and receipt.unsent == 6
    assert receipt.error == "the link broke"
    assert one.failures[-1] == "attempt 3 of 3 failed: the link broke"


def test_attempts_that_were_tests_are_in_the_receipt_and_leave_as_many_pushes(tmp_path: Path) -> None:
    """Seen: a dispatch to a dead target had five attempts, and one when it was delivered."""
    left = Left(attempts=3, futile=3, failures=["attempt 1 of 4 failed: away"] * 3, tried=1.0, error="Unreachable")
    with delivery(tmp_path, after(1), max_attempts=1) as one:
        one.resume(left)
        one.stopped = State.WAITING  # as there is no slot
        assert one.leave(left) == left
        one.stopped = None
        run(one)
        receipt = one.receipt()
    assert receipt.state is State.DELIVERED and receipt.attempts == 9
    assert receipt.notes[0] == "attempt 1 of 4 failed: away" and len(receipt.notes) == 6
    with delivery(tmp_path / "other", after(0), max_attempts=2) as one:
        one.resume(left)
        assert len(run(one)) == 1 and one.attempts == 5 and one.failures[-1] == "attempt 5 of 5 failed: the link broke"


def test_a_ledger_that_is_away_costs_no_attempt(tmp_path: Path) -> None:
    away = [LedgerAway("the ledger's database can't be reached")] * 3

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        if away:
            raise away.pop()
        return after(6)(target, plan, report)

    with delivery(tmp_path, push, max_attempts=1) as one:
        delays = run(one)
        assert (one.attempts, one.futile, delays) == (4, 0, [LEDGER_S] * 3)
        assert one.receipt().state is State.DELIVERED


def test_nothing_is_sent_that_could_not_be_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: one instance went out a hundred times in a minute, until the disk of the ledger had room again."""
    with delivery(tmp_path, after(6), max_attempts=1) as one:
        one.may_rest = True
        with monkeypatch.context() as patch:
            patch.setattr(writable, "ROOM_BYTES", 1 << 62)
            assert run(one) == [] and isinstance(one.error, LedgerFull) and one.futile == 0
            assert one.receipt().unsent == 6
        assert run(one) == [] and one.receipt().state is State.DELIVERED


def test_a_rejection_is_a_step_too(tmp_path: Path) -> None:
    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        if not plan.pending:
            return report.receipt(target.name, plan)
        report(plan.pending[0], Outcome(Kind.REJECTED, "no"))
        raise Interrupted("the link broke")

    with delivery(tmp_path, push, max_attempts=2) as one:
        run(one)
        assert one.receipt().counts[Kind.REJECTED] == 6 and one.attempts == 7


def test_the_attempts_of_a_run_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_ATTEMPTS", 4)
    with delivery(tmp_path, after(1), max_attempts=3) as one:
        run(one)
        assert one.attempts == 4 and one.receipt().unsent == 2


@pytest.mark.parametrize(("resumes", "attempts"), [(True, 6), (False, 2)])
def test_parts_of_files_count_where_the_target_keeps_them(tmp_path: Path, resumes: bool, attempts: int) -> None:
    """A large file over a link that breaks again and again; and no longer than the file takes, if it is sent anew."""
    size = 500_000
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "large.bin").write_bytes(bytes(size))
    moved = 0

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        nonlocal moved
        report.moved(100_000)
        moved += 100_000
        if moved < size + 100_000:
            raise Interrupted("the link broke")
        for item in plan.pending:
            report(item, DELIVERED)
        return report.receipt(target.name, plan)

    with delivery(tmp_path, push, files=0, facts=Facts(resumes=resumes), max_attempts=2) as one:
        run(one)
        assert one.attempts == attempts
        assert one.receipt().state is (State.DELIVERED if resumes else State.FAILED)


def test_what_asks_for_time_gets_it_and_what_is_final_ends(tmp_path: Path) -> None:
    errors: list[DispatchError] = [Busy("later", retry_after=77), Misconfigured("wrong name")]

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        raise errors.pop(0)

    with delivery(tmp_path, push, max_attempts=5) as one:
        assert run(one) == [77]
        receipt = one.receipt()
    assert one.failures == ["attempt 1 of 5 failed: later", "attempt 2 failed: wrong name"]
    assert receipt.error == "wrong name" and receipt.attempts == 2


def test_the_seconds_are_those_of_all_attempts_and_what_lies_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
        nonlocal now
        now += 1
        return after(4)(target, plan, report)

    with delivery(tmp_path, push) as one:
        with pytest.raises(Interrupted):
            one.push()
        now += 60
        receipt = one.push()
    assert (receipt.seconds, receipt.attempts, receipt.bytes) == (62, 2, one.plan.size)


@pytest.mark.parametrize(
    ("on", "wanted"), [({}, False), ({"on_complete": True, "hook_attempts": 4, "hook_retry_delay_s": 7}, True)]
)
def test_a_type_declares_its_script(on: dict[str, float], wanted: bool) -> None:
    assert FolderTarget(folder="/nowhere").hook is None
    hook = SftpTarget(host="h", folder="/f", layout="{StudyInstanceUID}", **on).hook
    assert (hook.wanted, hook.layout) == (wanted, "{StudyInstanceUID}")
    assert (hook.attempts, hook.retry_delay_s) == ((4, 7) if wanted else (3, 30))
