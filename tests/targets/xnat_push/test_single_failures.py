"""Studies and files that fail at XNAT affect no others."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt, sending
from tests.servers.xnat import Fault, Refusal, Reply, Xnat
from tests.servers.xnat import error as error_page
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import fails
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    TimedOut,
)
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import State


class Failing:
    """XNAT that fails, in one way or another, at every import with one of these instances.

    Args:
        how: `aborts`, `500`, or the status with which it refuses the import, without naming the instance.
    """

    words = "java.lang.IllegalArgumentException: value out of range"

    def __init__(self, server: Xnat, bad: set[str], how: str | int) -> None:
        self.server, self.bad, self.how = server, bad, how
        self.sent: list[set[str]] = []  # instances of each import
        self._put = server.rest.service._file
        self._run = server.rest.service.run
        server.rules.commit_ignores = False
        server.rest.service._file = self._file  # type: ignore[method-assign]
        server.rest.service.run = self.run  # type: ignore[method-assign]

    def run(self, user: str, params: dict[str, str], uploads: list[Any]) -> Any:
        self.sent.append(set())
        return self._run(user, params, uploads)

    def _file(self, user: str, params: dict[str, str], place: Any, name: str, pieces: Any, auto: bool) -> Any:
        self.sent[-1].add(name.removesuffix(".dcm"))
        if name.removesuffix(".dcm") in self.bad:
            for _ in pieces:
                pass
            if isinstance(self.how, int):
                raise Refusal(self.how, self.words)
            if self.how == "aborts":
                raise BrokenPipeError  # the stand-in closes the connection
            raise Refusal(500, "java.lang.NullPointerException")
        return self._put(user, params, place, name, pieces, auto)


def delivered_in_the_end(server: Xnat, study: Path, failing: Failing, attempts: int, **settings: Any) -> Sent:
    """Dispatch until it ends, as the engine does; return the last attempt."""
    plan = scan([study])
    with sending(xnat_target(server.url, concurrency=1, **settings), plan) as sender:
        for _ in range(attempts):
            failing.sent.clear()
            sent = sender.attempt()
            counts = Counter(sop for one in failing.sent for sop in one)
            assert max(counts.values(), default=0) <= 2, "sent more than twice in one attempt"
            if sent.receipt:
                break
        receipt = sender.receipt()
    wrong = {item.path for item in receipt.items if item.outcome is not Kind.DELIVERED}
    assert wrong == {item.path for item in plan.items if item.header and item.header.SOPInstanceUID in failing.bad}
    assert set(server.instances()) == {
        item.header.SOPInstanceUID for item in plan.items if item.header and item.path not in wrong
    }
    assert {item.outcome for item in receipt.items if item.path in wrong} == {Kind.REJECTED}
    assert all("alone" in item.detail for item in receipt.items if item.path in wrong)
    return sent


@pytest.mark.parametrize("how", ["500", "aborts"])
@pytest.mark.parametrize("at", [{0}, {19}, {3, 11}])
def test_a_file_at_which_xnat_fails_each_time(server: Xnat, study: Path, at: set[int], how: str) -> None:
    files = studies.ct(study, 20)
    bad = {_uid_of(files[number]) for number in at}
    delivered_in_the_end(server, study, Failing(server, bad, how), attempts=6)


@pytest.mark.parametrize("status", [400, 409, 413, 422])
@pytest.mark.parametrize("at", [{0}, {19}, {3, 11, 12, 13}])
def test_a_file_that_xnat_refuses_without_naming_it(server: Xnat, study: Path, at: set[int], status: int) -> None:
    """It alone is rejected, with XNAT's reason, in the first attempt; nothing is sent more than twice."""
    files = studies.ct(study, 20)
    failing = Failing(server, {_uid_of(files[number]) for number in at}, status)
    sent = attempt(xnat_target(server.url), study)
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == {files[number].name for number in at}
    assert all("value out of range" in reason for reason in sent.rejected.values())
    assert len(sent.arrived) == 20 - len(at)
    assert set(server.instances()) == {_uid_of(file) for file in files} - failing.bad
    assert {one.name for one in server.store.prearchive} == set()
    counts = Counter(sop for one in failing.sent for sop in one)
    assert max(counts.values()) <= 2


