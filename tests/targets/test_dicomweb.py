"""The DICOMweb target: its fields, its authorization, its TLS, and its check."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_plus

import pytest
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import ValidationError

from blocks.dicomweb import DicomWebTarget
from imaging.query import Query
from protocols.http.multipart import Parts, parameters
from protocols.net.words import clean, excerpt
from talaria.testing import process, studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from tasks.dicomweb import _credentials, check, driver, find, push
from tests.servers.certificates import Authority, Leaf
from tests.servers.dicomweb import Reply, Request, Scripted, scripted, uid_of
from tests.targets.dicomweb import dicomweb_target
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotFound,
    NotTrusted,
    TimedOut,
    Unreachable,
)
from transfer.health import Health
from transfer.plan import Plan, scan
from transfer.receipt import Level, PushReport, State

PASSWORD = "pa55word-1234"
TOKEN = "eyJhbGciOiJ.t0ken-5678.sig"


class TestBlock(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[DicomWebTarget]:
        return DicomWebTarget

    def test_has_a_valid_image(self, block: Any) -> None:
        """Fetching it needs the internet: only its form is looked at."""
        assert str(block._logo_url).startswith("https://")


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.ct(tmp_path / "study", 3)
    return scan([tmp_path / "study"])


@pytest.fixture(autouse=True)
def no_tokens() -> None:
    _credentials.cache_clear()


# ---- fields


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "http://pacs/dicom-web"},
        {"url": "https://pacs.example.org:8443/a/b/"},
        {"url": "http://[::1]:8042/dicom-web"},
        {"url": "file:///data/dicom"},
        {"url": "file://localhost/data/My%20Files"},
        {"url": "http://pacs", "http_user": "u", "http_password": "p:ä"},
        {"url": "http://pacs", "http_user": "u"},
        {"url": "http://pacs", "access_token": TOKEN},
        {"url": "http://pacs", "token_url": "https://login/t?x=1", "client_id": "c", "client_secret": "s"},
        {"url": "http://pacs", "stow_url_prefix": "/rs/store/", "qido_url_prefix": "q", "wado_url_prefix": ""},
    ],
)
def test_good_fields(fields: dict[str, Any]) -> None:
    DicomWebTarget(**fields)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({}, "url"),
        ({"url": ""}, "must begin with"),
        ({"url": "pacs/dicom-web"}, "must begin with http"),
        ({"url": "ftp://pacs"}, "must begin with http"),
        ({"url": "http://"}, "names no host"),
        ({"url": f"http://lab:{PASSWORD}@pacs/x"}, "use http_user and http_password"),
        ({"url": "http://pacs/x?y=1"}, "remove what follows"),
        ({"url": "http://pacs/x#y"}, "remove what follows"),
        ({"url": "http://pa cs/x"}, "without blanks"),
        ({"url": "http://pacs/x\r\nHost: y"}, "without blanks"),
        ({"url": "http://pacs:99999/"}, "not a URL"),
        ({"url": "http://pacs/a/../b"}, "'..'"),
        ({"url": "file://server/share"}, "three slashes"),
        ({"url": "file:///data?x"}, "%3F"),
        ({"url": "file:data"}, "three slashes"),
        ({"url": "file:///da\nta"}, "control characters"),
        ({"url": "file:///da%0Ata"}, "control characters"),
        ({"url": "http://pacs", "stow_url_prefix": "http://other/rs"}, "path below url"),
        ({"url": "http://pacs", "qido_url_prefix": "a/../../b"}, "'..'"),
        ({"url": "http://pacs", "http_user": "u", "access_token": TOKEN}, "one way to authorize"),
        ({"url": "http://pacs", "http_password": PASSWORD}, "without http_user"),
        ({"url": "http://pacs", "http_user": "a:b"}, "colon"),
        ({"url": "http://pacs", "http_user": "a\nb"}, "control characters"),
        ({"url": "http://pacs", "access_token": "Bearer abc"}, "without line breaks and the word Bearer"),
        ({"url": "http://pacs", "token_url": "https://login/t"}, "needs client_id"),
        ({"url": "http://pacs", "client_id": "c", "client_secret": "s"}, "need token_url"),
        ({"url": "http://pacs", "tls_key": "k"}, "tls_cert"),
        ({"url": "file:///data", "http_user": "u"}, "no use for a folder"),
        ({"url": "http://pacs", "batch_bytes": 0}, "greater than or equal"),
        ({"url": "http://pacs", "batch_items": 0}, "greater than or equal"),
        ({"url": "http://pacs", "nonsense": 1}, "nonsense"),
    ],
)
def test_bad_fields(fields: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DicomWebTarget(**fields)
    assert advice in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_defaults_and_names() -> None:
    target = DicomWebTarget(url="HTTPS://pacs/rs/")
    assert target.url == "https://pacs/rs"
    assert (target.batch_bytes, target.batch_items, target.concurrency) == (20_000_000, 100, 4)
    assert target.can_query
    assert target.folder is None
    for url, folder in (
        ("file:///data/My%20Files", "/data/My Files"),
        ("FILE:///data/My Files", "/data/My Files"),
        ("file:///data/f%C3%B6%20100%25/ö+%2B;[x]", "/data/fö 100%/ö++;[x]"),
        ("file:///data/caf%E9", os.fsdecode(b"/data/caf\xe9")),
        ("file:///data/a%3Fb%23c", "/data/a?b#c"),
    ):
        assert DicomWebTarget(url=url).folder == Path(folder)
    assert driver.facts.dicom_only


def test_secrets_are_not_shown() -> None:
    secrets: dict[str, Any] = {"http_password": PASSWORD, "tls_cert": "c", "tls_key": "k3y-text"}
    target = DicomWebTarget(url="http://pacs", http_user="u", **secrets)
    for text in (repr(target), str(target), target.model_dump_json()):
        assert PASSWORD not in text
        assert "k3y-text" not in text


# ---- authorization


def basic(user: str, password: str) -> str:
    import base64

    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_basic(server: Scripted, plan: Plan) -> None:
    server.authorization = lambda given: given == basic("lab", "pä:ss wörd")
    target = dicomweb_target(server.url, http_user="lab", http_password="pä:ss wörd")
    assert attempt(target, plan).require().state is State.DELIVERED
    assert check(target).ok
    list(find(target, Query()))


def test_token(server: Scripted, plan: Plan) -> None:
    server.authorization = lambda given: given == f"Bearer {TOKEN}"
    assert attempt(dicomweb_target(server.url, access_token=TOKEN), plan).require().state is State.DELIVERED


def test_wrong_password(server: Scripted, plan: Plan) -> None:
    server.authorization = lambda given: given == basic("lab", "right")
    target = dicomweb_target(server.url, http_user="lab", http_password=PASSWORD)
    error = attempt(target, plan).error
    assert type(error) is Denied
    assert "401" in error.message
    assert "Basic" in error.message
    assert PASSWORD not in str(error)
    with pytest.raises(Denied):
        list(find(target, Query()))


def oauth(server: Scripted, **settings: Any) -> DicomWebTarget:
    client, secret = server.client
    token_url = f"http://127.0.0.1:{server.port}/token"
    defaults = {"token_url": token_url, "client_id": client, "client_secret": secret, "scope": "a b"}
    return dicomweb_target(server.url, **(defaults | settings))


def only_newest(server: Scripted) -> None:
    server.authorization = lambda given: bool(server.tokens) and given == f"Bearer {server.tokens[-1]}"


@pytest.mark.parametrize("in_body", [False, True])
def test_oauth_token_is_fetched_once(server: Scripted, plan: Plan, in_body: bool) -> None:
    only_newest(server)
    server.client_in_body = in_body
    target = oauth(server, batch_items=1)
    for _ in range(3):
        assert attempt(target, plan).require().state is State.DELIVERED
    list(find(target, Query()))
    assert len(server.tokens) == 1
    asked = [request for request in server.requests if request.path == "/token"]
    assert len(asked) == (2 if in_body else 1)
    assert asked[-1].headers["content-type"] == "application/x-www-form-urlencoded"
    assert b"grant_type=client_credentials" in asked[-1].body
    assert b"scope=a+b" in asked[-1].body


def test_oauth_threads_share_a_token(server: Scripted, tmp_path: Path) -> None:
    only_newest(server)
    studies.ct(tmp_path, 40)
    assert attempt(oauth(server, batch_items=2, concurrency=8), tmp_path).require().state is State.DELIVERED
    assert len(server.tokens) == 1


def test_oauth_token_is_renewed_near_its_end(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    only_newest(server)
    server.lifetime_s, later_s = 60, 0.0
    monkeypatch.setattr("protocols.http.oauth.time", SimpleNamespace(monotonic=lambda: time.monotonic() + later_s))
    target = oauth(server)
    attempt(target, plan).require()
    attempt(target, plan).require()
    assert len(server.tokens) == 1
    later_s = 50  # four fifths of it are over
    attempt(target, plan).require()
    assert len(server.tokens) == 2


def test_oauth_token_is_renewed_once_on_401(server: Scripted, plan: Plan) -> None:
    only_newest(server)
    target = oauth(server, concurrency=1)
    attempt(target, plan).require()
    server.tokens.append("revoked-all-others-xyz")
    assert attempt(target, plan).require().state is State.DELIVERED
    assert len(server.tokens) == 3


def test_oauth_renewal_in_the_middle_of_a_push(server: Scripted, tmp_path: Path) -> None:
    only_newest(server)
    studies.ct(tmp_path, 24)
    counts: list[int] = []

    def told(sent: Sent, item: Any, outcome: Any) -> None:
        counts.append(1)
        if len(counts) == 6:
            server.tokens.append("revoked-all-others-xyz")

    sent = attempt(oauth(server, batch_items=2, concurrency=3), scan([tmp_path]), told=told)
    assert sent.require().state is State.DELIVERED
    assert len(server.tokens) == 3


def test_oauth_refused_for_good(server: Scripted, plan: Plan) -> None:
    server.authorization = lambda given: False
    sent = attempt(oauth(server, concurrency=1), plan)
    assert type(sent.error) is Denied
    assert len(server.tokens) <= 4  # one, and one renewal for each request that was tried
    assert len(server.of("POST")) == 2 * (len(server.tokens) - 1)
    for token in server.tokens:
        assert token not in str(sent.error)


def test_oauth_wrong_secret(server: Scripted, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    sent = attempt(oauth(server, client_secret=PASSWORD), plan)
    assert type(sent.error) is Denied
    assert "invalid_client" in sent.error.message or "no:" in sent.error.message
    assert PASSWORD not in str(sent.error)
    assert PASSWORD not in caplog.text
    assert not server.of("POST")


@pytest.mark.parametrize("status", [401, 403, 500])
def test_oauth_secrets_show_in_no_form(server: Scripted, plan: Plan, status: int) -> None:
    secret = "S3cr3t/+= ü&xyzzy"

    def echo(request: Request) -> Reply:
        said = f"{request.headers.get('authorization', '')} {request.body.decode()}"
        return Reply(
            status, json.dumps({"error": "invalid_client", "error_description": said}).encode(), "application/json"
        )

    server.on_token = echo
    sent = attempt(oauth(server, client_secret=secret), plan)
    assert sent.error is not None
    text = str(sent.error)
    for form in (secret, quote_plus(secret), base64.b64encode(f"client:{quote_plus(secret)}".encode()).decode()):
        assert form not in text
    assert "xyzzy" not in text


@pytest.mark.parametrize("reply", [Reply(403, delay_s=0.3), Reply(hangs=True)])
def test_oauth_threads_share_a_failure(server: Scripted, tmp_path: Path, reply: Reply) -> None:
    studies.ct(tmp_path, 40)
    asked: list[Request] = []
    server._token = lambda request: asked.append(request) or reply  # type: ignore[func-returns-value,method-assign]
    sent = attempt(oauth(server, concurrency=4, batch_items=10, idle_timeout_s=1), tmp_path)
    assert isinstance(sent.error, Denied | TimedOut)
    assert len(asked) == 1
    assert sent.seconds < as_loaded(2.5)
    server._token = type(server)._token.__get__(server)  # type: ignore[method-assign]
    assert attempt(oauth(server, concurrency=4), tmp_path).require().state is State.DELIVERED


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(200, b"<html>login</html>", "text/html"), Misconfigured),
        (Reply(200, b'{"token_type": "Bearer"}', "application/json"), Misconfigured),
        (Reply(200, b'{"access_token": "a", "token_type": "mac"}', "application/json"), Misconfigured),
        (Reply(200, b'{"access_token": "a\\r\\nX: y"}', "application/json"), Misconfigured),
        (Reply(404), NotFound),
        (Reply(429, headers={"Retry-After": "9"}), Busy),
        (Reply(503), Busy),
        (Reply(resets=True), Interrupted),
        (Reply(hangs=True), TimedOut),
        (Reply(302, headers={"Location": "http://elsewhere/"}), Misconfigured),
    ],
)
def test_oauth_server_in_trouble(server: Scripted, plan: Plan, reply: Reply, error: type[DispatchError]) -> None:
    server._token = lambda request: reply  # type: ignore[method-assign]
    sent = attempt(oauth(server, idle_timeout_s=1), plan)
    assert type(sent.error) is error
    if isinstance(sent.error, Busy) and reply.headers:
        assert sent.error.retry_after == 9
    assert not server.of("POST")
    health = check(oauth(server, idle_timeout_s=1))
    assert not health.ok
    assert [p.name for p in health.probes if p.result == "failed"] == ["authenticate"]


def test_nothing_secret_is_logged(server: Scripted, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    only_newest(server)
    caplog.set_level(logging.DEBUG)
    target = oauth(server)
    attempt(target, plan).require()
    list(find(target, Query(PatientName="Quellwasser*")))
    health = check(target)
    text = caplog.text + json.dumps(health.to_json("x"))
    for secret in (*server.tokens, server.client[1], *studies.PHI):
        assert secret not in text


# ---- TLS


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def context_of(leaf: Leaf, client_ca: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context


def https(server: Scripted, **settings: Any) -> DicomWebTarget:
    return dicomweb_target(server.url.replace("http:", "https:"), **settings)


@pytest.mark.parametrize("as_text", [False, True])
def test_tls_with_client_certificate(ca: Authority, plan: Plan, as_text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the environment names must not come before what the target names.
    for name in process.AMBIENT_TRUST:
        monkeypatch.setenv(name, "/nonexistent.pem")
    client = ca.leaf("client", password="k3y-pass")
    values = [path.read_text() if as_text else str(path) for path in (ca.ca, client.cert, client.key)]
    trust = dict(zip(("ca_cert", "tls_cert", "tls_key"), values, strict=True)) | {"tls_key_password": "k3y-pass"}
    with scripted(context_of(ca.leaf("server"), ca.ca)) as server:
        target = https(server, **trust)
        assert attempt(target, plan).require().state is State.DELIVERED
        health = check(target)
        assert health.ok
        (tls,) = [probe for probe in health.probes if probe.name == "tls"]
        assert "TLSv1.3" in tls.detail
        assert "expires in" in tls.detail
        refused = attempt(https(server, ca_cert=str(ca.ca)), plan)
        assert isinstance(refused.error, Misconfigured | Denied)
        assert "certificate" in refused.error.message


@pytest.mark.parametrize("kind", ["unknown", "expired", "name"])
def test_tls_not_trusted(ca: Authority, plan: Plan, tmp_path: Path, kind: str) -> None:
    if kind == "unknown":
        leaf = Authority(tmp_path / "rogue").leaf("server")
    elif kind == "expired":
        leaf = ca.leaf("expired", expired=True)
    else:
        leaf = ca.leaf("elsewhere", hosts=("elsewhere.example",))
    with scripted(context_of(leaf)) as server:
        target = https(server, ca_cert=str(ca.ca), http_user="lab", http_password=PASSWORD)
        sent = attempt(target, plan)
        assert type(sent.error) is NotTrusted
        health = check(target)
        assert type(health.error) is NotTrusted
        assert [probe.name for probe in health.probes if probe.result == "failed"] == ["tls"]
        assert not server.requests


def test_tls_large_upload_and_early_answer(ca: Authority, tmp_path: Path) -> None:
    studies.multiframe(tmp_path / "large.dcm", 20)
    plan = scan([tmp_path])
    with scripted(context_of(ca.leaf("server"))) as server:
        target = https(server, ca_cert=str(ca.ca))
        assert attempt(target, plan).require().state is State.DELIVERED
        server.continues = False
        server.script = [Reply(503, reads=100_000, headers={"Retry-After": "2"})]
        sent = attempt(target, plan)
        assert isinstance(sent.error, Busy)
        assert sent.error.retry_after == 2


def test_tls_port_without_tls(server: Scripted, plan: Plan, ca: Authority) -> None:
    sent = attempt(https(server, ca_cert=str(ca.ca)), plan)
    assert isinstance(sent.error, Misconfigured)


# ---- check


def names(health: Health, result: str) -> list[str]:
    return [probe.name for probe in health.probes if probe.result == result]


def test_check_all(server: Scripted) -> None:
    data = studies.ct_bytes()
    server.stored[uid_of(data)] = data
    before = dict(server.stored)
    health = check(dicomweb_target(server.url, direction="both"))
    assert health.ok, health
    assert names(health, "ok") == ["resolve", "tcp", "authenticate", "authorize", "qido", "stow", "wado"]
    assert server.stored == before
    assert "127.0.0.1" in health.probes[0].detail


def test_check_of_an_empty_archive(server: Scripted) -> None:
    health = check(dicomweb_target(server.url))
    assert health.ok
    assert "not there" in health.probes[-1].detail


def test_check_that_only_stores(server: Scripted) -> None:
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="store"))
    assert health.ok
    assert names(health, "failed") == ["qido"]
    assert names(health, "skipped") == ["wado"]
    health = check(dicomweb_target(server.url, direction="store", verify=Level.LISTED))
    assert not health.ok
    assert type(health.error) is NotFound


def test_check_that_only_queries(server: Scripted) -> None:
    server._store = lambda request: Reply(403)  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="query"))
    assert health.ok
    assert names(health, "skipped") == ["stow"]
    assert not server.of("POST")


@pytest.mark.parametrize(
    ("status", "probe", "error"),
    [
        (401, "authenticate", Denied),
        (403, "authorize", Denied),
        (404, "stow", NotFound),
        (405, "stow", Misconfigured),
        (500, "stow", Busy),
        (503, "stow", Busy),
    ],
)
def test_check_stow(server: Scripted, status: int, probe: str, error: type[DispatchError]) -> None:
    server._store = lambda request: Reply(status, b"<h1>why</h1>", "text/html")  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url))
    assert names(health, "failed") == [probe]
    assert type(health.error) is error
    assert "why" in health.error.message


@pytest.mark.parametrize("status", [200, 204, 400, 409, 415])
def test_check_stow_that_answers(server: Scripted, status: int) -> None:
    server._store = lambda request: Reply(status)  # type: ignore[method-assign]
    assert check(dicomweb_target(server.url)).ok


def test_check_stow_that_stumbles_over_an_empty_request(server: Scripted) -> None:
    def store(request: Request) -> Reply:
        return Reply(400 if request.body.count(b"--talaria") == 2 else 500)

    server._store = store  # type: ignore[method-assign]
    assert check(dicomweb_target(server.url)).ok


def test_check_web_server_that_is_no_archive(server: Scripted) -> None:
    page = Reply(200, b"<html><title>It works!</title></html>", "text/html")
    server._usual = lambda request: page  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url))
    assert names(health, "failed") == ["qido", "stow", "wado"]
    assert "It works!" in str(health.probes)


@pytest.mark.parametrize("status", [400, 406, 409, 415])
@pytest.mark.parametrize("direction", ["store", "both", "query"])
@pytest.mark.parametrize("credentials", [{}, {"http_user": "lab", "http_password": PASSWORD}])
def test_check_web_server_that_says_the_same_to_everything(
    server: Scripted, status: int, direction: str, credentials: dict[str, Any]
) -> None:
    """That the credentials are accepted, or that there is a service, is said of no such answer."""
    server._usual = lambda request: Reply(status, b"no")  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction=direction, **credentials))
    assert not health.ok
    assert names(health, "failed") == ["authenticate"]
    assert str(status) in str(health.error)
    assert "accepted" not in str(health.probes)


def test_check_service_that_takes_only_instances(server: Scripted) -> None:
    """It answers 400 to a request without any, and isn't taken for a web server."""
    server._store = lambda request: Reply(400)  # type: ignore[method-assign]
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="store"))
    assert health.ok, health


