"""Refusals of S3 stores, keys with few rights, and stores that can't be reached."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt, sending
from talaria.testing.process import as_loaded, free_port
from tests.servers.s3_stub import Misdeed, Refusal, Stub, stub
from tests.targets.s3 import PREFIX, files_of
from tests.targets.s3_push.pushing import (
    ALONE,
    assert_failures_cost_themselves_alone,
    assert_whole,
    contents,
    large,
    marked,
    on,
    target,
)
from transfer.errors import (
    Busy,
    Denied,
    Interrupted,
    Misconfigured,
    NotFound,
    TimedOut,
    Unreachable,
)
from transfer.outcome import Kind
from transfer.receipt import Level, State

# ---- refusals


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (Refusal(403, "AccessDenied", "Access Denied"), Denied, "allowed to"),
        (Refusal(403, "InvalidAccessKeyId"), Denied, "access_key_id"),
        (Refusal(503, "SlowDown", "Please reduce your request rate."), Busy, "reduce your request rate"),
        (Refusal(500, "InternalError"), Busy, "InternalError"),
        (Refusal(404, "NoSuchBucket"), NotFound, "make the bucket"),
        (Refusal(400, "InvalidStorageClass"), Misconfigured, "correct storage_class"),
        (Refusal(501, "NotImplemented"), Misconfigured, "NotImplemented"),
    ],
)
def test_refusals_have_their_class(
    store: Stub, study: Path, refusal: Refusal, kind: type[Exception], words: str
) -> None:
    studies.ct(study, 2)
    store.fault = on("Put", refusal)
    sent = attempt(target(store), study)
    assert type(sent.error) is kind
    assert words in str(sent.error)
    assert not sent.outcomes
    assert not files_of(store.objects("lab"), sent.plan)


def test_a_bucket_that_is_not_there_is_NotFound(store: Stub, study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(target(store, bucket="nowhere"), study)
    assert isinstance(sent.error, NotFound)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"access_key_id": "AKIAOTHER"}, "correct access_key_id"),
        ({"secret_access_key": "wr0ng"}, "correct secret"),
    ],
)
def test_wrong_credentials_are_Denied(store: Stub, study: Path, wrong: dict[str, str], words: str) -> None:
    studies.ct(study, 1)
    usual = target(store)
    for field, value in wrong.items():
        setattr(usual, field, value)
    sent = attempt(usual, study)
    assert isinstance(sent.error, Denied)
    assert words in str(sent.error)
    assert "wr0ng" not in str(sent.error)


def test_a_busy_store_is_asked_again_and_then_left_to_the_dispatch(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    store.fault = on("Put", Refusal(503, "SlowDown"), times=1, key="CT0002.dcm")
    assert_whole(store, attempt(target(store), study))
    store.buckets["lab"].clear()
    store.fault = on("Put", Refusal(503, "SlowDown", headers={"Retry-After": "77"}), key="CT0002.dcm")
    begun = time.monotonic()
    sent = attempt(target(store, concurrency=1), study)
    assert isinstance(sent.error, Busy)
    assert sent.error.retry_after == 77
    assert sent.error.item == "CT0002.dcm"
    assert sent.arrived == {"CT0001.dcm", "CT0003.dcm"}
    assert time.monotonic() - begun < as_loaded(5)
    assert not marked(store)


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("answer", ALONE)
def test_objects_that_fail_alone_cost_themselves_alone(
    store: Stub, study: Path, answer: Refusal | Misdeed, concurrency: int
) -> None:
    assert_failures_cost_themselves_alone(store, study, answer, concurrency)


def test_a_store_that_takes_nothing_is_left_in_peace(store: Stub, study: Path) -> None:
    studies.ct(study, 40)
    store.fault = on("Put", Refusal(503, "SlowDown"))
    store.seen.clear()
    sent = attempt(target(store, concurrency=2), study)
    assert isinstance(sent.error, Busy)
    assert sum(one.operation == "Put" and "probe" not in one.key for one in store.seen) <= 9


def test_a_hung_store_is_TimedOut(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    store.fault = on("Put", Misdeed(hang_after=0), key="CT0003.dcm")
    sent = attempt(target(store, idle_timeout_s=1), study)
    assert isinstance(sent.error, TimedOut)
    assert sent.seconds < as_loaded(4)
    assert sent.arrived <= {"CT0001.dcm", "CT0002.dcm"}


def test_a_reset_is_Interrupted(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    store.fault = on("Put", Misdeed(reset_after=100), key="CT0003.dcm")
    sent = attempt(target(store, concurrency=1), study)
    assert isinstance(sent.error, Interrupted)
    assert sent.arrived == {"CT0001.dcm", "CT0002.dcm"}


def test_an_answer_that_is_lost_is_found_to_be_done(store: Stub, study: Path) -> None:
    studies.ct(study, 1)
    large(study / "large.bin")
    store.fault = on("Complete", Misdeed(silent=True), times=1)
    first = attempt(target(store), study)
    assert isinstance(first.error, Interrupted)
    store.seen.clear()
    second = attempt(target(store), first.plan, done=first.arrived)
    assert second.outcomes["large.bin"].kind is Kind.ALREADY
    assert store.count("UploadPart") == 0
    assert_whole(store, second)


def test_what_this_run_brought_without_an_answer_is_delivered_and_not_already_there(store: Stub, study: Path) -> None:
    studies.ct(study, 1)
    large(study / "large.bin")
    store.fault = on("Complete", Misdeed(silent=True), times=1)
    with sending(target(store), study) as sender:
        assert isinstance(sender.attempt().error, Interrupted)
        receipt = sender.attempt().require()
    assert receipt.counts[Kind.DELIVERED] == 2
    assert receipt.bytes == sum(path.stat().st_size for path in study.iterdir())


def test_names_made_of_patient_data_show_in_no_message(store: Stub, study: Path) -> None:
    studies.ct(study, 2)
    usual = target(store, layout="{PatientID}")
    store.fault = on("Put", Refusal(403, "AccessDenied", f"no right to {PREFIX}/{studies.PATIENT_ID}/CT0001.dcm"))
    sent = attempt(usual, study)
    assert isinstance(sent.error, Denied)
    assert studies.PATIENT_ID not in str(sent.error)
    store.fault = on("Put", Refusal(400, "InvalidURI", f"bad: {studies.PATIENT_ID}"), key="CT0001.dcm")
    assert studies.PATIENT_ID not in str(attempt(usual, study).rejected)


def test_what_a_layout_says_itself_shows(store: Stub, study: Path) -> None:
    studies.ct(study, 1)
    sent = attempt(target(store, layout="studies/{dispatch_id}", bucket="studies-no"), study)
    assert "studies-no" in str(sent.error)


# ---- keys that may do little


def test_key_that_may_only_write(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    large(study / "large.bin")
    store.denied = {"ListObjects", "ListMultipartUploads", "Head", "HeadBucket", "Get", "Delete", "ListParts"}
    sent = attempt(target(store, verify="listed"), study)
    receipt = sent.require()
    assert receipt.state is State.DELIVERED
    assert receipt.verified is Level.ACCEPTED
    assert {note.split(":")[0] for note in receipt.notes} >= {"the key may not read", "the key may not delete"}
    assert any("verified only as accepted" in note for note in receipt.notes)
    assert files_of(store.objects("lab"), sent.plan) == contents(sent.plan)
    assert marked(store)


# ---- nobody there


def test_dead_endpoint(study: Path) -> None:
    studies.ct(study, 1)
    with stub(buckets={"lab": {}}) as store:
        sent = attempt(target(store, port=free_port()), study)
    assert isinstance(sent.error, Unreachable)