def test_a_file_that_xnat_refuses_in_a_large_study(server: Xnat, study: Path) -> None:
    """Parts of it are refused at first; each attempt comes nearer to the file, and sends nothing more than twice."""
    files = studies.ct(study, 130)
    failing = Failing(server, {_uid_of(files[77])}, 400)
    with sending(xnat_target(server.url), study) as sender:
        first = sender.attempt()
        assert type(first.error) is Busy and "value out of range" in str(first.error)
        assert len(first.arrived) > 110
        assert max(Counter(sop for one in failing.sent for sop in one).values()) <= 2
        failing.sent.clear()
        second = sender.attempt()
        assert max(Counter(sop for one in failing.sent for sop in one).values()) <= 2
        assert second.require().state is State.PARTIAL
    assert {path: "out of range" in reason for path, reason in second.rejected.items()} == {files[77].name: True}
    assert len(server.instances()) == 129


def test_a_large_study_of_which_xnat_refuses_everything_is_rejected_at_once(server: Xnat, study: Path) -> None:
    files = studies.ct(study, 80)
    Failing(server, {_uid_of(file) for file in files}, 400)
    sent = attempt(xnat_target(server.url), study)
    assert sent.require().state is State.FAILED
    assert len(sent.rejected) == 80
    assert len(server.imports) <= 17


def test_a_study_that_is_too_large_goes_in_parts(server: Xnat, study: Path) -> None:
    studies.ct(study, 80, side=64)
    run = server.rest.service.run

    def limited(user: str, params: dict[str, str], uploads: list[Any]) -> Any:
        data = uploads[0].read
        size = 0

        def read(count: int) -> bytes:
            nonlocal size
            piece: bytes = data(count)
            size += len(piece)
            if size > 30_000:
                raise Refusal(413, "Request Entity Too Large")
            return piece

        uploads[0].read = read
        return run(user, params, uploads)

    server.rest.service.run = limited  # type: ignore[method-assign]
    with sending(xnat_target(server.url), study) as sender:
        for _ in range(3):
            sent = sender.attempt()
            if sent.receipt:
                break
        assert sender.receipt().state is State.DELIVERED
    assert len(server.instances()) == 80


@pytest.mark.parametrize(
    ("status", "words", "error"),
    [
        (401, "The request requires user authentication", Interrupted),
        (403, "Forbidden", Denied),
        (404, "Not Found", Misconfigured),
        (400, "Disk quota exceeded", Busy),
        (400, "java.io.IOException: No space left on device", Busy),
        (503, "down for maintenance", Busy),
        (507, "Insufficient Storage", Busy),
    ],
)
def test_a_refusal_that_is_not_about_content_is_not_tried_in_parts(
    server: Xnat, study: Path, status: int, words: str, error: type[DispatchError]
) -> None:
    studies.ct(study, 5)
    server.faults.append(Fault("POST", "/data/services/import", error_page(status, words), times=99))
    problem = fails(attempt(xnat_target(server.url), study), error)
    assert words in str(problem)
    assert len(server.imports) == 1
    server.faults.clear()


def _uid_of(file: Path) -> str:
    header = scan([file]).items[0].header
    assert header
    return header.SOPInstanceUID


