"""Pushes to a store of our own that refuses what real stores refuse, and misbehaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest

from blocks.s3 import S3Target
from protocols.s3.checksums import ALGORITHMS, encoded
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.process import as_loaded, free_port, until
from talaria.testing.relay import relay
from tasks.s3 import pace
from tasks.s3.support import forget
from tests.servers.s3_stub import SECRET_KEY, Misdeed, Refusal, Request, Stub, stub
from tests.targets.s3 import PREFIX, files_of, stub_target
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    Interrupted,
    Misconfigured,
    NotFound,
    Retryable,
    TimedOut,
    Unreachable,
)
from transfer.outcome import Kind
from transfer.plan import Item, Plan, scan
from transfer.receipt import Level, State

MIB = 1 << 20
PART = 5 * MIB  # the smallest that there is


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    forget()  # another store had this port before


@pytest.fixture
def store() -> Iterator[Stub]:
    with stub(buckets={"lab": {}}) as made:
        yield made


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    return folder


def large(path: Path, size: int = 3 * PART + 1000) -> Path:
    """A file that goes in four parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


def target(store: Stub, **settings: Any) -> S3Target:
    return stub_target(store, **({"multipart_bytes": PART, "concurrency": 4} | settings))


def on(
    operation: str, answer: Refusal | Misdeed, *, times: int = 1_000_000, part: int | None = None, key: str = ""
) -> Callable[[Request], Misdeed | None]:
    """A fault that hits some requests: of this operation, for keys that end so, after the probes."""
    left = [times]

    def fault(request: Request) -> Misdeed | None:
        wanted = request.operation == operation and ".talaria-probe" not in request.key and request.key.endswith(key)
        if part is not None:
            wanted = wanted and request.query.get("partNumber") == str(part)
        if not wanted or left[0] <= 0:
            return None
        left[0] -= 1
        if isinstance(answer, Refusal):
            raise answer
        return answer

    return fault


def assert_whole(store: Stub, sent: Sent) -> None:
    """Everything is there, byte for byte, and marked; nothing is unfinished."""
    receipt = sent.require()
    assert receipt.state is State.DELIVERED, sent.rejected
    assert files_of(store.objects("lab"), sent.plan) == contents(sent.plan)
    assert f"{PREFIX}/{sent.plan.dispatch_id}/.complete" in store.objects("lab")
    assert not store.uploads


def contents(plan: Plan) -> dict[str, bytes]:
    return {item.path: plan.file(item).read_bytes() for item in plan.items}


def marked(store: Stub) -> bool:
    return any(key.endswith("/.complete") for key in store.objects("lab"))


# ---- what an object is


def test_objects_say_what_they_are(store: Stub, study: Path) -> None:
    studies.sample(study)
    large(study / "large.bin")
    usual = target(store, sse="aws:kms", kms_key_id="key-1", storage_class="STANDARD_IA")
    sent = attempt(usual, study)
    assert_whole(store, sent)
    for item in sent.plan.items:
        one = store.buckets["lab"][f"{PREFIX}/{sent.plan.dispatch_id}/{item.path}"]
        assert one.headers["x-amz-meta-sha256"] == hashlib.sha256(sent.plan.file(item).read_bytes()).hexdigest()
        assert one.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert one.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"
        assert one.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert one.sum_type == "FULL_OBJECT"
        assert one.sums["crc64nvme"] == encoded(ALGORITHMS["crc64nvme"].of(memoryview(one.data)))
        if item.header:
            assert one.headers["content-type"] == "application/dicom"
    types = {key.rsplit("/", 1)[1]: one.headers["content-type"] for key, one in store.buckets["lab"].items()}
    assert types["overlay.png"] == "image/png"
    assert types["result.json"] == "application/json"


