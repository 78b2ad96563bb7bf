"""S3 without a server: the block, keys, signatures, checksums, and what a store says."""

from __future__ import annotations

import os
import traceback
from typing import Any

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from blocks.s3 import S3Target
from protocols.http.head import Fields
from protocols.s3.checksums import ALGORITHMS, CRC64NVME, MD5, SHA256, Mismatch, Support, encoded
from protocols.s3.error import StoreError
from protocols.s3.keys import content_type, keys
from protocols.s3.sign import EMPTY_SHA256, UNSIGNED, Credentials, Signer
from protocols.s3.upload import MAX_PARTS, part_size
from tasks.s3 import connect
from tasks.s3.errors import of
from transfer.errors import Busy, Denied, Interrupted, Misconfigured, NotFound, Rejected

MIB = 1 << 20
SECRET = "Geheim/0815+secret"

# ---- the block


def block(**settings: Any) -> S3Target:
    return S3Target(**{"bucket": "studies", **settings})


def test_a_bucket_is_all_that_is_needed() -> None:
    made = block()
    assert made.checksum == "auto"
    assert made.addressing_style == "auto"
    assert (made.prefix, made.region, made.endpoint_url, made.access_key_id) == ("", None, None, None)


def test_empty_fields_of_a_form_are_none() -> None:
    names = (
        "region", "endpoint_url", "access_key_id", "secret_access_key", "session_token", "profile", "ca_cert", "sse",
        "kms_key_id", "storage_class",
    )  # fmt: skip
    made = block(**dict.fromkeys(names, " "))
    assert all(getattr(made, name) is None for name in names)


def test_prefix_loses_its_slashes() -> None:
    assert block(prefix="/in/box/").prefix == "in/box"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bucket": "ab"}, "not the name of a bucket"),
        ({"bucket": "a/b/c"}, "not the name of a bucket"),
        ({"bucket": "../etc"}, "not the name of a bucket"),
        ({"bucket": "fast--use1-az4--x-s3"}, "directory bucket"),
        ({"prefix": "a/../b"}, "'..'"),
        ({"prefix": "a//b"}, "empty parts"),
        ({"prefix": "a\nb"}, "control characters"),
        ({"endpoint_url": "minio:9000"}, "must begin with http"),
        ({"endpoint_url": "ftp://minio"}, "must begin with http"),
        ({"endpoint_url": "https://user:pw@minio"}, "use access_key_id"),
        ({"endpoint_url": "https://minio/?x=1"}, "remove what follows"),
        ({"endpoint_url": "https://minio:99999"}, "endpoint_url"),
        ({"access_key_id": "AKIA"}, "belong together"),
        ({"secret_access_key": "x"}, "belong together"),
        ({"session_token": "x"}, "session_token belongs"),
        ({"access_key_id": "A", "secret_access_key": "x", "profile": "p"}, "one of them"),
        ({"kms_key_id": "k"}, "set sse"),
        ({"kms_key_id": "k", "sse": "AES256"}, "set sse"),
        ({"sse": "rot13"}, "sse"),
        ({"checksum": "md4"}, "checksum"),
        ({"multipart_bytes": 1000}, "multipart_bytes"),
        ({"region": "-o x"}, "begin with"),
        ({"direction": "query"}, "can only store"),
        ({"layout": "{PatientName}"}, "fields are"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words.replace(".", r"\.")):
        block(**settings)


def test_secrets_do_not_show() -> None:
    made = block(access_key_id="AKIA", secret_access_key=SECRET, session_token=SECRET + "t")
    for text in (repr(made), str(made), made.model_dump_json(), repr(made.model_dump())):
        assert SECRET not in text


def test_secrets_do_not_show_in_what_is_logged_of_an_error() -> None:
    made = block(access_key_id="AKIA", secret_access_key=SECRET, region="eu-central-1")
    with pytest.raises(Denied) as caught, connect(made, hidden=["4711-XQ"]):
        raise Denied(f"refused: {SECRET} for 4711-XQ") from ValueError(f"{SECRET} 4711-XQ")
    error = caught.value
    for text in (str(error), repr(error), repr(error.args), "".join(traceback.format_exception(error))):
        # The lines of this test are in the traceback; what they were filled with is not.
        assert SECRET not in text
        assert "refused: *** for ***" in text


def test_the_ledger_counts_per_place() -> None:
    same = block(access_key_id="A", secret_access_key="x", region="eu-1", concurrency=2)
    assert same.endpoint_for() == block().endpoint_for()
    for other in ({"bucket": "other"}, {"prefix": "p"}, {"endpoint_url": "http://minio"}, {"layout": "{Modality}"}):
        assert block(**other).endpoint_for() != block().endpoint_for()


