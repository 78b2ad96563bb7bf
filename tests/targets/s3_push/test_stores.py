"""Pushes to S3 servers that others have made: moto, and s3rver, which spoils what comes with trailing checksums."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.s3 import driver
from tests.servers.s3 import S3Server, s3rver
from tests.targets.s3 import certificates, files_of, shared_moto, target
from tests.targets.s3_push.pushing import PART
from transfer.receipt import Level, State


@pytest.fixture(scope="module", params=["http", "https"])
def spoiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    authority, leaf = certificates()
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("s3rver")
        tls = (leaf, authority.ca) if request.param == "https" else ()
        yield stack.enter_context(s3rver(folder, *tls))


@pytest.fixture
def study(study: Path) -> Path:
    studies.sample(study)
    studies.odd_names(study / "odd")
    (study / "large.bin").write_bytes(os.urandom(2 * PART + 77))
    (study / "empty.txt").write_bytes(b"")
    return study


def objects(client: Any, prefix: str) -> dict[str, bytes]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix=prefix)
    names = [row["Key"] for page in pages for row in page.get("Contents", ())]
    return {name: client.get_object(Bucket="lab", Key=name)["Body"].read() for name in names}


def test_the_spoiler_spoils(spoiler: S3Server) -> None:
    """Why boto3's default can't be used: it is this that a push has to avoid, or to find out."""
    client = boto3.client(
        "s3", endpoint_url=spoiler.url, region_name="us-east-1", aws_access_key_id=spoiler.access_key,
        aws_secret_access_key=spoiler.secret_key, verify=spoiler.ca or None,
        config=Config(s3={"addressing_style": "path"}),
    )  # fmt: skip
    client.put_object(Bucket="lab", Key="spoilt", Body=b"x" * 100)
    client.close()
    spoilt = objects(spoiler.client(), "spoilt") != {"spoilt": b"x" * 100}
    assert spoilt == bool(spoiler.ca), "boto3 sends trailing checksums over TLS only"


@pytest.mark.parametrize("checksum", ["auto", "crc32", "off"])
@pytest.mark.parametrize("level", list(Level))
def test_the_spoiler_gets_what_was_sent(spoiler: S3Server, study: Path, checksum: str, level: Level) -> None:
    prefix = f"in/{uuid.uuid4().hex}"
    usual = target(
        spoiler.url, spoiler.access_key, spoiler.secret_key, ca_cert=spoiler.ca or None, prefix=prefix,
        checksum=checksum, verify=level, multipart_bytes=PART,
    )  # fmt: skip
    sent = attempt(usual, study)
    receipt = sent.require()
    assert receipt.state is State.DELIVERED, sent.rejected
    assert receipt.verified is level
    client = spoiler.client()
    got = files_of(objects(client, prefix), sent.plan, prefix)
    client.close()
    assert got == {item.path: sent.plan.file(item).read_bytes() for item in sent.plan.items}


def test_the_check_tells_of_the_spoiler(spoiler: S3Server) -> None:
    usual = target(spoiler.url, spoiler.access_key, spoiler.secret_key, ca_cert=spoiler.ca or None)
    health = driver.check(usual)
    assert health.ok, health.to_json("x")
    told = {probe.name: probe.detail for probe in health.probes}
    assert told["checksum"] == "the store gives md5"
    if spoiler.ca:
        assert "spoil the object" in told["trailers"]
    else:
        assert "trailers" not in told


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_moto_with_large_files(study: Path, tls: bool, level: Level) -> None:
    server, client = shared_moto(tls)
    prefix = f"in/{uuid.uuid4().hex}"
    usual = target(
        server.url, server.access_key, server.secret_key, ca_cert=server.ca or None, prefix=prefix, verify=level,
        multipart_bytes=PART,
    )  # fmt: skip
    sent = attempt(usual, study)
    assert sent.require().state is State.DELIVERED, sent.rejected
    assert sent.require().verified is level
    got = files_of(objects(client, prefix), sent.plan, prefix)
    assert got == {item.path: sent.plan.file(item).read_bytes() for item in sent.plan.items}
    head = client.head_object(Bucket="lab", Key=f"{prefix}/{sent.plan.dispatch_id}/CT/1.dcm")
    assert head["ContentType"] == "application/dicom"
    assert len(head["Metadata"]["sha256"]) == 64
    assert not client.list_multipart_uploads(Bucket="lab").get("Uploads")