def test_check_nobody_there() -> None:
    health = check(dicomweb_target(f"http://127.0.0.1:{process.free_port()}/rs"))
    assert names(health, "ok") == ["resolve"]
    assert names(health, "failed") == ["tcp"]
    assert type(health.error) is Unreachable
    assert "refused" in health.error.message.lower()
    health = check(dicomweb_target("http://no-such-host.invalid/rs"))
    assert names(health, "failed") == ["resolve"]
    assert type(health.error) is Unreachable


def test_check_says_that_credentials_go_unencrypted(server: Scripted) -> None:
    health = check(dicomweb_target(server.url, http_user="lab", http_password=PASSWORD))
    assert "unencrypted" in str(health.probes)


def test_name_that_is_resolved_too_slowly(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    resolver = socket.getaddrinfo

    def slow(host: str, *args: Any, **options: Any) -> Any:
        if host != "localhost":
            return resolver(host, *args, **options)
        asked.wait(10)
        return resolver(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    url = server.url.replace("127.0.0.1", "localhost")
    sent = attempt(dicomweb_target(url, connect_timeout_s=0.5), plan)
    assert type(sent.error) is Unreachable
    assert "not resolved within 0.5 s" in sent.error.message
    assert sent.seconds < as_loaded(3)
    cancelled = threading.Event()
    timer = threading.Timer(0.3, cancelled.set)
    timer.start()
    assert type(attempt(dicomweb_target(url, connect_timeout_s=60), plan, cancelled=cancelled).error) is Cancelled
    health = check(dicomweb_target(url, connect_timeout_s=0.5))
    assert [probe.name for probe in health.probes if probe.result == "failed"] == ["resolve"]
    asked.set()
    assert attempt(dicomweb_target(url, connect_timeout_s=5), plan).require().state is State.DELIVERED


def test_connection_that_is_never_made(plan: Plan) -> None:
    """A listener whose queue is full answers no SYN: the connect timeout ends the wait."""
    import socket

    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        try:
            sent = attempt(dicomweb_target(f"http://127.0.0.1:{port}/rs", connect_timeout_s=1, concurrency=1), plan)
            assert type(sent.error) is Unreachable
            assert "1 s" in sent.error.message
            assert sent.seconds < as_loaded(4)
        finally:
            for filler in fillers:
                filler.close()


def test_errors_survive_pickling(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(503, headers={"Retry-After": "7"})]
    error = attempt(dicomweb_target(server.url), plan).error
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.retry_after) == (Busy, str(error), 7)


def test_bad_certificate_setting(plan: Plan) -> None:
    target = dicomweb_target("https://127.0.0.1:1/rs", ca_cert="/nonexistent.pem")
    assert not check(target).ok
    with pytest.raises(DispatchError):
        push(target, plan, PushReport())


# ---- words of others


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"<html><script>var x=1</script><title>A</title><p>B &amp; C</p></html>", "text/html", "A B & C"),
        (b'{"Message": "bad", "Details": "very", "HttpStatus": 400}', "application/json", "bad; very"),
        (b'{"error": {"message": "inner"}}', "application/json", "inner"),
        (b'[{"error": "x"}]', "application/json", "x"),
        (b"plain\r\n\x1b[31mtext\x00", "text/plain", "plain [31mtext"),
        (b"\xff\xfe", "text/plain", "��"),
        (b"", "text/html", ""),
    ],
)
def test_quote(body: bytes, kind: str, said: str) -> None:
    assert excerpt(body, kind) == said


