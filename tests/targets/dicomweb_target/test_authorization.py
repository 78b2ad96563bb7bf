"""Authorization at a DICOMweb server: basic, bearer, OAuth2."""

from __future__ import annotations

import base64
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_plus

import pytest

from blocks.dicomweb import DicomWebTarget
from imaging.query import Query
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from tasks.dicomweb import check, find, retrieve
from tests.servers.dicomweb import Reply, Request, Scripted
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.finding import hold
from tests.targets.dicomweb_target.services import PASSWORD, TOKEN
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotFound,
    TimedOut,
    Unauthorized,
)
from transfer.outcome import Kind
from transfer.plan import Plan, scan
from transfer.receipt import PushReport, State


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
    assert type(error) is Unauthorized
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
    assert type(sent.error) is Unauthorized
    assert len(server.tokens) <= 4  # one, and one renewal for each request that was tried
    assert len(server.of("POST")) == 2 * (len(server.tokens) - 1)
    for token in server.tokens:
        assert token not in str(sent.error)


@pytest.mark.parametrize("same", [False, True])
def test_oauth_a_right_that_is_lacking_costs_one_token_and_not_one_for_each_request(
    server: Scripted, tmp_path: Path, same: bool
) -> None:
    """Such servers count what is asked for at /token, too. Some give out the same token again as long as it holds."""
    study, series = studies.uid(), studies.uid()
    uids = hold(server, *(studies.dataset(study=study, series=series) for _ in range(12)))
    closed, really = set(sorted(uids)[::2]), server._retrieve

    def retrieve_all(segments: list[str]) -> Reply:
        return Reply(403) if len(segments) < 6 or segments[-1] in closed else really(segments)

    server._retrieve = retrieve_all  # type: ignore[method-assign]
    only_newest(server)

    def again(request: Request) -> Reply:
        server.tokens.append(server.tokens[0] if server.tokens else f"token-{studies.uid()}-xyz")
        return Reply(200, json.dumps({"access_token": server.tokens[0], "token_type": "bearer"}).encode())

    server.on_token = again if same else None
    receipt = retrieve(oauth(server, concurrency=1), Query(), tmp_path / "out", PushReport())
    assert (receipt.state, receipt.counts[Kind.DELIVERED]) == (State.PARTIAL, 6)
    assert len(server.tokens) == 2
    if same:
        return
    server.tokens.append("revoked-all-others-xyz")
    assert list(find(oauth(server), Query())) and len(server.tokens) == 4


def test_oauth_wrong_secret(server: Scripted, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    sent = attempt(oauth(server, client_secret=PASSWORD), plan)
    assert type(sent.error) is Unauthorized
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