def test_manifest_and_then_marker_come_last(store: Stub, study: Path) -> None:
    studies.sample(study)
    large(study / "large.bin")
    sent = attempt(target(store), study)
    assert_whole(store, sent)
    made = [
        request.key.rsplit("/", 1)[1]
        for request in store.seen
        if request.operation in ("Put", "Complete") and ".talaria-probe" not in request.key
    ]
    manifest = f".talaria-manifest-{sent.plan.dispatch_id}.json"
    assert made[-2:] == [manifest, ".complete"]
    assert len(made) == len(sent.plan.items) + 2
    folder = f"{PREFIX}/{sent.plan.dispatch_id}"
    assert store.objects("lab")[f"{folder}/.complete"] == b""
    document = json.loads(store.objects("lab")[f"{folder}/{manifest}"])
    assert document["dispatch_id"] == sent.plan.dispatch_id
    assert {(row["name"], row["size"], row["sha256"]) for row in document["files"]} == {
        (path, len(data), hashlib.sha256(data).hexdigest()) for path, data in contents(sent.plan).items()
    }
    uids = {item.path: item.header.SOPInstanceUID for item in sent.plan.items if item.header}
    assert {row["name"]: row["sop_instance_uid"] for row in document["files"] if "sop_instance_uid" in row} == uids


def test_layout_of_two_studies_gets_two_manifests_and_markers(store: Stub, study: Path) -> None:
    first, second = studies.uid(56), studies.uid(56)
    studies.ct(study / "a", 2, study=first)
    studies.ct(study / "b", 3, study=second)
    sent = attempt(target(store, layout="{StudyInstanceUID}"), study)
    sent.require()
    found = store.objects("lab")
    for uid, count in ((first, 2), (second, 3)):
        assert found[f"{PREFIX}/{uid}/.complete"] == b""
        document = json.loads(found[f"{PREFIX}/{uid}/.talaria-manifest-{sent.plan.dispatch_id}.json"])
        assert len(document["files"]) == count


def test_key_that_is_too_long_is_rejected_alone(store: Stub, study: Path) -> None:
    studies.ct(study, 1)
    deep = "/".join(["d" * 200] * 5)
    studies.ct(study / deep, 1)
    sent = attempt(target(store), study)
    key = f"{PREFIX}/{sent.plan.dispatch_id}/{deep}/CT0001.dcm"
    assert sent.rejected == {f"{deep}/CT0001.dcm": f"its key would have {len(key)} bytes, S3 takes 1024"}
    assert sent.arrived == {"CT0001.dcm"}


# ---- again


@pytest.mark.parametrize("listing", [True, False])
def test_what_is_there_is_not_sent_again(store: Stub, study: Path, listing: bool) -> None:
    studies.sample(study)
    large(study / "large.bin")
    first = attempt(target(store), study)
    if not listing:
        store.denied = {"ListObjects", "ListMultipartUploads"}
    store.seen.clear()
    again = attempt(target(store), first.plan)
    assert {outcome.kind for outcome in again.outcomes.values()} == {Kind.ALREADY}
    assert not {"Put", "UploadPart", "Create", "Delete"} & {request.operation for request in store.seen}
    assert again.moved == 0
    assert_whole(store, again)