def test_quote_is_short_and_hides() -> None:
    text = excerpt(b"x" * 100_000, "text/plain")
    assert len(text) <= 200
    assert clean("user Secret-1 and SECRET-1", ["secret-1", ""]) == "user *** and ***"


# ---- multipart


def parts_of(body: bytes, size: int, boundary: str = "b") -> list[tuple[str, bytes]]:
    pieces = (memoryview(body)[at : at + size] for at in range(0, len(body), size))
    parts = Parts(pieces, boundary, "here")
    return [(head.get("X", ""), b"".join(bytes(piece) for piece in parts.content())) for head in parts]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_multipart(size: int) -> None:
    body = (
        b"preamble\r\n--b \t\r\nX: 1\r\n\r\none\r\n--bb\r\n-\r\n--\r\r\n"
        b"--b\r\n\r\ntwo\r\n\r\n--b\r\nX: 3\r\n\r\n\r\n--b--\r\nepilogue --b"
    )
    # The line break before a delimiter belongs to the delimiter, all others to the content.
    expected = [("1", b"one\r\n--bb\r\n-\r\n--\r"), ("", b"two\r\n"), ("3", b"")]
    got = parts_of(body.replace(b"--bb", b"--x"), size)
    assert got == [(name, content.replace(b"--bb", b"--x")) for name, content in expected]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_multipart_with_bare_line_feeds(size: int) -> None:
    body = b"preamble\n--b \nX: 1\n\none\r\n--\r\n--x\r\n--b\n\ntwo\n\n--b\nX: 3\n\n\n--b--\nepilogue --b"
    assert parts_of(body, size) == [("1", b"one\r\n--\r\n--x\r"), ("", b"two\n"), ("3", b"")]


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_multipart_cut_short(size: int, cut: int) -> None:
    body = b"--b\r\nX: 1\r\n\r\none\r\n--b\r\n\r\ntwo\r\n--b--"
    with pytest.raises(Interrupted):
        parts_of(body[:-cut], size)


def test_multipart_parameters() -> None:
    assert parameters('Multipart/Related; type="application/dicom"; boundary="a b;c"') == (
        "multipart/related",
        {"type": "application/dicom", "boundary": "a b;c"},
    )
    assert parameters("multipart/related; boundary*=us-ascii'en'a%20b") == ("multipart/related", {"boundary": "a b"})
    assert parameters("") == ("", {})


def test_threads_end(server: Scripted, plan: Plan) -> None:
    attempt(dicomweb_target(server.url), plan).require()
    assert not [thread for thread in threading.enumerate() if thread.name in ("stow", "wado", "read-back")]