@pytest.mark.parametrize("how", ["500", "silent"])
def test_studies_that_fail_stop_no_others(server: Xnat, study: Path, how: str) -> None:
    """In the first attempt, whichever come first; the failed ones are named."""
    uids = [studies.uid(56) for _ in range(6)]
    for number, uid in enumerate(uids):
        studies.ct(study / str(number), 2, study=uid)
    run, given_up = server.rest.service.run, threading.Event()

    def failing(user: str, params: dict[str, str], uploads: list[Any]) -> Any:
        if len(server.imports) <= 2:  # the first two to come
            if how == "silent":
                uploads[0].read(1 << 30)
                given_up.wait(60)
            raise Refusal(500, "java.lang.NullPointerException")
        return run(user, params, uploads)

    server.rest.service.run = failing  # type: ignore[method-assign]
    with sending(xnat_target(server.url, concurrency=1, idle_timeout_s=1), study) as sender:
        first = sender.attempt()
        given_up.set()
        assert type(first.error) is (Busy if how == "500" else TimedOut)
        assert len(first.arrived) == 8, "what could go did not go"
        assert len(server.imports) == 6
        receipt = sender.attempt().require()
    assert receipt.state is State.DELIVERED
    assert len(server.imports) <= 10, "two studies of two files, each alone at most"


@pytest.mark.parametrize("status", [403, 404, 405, 415])
@pytest.mark.parametrize("bad", [0, 1, 4])
def test_a_study_that_is_refused_stops_no_others(server: Xnat, study: Path, status: int, bad: int) -> None:
    """As a firewall before XNAT does at something in it."""
    uids = sorted(studies.uid(56) for _ in range(5))
    for number, uid in enumerate(uids):
        studies.ct(study / str(number), 2, study=uid)
    run = server.rest.service.run

    def failing(user: str, params: dict[str, str], uploads: list[Any]) -> Any:
        if len(server.imports) == bad + 1:
            raise Refusal(status, "not here")
        return run(user, params, uploads)

    server.rest.service.run = failing  # type: ignore[method-assign]
    sent = attempt(xnat_target(server.url, concurrency=1), study)
    assert sent.require().state is State.PARTIAL
    assert len(sent.arrived) == 8
    assert len(sent.rejected) == 2
    assert all("not here" in reason for reason in sent.rejected.values())
    assert len(server.imports) == 5


def test_a_server_that_refuses_every_study_is_left_in_peace(server: Xnat, study: Path) -> None:
    for number in range(8):
        studies.ct(study / str(number), 1, study=studies.uid(56))
    server.faults.append(Fault("POST", "/data/services/import", error_page(403, "Forbidden"), times=99))
    fails(attempt(xnat_target(server.url, concurrency=1), study), Denied)
    assert len(server.imports) == 3
    server.faults.clear()


def test_a_server_that_fails_always_is_left_in_peace(server: Xnat, study: Path) -> None:
    for number in range(8):
        studies.ct(study / str(number), 1, study=studies.uid(56))
    server.faults.append(Fault("POST", "/data/services/import", error_page(500, "out of memory"), times=99))
    fails(attempt(xnat_target(server.url, concurrency=1), study), Busy)
    assert len(server.imports) == 3
    server.faults.clear()
    busy = Reply("busy", 503, headers={"Retry-After": "7"})
    server.faults.append(Fault("POST", "/data/services/import", busy, times=99))
    problem = fails(attempt(xnat_target(server.url, concurrency=1), study), Busy)
    assert isinstance(problem, Busy)
    assert problem.retry_after == 7
    assert len(server.imports) == 4
    server.faults.clear()


def test_many_unreadable_files_cost_one_more_import(server: Xnat, study: Path) -> None:
    studies.ct(study, 9)
    plan = scan([study])
    server.rules.unreadable = {item.header.SOPInstanceUID for item in plan.items[1:6] if item.header}
    server.rules.commit_ignores = False
    sent = attempt(xnat_target(server.url), plan)
    assert len(sent.arrived) == 4
    assert set(sent.rejected) == {item.path for item in plan.items[1:6]}
    assert len(server.imports) == 2


def test_many_changed_files_cost_one_more_import(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    files = studies.ct(study, 9, study=uid)
    studies.multiframe(study / "large.dcm", 8, study=uid)
    plan = scan([study])

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 500_000:
            for file in files[2:6]:
                file.unlink(missing_ok=True)

    sent = attempt(xnat_target(server.url, bandwidth_limit=4 << 20), plan, moved=moved)
    assert set(sent.rejected) == {file.name for file in files[2:6]}
    assert len(sent.arrived) == 6
    assert len(server.imports) == 2
