"""Redirects of a STOW server."""

from __future__ import annotations

import pytest

from talaria.testing.harness import attempt
from tests.servers.dicomweb import Reply, Scripted, scripted
from tests.targets.dicomweb import dicomweb_target
from tests.targets.stow.pushing import Always, all_delivered, push
from transfer.errors import (
    Misconfigured,
)
from transfer.plan import Plan


@pytest.mark.parametrize("status", [307, 308])
def test_redirect_within_the_server(server: Scripted, plan: Plan, status: int) -> None:
    server.script = [Reply(status, headers={"Location": "/rs/studies"})]
    target = dicomweb_target(server.url.replace("/rs", "/old"), concurrency=1)
    all_delivered(attempt(target, plan), server)


@pytest.mark.parametrize("status", [301, 302, 303])
def test_redirect_that_would_lose_the_body(server: Scripted, plan: Plan, status: int) -> None:
    server.script = Always([Reply(status, headers={"Location": "/rs/studies"})])
    sent = push(server, plan)
    assert isinstance(sent.error, Misconfigured)
    assert "/rs/studies" in sent.error.message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_to_another_host_is_not_followed(server: Scripted, plan: Plan, status: int) -> None:
    with scripted() as other:
        location = f"http://user:pass-word@127.0.0.1:{other.port}/rs/studies?token=t0ken"
        server.script = Always([Reply(status, headers={"Location": location})])
        sent = push(server, plan, http_user="lab", http_password="pa55word-1234")
        assert isinstance(sent.error, Misconfigured)
        assert f"http://127.0.0.1:{other.port}" in sent.error.message
        assert "pass-word" not in sent.error.message
        assert "t0ken" not in sent.error.message
        assert not other.requests


@pytest.mark.parametrize("location", ["http://[::1/rs", "http://a:99999999/rs", "//[x"])
def test_redirect_to_what_is_no_url(server: Scripted, plan: Plan, location: str) -> None:
    server.script = Always([Reply(307, headers={"Location": location})])
    sent = push(server, plan)
    assert isinstance(sent.error, Misconfigured)
    assert "not a URL" in sent.error.message


@pytest.mark.parametrize(
    ("location", "path"), [("/rs/a b", "/rs/a%20b"), ("/rs/\xfc\x01%20", "/rs/%C3%BC%01%20"), ("?x=a b", "/rs/studies")]
)
def test_redirect_that_is_not_encoded(server: Scripted, plan: Plan, location: str, path: str) -> None:
    server.script = [Reply(307, headers={"Location": location})]
    push(server, plan)
    assert [request.path for request in server.requests][:2] == ["/rs/studies", path]


def test_redirect_to_the_root(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(307, headers={"Location": f"http://127.0.0.1:{server.port}"})]
    push(server, plan)
    assert server.requests[1].path == "/"


def test_redirect_loop(server: Scripted, plan: Plan) -> None:
    server.script = Always([Reply(307, headers={"Location": "/rs/studies"})])
    sent = push(server, plan)
    assert isinstance(sent.error, Misconfigured)
    assert "too often" in sent.error.message
