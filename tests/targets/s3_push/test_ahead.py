"""A push that sends the next small object while the store works on the last one, over a second connection."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt, sending
from talaria.testing.process import as_loaded
from tasks.s3 import S3Push
from tests.servers.s3_stub import Misdeed, Refusal, Request, Stub
from tests.targets.s3_push.pushing import ALONE, assert_failures_cost_themselves_alone, assert_whole, on, target
from transfer.errors import Cancelled, Interrupted
from transfer.outcome import Kind


@pytest.fixture(autouse=True)
def _near(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is so near that one thread is enough."""
    monkeypatch.setattr(sys.modules[S3Push.__module__], "useful", lambda items, most, send: 1)


@pytest.mark.parametrize(("concurrency", "ahead"), [(1, False), (2, True), (4, True)])
def test_the_next_one_comes_before_the_answer(store: Stub, study: Path, concurrency: int, ahead: bool) -> None:
    studies.ct(study, 6)
    second, together = threading.Event(), []

    def fault(request: Request) -> None:
        if request.operation == "Put" and request.key.endswith("CT0001.dcm"):
            together.append(second.wait(60 if ahead else 0.5))
        elif request.operation == "Put" and request.key.endswith("CT0002.dcm"):
            second.set()

    store.fault = fault
    assert_whole(store, attempt(target(store, concurrency=concurrency), study))
    assert together == [ahead]


def test_an_object_of_which_the_store_got_other_bytes_is_sent_once_more(store: Stub, study: Path) -> None:
    """The next file has been read meanwhile; what is sent again is the first one."""
    studies.ct(study, 4)
    store.fault = on("Put", Refusal(400, "BadDigest"), times=1, key="CT0002.dcm")
    assert_whole(store, attempt(target(store), study))
    store.buckets["lab"].clear()
    store.fault = on("Put", Refusal(400, "BadDigest"), key="CT0002.dcm")
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"CT0002.dcm"}
    assert sent.arrived == {"CT0001.dcm", "CT0003.dcm", "CT0004.dcm"}


def test_an_object_whose_request_is_redirected_arrives(store: Stub, study: Path) -> None:
    studies.ct(study, 4)
    left = [1]

    def fault(request: Request) -> None:
        if request.operation == "Put" and request.key.endswith("CT0002.dcm") and left.pop():
            left.append(0)
            raise Refusal(307, "TemporaryRedirect", headers={"Location": f"/lab/{request.key}"})

    store.fault = fault
    assert_whole(store, attempt(target(store), study))


@pytest.mark.parametrize("answer", ALONE)
def test_objects_that_fail_alone_cost_themselves_alone(store: Stub, study: Path, answer: Refusal | Misdeed) -> None:
    assert_failures_cost_themselves_alone(store, study, answer, 4)


def test_one_that_is_refused_is_rejected_alone(store: Stub, study: Path) -> None:
    studies.ct(study, 5)
    store.fault = on("Put", Refusal(400, "InvalidArgument"), key="CT0003.dcm")
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"CT0003.dcm"}
    assert len(sent.arrived) == 4


def test_a_file_that_changes_while_another_is_under_way(store: Stub, study: Path) -> None:
    studies.ct(study, 4)

    def fault(request: Request) -> None:
        if request.operation == "Put" and request.key.endswith("CT0001.dcm"):
            (study / "CT0003.dcm").write_bytes(b"another")

    store.fault = fault
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"CT0003.dcm"}
    assert sent.arrived == {"CT0001.dcm", "CT0002.dcm", "CT0004.dcm"}


def test_answers_that_are_lost_are_found_to_be_done(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    store.fault = on("Put", Misdeed(silent=True), times=3)
    sent = attempt(target(store), study)
    assert sent.require().counts[Kind.DELIVERED] == 3
    assert_whole(store, sent)


def test_what_was_under_way_when_the_push_ended_counts_as_delivered_later(store: Stub, study: Path) -> None:
    studies.ct(study, 12)
    with sending(target(store), study) as sender:
        store.fault = on("Put", Misdeed(silent=True))
        assert isinstance(sender.attempt().error, Interrupted)
        assert 0 < store.count("Put") < 12
        store.fault = lambda request: None
        receipt = sender.attempt().require()
    assert receipt.counts[Kind.DELIVERED] == 12


def test_cancelled_while_the_store_says_nothing(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    cancelled = threading.Event()

    def fault(request: Request) -> Misdeed | None:
        if request.operation == "Put" and request.key.endswith("CT0001.dcm"):
            cancelled.set()
            return Misdeed(hang_after=0)
        return None

    store.fault = fault
    sent = attempt(target(store, idle_timeout_s=60), study, cancelled=cancelled)
    assert isinstance(sent.error, Cancelled)
    assert sent.seconds < as_loaded(4)
