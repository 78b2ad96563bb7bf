"""Large objects, which go to S3 in parts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.process import as_loaded, until
from talaria.testing.relay import relay
from tests.servers.s3_stub import SECRET_KEY, Misdeed, Refusal, Request, Stub
from tests.targets.s3 import PREFIX, files_of
from tests.targets.s3_push.pushing import MIB, PART, assert_whole, large, marked, on, target
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    Interrupted,
    Retryable,
)
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import State


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