# ---- keys


def test_keys_keep_paths() -> None:
    paths = ["a/1.dcm", "b/1.dcm", "Größe №1/影像.dcm", "$(touch x) 'q' \"d\" &+?#%.dcm", "back\\slash"]
    found = keys("in/box", dict.fromkeys(paths, "name"), paths)
    assert found == {path: f"in/box/name/{path}" for path in paths}
    assert keys("", {"1": "name"}, ["1"]) == {"1": "name/1"}


def test_keys_of_what_is_no_text() -> None:
    paths = [os.fsdecode(b"caf\xe9.dcm"), "caf%E9.dcm", "new\nline", "new%0Aline", "tab\there"]
    found = keys("", dict.fromkeys(paths, "n"), paths)
    assert found[paths[0]] == "n/caf%E9.dcm"
    assert found["new\nline"] == "n/new%0Aline"
    assert found["tab\there"] == "n/tab%09here"
    assert len(set(found.values())) == len(paths)
    for key in found.values():
        key.encode()


@given(st.lists(st.binary(min_size=1, max_size=6).filter(lambda b: b"\0" not in b), unique=True))
def test_no_two_paths_get_one_key(names: list[bytes]) -> None:
    paths = [os.fsdecode(name) for name in names]
    found = keys("p", dict.fromkeys(paths, "f"), paths)
    assert len(set(found.values())) == len(paths)
    assert all(key.isprintable() or " " in key or key.encode() for key in found.values())


def test_content_types() -> None:
    assert content_type("IM0001", is_dicom=True) == "application/dicom"
    assert content_type("damaged.DCM", is_dicom=False) == "application/dicom"
    assert content_type("a/overlay.png", is_dicom=False) == "image/png"
    assert content_type("result.json", is_dicom=False) == "application/json"
    assert content_type("no idea", is_dicom=False) == "application/octet-stream"


# ---- signatures


@pytest.mark.parametrize("token", [None, "temporary/Token+="])
@pytest.mark.parametrize("sha256", [EMPTY_SHA256, UNSIGNED])
@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("PUT", "/lab/in/a.dcm", {}),
        ("GET", "/lab/Größe 影像/$(x)'\"&+?#%25~-_..dcm", {}),
        ("PUT", "/lab/new line/a", {"partNumber": "7", "uploadId": "a+b/c=="}),
        ("POST", "/k", {"uploads": ""}),
        ("DELETE", "/k", {"versionId": "x y", "B": "2", "a": "1"}),
    ],
)
def test_signature_is_that_of_botocore(
    method: str, path: str, query: dict[str, str], sha256: str, token: str | None
) -> None:
    headers = {"content-type": "application/dicom", "x-amz-meta-sha256": "ab" * 32, "x-amz-storage-class": "STANDARD"}
    target, fields = Signer("eu-central-1").signed(
        Credentials("AKIA", SECRET, token), method, "s3.example:9000", path, query, headers, sha256
    )
    request: Any = botocore.awsrequest.AWSRequest(method, f"http://s3.example:9000{target}", headers=dict(headers))
    request.headers["X-Amz-Content-SHA256"] = sha256
    request.context["timestamp"] = fields["x-amz-date"]
    request.context["client_config"] = None

    class Same(botocore.auth.S3SigV4Auth):
        """Signs at the time at which we did."""

        def add_auth(self, request: Any) -> None:
            request.context["timestamp"] = fields["x-amz-date"]
            self._modify_request_before_signing(request)
            canonical = self.canonical_request(request)
            self._inject_signature_to_request(request, self.signature(self.string_to_sign(request, canonical), request))

        def payload(self, request: Any) -> str:
            return sha256

    Same(botocore.credentials.Credentials("AKIA", SECRET, token), "s3", "eu-central-1").add_auth(request)
    assert fields["authorization"] == request.headers["Authorization"]
    assert SECRET not in str(fields)


def test_signing_key_changes_with_the_day() -> None:
    signer, who = Signer("r"), Credentials("A", SECRET)
    first, second = (
        signer.signed(who, "GET", "h", "/k", {}, {}, EMPTY_SHA256, now=day * 86_400)[1]["authorization"]
        for day in (20_000, 20_001)
    )
    assert first.rsplit("=", 1)[1] != second.rsplit("=", 1)[1]


# ---- checksums


