"""Repeated pushes to S3."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.servers.s3_stub import Refusal, Stub
from tests.targets.s3 import PREFIX
from tests.targets.s3_push.pushing import assert_whole, contents, large, marked, on, target
from transfer.errors import (
    Busy,
)
from transfer.outcome import Kind
from transfer.receipt import State


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