def test_an_object_of_other_content_is_replaced_with_a_warning(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    usual = target(store, layout="same")
    assert attempt(usual, study).require().counts[Kind.DELIVERED] == 3
    one = study / "CT0002.dcm"
    one.write_bytes(one.read_bytes()[:-2] + b"\0\1")
    store.seen.clear()
    sent = attempt(usual, study)
    assert {path: outcome.kind for path, outcome in sent.outcomes.items()} == {
        "CT0001.dcm": Kind.ALREADY, "CT0002.dcm": Kind.WARNING, "CT0003.dcm": Kind.ALREADY,
    }  # fmt: skip
    assert store.objects("lab")[f"{PREFIX}/same/CT0002.dcm"] == one.read_bytes()
    # While it was being replaced, nothing said that all is there.
    changes = [(one.operation, one.key.rsplit("/", 1)[1]) for one in store.seen if one.operation in ("Put", "Delete")]
    assert changes == [
        ("Delete", ".complete"),
        ("Put", "CT0002.dcm"),
        ("Put", f".talaria-manifest-{sent.plan.dispatch_id}.json"),
        ("Put", ".complete"),
    ]


def test_another_instance_is_not_replaced(store: Stub, study: Path) -> None:
    (first,) = studies.ct(study / "one", 1)
    studies.ct(study / "two", 2)
    usual = target(store, layout="same")
    attempt(usual, study / "one").require()
    sent = attempt(usual, study / "two")
    assert sent.error is None
    assert sent.rejected == {"CT0001.dcm": "another instance has its name there: use a finer layout"}
    assert sent.arrived == {"CT0002.dcm"}
    assert store.objects("lab")[f"{PREFIX}/same/CT0001.dcm"] == first.read_bytes()


def test_marker_is_completed_when_everything_had_arrived(store: Stub, study: Path) -> None:
    studies.ct(study, 4)
    large(study / "large.bin")
    store.fault = on("Put", Refusal(503, "SlowDown"), key=".complete")
    first = attempt(target(store), study)
    assert isinstance(first.error, Busy)
    assert len(first.arrived) == 5
    store.fault = lambda request: None
    store.seen.clear()
    second = attempt(target(store), first.plan, done=first.arrived)
    assert not second.outcomes
    assert second.moved == 0
    assert_whole(store, second)
    document = json.loads(
        store.objects("lab")[f"{PREFIX}/{first.plan.dispatch_id}/.talaria-manifest-{first.plan.dispatch_id}.json"]
    )
    assert {row["sha256"] for row in document["files"]} == {
        hashlib.sha256(data).hexdigest() for data in contents(first.plan).values()
    }


def test_what_vanished_since_is_found_out_before_the_marker(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    store.fault = on("Put", Refusal(503, "SlowDown"), key=".json")
    first = attempt(target(store), study)
    store.fault = lambda request: None
    del store.buckets["lab"][f"{PREFIX}/{first.plan.dispatch_id}/CT0002.dcm"]
    second = attempt(target(store), first.plan, done=first.arrived)
    assert set(second.rejected) == {"CT0002.dcm"}
    assert second.require().state is State.PARTIAL
    assert not marked(store)


def test_boto3_carries_what_is_not_an_object(store: Stub, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/dependencies.md"""
    called: list[str] = []
    original = botocore.client.BaseClient._make_api_call

    def call(self: Any, operation: str, parameters: Any) -> Any:
        called.append(operation)
        return original(self, operation, parameters)

    sessions: list[Any] = []
    client = boto3.Session.client
    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
    monkeypatch.setattr(boto3.Session, "client", lambda self, *a, **k: sessions.append(self) or client(self, *a, **k))
    large(study / "large.bin")
    attempt(target(store), study).require()
    assert len(sessions) == 1
    assert {"ListObjectsV2", "CreateMultipartUpload", "CompleteMultipartUpload", "ListMultipartUploads"} <= set(called)
    assert not {"PutObject", "UploadPart"} & set(called)


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
@pytest.mark.parametrize(
    "answer", [Refusal(503, "SlowDown"), Refusal(500, "InternalError"), Misdeed(reset_after=100), Misdeed(silent=True)]
)
def test_objects_that_fail_alone_cost_themselves_alone(
    store: Stub, study: Path, answer: Refusal | Misdeed, concurrency: int
) -> None:
    studies.ct(study, 20)
    bad = {f"CT{number:04}.dcm" for number in (1, 2, 9, 20)}

    def fault(request: Request) -> Misdeed | None:
        return on("Put", answer)(request) if request.key.rsplit("/", 1)[-1] in bad else None

    store.fault = fault
    sent = attempt(target(store, concurrency=concurrency), study)
    assert isinstance(sent.error, Busy | Interrupted)
    assert sent.error.item in bad
    # What was carried out without an answer is found to be there.
    assert sent.arrived >= {item.path for item in sent.plan.items} - bad
    for item in sent.plan.items:
        assert store.count("Put", f"{PREFIX}/{sent.plan.dispatch_id}/{item.path}") <= 2
    assert not marked(store)


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


@pytest.mark.parametrize(
    ("wait", "size", "count", "connections"),
    [(0.0, 30_000, 500, 1), (0.9, 30_000, 500, 1), (1.5, 30_000, 500, 2), (50.0, 30_000, 500, 4),
     (0.0, 500_000, 500, 4), (0.0, 30_000, 100, 4)],
)  # fmt: skip
def test_connections_that_are_of_use(
    monkeypatch: pytest.MonkeyPatch, wait: float, size: int, count: int, connections: int
) -> None:
    """As many as share what is waited for, in units of what an object costs this process."""
    clock = {"busy": 0.0, "all": 0.0}

    def send() -> None:
        clock["busy"] += 1
        clock["all"] += 1 + wait

    monkeypatch.setattr(pace.time, "thread_time", lambda: clock["busy"])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock["all"])
    assert pace.useful([Item(str(n), size, 0) for n in range(count)], 4, send) == connections


def test_many_small_objects(store: Stub, study: Path) -> None:
    studies.ct(study, pace.MANY + 10)
    store.fault = on("Put", Refusal(503, "SlowDown"), times=1, key="CT0003.dcm")
    assert_whole(store, attempt(target(store), study))


# ---- large objects


def test_large_file_in_parts(store: Stub, study: Path) -> None:
    large(study / "large.bin", 4 * PART)
    large(study / "tail.bin", PART + 1)
    large(study / "small.bin", PART)
    sent = attempt(target(store), study)
    assert_whole(store, sent)
    key = f"{PREFIX}/{sent.plan.dispatch_id}/"
    assert store.count("UploadPart", key + "large.bin") == 4
    assert store.count("UploadPart", key + "tail.bin") == 2
    assert store.count("Put", key + "small.bin") == 1
    assert sent.moved == sent.plan.size


def test_500_in_the_middle_of_a_multipart_upload_is_Busy_and_gone_on_with(store: Stub, study: Path) -> None:
    file = large(study / "large.bin")
    studies.ct(study, 2)
    store.fault = on("UploadPart", Refusal(500, "InternalError", "We encountered an internal error."), part=3)
    sent = attempt(target(store, concurrency=1), study)
    assert isinstance(sent.error, Busy)
    assert len(store.uploads) == 1
    assert sent.arrived == {"CT0001.dcm", "CT0002.dcm"}
    store.fault = lambda request: None
    again = attempt(target(store), sent.plan, done=sent.arrived)
    assert_whole(store, again)
    assert again.moved <= file.stat().st_size - 2 * PART


@pytest.mark.parametrize("answer", [Misdeed(reset_after=10), Misdeed(hang_after=0), Refusal(503, "SlowDown")])
def test_large_file_that_never_gets_through_costs_itself_alone(
    store: Stub, study: Path, answer: Refusal | Misdeed
) -> None:
    for name in ("bad.bin", "good.bin"):
        large(study / name)
    studies.ct(study, 20)
    store.fault = lambda request: on("UploadPart", answer, part=2)(request) if request.key.endswith("bad.bin") else None
    with sending(target(store, concurrency=2, idle_timeout_s=1, max_attempts=2), study) as sender:
        first = sender.attempt()
        assert first.arrived == {item.path for item in first.plan.items} - {"bad.bin"}
        seen = len(store.seen)
        second = sender.attempt()
        assert {one.key.rsplit("/", 1)[-1] for one in store.seen[seen:] if one.operation == "UploadPart"} == {"bad.bin"}
        assert isinstance(second.error, Retryable)
        (left,) = (row for row in sender.receipt().items if row.outcome is not Kind.DELIVERED)
        assert left.outcome is Kind.UNSENT
        assert second.error.message in left.detail
    assert not marked(store)


@pytest.mark.parametrize("large_too", [False, True])
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(
    "refusal",
    [Refusal(403, "AccessDenied"), Refusal(404, "NoSuchKey"), Refusal(400, "InvalidRequest"),
     Refusal(405, "MethodNotAllowed"), Refusal(501, "NotImplemented"), Refusal(301, "PermanentRedirect"),
     Refusal(401, "Unauthorized")],
)  # fmt: skip
def test_keys_that_are_refused_cost_themselves_alone(
    store: Stub, study: Path, refusal: Refusal, concurrency: int, *, large_too: bool
) -> None:
    """As a policy has it that denies some names."""
    studies.ct(study, 30)
    bad = {f"CT{number:04}.dcm" for number in (1, 2, 3, 9, 30)}
    if large_too:
        large(study / "large.bin")
        bad |= {"large.bin"}

    def fault(request: Request) -> Misdeed | None:
        wrong = request.key.rsplit("/", 1)[-1] in bad
        return on("Put", refusal)(request) or on("Complete", refusal)(request) if wrong else None

    store.fault = fault
    sent = attempt(target(store, concurrency=concurrency), study)
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == bad
    assert all(refusal.code in reason for reason in sent.rejected.values())
    assert len(sent.arrived) == len(sent.plan.items) - len(bad)
    assert not store.uploads
    assert not marked(store)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_bucket_that_refuses_every_key_is_Denied_soon(store: Stub, study: Path, concurrency: int) -> None:
    studies.ct(study, 40)
    store.fault = on("Put", Refusal(403, "AccessDenied"))
    sent = attempt(target(store, concurrency=concurrency, checksum="off"), study)
    assert isinstance(sent.error, Denied)
    assert not sent.outcomes
    assert store.count("Put") <= 2 * concurrency + 4


def test_objects_that_fail_at_the_beginning_do_not_hide_the_others(store: Stub, study: Path) -> None:
    """More of them, one after the other, than would be put down to objects."""
    studies.ct(study, 40)
    bad = {f"CT{number:04}.dcm" for number in range(1, 13)}
    store.fault = lambda request: (
        on("Put", Refusal(503, "SlowDown"))(request) if request.key.rsplit("/", 1)[-1] in bad else None
    )
    sent = attempt(target(store, concurrency=1), study)
    assert sent.arrived == {item.path for item in sent.plan.items} - bad


@pytest.mark.parametrize("operation", ["Create", "Complete"])
def test_refused_beginning_or_end_of_a_multipart_upload(store: Stub, study: Path, operation: str) -> None:
    large(study / "large.bin")
    store.fault = on(operation, Refusal(403, "AccessDenied"))
    sent = attempt(target(store), study)
    assert isinstance(sent.error, Denied)
    assert not store.uploads


def test_one_large_file_that_is_refused_rejects_it_alone(store: Stub, study: Path) -> None:
    large(study / "large.bin")
    studies.ct(study, 2)
    store.fault = on("UploadPart", Refusal(400, "EntityTooLarge", "too large"), part=2)
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"large.bin"}
    assert len(sent.arrived) == 2
    assert not store.uploads
    assert not marked(store)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_large_file_over_a_cut_link_is_resumed(store: Stub, study: Path, share: float) -> None:
    size = 10 * PART + 4711
    large(study / "large.bin", size)
    with relay(store.port) as link:
        usual = target(store, port=link.port, concurrency=2)
        attempt(usual, study).require()  # probes and all are out of the way
        store.buckets["lab"].clear()
        link.sent, link.cut_after = 0, int(size * share)
        first = attempt(usual, study)
        assert isinstance(first.error, Interrupted), repr(first.error)
        (upload,) = store.uploads.values()
        there = sum(len(part.data) for part in upload.parts.values())
        assert there >= size * share - 3 * PART
        second = attempt(usual, first.plan)
    assert_whole(store, second)
    assert second.moved == size - there, "parts that were there were sent again"


def test_upload_that_a_killed_process_left_is_gone_on_with(store: Stub, study: Path, tmp_path: Path) -> None:
    large(study / "large.bin", 6 * PART)
    script = tmp_path / "push.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from talaria.testing.harness import attempt\n"
        "from blocks.s3 import S3Target\n"
        "attempt(S3Target.model_validate_json(sys.argv[1]), Path(sys.argv[2])).require()\n"
    )
    slow = target(store, concurrency=1, bandwidth_limit=12 * MIB)
    settings = slow.model_dump(mode="json", include=slow.model_fields_set) | {"secret_access_key": SECRET_KEY}
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(settings), str(study)],
        cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    until(lambda: process.poll() is not None or any(len(one.parts) >= 2 for one in list(store.uploads.values())))
    assert process.poll() is None, "it ended too soon"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (name,) = store.uploads
    there = len(store.uploads[name].parts)
    sent = attempt(target(store), study)
    assert_whole(store, sent)
    assert sent.moved <= (6 - there) * PART
    assert store.count("Create", f"{PREFIX}/{sent.plan.dispatch_id}/large.bin") == 1


def test_unfinished_upload_of_another_file_is_aborted(store: Stub, study: Path) -> None:
    file = large(study / "large.bin")
    usual = target(store, layout="same", concurrency=1)
    store.fault = on("UploadPart", Misdeed(reset_after=10), part=3)
    first = attempt(usual, study)
    assert isinstance(first.error, Interrupted)
    assert len(store.uploads) == 1
    large(file)
    store.fault = lambda request: None
    sent = attempt(usual, study)
    assert sent.require().state is State.DELIVERED
    assert store.objects("lab")[f"{PREFIX}/same/large.bin"] == file.read_bytes()
    assert not store.uploads


def test_upload_whose_first_parts_are_the_same_does_not_give_its_old_head_to_another_file(
    store: Stub, study: Path
) -> None:
    file = large(study / "large.bin")
    usual = target(store, layout="same", concurrency=1)
    store.fault = on("UploadPart", Misdeed(reset_after=10), part=3)
    assert isinstance(attempt(usual, study).error, Interrupted)
    with file.open("r+b") as changed:
        changed.seek(3 * PART)
        changed.write(b"another end")
    store.fault = lambda request: None
    sent = attempt(usual, study)
    assert sent.require().state is State.DELIVERED
    one = store.buckets["lab"][f"{PREFIX}/same/large.bin"]
    assert one.data == file.read_bytes()
    assert one.headers["x-amz-meta-sha256"] == hashlib.sha256(one.data).hexdigest()
    assert not store.uploads


def test_file_that_changes_while_its_parts_are_sent_never_arrives(store: Stub, study: Path) -> None:
    file = large(study / "large.bin", 6 * PART)
    studies.ct(study, 2)
    plan = scan([study])
    changed = threading.Event()

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 2 * PART and not changed.is_set():
            changed.set()
            with file.open("r+b") as writer:
                writer.seek(5 * PART)
                writer.write(b"changed")

    sent = attempt(target(store, concurrency=1), plan, moved=moved)
    assert set(sent.rejected) == {"large.bin"}
    assert "chang" in sent.rejected["large.bin"]
    assert set(files_of(store.objects("lab"), plan)) == {"CT0001.dcm", "CT0002.dcm"}
    assert not store.uploads
    assert not marked(store)


def test_cancelled_in_a_large_file_stops_soon_and_aborts(store: Stub, study: Path) -> None:
    large(study / "large.bin", 6 * PART)
    cancelled = threading.Event()
    at: list[float] = []

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 2 * MIB and not at:
            at.append(time.monotonic())
            cancelled.set()

    sent = attempt(target(store, bandwidth_limit=4 * MIB), study, moved=moved, cancelled=cancelled)
    assert isinstance(sent.error, Cancelled)
    assert time.monotonic() - at[0] < as_loaded(3)
    assert not store.uploads
    assert not files_of(store.objects("lab"), sent.plan)


def test_cancelled_while_the_store_hangs(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    cancelled = threading.Event()
    store.fault = on("Put", Misdeed(hang_after=0))
    timer = threading.Timer(1, cancelled.set)
    timer.start()
    sent = attempt(target(store, idle_timeout_s=60), study, cancelled=cancelled)
    assert isinstance(sent.error, Cancelled)
    assert sent.seconds < as_loaded(4)


def test_bandwidth_limit_holds_over_all_connections(store: Stub, study: Path) -> None:
    large(study / "large.bin", 2 * PART)
    studies.ct(study, 4)
    attempt(target(store), study).require()
    store.buckets["lab"].clear()
    sent = attempt(target(store, bandwidth_limit=5 * MIB), study)
    assert_whole(store, sent)
    assert sent.plan.size / (5 * MIB) - 0.3 <= sent.seconds < as_loaded(sent.plan.size / (5 * MIB) + 2)


# ---- checksums


@pytest.mark.parametrize(
    ("settings", "algorithm", "form"),
    [
        ({}, "crc64nvme", "FULL_OBJECT"),
        ({"knows": ("crc32", "sha256")}, "crc32", "FULL_OBJECT"),
        ({"knows": ("crc32", "sha256"), "unknown": "refuse"}, "crc32", "FULL_OBJECT"),
        ({"knows": ("crc32",), "full_parts": False}, "crc32", "COMPOSITE"),
        ({"knows": ()}, "md5", None),
        ({"knows": (), "unknown": "refuse"}, "md5", None),
        ({"checks": "echo"}, "md5", None),
        ({"checks": "ignore", "md5": False}, None, None),
    ],
)
@pytest.mark.parametrize("level", list(Level))
def test_checksum_is_what_the_store_supports(
    study: Path, settings: dict[str, Any], algorithm: str | None, form: str | None, level: Level
) -> None:
    studies.ct(study, 2)
    large(study / "large.bin", PART + 1000)
    with stub(buckets={"lab": {}}, **settings) as store:
        sent = attempt(target(store, verify=level), study)
        assert_whole(store, sent)
        assert sent.require().verified is level
        one = store.buckets["lab"][f"{PREFIX}/{sent.plan.dispatch_id}/large.bin"]
        puts = [request for request in store.seen if request.operation == "Put" and "CT0001" in request.key]
        assert (one.sum_type if algorithm in one.sums else None) == form
        if algorithm and algorithm != "md5":
            assert f"x-amz-checksum-{algorithm}" in puts[0].headers
        # A store that computes its checksums itself is believed; else everything is read back.
        read_back = store.count("Get", f"{PREFIX}/{sent.plan.dispatch_id}/CT0001.dcm")
        assert read_back == (1 if level is Level.PROVEN and algorithm is None else 0)


@pytest.mark.parametrize("checksum", ["crc64nvme", "crc32", "sha256", "off"])
@pytest.mark.parametrize("level", [Level.ACCEPTED, Level.PROVEN])
def test_checksum_of_ones_own_choice(store: Stub, study: Path, checksum: str, level: Level) -> None:
    studies.ct(study, 2)
    large(study / "large.bin", PART + 1000)
    sent = attempt(target(store, checksum=checksum, verify=level), study)
    assert_whole(store, sent)
    assert sent.require().verified is level
    for name in ("CT0001.dcm", "large.bin"):
        kept = store.buckets["lab"][f"{PREFIX}/{sent.plan.dispatch_id}/{name}"].sums
        assert set(kept) == ({checksum} if checksum != "off" else set())
    assert store.count("Get") > 0 or level is not Level.PROVEN


def test_checksum_that_the_store_does_not_know_is_Misconfigured(study: Path) -> None:
    studies.ct(study, 2)
    with stub(buckets={"lab": {}}, knows=("crc32",), unknown="refuse") as store:
        sent = attempt(target(store, checksum="crc64nvme"), study)
        assert isinstance(sent.error, Misconfigured)
        assert "see checksum" in str(sent.error)


def test_store_that_refuses_trailing_checksums_is_no_problem(study: Path) -> None:
    studies.ct(study, 2)
    large(study / "large.bin")
    with stub(buckets={"lab": {}}, trailers="refuse") as store:
        assert_whole(store, attempt(target(store), study))


def spoil_all(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def test_store_that_spoils_everything_is_found_out_before_anything_is_sent(store: Stub, study: Path) -> None:
    studies.ct(study, 2)
    store.fault = lambda request: Misdeed(change=spoil_all)
    sent = attempt(target(store), study)
    assert isinstance(sent.error, Misconfigured)
    assert "does not keep" in str(sent.error)
    assert not sent.outcomes
    assert not store.objects("lab"), "the probe is still there"


@pytest.mark.parametrize("checksum", ["auto", "crc32"])
def test_store_that_tells_another_checksum_is_not_believed(store: Stub, study: Path, checksum: str) -> None:
    studies.ct(study, 3)
    wrong = {"x-amz-checksum-crc64nvme": "AAAAAAAAAAA=", "x-amz-checksum-crc32": "AAAAAA=="}
    store.fault = on("Put", Misdeed(answer=wrong), key="CT0002.dcm")
    sent = attempt(target(store, checksum=checksum), study)
    assert set(sent.rejected) == {"CT0002.dcm"}
    assert "other bytes" in sent.rejected["CT0002.dcm"]
    assert set(files_of(store.objects("lab"), sent.plan)) == {"CT0001.dcm", "CT0003.dcm"}
    assert not marked(store)


def test_store_that_got_other_bytes_gets_them_once_more(store: Stub, study: Path) -> None:
    studies.ct(study, 2)
    large(study / "large.bin")
    refusal = Refusal(400, "BadDigest", "The checksum did not match.")
    one, other = on("Put", refusal, times=1, key="CT0001.dcm"), on("UploadPart", refusal, times=1, part=2)
    store.fault = lambda request: one(request) or other(request)
    assert_whole(store, attempt(target(store), study))
    store.buckets["lab"].clear()
    store.fault = on("Put", refusal, key="CT0001.dcm")
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"CT0001.dcm"}
    store.buckets["lab"].clear()
    store.fault = on("UploadPart", refusal, part=2)
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"large.bin"}
    assert not store.uploads


def spoiling(change: Callable[[bytes], bytes]) -> Callable[[Request], Misdeed | None]:
    """Spoil what is larger than a probe, and say nothing of it."""
    return lambda request: Misdeed(change=lambda data: change(data) if len(data) > 5000 else data)


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("checks", ["verify", "ignore"])
def test_store_that_spoils_behind_its_own_back(study: Path, level: Level, checks: str) -> None:
    """It compares what came and keeps something else: only what it tells or gives back later can show that."""
    studies.ct(study, 2)
    with stub(buckets={"lab": {}}, checks=checks, knows=() if checks == "ignore" else ("crc64nvme",)) as store:
        store.fault = spoiling(lambda data: data[:-7])
        sent = attempt(target(store, verify=level), study)
        if checks == "verify" and level is Level.ACCEPTED:
            return  # it says that it has the bytes
        assert set(sent.rejected) == {"CT0001.dcm", "CT0002.dcm"}
        assert not files_of(store.objects("lab"), sent.plan), "what was spoilt is still there"
        assert not marked(store)


def test_what_the_store_has_lost_is_revoked(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    original = store._head

    def head(request: Request, body: bytes) -> Any:
        if request.key.endswith("CT0002.dcm"):
            store.buckets["lab"].pop(request.key, None)
        return original(request, body)

    store._head = head  # type: ignore[method-assign]
    sent = attempt(target(store, verify="listed"), study)
    assert sent.rejected == {"CT0002.dcm": "the store does not have it"}
    assert not marked(store)


@pytest.mark.parametrize("level", ["listed", "proven"])
def test_what_the_store_has_lost_later_takes_the_marker_away(store: Stub, study: Path, level: str) -> None:
    studies.ct(study, 3)
    first = attempt(target(store, verify=level), study)
    assert marked(store)
    (lost,) = (key for key in store.buckets["lab"] if key.endswith("CT0002.dcm"))
    del store.buckets["lab"][lost]
    found = attempt(target(store, verify=level), study, done=first.arrived).require()
    assert found.counts[Kind.REJECTED] == 1
    assert not marked(store)
    again = attempt(target(store, verify=level), study, done=first.arrived - {"CT0002.dcm"}).require()
    assert again.state is State.DELIVERED
    assert marked(store)


def test_probes_are_made_once_in_a_process(store: Stub, study: Path) -> None:
    studies.ct(study, 1)
    attempt(target(store), study).require()
    store.seen.clear()
    attempt(target(store, layout="other"), study).require()
    assert not [request for request in store.seen if ".talaria-probe" in request.key]
    forget()
    attempt(target(store, layout="third"), study).require()
    assert [request for request in store.seen if ".talaria-probe" in request.key]


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
