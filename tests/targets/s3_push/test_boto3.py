"""What of a push to S3 goes through boto3; fails when the product stops using it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest

from talaria.testing.harness import attempt
from tests.servers.s3_stub import Stub
from tests.targets.s3_push.pushing import large, target


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
