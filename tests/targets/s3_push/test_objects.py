"""Objects that a push to S3 makes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from protocols.s3.checksums import ALGORITHMS, encoded
from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.servers.s3_stub import Stub
from tests.targets.s3 import PREFIX
from tests.targets.s3_push.pushing import assert_whole, contents, large, target


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
