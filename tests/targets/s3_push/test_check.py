"""Checks of S3 targets, trust, and where credentials come from."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.s3 import S3Target
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded, free_port
from tasks.s3 import driver
from tasks.s3.support import forget
from tests.servers.certificates import Authority, Leaf
from tests.servers.s3 import accepting
from tests.servers.s3_stub import ACCESS_KEY, REGION, SECRET_KEY, Misdeed, Refusal, Request, Stub, stub
from tests.targets.s3 import certificates, shared_moto, stub_target
from tests.targets.s3 import target as target_at
from transfer.errors import Denied, Interrupted, Misconfigured, NotFound, NotTrusted, Retryable, TimedOut, Unreachable
from transfer.health import Health
from transfer.receipt import State


@pytest.fixture
def study(study: Path) -> Path:
    """Two instances, in the folder to send."""
    studies.ct(study, 2)
    return study


def results(health: Health) -> dict[str, str]:
    return {probe.name: probe.result for probe in health.probes}


def detail(health: Health, name: str) -> str:
    return next(probe.detail for probe in health.probes if probe.name == name)


# ---- check


def test_check_tells_what_the_store_does(store: Stub) -> None:
    health = driver.check(stub_target(store))
    assert health.ok
    assert list(results(health)) == ["resolve", "tcp", "authenticate", "authorize", "write", "checksum", "multipart"]
    assert set(results(health).values()) == {"ok"}
    assert "unencrypted" in detail(health, "authenticate")
    assert detail(health, "checksum") == "the store compares and gives crc64nvme"
    assert detail(health, "multipart") == "taken; the store checks the object as a whole"
    assert not store.objects("lab")
    assert not store.uploads


@pytest.mark.parametrize(
    ("trailers", "words"), [("decode", "taken"), ("refuse", "MissingContentLength"), ("store", "spoil the object")]
)
def test_check_tells_what_trailing_checksums_do(trailers: str, words: str) -> None:
    with stub(accepting(certificates()[1]), buckets={"lab": {}}, trailers=trailers) as store:
        health = driver.check(stub_target(store, tls=True))
        assert health.ok, health.to_json("x")
        assert words in detail(health, "trailers")
        assert "TLSv1.3" in detail(health, "tls")
        assert "expires in" in detail(health, "tls")
        assert not store.objects("lab")


@pytest.mark.parametrize(
    ("settings", "failed", "kind", "words"),
    [
        ({"access_key_id": "AKIAOTHER"}, "authenticate", Denied, "correct access_key_id"),
        ({"secret_access_key": "wr0ng"}, "authenticate", Denied, "correct secret_access_key"),
        ({"bucket": "nowhere"}, "authorize", NotFound, "make the bucket"),
    ],
)
def test_check_names_the_stage_that_fails(
    store: Stub, settings: dict[str, Any], failed: str, kind: type[Exception], words: str
) -> None:
    target = stub_target(store)
    for name, value in settings.items():
        setattr(target, name, value)
    health = driver.check(target)
    assert type(health.error) is kind
    assert results(health)[failed] == "failed"
    assert words in detail(health, failed)
    after = list(results(health)).index(failed) + 1
    assert set(list(results(health).values())[after:]) == {"skipped"}


@pytest.mark.parametrize(
    ("denied", "failed"),
    [
        ({"HeadBucket"}, "authorize"),
        ({"ListObjects"}, "authorize"),
        ({"Put"}, "write"),
        ({"Delete"}, "write"),
        ({"Create"}, "multipart"),
    ],
)
def test_check_403_is_Denied_not_connected(store: Stub, denied: set[str], failed: str) -> None:
    store.denied = denied
    health = driver.check(stub_target(store))
    assert type(health.error) is Denied
    assert results(health)[failed] == "failed"
    assert results(health)["authenticate"] == "ok"


@pytest.mark.parametrize("knows", [("crc64nvme", "crc32", "sha256"), ("crc32",), ()])
def test_check_of_a_bucket_with_object_lock_leaves_one_probe(store: Stub, knows: tuple[str, ...]) -> None:
    """It takes no object without a checksum, and gives none back."""
    store.locked, store.knows, store.unknown = True, knows, "refuse"
    health = driver.check(stub_target(store))
    assert health.ok, health
    assert "it stays, hidden: the bucket has Object Lock (compliance, 30 days)" in detail(health, "write")
    assert results(health)["multipart"] == "skipped"
    assert len(store.versions) == 1
    assert not store.objects("lab")


def test_push_into_a_bucket_with_object_lock(store: Stub, study: Path) -> None:
    forget()
    studies.multiframe(study / "large.dcm", 12)  # in parts
    store.locked = True
    target = stub_target(store, multipart_bytes=5 << 20)
    sent = attempt(target, study)
    assert sent.require().state is State.DELIVERED
    assert "the bucket has Object Lock (compliance, 30 days)" in " ".join(sent.require().notes)
    assert sum("probe" in key for key in store.versions) == 1
    assert not any("probe" in key for key in store.objects("lab"))


def test_check_of_moto_s_bucket_with_object_lock() -> None:
    server, client = shared_moto(False)
    client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
    client.put_object_lock_configuration(
        Bucket="locked",
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}},
        },
    )  # fmt: skip
    health = driver.check(target_at(server.url, server.access_key, server.secret_key, bucket="locked"))
    assert health.ok, health
    assert "Object Lock (compliance, 1 days)" in detail(health, "write")
    versions = client.list_object_versions(Bucket="locked")
    assert len(versions["Versions"]) == 1
    assert "Contents" not in client.list_objects_v2(Bucket="locked")


def test_check_everything_403(store: Stub) -> None:
    def fault(request: Request) -> Misdeed | None:
        raise Refusal(403, "AccessDenied", "Access Denied")

    store.fault = fault
    health = driver.check(stub_target(store))
    assert type(health.error) is Denied
    assert not health.ok


def test_check_of_a_store_that_spoils_fails(store: Stub) -> None:
    store.fault = lambda request: Misdeed(change=lambda data: data[::-1])
    health = driver.check(stub_target(store))
    assert type(health.error) is Misconfigured
    assert results(health)["write"] == "failed"
    assert "came back" in detail(health, "write")


def test_check_of_a_store_that_hangs(store: Stub) -> None:
    store.fault = lambda request: Misdeed(hang_after=0)
    health = driver.check(stub_target(store, idle_timeout_s=1))
    assert type(health.error) is TimedOut
    assert results(health)["authenticate"] == "failed"


def test_check_of_no_store() -> None:
    with stub(buckets={"lab": {}}) as store:
        target = stub_target(store, port=free_port())
    health = driver.check(target)
    assert type(health.error) is Unreachable
    assert results(health)["tcp"] == "failed"
    target.endpoint_url = "http://no-such-host.invalid"
    health = driver.check(target)
    assert type(health.error) is Unreachable
    assert results(health)["resolve"] == "failed"


def test_check_of_a_name_that_nobody_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: over.wait(5) and [])
    begun = time.monotonic()
    health = driver.check(target_at("http://minio.example.org", ACCESS_KEY, SECRET_KEY, connect_timeout_s=0.3))
    assert time.monotonic() - begun < as_loaded(3)
    over.set()
    assert type(health.error) is Unreachable
    assert "not resolved within 0.3 s" in detail(health, "resolve")


@pytest.mark.parametrize("host", [f"{'x' * 64}.example.org", "minio..example.org", "minio_1.invalid"])
def test_names_that_no_host_can_have(study: Path, host: str) -> None:
    target = target_at(f"https://{host}", ACCESS_KEY, SECRET_KEY)
    assert results(driver.check(target))["resolve"] == "failed"
    sent = attempt(target, study)
    assert type(sent.error) is Misconfigured
    assert "correct endpoint_url" in sent.error.message


# ---- trust


@contextmanager
def https(leaf: Leaf) -> Iterator[Stub]:
    with stub(accepting(leaf), buckets={"lab": {}}) as store:
        yield store


def test_unknown_authority_is_NotTrusted(study: Path) -> None:
    with https(certificates()[1]) as store:
        target = stub_target(store, tls=True)
        target.ca_cert = None
        sent = attempt(target, study)
        assert type(sent.error) is NotTrusted
        assert "set ca_cert" in str(sent.error)
        health = driver.check(target)
        assert results(health)["tls"] == "failed"
        assert type(health.error) is NotTrusted


def test_bad_certificates_are_NotTrusted_with_the_reason(tmp_path: Path, study: Path) -> None:
    authority = Authority(tmp_path / "ca")
    for leaf, words in (
        (authority.leaf("old", expired=True), "expired"),
        (authority.leaf("other", hosts=("example.org",)), "wrong name"),
    ):
        with https(leaf) as store:
            sent = attempt(stub_target(store, tls=True, ca_cert=str(authority.ca)), study)
            assert type(sent.error) is NotTrusted
            assert words in str(sent.error)


def test_authority_as_text(study: Path) -> None:
    with https(certificates()[1]) as store:
        target = stub_target(store, tls=True, ca_cert=certificates()[0].ca.read_text())
        assert attempt(target, study).require().state is State.DELIVERED


def test_authority_that_is_not_there(study: Path) -> None:
    with https(certificates()[1]) as store:
        sent = attempt(stub_target(store, tls=True, ca_cert="/nowhere/ca.pem"), study)
        assert type(sent.error) is Misconfigured
        assert "ca_cert" in str(sent.error)


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_environment_never_overrides_the_target_s_own_trust(
    name: str, tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = certificates()[0].ca, Authority(tmp_path / "other").ca
    with https(certificates()[1]) as store:
        monkeypatch.setenv(name, str(other))
        assert attempt(stub_target(store, tls=True), study).require().state is State.DELIVERED
        monkeypatch.setenv(name, str(ours))
        sent = attempt(stub_target(store, tls=True, ca_cert=str(other), layout="second"), study)
        assert type(sent.error) is NotTrusted


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_environment_of_other_programs_is_no_trust_store(
    name: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(certificates()[0].ca))
    with https(certificates()[1]) as store:
        target = stub_target(store, tls=True)
        target.ca_cert = None
        assert type(attempt(target, study).error) is NotTrusted


def test_endpoint_that_does_not_speak_tls(store: Stub, study: Path) -> None:
    sent = attempt(stub_target(store, tls=True), study)
    assert type(sent.error) is Misconfigured
    assert "does not speak TLS" in str(sent.error)
    health = driver.check(stub_target(store, tls=True))
    assert results(health)["tls"] == "failed"


def test_endpoint_that_wants_tls(study: Path) -> None:
    with https(certificates()[1]) as store:
        sent = attempt(stub_target(store), study)
        assert isinstance(sent.error, Interrupted | Misconfigured)


def test_endpoint_that_is_no_store(study: Path) -> None:
    page = b"<html><body>It works!</body></html>"
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page)
    with answering(answer) as port:
        target = S3Target(
            bucket="lab", endpoint_url=f"http://127.0.0.1:{port}", access_key_id="A", secret_access_key=SecretStr("b")
        )
        sent = attempt(target, study)
        assert isinstance(sent.error, Misconfigured), repr(sent.error)
        assert not driver.check(target).ok


def test_endpoint_that_is_no_web_server(study: Path) -> None:
    with answering(b"220 mail.example ESMTP\r\n") as port:
        target = S3Target(
            bucket="lab", endpoint_url=f"http://127.0.0.1:{port}", access_key_id="A", secret_access_key=SecretStr("b")
        )
        assert isinstance(attempt(target, study).error, Retryable)


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that says the same to everything."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(0.3)
                try:
                    while sock.recv(65_536):
                        sock.sendall(answer)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


# ---- credentials and region


def without_keys(store: Stub, **settings: Any) -> S3Target:
    return S3Target(bucket="lab", endpoint_url=f"http://127.0.0.1:{store.port}", connect_timeout_s=5, **settings)


def test_no_credentials_are_Misconfigured(store: Stub, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    sent = attempt(without_keys(store), study)
    assert type(sent.error) is Misconfigured
    assert "set access_key_id" in str(sent.error)
    health = driver.check(without_keys(store))
    assert results(health)["tcp"] == "ok"
    assert results(health)["authenticate"] == "failed"
    health = driver.check(S3Target(bucket="lab"))  # at AWS: nothing is asked without credentials
    assert results(health)["authenticate"] == "failed"
    assert results(health)["tcp"] == "skipped"


def test_credentials_of_the_environment(store: Stub, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a token")
    assert attempt(without_keys(store), study).require().state is State.DELIVERED
    assert all(request.headers["x-amz-security-token"] == "a token" for request in store.seen)


def test_credentials_of_a_profile(store: Stub, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[archive]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOTHER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert attempt(without_keys(store, profile="archive"), study).require().state is State.DELIVERED
    sent = attempt(without_keys(store, profile="nobody"), study)
    assert type(sent.error) is Misconfigured
    assert "correct profile" in str(sent.error)


def test_session_token_goes_along_signed(store: Stub, study: Path) -> None:
    target = stub_target(store, session_token="temporary")
    assert attempt(target, study).require().state is State.DELIVERED
    assert all(request.headers["x-amz-security-token"] == "temporary" for request in store.seen)


def test_environment_does_not_change_a_target_s_own_settings(
    store: Stub, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("[profile other]\nregion = ap-south-9\ns3 =\n  addressing_style = virtual\n")
    for name, value in {
        "AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "other", "AWS_ACCESS_KEY_ID": "AKIAOTHER",
        "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_REGION": "ap-south-8",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1", "AWS_DEFAULT_REGION": "ap-south-8", "AWS_MAX_ATTEMPTS": "9",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_SUPPORTED", "HTTP_PROXY": "http://127.0.0.1:1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert attempt(stub_target(store), study).require().state is State.DELIVERED
    assert attempt(stub_target(store, region=REGION), study).require().state is State.DELIVERED
    regions = {request.headers["authorization"].split("/")[2] for request in store.seen}
    assert regions == {"us-east-1", REGION}
    monkeypatch.setenv("AWS_PROFILE", "missing")
    assert attempt(stub_target(store), study).require().state is State.DELIVERED


def test_names_of_aws_s_hosts() -> None:
    """Without an endpoint of its own a target goes to AWS, whatever the style."""
    from protocols.s3.client import BucketSettings
    from protocols.s3.store import Store

    def url(**settings: Any) -> str:
        with Store(BucketSettings(access_key="A", secret_key="b", **settings)) as made:
            return f"{made.origin.where}{made._aim.base} {made.region}"

    assert url(bucket="lab", region="eu-central-1") == "https://lab.s3.eu-central-1.amazonaws.com/ eu-central-1"
    assert url(bucket="lab.x", region="eu-central-1") == "https://s3.eu-central-1.amazonaws.com/lab.x/ eu-central-1"
    assert (
        url(bucket="lab", region="eu-central-1", addressing="path")
        == "https://s3.eu-central-1.amazonaws.com/lab/ eu-central-1"
    )
    assert (
        url(bucket="lab", region="cn-north-1", addressing="virtual")
        == "https://lab.s3.cn-north-1.amazonaws.com.cn/ cn-north-1"
    )
    assert url(bucket="lab", endpoint_url="https://minio:9000") == "https://minio:9000/lab/ us-east-1"
    assert url(bucket="lab", endpoint_url="https://minio/s3") == "https://minio/s3/lab/ us-east-1"
    assert (
        url(bucket="lab", endpoint_url="http://ceph.example", addressing="virtual")
        == "http://lab.ceph.example/ us-east-1"
    )
    arn = "arn:aws:s3:eu-west-1:123456789012:accesspoint/mine"
    assert url(bucket=arn, region="eu-west-1").startswith(
        "https://mine-123456789012.s3-accesspoint.eu-west-1.amazonaws.com/"
    )