def test_checksums_of_the_usual_example() -> None:
    data = memoryview(b"123456789")
    assert {name: one.of(data).hex() for name, one in ALGORITHMS.items()} == {
        "crc64nvme": "ae8b14860a799888",
        "crc32": "cbf43926",
        "sha256": "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
        "md5": "25f9e794323b453885f5181f1b624d0b",
    }


@given(st.binary(), st.integers(0, 200))
def test_checksums_grow(data: bytes, cut: int) -> None:
    for algorithm in ALGORITHMS.values():
        made = algorithm.new()
        made.update(memoryview(data)[:cut])
        made.update(memoryview(data)[cut:])
        assert made.digest() == algorithm.of(memoryview(data))


def test_md5_is_read_from_the_etag() -> None:
    digest = MD5.of(memoryview(b"x"))
    assert MD5.reported({"etag": f'"{digest.hex()}"'}) == encoded(digest)
    assert MD5.reported({"etag": f'"{digest.hex()}-3"'}) == encoded(digest) + "-3"
    assert MD5.reported({"etag": '"of another kind"'}) is None
    assert MD5.reported({}) is None


def test_an_md5_that_is_not_compared_is_not_sent() -> None:
    digest = MD5.of(memoryview(b"x"))
    assert Support(MD5, verifies=False, reports=True).header(digest) == {}
    assert Support(MD5, verifies=True).header(digest) == {"content-md5": encoded(digest)}


def test_a_store_that_tells_another_checksum_is_found_out() -> None:
    right, wrong = (CRC64NVME.of(memoryview(data)) for data in (b"right", b"wrong"))
    support = Support(CRC64NVME)
    support.compare(right, CRC64NVME.header(right))
    support.compare(right, {})
    with pytest.raises(Mismatch):
        support.compare(right, CRC64NVME.header(wrong))


def test_checksum_of_checksums() -> None:
    parts = [SHA256.of(memoryview(data)) for data in (b"a", b"b")]
    assert SHA256.composite(parts) == encoded(SHA256.of(memoryview(b"".join(parts)))) + "-2"


@given(st.integers(1, 5 << 40), st.integers(5 * MIB, 512 * MIB))
def test_parts_are_never_too_many(size: int, wanted: int) -> None:
    each = part_size(size, wanted)
    assert each >= wanted
    assert -(-size // each) <= MAX_PARTS
    assert each == wanted or each % MIB == 0


# ---- what a store says


def test_error_is_read_from_its_document() -> None:
    headers = Fields(["Retry-After: 7"])
    body = (
        b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>a &lt;b&gt; key-4711</Message><Key>k</Key></Error>"
    )
    error = StoreError.of_answer(503, headers, body, ("key-4711",))
    assert (error.code, error.words, error.retry_after, error.busy) == ("SlowDown", "a <b> ***", 7.0, True)


@pytest.mark.parametrize(("status", "code"), [(403, "Forbidden"), (404, "NotFound"), (503, "ServiceUnavailable")])
def test_error_without_a_document_goes_by_its_status(status: int, code: str) -> None:
    assert StoreError.of_answer(status, Fields(), b"", ()).code == code


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", Denied),
        (403, "", Denied),
        (403, "InvalidAccessKeyId", Denied),
        (403, "SignatureDoesNotMatch", Denied),
        (400, "ExpiredToken", Denied),
        (403, "RequestTimeTooSkewed", Denied),
        (401, "", Denied),
        (404, "NoSuchBucket", NotFound),
        (404, "NoSuchUpload", Interrupted),
        (503, "SlowDown", Busy),
        (503, "", Busy),
        (500, "InternalError", Busy),
        (502, "", Busy),
        (429, "", Busy),
        (400, "RequestTimeout", Busy),
        (507, "XMinioStorageFull", Busy),
        (301, "PermanentRedirect", Misconfigured),
        (400, "AuthorizationHeaderMalformed", Misconfigured),
        (400, "InvalidStorageClass", Misconfigured),
        (400, "KMS.NotFoundException", Misconfigured),
        (411, "MissingContentLength", Misconfigured),
        (501, "NotImplemented", Misconfigured),
    ],
)
def test_every_refusal_has_its_class(status: int, code: str, kind: type[Exception]) -> None:
    error = of(StoreError(status, code, "words"), "http://s3, bucket b", "item")
    assert type(error) is kind
    assert "words" in str(error)


def test_a_refusal_of_one_object_rejects_it_alone() -> None:
    refused = StoreError(400, "KeyTooLongError", "too long")
    assert type(of(refused, "w", "item")) is Rejected
    assert type(of(refused, "w")) is Misconfigured
